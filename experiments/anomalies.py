r"""How well scores separate anomalies from normal images, for several priors, over seeds.

  python experiments/anomalies.py classes --config jobs/configs/mnist_digits.yaml --train.epochs 31 \
    --output runs/anomalies                                         # after scripts/fetch-mnist-digits
  python experiments/anomalies.py classes --config jobs/configs/fashion_mnist.yaml --held_out '[0, 5, 7, 8]' \
    --originals data/original/fashion-mnist --output runs/garments  # after scripts/fetch-fashion-mnist
  python experiments/anomalies.py ood --config jobs/configs/fashion_mnist.yaml --output runs/ood
  python experiments/anomalies.py ood --runs '[runs/fashion-0, runs/fashion-1]' --output runs/ood

classes: a class is left out of training and must be detected, by the pooled protocol of MEG (Kumar et al.
2019) and Zenati et al. (2018): all images together; a fifth of the normal ones and all anomalous ones are
tested. A tenth of the other normal images is kept out of training as reference. AUPRC depends on the share of
anomalies, about a third here, so it stands beside chance; AUROC does not; and AUPRC at one in ten weights the
anomalies to that share.

  arms       gaussian, joint, top, two_stage   as in jebm compare
             oracle     the gaussian run with the aggregate posterior of its training images as prior:
                        how much of what a prior could do, one does
             knn, pca   distance in pixels to the three nearest training images; error of as many principal
                        components as there are latents

ood: equal numbers of images of another data set (--outliers) and of held-out ones, for models trained here or
given by --runs (storage/name of finished runs, or storage/name/checkpoints/…, which determine arm, seed and
held-out images).

Scores are those of `jebm.evaluate.ood.scores` without log Z, which is the same for all images, and Fisher's
sum of the log p-values of reconstruction and log prior among the reference images. Arms share the initial
generator and inference weights, the order of the images and the noise. Results for each (anomaly, seed, arm)
are kept in OUTPUT/rows and not measured again; interrupted training resumes.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from anomaly_cases import cases_of  # type: ignore[import-not-found, unused-ignore]
from anomaly_measures import Scores  # type: ignore[import-not-found, unused-ignore]
from anomaly_tables import PAPER_DIGITS, class_tables, ood_tables  # type: ignore[import-not-found, unused-ignore]

from jebm.campaign.rows import Rows
from jebm.campaign.runs import rows_of
from jebm.cli import run
from jebm.parser import argument_parser, parse_arguments
from jebm.store.storage import LocalStore
from jebm.train.runtime import prepare_process


def main() -> int:
    """Train, score, print Markdown tables."""
    parser = argument_parser(__doc__ or "")
    add = parser.add_argument
    add("experiment", choices=("classes", "ood"), help="a class left out of training, or another data set")
    add("--output", required=True, metavar="FOLDER", help="for runs, data sets and rows")
    add("--seeds", type=list[int], default=[0, 1, 2], help="of the trainings")
    arms = Literal["gaussian", "joint", "top", "two_stage", "oracle", "knn", "pca"]
    add("--arms", type=list[arms], default=[], help="what is compared, see above; by default all")
    add("--parallel", type=int, default=1, help="trainings at once, each in a process of its own")
    add("--held_out", type=list[int], default=[*PAPER_DIGITS], help="classes: those left out, in turn")
    add("--originals", default="data/original/mnist-digits", help="classes: the fetched files")
    add("--outliers", default="data/mnist_digits/test", metavar="URI", help="ood: the other data set")
    add("--normal", type=str | None, metavar="URI", help="ood: normal images, data.held_out by default")
    add("--images", type=int, default=2000, help="ood: of each data set, the first ones")
    add("--runs", type=list[str], default=[], help="ood: finished runs, storage/name, instead of training")
    config, arguments = parse_arguments(parser)
    # Every run trains in this process, or in one of its own.
    engine = dataclasses.replace(config.cluster, engine="process", workers=1, min_workers=None)
    config = dataclasses.replace(config, cluster=engine)
    cases = cases_of(config, arguments)
    prepare_process(config, torch.device("cpu"))
    found = rows_of(
        cases, Rows(LocalStore(Path(arguments.output).absolute()), Scores()), parallel=arguments.parallel
    )
    if found is None:
        return 1
    rows = [
        {"anomaly": case.anomaly, "arm": case.arm, "seed": case.seed, **found[case.key]}
        for case in cases
        if found[case.key]  # the others diverged
    ]
    if rows:
        tables = class_tables if arguments.experiment == "classes" else ood_tables
        print("\n".join(tables(rows)))
    return 0


if __name__ == "__main__":
    run(main)
