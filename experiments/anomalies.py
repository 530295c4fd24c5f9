r"""How well scores separate anomalies from normal images, for several priors, over seeds.

  python experiments/anomalies.py digits --config jobs/configs/mnist_digits.yaml --output runs/anomalies
  python experiments/anomalies.py ood --config jobs/configs/fashion_mnist.yaml --output runs/ood
  python experiments/anomalies.py ood --runs '[runs/fashion-0, runs/fashion-1]' --output runs/ood

digits: the paper's table 3. A digit is left out of training and must be detected among test images of the
other nine (a fifth of the images; scripts/fetch-mnist-digits downloads them). AUPRC depends on the share of
anomalies, and the paper's VAE (.063 for digit 1) is below the worst possible ranking if more than 12 % are
anomalies. So besides AUPRC with all images of the digit (a third of all), there is AUPRC at about one in ten:
the mean over disjoint fifths of the digit, each against all normal images.

ood: equal numbers of images of another data set (--outliers) and of held-out ones, for models trained here or
given by --runs (storage/name of finished runs, or storage/name/checkpoints/…, which determine arm, seed and
held-out images).

Scores are those of `jebm.evaluate.ood.scores` without log Z, which is the same for all images. Arms share the
initial generator and inference weights, the order of the images and the noise. Results for each (anomaly,
seed, arm) are kept in OUTPUT/rows and not measured again; interrupted training resumes.
"""

import dataclasses
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import torch
from jsonargparse import Namespace
from torch import Tensor

from jebm.campaign.rows import Row, Rows
from jebm.campaign.runs import rows_of
from jebm.campaign.trials import Trial
from jebm.cli import run
from jebm.config import Config
from jebm.core.model import JointModel
from jebm.data.dataset import ImageSet, load_images
from jebm.data.loader import to_float
from jebm.data.manifest import dataset_exists, read_manifest
from jebm.data.readers import open_source
from jebm.data.shards import write_dataset
from jebm.errors import ConfigError
from jebm.evaluate.ood import average_precision, detections, scores
from jebm.evaluate.restore import restored, stored_config
from jebm.evaluate.share import ALONE
from jebm.evaluate.statistics import t_interval
from jebm.parser import argument_parser, override, parse_arguments
from jebm.rng import gaussian_noise
from jebm.store.checkpoint import Manifest
from jebm.store.retrieve import open_checkpoint
from jebm.store.storage import LocalStore, open_store
from jebm.train.runtime import prepare_process
from jebm.train.start import total_steps_of
from jebm.untrusted import JsonObject

PAPER = {  # AUPRC of digits 1, 4, 5, 7, 9 held out: table 3 of arXiv 2310.09604
    "VAE (paper)": (0.063, 0.337, 0.325, 0.148, 0.104),
    "HVAE, L>0 (paper)": (0.494, 0.920, 0.913, 0.680, 0.791),
    "LEBM (paper)": (0.336, 0.630, 0.619, 0.463, 0.413),
    "joint EBM (paper)": (0.722, 0.949, 0.980, 0.941, 0.935),
}
PAPER_DIGITS = (1, 4, 5, 7, 9)
SCORE = "log p(x, z)"


# -------------------------------------------------------------------------------------------------- one case


@dataclass(frozen=True)
class Case(Trial):
    """One model and its anomalies."""

    anomaly: str
    """The digit, or the URI of another data set."""
    anomalies: str
    """Data set that contains the anomalies."""
    normal: str
    """Data set of the kind that the model was trained on, but has not seen."""
    images: int | None
    """The number used of each kind; None for all."""
    given: str = ""
    """The checkpoint of a finished run; empty if we train the run."""

    @property
    def key(self) -> str:
        """Key of its row."""
        return re.sub(r"[^A-Za-z0-9]+", "-", f"{self.given or self.name}-{self.anomaly}")

    def latest(self) -> Manifest | None:
        """Return the checkpoint to score, which if given may be of any config; else as for any trial."""
        return open_checkpoint(self.given)[1] if self.given else super().latest()

    def finished(self) -> bool:
        """Return whether nothing is left to train."""
        return bool(self.given) or super().finished()


