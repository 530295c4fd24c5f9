r"""What each latent layer carries, for several recipes, over seeds.

  python experiments/hierarchy.py --config jobs/configs/fashion_mnist.yaml --output runs/hierarchy \
    --arms '["together=hierarchy.rate_factor:1", "late=hierarchy.rate_factor:30"]' --seeds '[0, 1, 2]'
  python experiments/hierarchy.py … --judge held_out    # the table, once the recipe is fixed

An arm is NAME=KEY:VALUE,… : the config with some keys changed. Recipes are chosen on data.validation (the
default), tables are made on data.held_out. For each layer, bottom first:

  swapped    share of 4,000 reconstructions whose kind, to the eye of a classifier of the training images,
             changes when this layer's code is another image's
  accuracy   of a classifier (linear to 256, ReLU, linear) of the layer's mean code, trained on all training
             images: the paper's table 1
  rate       KL(q || N(0, I)) in nats

and distortion (with all constants), ELBO, squared error, sigma, and E_q[f]: bounded, if f and q do not race.
Rows are kept in OUTPUT/rows and not measured again; interrupted training resumes.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import torch
from torch import Tensor

from jebm.campaign.rows import Row, Rows
from jebm.campaign.runs import rows_of
from jebm.campaign.trials import Trial
from jebm.cli import run
from jebm.config import Config, config_to_dict
from jebm.core.by_class import named_modules
from jebm.data.dataset import ImageSet, load_images
from jebm.data.manifest import read_manifest
from jebm.errors import ConfigError
from jebm.evaluate.features.classifier import classifier_features
from jebm.evaluate.hierarchy import LatentClassifiers, layer_columns, train_code_classifiers
from jebm.evaluate.restore import restored
from jebm.evaluate.statistics import t_interval
from jebm.evaluate.subject import COMPARED, Subject, labels
from jebm.parser import argument_parser, override, parse_arguments
from jebm.parser.yaml_file import read_value
from jebm.rng import generator
from jebm.store.storage import LocalStore, open_store
from jebm.train.runtime import prepare_process
from jebm.train.start import total_steps_of
from jebm.untrusted import JsonObject

_SWAPS = 4000
_CLASSIFIER_BATCH = 256
_CLASSIFIER_UPDATES = 5000


class LayerMeasures:
    """An `Instrument` of what each layer carries."""

    def __init__(self, config: Config, judge: ImageSet) -> None:
        """Read the training images, and train the classifier of images that calls a kind changed."""
        self._train, self._judge = load_images(open_store(config.data.train)), judge
        self._eye = classifier_features(self._train, device="cpu")

    def identity(self, trial: Trial) -> JsonObject:
        """Return what a row depends on."""
        return {
            "train": self._train.manifest.sha256,
            "judge": self._judge.manifest.sha256,
            "langevin": config_to_dict(trial.config)["langevin"],
        }

    def measure(self, trial: Trial) -> Row:
        """Return measure -> value; layers are counted from 1, the bottom."""
        model = restored(trial.uri, trusted=named_modules(trial.config)).model
        subject = Subject(
            model, trial.config, self._judge, samples=len(self._judge.images_NHWC), seed=0, sizes=COMPARED
        )
        found = subject.likelihood(self._judge.images_NHWC)
        code_ND = self._codes(subject, self._judge)
        return {
            "elbo": found.elbo.value,
            "gain": found.gain.value,
            "f_posterior": found.f_posterior.value,
            "distortion": found.distortion.value,
            "mse": found.squared_error.value,
            "rmse": math.sqrt(found.squared_error.value),
            **{name: float(each) for name, each in model.likelihood.metrics().items()},
            **{f"rate_{i}": rate.value for i, rate in enumerate(found.rate_L, 1)},
            **{f"swapped_{i}": share for i, share in enumerate(self._swapped(subject, code_ND), 1)},
            **{f"accuracy_{i}": share for i, share in enumerate(self._accuracies(subject, code_ND), 1)},
        }

    def _codes(self, subject: Subject, images: ImageSet) -> Tensor:
        """Return the mean codes of all images, (N, D)."""

        def codes(_position: int, rows: slice) -> Tensor:
            return subject.model.mean_code(subject.batch(rows, images.images_NHWC))

        return subject.rows(len(images.images_NHWC), subject.model.latent_dim, codes).float()

    @torch.no_grad()
    def _swapped(self, subject: Subject, code_ND: Tensor) -> list[float]:
        """Return the share of reconstructions whose kind changes with each layer of another image."""
        model, code_ND = subject.model, code_ND[:_SWAPS]
        other_ND = code_ND[torch.randperm(len(code_ND), generator=generator(0, 0, 0, "swapped layers"))]

        def kinds(code_ND: Tensor) -> Tensor:
            return torch.cat([self._eye.predict(model.decode(part)) for part in torch.split(code_ND, 500)])

        before_N, shares = kinds(code_ND), []
        for layer in range(len(model.latent_dims)):
            columns, mixed_ND = layer_columns(model.latent_dims, [layer]), code_ND.clone()
            mixed_ND[:, columns] = other_ND[:, columns]
            shares.append(float((kinds(mixed_ND) != before_N).double().mean()))
        return shares

    def _accuracies(self, subject: Subject, code_ND: Tensor) -> list[float]:
        """Return the accuracy of each layer's classifier on the judging images."""
        train_ND = self._codes(subject, self._train)
        train_N = labels(self._train, len(train_ND))
        label_N = labels(self._judge, len(code_ND))

        def batch(step: int) -> tuple[Tensor, Tensor]:
            stream = generator(0, 0, step, "codes to classify")
            rows_B = torch.randint(len(train_ND), (_CLASSIFIER_BATCH,), generator=stream)
            return train_ND[rows_B], train_N[rows_B]

        initial = LatentClassifiers.initial(subject.model.latent_dims, int(train_N.max()) + 1, seed=0)
        classifiers = train_code_classifiers(initial, batch, updates=_CLASSIFIER_UPDATES)
        right_LN = classifiers(code_ND).argmax(2) == label_N
        return [float(share) for share in right_LN.double().mean(1)]


