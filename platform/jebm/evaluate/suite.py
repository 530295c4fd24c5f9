"""A suite of measures of one checkpoint: one section of findings each, all from the same data and noise.

The request is checked before any tensor or image is read. The sections are computed one after another, each
by its own module (`section_likelihood`, …), from one `jebm.evaluate.subject.Subject`. Work without images
(log Z, chains, pictures) takes seconds: every worker repeats it.

Shapes: N images, H height, W width, C channels.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import torch

from jebm.config import Config, Features, config_to_dict
from jebm.core.precision import true_fp32
from jebm.data.dataset import load_images
from jebm.data.manifest import DatasetManifest, read_manifest
from jebm.errors import ConfigError
from jebm.evaluate.quick import check_enough
from jebm.evaluate.restore import Restored, restored, stored_config
from jebm.evaluate.section_chains import chains_section
from jebm.evaluate.section_factors import factors_section
from jebm.evaluate.section_hierarchy import hierarchy_section
from jebm.evaluate.section_likelihood import likelihood_section
from jebm.evaluate.section_ood import ood_section
from jebm.evaluate.section_samples import samples_section
from jebm.evaluate.share import ALONE, Share
from jebm.evaluate.subject import Subject
from jebm.plain import hint_at
from jebm.report.findings import Findings, Section, duration, plural
from jebm.store.manifest import Manifest
from jebm.store.retrieve import open_checkpoint
from jebm.store.storage import open_store

__all__ = ["MEASURES", "Checked", "Request", "check", "evaluate", "evaluate_request", "measures_of"]

_QUICK = ("likelihood", "samples", "hierarchy", "chains")
_FEWEST_SAMPLES = 100

_LOG = logging.getLogger("jebm.evaluate")

_SECTIONS: Mapping[str, Callable[..., Section]] = {
    "likelihood": likelihood_section,
    "samples": samples_section,
    "hierarchy": hierarchy_section,
    "factors": factors_section,
    "ood": ood_section,
    "chains": chains_section,
}
MEASURES = tuple(_SECTIONS)
"""Sections of a report, in order."""


@dataclass(frozen=True)
class Request:
    """What to evaluate, as plain values that can be sent to other processes."""

    checkpoint: str
    """URI of a run, for its newest checkpoint, or of …/checkpoints/<name>."""
    suite: tuple[str, ...] = ("quick",)
    """quick, paper, or names of `MEASURES`."""
    data: str | None = None
    """Images that the model has not seen; the run's data.held_out by default."""
    train: str | None = None
    """Images that it was trained on, with their labels; the run's data.train by default."""
    out_of_distribution: Mapping[str, str] = field(default_factory=dict)
    """Name -> URI of data sets of another kind."""
    features: Features | None = None
    """The run's evaluation.features by default."""
    inception_weights: str | None = None
    """File with the weights of inceptionv3; the run's evaluation.inception_weights by default."""
    samples: int = 10_000
    """Number of prior samples, and the most images of each data set that are used."""
    seed: int = 0
    trusted: tuple[str, ...] = ()
    """Top-level modules whose classes the run's config, and `features`, may name."""


@dataclass(frozen=True)
class Checked:
    """A checked request: what it resolves to."""

    run: str
    """URI of the run."""
    manifest: Manifest
    config: Config
    """The run's, with the request's `data` and feature net."""
    measures: Mapping[str, bool]
    """Measure -> whether in full, in the order of the report."""


def measures_of(suite: Sequence[str], *, factors: bool = False) -> dict[str, bool]:
    """Return measure -> whether in full, for names of suites and measures; ConfigError for any other name.

    `factors`: the images have factors, so paper measures what is told of them.
    """
    asked: dict[str, bool] = {}
    paper = tuple(each for each in MEASURES if factors or each != "factors")
    for name in suite:
        known = {"quick": _QUICK, "paper": paper} | {measure: (measure,) for measure in MEASURES}
        if name not in known:
            raise ConfigError(f"suite: unknown name {name}; {hint_at(name, known)}")
        for measure in known[name]:
            asked[measure] = asked.get(measure, False) or name != "quick"
    if not asked:
        raise ConfigError("suite: give quick, paper, or names of measures")
    return {measure: asked[measure] for measure in MEASURES if measure in asked}


