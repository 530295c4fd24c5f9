"""What experiments/anomalies.py trains and scores: arms, classes held out, data sets.

Shapes: N images, H height, W width, C channels.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jsonargparse import Namespace

from jebm.campaign.trials import ARMS, Trial
from jebm.config import Config
from jebm.data.manifest import dataset_exists, read_manifest
from jebm.data.readers import open_source
from jebm.data.shards import write_dataset
from jebm.data.source import Source, SourceDescription, source_from_arrays
from jebm.errors import ConfigError
from jebm.evaluate.restore import stored_config
from jebm.parser import override
from jebm.store.checkpoint import Manifest
from jebm.store.retrieve import open_checkpoint
from jebm.store.storage import open_store
from jebm.train.start import total_steps_of

BASELINES = ("knn", "pca")
"""Arms without a model: the same for every seed."""
ORACLE = "oracle"
"""The Gaussian run of the same seed, with the aggregate posterior of its training images as prior."""
_CLASS_ARMS = ("gaussian", "top", "joint", "two_stage", ORACLE, *BASELINES)
_OOD_ARMS = ("gaussian", "top", "joint")
_TEST_EVERY = 5
_REFERENCE_EVERY = 10


@dataclass(frozen=True)
class Case(Trial):
    """One arm and its anomalies."""

    label: str
    """Key of its row."""
    anomaly: str
    """The class held out, or the URI of another data set."""
    anomalous: str
    """Data set of the anomalies."""
    normal: str
    """Data set of the kind that the model was trained on, but has not seen."""
    images: int | None = None
    """The number used of each kind; None for all."""
    reference: str = ""
    """Data set of further normal images, neither trained nor tested on; empty if there is none."""
    given: str = ""
    """The checkpoint of a finished run; empty if we train the run."""
    starts_from: str = ""
    """Key of the case whose run must finish first."""

    @property
    def key(self) -> str:
        """Key of its row."""
        return re.sub(r"[^A-Za-z0-9_]+", "-", self.label)

    @property
    def origin(self) -> str:
        """Key of the case that must finish first; empty if there is none."""
        return self.starts_from

    def latest(self) -> Manifest | None:
        """Return the checkpoint to score, which if given may be of any config; else as for any trial."""
        if self.arm in BASELINES:
            return None
        return open_checkpoint(self.given)[1] if self.given else super().latest()

    def finished(self) -> bool:
        """Return whether nothing is left to train."""
        return bool(self.given) or self.arm in BASELINES or super().finished()


def cases_of(config: Config, arguments: Namespace) -> list[Case]:
    """Return all cases, in the order to run them; writes missing data sets.

    Raises:
        ConfigError: no arm, class or seed; or an arm starts from the Gaussian run, which is not an arm.
    """
    of_classes = arguments.experiment == "classes"
    arms = list(dict.fromkeys(arguments.arms or (_CLASS_ARMS if of_classes else _OOD_ARMS)))
    arms.sort(key=lambda arm: arm != "gaussian")
    if {"two_stage", ORACLE} & set(arms) and "gaussian" not in arms:
        raise ConfigError(f"--arms: two_stage and {ORACLE} start from the gaussian run; add gaussian")
    output = Path(arguments.output)
    if of_classes:
        cases = [*_class_cases(config, arguments, arms, output)]
    else:
        cases = [*_ood_cases(config, arguments, arms, output)]
    if not cases:
        raise ConfigError("--seeds, --held_out: each needs at least one value")
    return cases


# ---------------------------------------------------------------------------------------- a class held out


def _class_cases(config: Config, arguments: Namespace, arms: list[str], output: Path) -> Iterator[Case]:
    """Yield a case for each seed, class and arm, in this order; baselines only for the first seed."""
    for seed in arguments.seeds:
        for held_out in arguments.held_out:
            sets = _class_sets(Path(arguments.originals), output, held_out)
            gaussian = f"without-{held_out}-gaussian-{seed}"
            for arm in arms:
                if arm in BASELINES and seed != arguments.seeds[0]:
                    continue
                label = f"without-{held_out}-{arm}-{seed}"
                of_arm = _arm_config(
                    config,
                    arm,
                    seed,
                    output,
                    {
                        "run.name": gaussian if arm == ORACLE else label,
                        "data.train": sets["train"],
                        "data.validation": sets["reference"],
                        "data.held_out": sets["normal"],
                    },
                    gaussian,
                )
                yield Case(
                    arm,
                    seed,
                    of_arm,
                    0 if arm in BASELINES else _total_steps(of_arm),
                    label=label,
                    anomaly=str(held_out),
                    anomalous=sets["anomalous"],
                    normal=sets["normal"],
                    reference=sets["reference"],
                    starts_from=gaussian if arm in {"two_stage", ORACLE} else "",
                )


def _class_sets(originals: Path, output: Path, held_out: int) -> dict[str, str]:
    """Return the URIs of train, reference, normal and anomalous images; writes those that are missing.

    The pooled protocol of Kumar et al. (2019, MEG) and Zenati et al. (2018): all images together, train and
    test part; a fifth of the normal ones and *all* anomalous ones are tested. Of the others, every tenth is
    kept out of training too, as reference for p-values and for the oracle's bandwidth.

    Raises:
        ConfigError: a set that exists was made from other original files, or a part would be empty.
    """
    uris = {
        name: str(output / "data" / f"without-{held_out}-{name}")
        for name in ("train", "reference", "normal", "anomalous")
    }
    # Sets that exist must be of the same files, or the runs and rows beside them would be of other images.
    sources = _sources(originals)
    files = tuple(file for source in sources for file in source.description.files)
    stores = {name: open_store(uri) for name, uri in uris.items()}
    missing = [name for name, store in stores.items() if not dataset_exists(store)]
    if any(read_manifest(stores[name]).source.files != files for name in uris if name not in missing):
        raise ConfigError(
            f"--output: {output} has data sets of other originals than {originals}; use another"
        )
    if not missing:
        return uris
    images_NHWC, labels_N = _pooled(sources)
    # Each image's place within its class decides its part, so that every part has all classes.
    place_N = np.zeros(len(labels_N), np.int64)
    for label in np.unique(labels_N):
        place_N[labels_N == label] = np.arange((labels_N == label).sum())
    normal_N, tested_N = labels_N != held_out, place_N % _TEST_EVERY == _TEST_EVERY - 1
    turn_N = place_N - place_N // _TEST_EVERY
    reference_N = ~tested_N & (turn_N % _REFERENCE_EVERY == _REFERENCE_EVERY - 1)
    chosen = {
        "train": normal_N & ~tested_N & ~reference_N,
        "reference": normal_N & reference_N,
        "normal": normal_N & tested_N,
        "anomalous": ~normal_N,
    }
    for name, chosen_N in chosen.items():
        if not chosen_N.any():
            raise ConfigError(f"--held_out: class {held_out} leaves no {name} images in {originals}")
        if name in missing:
            title, description = f"without {held_out}", SourceDescription(files, "pooled")
            part = source_from_arrays(
                images_NHWC[chosen_N], labels_N[chosen_N], name=title, split=name, description=description
            )
            write_dataset(part, stores[name])
    return uris


def _sources(originals: Path) -> list[Source]:
    """Return the original files: of the digits, or of train and test part."""
    splits = ("all",) if (originals / "0.json").is_file() else ("train", "test")
    return [open_source(originals, split=split) for split in splits]


def _pooled(sources: Sequence[Source]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Return all images and labels of the sources."""
    images, labels = [], []
    for source in sources:
        for batch in source.batches():
            if batch.labels_N is None:
                raise ConfigError(f"--originals: {source.name} has no labels, so no class can be held out")
            images.append(batch.images_NHWC)
            labels.append(batch.labels_N)
    return np.concatenate(images), np.concatenate(labels)