class Scores:
    """How well scores detect the anomalies of a case."""

    def identity(self, case: Case) -> JsonObject:
        """Return what a row depends on besides the run."""
        return {key: getattr(case, key) for key in ("anomaly", "seed", "given", "normal", "images")}

    def measure(self, case: Case) -> Row:
        """Return numbers of images, and {score: {measure: value}} as measures."""
        began = time.monotonic()
        found = restored(case.given or case.uri)
        normal = scored(found.model, case, load_images(open_store(case.normal)), "normal")
        anomalous = scored(found.model, case, load_images(open_store(case.anomalies)), "anomalous")
        measures = {name: one._asdict() for name, one in detections(normal, anomalous).items()}
        if case.anomaly.isdigit():
            for name, values in measures.items():
                fifths = [average_precision(-anomalous[name][k::5], -normal[name]) for k in range(5)]
                values["auprc of fifths"] = statistics.fmean(fifths)
        return {
            "step": found.manifest.step,
            "normal images": len(normal[SCORE]),
            "anomalous images": len(anomalous[SCORE]),
            "seconds": round(time.monotonic() - began, 1),
            "measures": measures,
        }


@torch.no_grad()
def scored(model: JointModel, case: Case, images: ImageSet, kind: str) -> dict[str, Tensor]:
    """Return the scores, (N,) each, of the normal or the anomalous images (a digit's, if it is one)."""
    images_NHWC = images.images_NHWC
    if kind == "anomalous" and case.anomaly.isdigit() and images.labels_N is not None:
        images_NHWC = images_NHWC[images.labels_N == int(case.anomaly)]
    images_NHWC = images_NHWC[: case.images]
    noise = gaussian_noise(case.seed, 0)
    batches = [
        scores(
            model,
            to_float(images_NHWC[rows].copy(), "cpu"),
            noise(position, f"scores of {kind} images"),
            case.config.langevin,
            log_z=0.0,
        )
        for position, rows in ALONE.batches(len(images_NHWC))
    ]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


# -------------------------------------------------------------------------------------------- what to measure


def arm_of(config: Config) -> str:
    """Return the name of a run's arm."""
    kind = config.prior.kind if config.has_energy else "gaussian"
    return kind if config.train.regime == "joint" else f"{kind}, {config.train.regime}"


def digit_cases(config: Config, arguments: Namespace, output: Path) -> Iterator[Case]:
    """Yield a case for each seed, digit and arm, in this order; writes missing data sets."""

    def data_set(name: str, split: str, digit: int | None) -> str:
        store = open_store(str(output / "data" / name))
        if not dataset_exists(store):
            source = open_source(arguments.originals, "mnist-digits", split=split, without_label=digit)
            write_dataset(source, store)
        return str(output / "data" / name)

    everything = data_set("all", "all", None)
    for seed in arguments.seeds:
        for digit in arguments.digits:
            train = data_set(f"without-{digit}-train", "train", digit)
            test = data_set(f"without-{digit}-test", "test", digit)
            for arm in arguments.arms:
                changes = {
                    "run.name": f"without-{digit}-{arm}-{seed}",
                    "data.train": train,
                    "data.held_out": test,
                }
                of_arm = arm_config(config, arm, seed, output, changes)
                steps = total_steps(of_arm)
                yield Case(arm, seed, of_arm, steps, str(digit), everything, test, images=None)


def arm_config(config: Config, arm: str, seed: int, output: Path, changes: dict[str, str]) -> Config:
    """Return an arm's config: the same except for prior, seed, storage and `changes`."""
    place = {"run.seed": seed, "run.storage": str(output / "runs"), "evaluation.every_steps": 0}
    return override(config, {"prior.kind": arm, **place, **changes})