def check(request: Request) -> Checked:
    """Return what a request resolves to, from manifests only: no tensor and no image is read.

    Raises:
        ConfigError: an unknown name, too few samples or images, images of another shape than the model's, or
            missing labels that a measure needs.
        CheckpointError, DataError, StoreError: the checkpoint or a data set is missing or cannot be read.
    """
    measures_of(request.suite)  # names first
    if request.samples < _FEWEST_SAMPLES:
        raise ConfigError(f"samples: {request.samples} are too few; at least {_FEWEST_SAMPLES}")
    run, manifest = open_checkpoint(request.checkpoint)
    config = _asked(stored_config(manifest, f"{run.uri}/checkpoints/{manifest.name}"), request)
    if request.inception_weights is not None and config.evaluation.features.name != "inceptionv3":
        raise ConfigError(
            f"inception_weights: not for features {config.evaluation.features.name}; "
            "give --features inceptionv3"
        )
    # All data sets must have the model's shape.
    held_out = read_manifest(open_store(config.data.held_out or ""))
    _check_shape(config, "data", held_out)
    for name, uri in request.out_of_distribution.items():
        _check_shape(config, f"out_of_distribution: {name}", read_manifest(open_store(uri)))
    if "ood" in request.suite and not request.out_of_distribution and held_out.labels_sha256 is None:
        raise ConfigError("out_of_distribution: ood needs another data set, or labels in the data; give one")
    if request.train is not None:
        _check_shape(config, "train", read_manifest(open_store(request.train)))
    measures = measures_of(request.suite, factors=_same_factors(config, held_out))
    if "samples" in measures:
        check_enough(held_out, key="data", otherwise="name measures other than samples")
    if "factors" in measures and not _same_factors(config, held_out):
        raise ConfigError(
            "data: factors are needed, the same as those of data.train; ingest both with --factors, or name "
            "other measures"
        )
    _check_labels(config, measures, held_out)
    return Checked(run.uri, manifest, config, measures)


def _asked(config: Config, request: Request) -> Config:
    """Return a run's config with the requested data and feature net."""
    data, evaluation = config.data, config.evaluation
    return replace(
        config,
        data=replace(
            data,
            train=request.train or data.train,
            held_out=request.data or data.held_out or data.train,
        ),
        evaluation=replace(
            evaluation,
            features=request.features or evaluation.features,
            inception_weights=request.inception_weights or evaluation.inception_weights,
        ),
    )


def _same_factors(config: Config, held_out: DatasetManifest) -> bool:
    """Return whether the images have factors, the same as the training images."""
    return bool(held_out.factors) and read_manifest(open_store(config.data.train)).factors == held_out.factors


def _check_labels(config: Config, measures: Mapping[str, bool], held_out: DatasetManifest) -> None:
    """Check that the labels that classifiers are trained and tested on exist."""
    hierarchy = measures.get("hierarchy", False)
    if hierarchy or ("samples" in measures and config.evaluation.features.name == "classifier"):
        train = read_manifest(open_store(config.data.train))
        _check_shape(config, "data.train of the run", train)
        if train.labels_sha256 is None and hierarchy:
            raise ConfigError(
                "suite: hierarchy trains classifiers on the labels of data.train, and it has none; ingest it "
                "again with --labels, or name other measures"
            )
        if train.labels_sha256 is None:
            raise ConfigError(
                "features: a classifier needs labels, and data.train has none; give --features effnetlite0"
            )
    if hierarchy and held_out.labels_sha256 is None:
        raise ConfigError(
            "data: hierarchy needs labels of the images, and there are none; name other measures"
        )


def _check_shape(config: Config, key: str, data: DatasetManifest) -> None:
    have = (data.height, data.width, data.channels)
    want = (config.model.image_size, config.model.image_size, config.model.image_channels)
    if have != want:
        raise ConfigError(
            f"{key}: images are {'x'.join(map(str, have))}, but the checkpoint's model has "
            f"{'x'.join(map(str, want))}; give other data, or ingest again with --size and --channels"
        )