def trials_of(config: Config, arms: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    """Return the runs RUN.NAME-ARM-SEED, seed by seed."""
    images = read_manifest(open_store(config.data.train)).images
    trials = []
    for seed in seeds:
        for arm in arms:
            name, _, text = arm.partition("=")
            pairs = [item.partition(":") for item in filter(None, text.split(","))]
            if any(not colon for _, colon, _ in pairs):
                raise ConfigError(f"--arms: {arm!r} is not NAME=KEY:VALUE,…")
            changes = {key.strip(): read_value(value.strip()) for key, _, value in pairs}
            run_keys = {"run.seed": seed, "run.name": f"{config.run.name}-{name}-{seed}"}
            of_arm = override(config, {**changes, **run_keys})
            total = total_steps_of(of_arm, images // of_arm.train.batch_size)
            trials.append(Trial(name, seed, of_arm, total))
    return trials


def table(rows: dict[str, list[Row]]) -> list[str]:
    """Return a Markdown table: means over seeds, with 95 % intervals for two seeds or more."""
    names = list(next(iter(rows.values()))[0])
    lines = ["| " + " | ".join(["arm", *names]) + " |", "|---" * (1 + len(names)) + "|"]
    for arm, of_arm in rows.items():
        cells = []
        for name in names:
            values = [row[name] for row in of_arm if name in row]
            found = t_interval(values) if len(values) > 1 else None
            half = "" if found is None else f" ± {found.half_width:.2g}"
            cells.append(f"{sum(values) / len(values):.4g}{half}" if values else "")
        lines.append("| " + " | ".join([f"{arm} ({len(of_arm)})", *cells]) + " |")
    return lines


def main() -> int:
    """Train, measure, print a Markdown table."""
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for rows")
    parser.add_argument("--arms", type=list[str], required=True, help="NAME=KEY:VALUE,… for each recipe")
    parser.add_argument("--seeds", type=list[int], default=[0], help="run.seed of each repetition")
    parser.add_argument("--parallel", type=int, default=1, help="trainings at once, each in its own process")
    judge = Literal["validation", "held_out"]
    parser.add_argument("--judge", type=judge, default="validation", help="which images judge")
    config, arguments = parse_arguments(parser)
    engine = dataclasses.replace(config.cluster, engine="process", workers=1, min_workers=None)
    config = dataclasses.replace(config, cluster=engine)
    place = getattr(config.data, arguments.judge)
    if place is None:
        raise ConfigError(f"data.{arguments.judge}: names no images, and --judge asks for them")
    prepare_process(config, torch.device("cpu"))
    trials = trials_of(config, arguments.arms, arguments.seeds)
    rows = Rows(
        LocalStore(Path(arguments.output).absolute()), LayerMeasures(config, load_images(open_store(place)))
    )
    found = rows_of(trials, rows, parallel=arguments.parallel)
    if found is None:
        return 1
    by_arm: dict[str, list[Row]] = {}
    for trial in trials:
        if found[trial.key]:  # the others diverged
            by_arm.setdefault(trial.arm, []).append(found[trial.key])
    if by_arm:
        print("\n".join(table(by_arm)))
    return 0


if __name__ == "__main__":
    run(main)