def total_steps(config: Config) -> int:
    """Return the number of steps of a full training."""
    images = read_manifest(open_store(config.data.train)).images
    return total_steps_of(config, images // config.train.batch_size)


def ood_cases(config: Config, arguments: Namespace, output: Path) -> Iterator[Case]:
    """Yield a case for each given run, or for each seed and arm of the config."""

    def case(arm: str, config: Config, given: str = "") -> Case:
        normal = arguments.normal or config.data.held_out
        if normal is None:
            raise ConfigError(
                f"{config.run.name} has no data.held_out; give --normal, images it has not seen"
            )
        steps = 0 if given else total_steps(config)
        anomaly = arguments.outliers
        return Case(arm, config.run.seed, config, steps, anomaly, anomaly, normal, arguments.images, given)

    for uri in arguments.runs:
        found, manifest = open_checkpoint(uri)
        of_run = stored_config(manifest, uri)
        storage, _, name = found.uri.rpartition("/")
        of_run = override(of_run, {"run.storage": storage, "run.name": name})
        yield case(arm_of(of_run), of_run, f"{found.uri}/checkpoints/{manifest.name}")
    for seed in arguments.seeds if not arguments.runs else ():
        for arm in arguments.arms:
            name = f"{config.run.name}-{arm}-{seed}"
            yield case(arm, arm_config(config, arm, seed, output, {"run.name": name}))


def cases_of(config: Config, arguments: Namespace) -> list[Case]:
    """Return all cases, in the order to run them."""
    output = Path(arguments.output)
    make = digit_cases if arguments.experiment == "digits" else ood_cases
    return [*make(config, arguments, output)]


# ----------------------------------------------------------------------------------------------------- tables


def shown(values: Sequence[float]) -> str:
    """Return the mean with its 95 % t-interval over seeds; for one seed, the value."""
    found = t_interval(values)
    return f"{found.mean:.3f} ± {found.half_width:.3f}" if len(values) > 1 else f"{found.mean:.3f}"


def line(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in cells)} |"


def by_seed(rows: Iterable[Row], measure: str, score: str = SCORE, **wanted: object) -> dict[int, float]:
    """Return seed -> value of one measure of one score, in the rows that match `wanted`."""
    return {
        row["seed"]: row["measures"][score][measure]
        for row in rows
        if all(row[key] == value for key, value in wanted.items())
    }