@true_fp32()
def evaluate_request(
    request: Request,
    *,
    device: torch.device | str = "cpu",
    share: Share = ALONE,
    provenance: Mapping[str, str] | None = None,
) -> Findings:
    """Restore the model, load the data and measure: every worker does this and gets the same findings.

    Raises as `check`, `restored` and `feature_net`.
    """
    checked = check(request)
    place = f"{checked.run}/checkpoints/{checked.manifest.name}"
    origin = replace(restored(place, device=device, trusted=request.trusted), config=checked.config)
    # Load the data and fail early if the feature net is missing.
    subject = Subject(
        origin.model,
        origin.config,
        load_images(open_store(checked.config.data.held_out or "")),
        out={name: load_images(open_store(uri)) for name, uri in request.out_of_distribution.items()},
        samples=request.samples,
        seed=request.seed,
        share=share,
        trusted=request.trusted,
    )
    if "samples" in checked.measures:
        _ = subject.net  # fail before anything is measured if it is missing
    return evaluate(subject, origin, checked.measures, provenance or {})


@torch.no_grad()
def evaluate(
    subject: Subject, origin: Restored, measures: Mapping[str, bool], provenance: Mapping[str, str]
) -> Findings:
    """Return the sections of `measures` (name -> in full), with their provenance.

    `origin` is what the subject's model was restored from; `provenance` that of the evaluating process:
    versions, revision. Raises ConfigError if the data are too few or lack labels that a measure needs, or the
    feature net is missing.
    """
    began = datetime.now(UTC)
    sections = []
    # One section per measure; rank 0 logs its first figures.
    for name, full in measures.items():
        if subject.share.rank == 0:
            _LOG.info("%s …", name)
        start = time.perf_counter()
        section = _SECTIONS[name](subject, full=full)
        section = replace(section, seconds=time.perf_counter() - start)
        sections.append(section)
        if subject.share.rank == 0:
            shown = [f"{f.name} {f.value:.5g}" for f in section.figures[:3] if f.value is not None]
            _LOG.info("%s: %s  (%.0f s)", name, ", ".join(shown) or "done", section.seconds)
            for line in section.warnings:
                _LOG.info("  warning: %s", line)
    # The findings, with their provenance.
    facts = _origin(subject, origin, began)
    latents = " + ".join(map(str, subject.config.model.latent_dims))
    return Findings(
        f"{facts['run']}, {_prior(subject.config).partition(' ')[2]}, at step {origin.manifest.step:,} "
        f"on {facts['data'].partition(',')[0]}",
        (
            facts["checkpoint"],
            f"A generator with latents {latents} (bottom to top) and {_prior(subject.config)}.",
            f"{plural(len(sections), 'measure')} in {duration(sum(s.seconds or 0.0 for s in sections))},"
            f" with {plural(len(subject.images_NHWC), 'image')}.",
        ),
        {**facts, **provenance},
        config_to_dict(subject.config),
        tuple(sections),
    )


def _prior(config: Config) -> str:
    kinds = {"joint": "a joint EBM prior", "top": "an EBM prior on the top layer"}
    return kinds[config.prior.kind] if config.has_energy else "a Gaussian prior"


def _origin(subject: Subject, origin: Restored, began: datetime) -> dict[str, str]:
    data = subject.images.manifest
    facts = {
        "checkpoint": origin.uri,
        "run": origin.manifest.run,
        "step": str(origin.manifest.step),
        "weights": "averaged" if origin.weights == "ema" else "last",
        "config_sha256": origin.manifest.config_sha256,
        "trained_by": origin.manifest.provenance.get("git_revision", "unknown"),
        "data": f"{data.name} ({data.split}), the first {len(subject.images_NHWC):,} images",
        "data_sha256": data.sha256,
        "training_data_sha256": str(origin.manifest.state.get("data_sha256", "unknown")),
        "seed": str(subject.seed),
        "samples": str(subject.samples),
        "workers": str(subject.share.world_size),
        "device": str(subject.device),
        "time": began.isoformat(timespec="seconds"),
    }
    for name, images in subject.out.items():
        facts[f"out_of_distribution {name}"] = f"{images.manifest.name} ({images.manifest.split})"
        facts[f"out_of_distribution {name} sha256"] = images.manifest.sha256
    if "net" in vars(subject):  # a measure has used it
        facts |= {"features": subject.net.name, "features_sha256": subject.net.sha256}
    return facts