# ------------------------------------------------------------------------------------- another data set


def _ood_cases(config: Config, arguments: Namespace, arms: list[str], output: Path) -> Iterator[Case]:
    """Yield a case for each given run, or for each seed and arm of the config."""
    extra = sorted(set(arms) - set(_OOD_ARMS))
    if extra and not arguments.runs:
        raise ConfigError(f"--arms: ood trains gaussian, joint and top, not {', '.join(extra)}")

    def case(arm: str, config: Config, given: str = "") -> Case:
        normal = arguments.normal or config.data.held_out
        if normal is None:
            raise ConfigError(
                f"{config.run.name} has no data.held_out; give --normal, images it has not seen"
            )
        return Case(
            arm,
            config.run.seed,
            config,
            0 if given else _total_steps(config),
            label=f"{given or config.run.name}-{arguments.outliers}",
            anomaly=arguments.outliers,
            anomalous=arguments.outliers,
            normal=normal,
            images=arguments.images,
            given=given,
        )

    for uri in arguments.runs:
        found, manifest = open_checkpoint(uri)
        of_run = stored_config(manifest, uri)
        storage, _, name = found.uri.rpartition("/")
        of_run = override(of_run, {"run.storage": storage, "run.name": name})
        yield case(_arm_of(of_run), of_run, f"{found.uri}/checkpoints/{manifest.name}")
    for seed in arguments.seeds if not arguments.runs else ():
        for arm in arms:
            name = f"{config.run.name}-{arm}-{seed}"
            yield case(arm, _arm_config(config, arm, seed, output, {"run.name": name}))


def _arm_of(config: Config) -> str:
    """Return the name of a run's arm."""
    kind = config.prior.kind if config.has_energy else "gaussian"
    return kind if config.train.regime == "joint" else f"{kind}, {config.train.regime}"


def _arm_config(
    config: Config, arm: str, seed: int, output: Path, changes: dict[str, str], gaussian: str = ""
) -> Config:
    """Return an arm's config: the same except for prior, regime, seed, storage and `changes`."""
    runs = str(output / "runs")
    place = {"run.seed": seed, "run.storage": runs, "evaluation.every_steps": 0}
    start = {"run.init_from": f"{runs}/{gaussian}"} if arm == "two_stage" else {}
    return override(config, {**ARMS.get(arm, ARMS["gaussian"]), **place, **start, **changes})


def _total_steps(config: Config) -> int:
    """Return the number of steps of a complete training."""
    images = read_manifest(open_store(config.data.train)).images
    return total_steps_of(config, images // config.train.batch_size)