def digit_tables(rows: Sequence[Row], arms: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the tables, with the paper's numbers."""
    # Rows by digit, with a mean over the digits.
    digits = sorted({int(row["anomaly"]) for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    head = [line("", *digits, "mean"), line(*["---"] * (len(digits) + 2))]

    def per_digit(title: str, measure: str, arm: str, score: str = SCORE, less: str = "") -> str:
        """Return one line: an arm, or its difference from another arm, paired by seed."""
        columns = []
        for digit in digits:
            values = by_seed(rows, measure, score, anomaly=str(digit), arm=arm)
            if less:
                others = by_seed(rows, measure, score, anomaly=str(digit), arm=less)
                values = {seed: values[seed] - others[seed] for seed in values.keys() & others.keys()}
            columns.append(values)
        complete = [seed for seed in seeds if all(seed in values for values in columns)]
        means = [statistics.fmean(values[seed] for values in columns) for seed in complete]
        cells = [shown([*values.values()]) if values else "" for values in (*columns, dict(enumerate(means)))]
        return line(title, *cells)

    for measure, title, share in (
        ("auprc of fifths", "about one image in ten is an anomaly", 0.2),
        ("auprc", "all images of the digit are there", 1.0),
    ):
        yield f"\n**AUPRC of {SCORE}, {title}**\n"
        yield from head
        if measure == "auprc of fifths":
            for name, values in PAPER.items():
                paper = dict(zip(PAPER_DIGITS, values, strict=True))
                known = [paper[digit] for digit in digits if digit in paper]
                mean = f"{statistics.fmean(known):.3f}" if len(known) == len(digits) else ""
                cells = (f"{paper[digit]:.3f}" if digit in paper else "" for digit in digits)
                yield line(name, *cells, mean)
        sizes = {int(row["anomaly"]): (row["anomalous images"] * share, row["normal images"]) for row in rows}
        chance = [anomalous / (anomalous + normal) for anomalous, normal in map(sizes.__getitem__, digits)]
        yield line("chance", *(f"{value:.3f}" for value in (*chance, statistics.fmean(chance))))
        yield from (per_digit(arm, measure, arm) for arm in arms)
        for arm in arms:
            if arm != "gaussian" and "gaussian" in arms:
                yield per_digit(f"{arm} - gaussian, paired", measure, arm, less="gaussian")
    for measure, title in (("auprc of fifths", "AUPRC, one in ten"), ("auroc", "AUROC")):
        for arm in arms:
            yield f"\n**{title}, arm {arm}, each score**\n"
            yield from head
            yield from (per_digit(score, measure, arm, score) for score in rows[0]["measures"])
    # How these numbers differ from the paper's.
    steps = sorted({row["step"] for row in rows})
    yield (
        f"\n± is a 95 % t-interval over seeds {seeds}; the paper's ± (left out) is over its last ten epochs."
        f" Here: 10,000 digits instead of MNIST's 70,000 (four fifths of nine digits to train on), {steps}"
        " updates, smaller nets, one draw of z for each image."
    )


def ood_tables(rows: Sequence[Row], arms: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the table of all scores and arms."""
    names = {"auroc": "AUROC", "auprc": "AUPRC", "fpr80": "FPR80"}
    sizes = sorted({(row["normal images"], row["anomalous images"]) for row in rows})
    yield f"\n**Normal and anomalous images {sizes}; anomalies: {rows[0]['anomaly']}**\n"
    yield line("arm", "score", *names.values(), "seeds")
    yield line(*["---"] * (len(names) + 3))
    for arm in arms:
        for score in rows[0]["measures"]:
            cells = [[*by_seed(rows, measure, score, arm=arm).values()] for measure in names]
            yield line(arm, score, *(shown(values) for values in cells), len(cells[0]))
    yield (
        "\n± is a 95 % t-interval over seeds."
        " A random score has AUROC 0.5, FPR80 0.8, and as AUPRC the share of anomalies."
    )


def main() -> int:
    """Train, score, print Markdown tables."""
    parser = argument_parser(__doc__ or "")
    add = parser.add_argument
    add("experiment", choices=("digits", "ood"), help="a digit left out of training, or another data set")
    add("--output", required=True, metavar="FOLDER", help="for runs, data sets and rows")
    add("--seeds", type=list[int], default=[0, 1, 2], help="of the trainings")
    add("--arms", type=list[Literal["gaussian", "joint", "top"]], default=["gaussian", "joint", "top"])
    add("--parallel", type=int, default=1, help="trainings at once, each in a process of its own")
    add(
        "--digits",
        type=list[int],
        default=[*PAPER_DIGITS],
        help="digits: those left out, in turn",
    )
    add(
        "--originals",
        default="data/original/mnist-digits",
        help="digits: the fetched files",
    )
    add("--outliers", default="data/mnist_digits/test", metavar="URI", help="ood: the other data set")
    add("--normal", type=str | None, metavar="URI", help="ood: normal images, data.held_out by default")
    add("--images", type=int, default=2000, help="ood: of each data set, the first ones")
    add("--runs", type=list[str], default=[], help="ood: finished runs, storage/name, instead of training")
    config, arguments = parse_arguments(parser)
    # Every run trains in this process, or in one of its own.
    engine = dataclasses.replace(config.cluster, engine="process", workers=1, min_workers=None)
    config = dataclasses.replace(config, cluster=engine)
    cases = cases_of(config, arguments)
    if not cases:
        raise ConfigError("--arms, --seeds, --digits: each needs at least one value")
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
        tables = digit_tables if arguments.experiment == "digits" else ood_tables
        print("\n".join(tables(rows, list(dict.fromkeys(row["arm"] for row in rows)))))
    return 0


if __name__ == "__main__":
    run(main)
