"""A suite of measures of one checkpoint: each a section of findings, all from the same data and noise.

Work on images is cut into batches of `samples.BATCH`, which workers share; the noise of a batch belongs to
its position, and statistics are added in the order of the batches, so that the findings do not depend on the
number of workers. What needs no images (log Z, chains, pictures) takes seconds: each worker does it alike.
Images are read a batch at a time; of an image no more stays than its features and scores.

Shapes: N images, B batch, C columns of a statistic (channels in x_BCHW), H height, W width, D latent width of
all layers together, L layers, P batches, R rows and K columns of a picture.
"""

import difflib
import io
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from jebm.config import Config, config_to_dict
from jebm.core.objective import reconstruct
from jebm.data.loader import to_float, to_uint8
from jebm.data.shards import DatasetManifest, ImageSet, load_images, read_manifest
from jebm.errors import ConfigError
from jebm.evaluate.chains import Estimate, Tilt, chain_report, run_chains, warnings_of
from jebm.evaluate.features import ClassifierFeatures, FeatureNet, classifier_features, feature_net
from jebm.evaluate.findings import Curve, Figure, Findings, Picture, Section, Table
from jebm.evaluate.hierarchy import (
    Source,
    changed_classes,
    correct_by_layer,
    energy_draws,
    hierarchical_samples,
    interpolate,
    layer_effects,
    pictured,
    tilt_of,
    train_latent_classifiers,
    traverse,
    traverse_plane,
)
from jebm.evaluate.likelihood import (
    AnnealedLogPartition,
    Likelihood,
    LikelihoodSums,
    Means,
    log_partition_annealed,
    log_partition_importance,
    log_partition_reverse,
)
from jebm.evaluate.ood import Detection, detections, detections_by_label, scores
from jebm.evaluate.restore import Restored, restored, stored_config
from jebm.evaluate.samples import ALONE, BATCH, Share, image_features, prior_samples, sample_quality
from jebm.rng import gaussian_noise, generator
from jebm.store.manifest import Manifest
from jebm.store.retrieve import open_checkpoint
from jebm.store.storage import open_store

__all__ = [
    "MEASURES",
    "Checked",
    "Request",
    "Subject",
    "chains_section",
    "check",
    "evaluate",
    "evaluate_request",
    "hierarchy_section",
    "likelihood_section",
    "measures_of",
    "ood_section",
    "samples_section",
]

MEASURES = ("likelihood", "samples", "hierarchy", "ood", "chains")
_QUICK = ("likelihood", "samples", "hierarchy", "chains")

_LOG = logging.getLogger("jebm.evaluate")


# ------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Request:
    """What is to be evaluated, in plain values that travel to other processes."""

    checkpoint: str
    """URI of a run, for its newest checkpoint, or of …/checkpoints/<name>."""
    suite: tuple[str, ...] = ("quick",)
    """quick, paper, or names of `MEASURES`."""
    data: str | None = None
    """Images that the model has not seen; the run's data.held_out where it is None."""
    train: str | None = None
    """Images that it was trained on, with their labels; the run's data.train where it is None."""
    out_of_distribution: Mapping[str, str] = field(default_factory=dict)
    """Name -> URI of data sets of another kind."""
    features: Literal["classifier", "effnetlite0"] | None = None
    """The run's evaluation.features where it is None."""
    samples: int = 10_000
    """Samples of the prior, and at most as many images of each data set."""
    seed: int = 0


@dataclass(frozen=True)
class Checked:
    """What a request comes to."""

    run: str
    """URI of the run."""
    manifest: Manifest
    config: Config
    """Of the run, with `data.held_out` and `evaluation.features` as the request has them."""
    measures: Mapping[str, bool]
    """Measures in the order of the report, and whether in full."""


def measures_of(suite: Sequence[str]) -> dict[str, bool]:
    """Return measure -> whether in full, for names of suites and measures; ConfigError for another name."""
    asked: dict[str, bool] = {}
    for name in suite:
        known = {"quick": _QUICK, "paper": MEASURES} | {measure: (measure,) for measure in MEASURES}
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"suite: unknown name {name}; {hint}")
        for measure in known[name]:
            asked[measure] = asked.get(measure, False) or name != "quick"
    if not asked:
        raise ConfigError("suite: give quick, paper, or names of measures")
    return {measure: asked[measure] for measure in MEASURES if measure in asked}


def check(request: Request) -> Checked:
    """Return what a request comes to, from manifests alone: no tensor and no image is read.

    Raises:
        ConfigError: an unknown name, too few samples, images of another shape than the model's, or labels
            that a measure needs and that are not there.
        CheckpointError, DataError, StoreError: the checkpoint or a data set is not there or cannot be read.
    """
    measures = measures_of(request.suite)
    if request.samples < _FEWEST_SAMPLES:
        raise ConfigError(f"samples: {request.samples} are too few; at least {_FEWEST_SAMPLES}")
    run, manifest = open_checkpoint(request.checkpoint)
    config = stored_config(manifest, f"{run.uri}/checkpoints/{manifest.name}")
    config = replace(
        config,
        data=replace(
            config.data,
            train=request.train or config.data.train,
            held_out=request.data or config.data.held_out or config.data.train,
        ),
        evaluation=replace(config.evaluation, features=request.features or config.evaluation.features),
    )
    held_out = read_manifest(open_store(config.data.held_out or ""))
    _check_shape(config, "data", held_out)
    for name, uri in request.out_of_distribution.items():
        _check_shape(config, f"out_of_distribution: {name}", read_manifest(open_store(uri)))
    if "ood" in request.suite and not request.out_of_distribution and held_out.labels_sha256 is None:
        raise ConfigError("out_of_distribution: ood needs another data set, or labels in the data; give one")
    if measures.get("hierarchy") or ("samples" in measures and config.evaluation.features == "classifier"):
        train = read_manifest(open_store(config.data.train))
        _check_shape(config, "data.train of the run", train)
        if train.labels_sha256 is None and measures.get("hierarchy"):
            raise ConfigError(
                "suite: hierarchy trains classifiers on the labels of data.train, and it has none; ingest it "
                "again with --labels, or name other measures"
            )
        if train.labels_sha256 is None:
            raise ConfigError(
                "features: a classifier needs labels, and data.train has none; give --features effnetlite0"
            )
    if measures.get("hierarchy") and held_out.labels_sha256 is None:
        raise ConfigError(
            "data: hierarchy needs labels of the images, and there are none; name other measures"
        )
    return Checked(run.uri, manifest, config, measures)


_FEWEST_SAMPLES = 100


def _check_shape(config: Config, key: str, data: DatasetManifest) -> None:
    have = (data.height, data.width, data.channels)
    want = (config.model.image_size, config.model.image_size, config.model.image_channels)
    if have != want:
        raise ConfigError(
            f"{key}: images are {'x'.join(map(str, have))}, but the checkpoint's model has "
            f"{'x'.join(map(str, want))}; give other data, or ingest again with --size and --channels"
        )


def evaluate_request(
    request: Request,
    *,
    device: torch.device | str = "cpu",
    share: Share = ALONE,
    provenance: Mapping[str, str] | None = None,
) -> Findings:
    """Restore, load, measure: what each worker does, and gets the same findings.

    Raises as `check`, `restored` and `feature_net`.
    """
    checked = check(request)
    place = f"{checked.run}/checkpoints/{checked.manifest.name}"
    subject = Subject(
        replace(restored(place, device=device), config=checked.config),
        load_images(open_store(checked.config.data.held_out or "")),
        out={name: load_images(open_store(uri)) for name, uri in request.out_of_distribution.items()},
        samples=request.samples,
        seed=request.seed,
        share=share,
    )
    if "samples" in checked.measures:
        _ = subject.net  # before anything is measured: it may not be there
    return evaluate(subject, checked.measures, provenance or {})


class Subject:
    """What all sections work on: the model, data, noise, and this worker's share. The same on all workers.

    What several sections need is made at the first use.
    """

    def __init__(
        self,
        origin: Restored,
        images: ImageSet,
        *,
        out: Mapping[str, ImageSet] | None = None,
        samples: int = 10_000,
        seed: int = 0,
        share: Share = ALONE,
    ) -> None:
        """Take a restored model, images it has not seen, and `out`: others than it knows.

        At most `samples` images of each set count, and as many samples of the prior are drawn.
        """
        self.origin, self.model, self.config = origin, origin.model, origin.config
        self.images, self.out = images, dict(out or {})
        self.samples, self.seed, self.share = samples, seed, share
        self.device = next(self.model.parameters()).device
        self.noise = gaussian_noise(seed, 0, self.device)
        self.images_NHWC = images.images_NHWC[:samples]
        self.tilt = tilt_of(self.model)
        ends = [0, *accumulate(self.model.latent_dims)]
        self.layer_columns = [list(range(*pair)) for pair in pairwise(ends)]
        self.layers = [f"z{layer + 1}" for layer in range(len(self.model.latent_dims))]

    @cached_property
    def train(self) -> ImageSet:
        """The images that the model was trained on."""
        return load_images(open_store(self.config.data.train))

    @cached_property
    def net(self) -> FeatureNet:
        """Where distances between images are taken."""
        if self.config.evaluation.features == "classifier":
            return self.classifier
        return feature_net(self.config.evaluation.features, self.train, device=self.device)

    @cached_property
    def classifier(self) -> ClassifierFeatures:
        """A classifier of the training images' labels."""
        return classifier_features(self.train, device=self.device)

    @cached_property
    def annealed(self) -> AnnealedLogPartition | None:
        """What bounds log Z from below; None for the Gaussian prior."""
        if self.tilt is None:
            return None
        normal = self.noise(0, "log Z from below")
        return log_partition_annealed(
            self.tilt, self.model.latent_dim, normal, chains=_AIS_CHAINS, temperatures=_AIS_TEMPERATURES
        )

    @property
    def log_z(self) -> Estimate:
        """Return log Z from below; exactly 0 for the Gaussian prior."""
        return Estimate(0.0, 0.0) if self.annealed is None else self.annealed.log_z

    def batch(self, rows: slice, images_NHWC: npt.NDArray[np.uint8] | None = None) -> Tensor:
        """Return images (B, C, H, W) in [-1, 1] on the device."""
        chosen_NHWC = self.images_NHWC if images_NHWC is None else images_NHWC
        return to_float(chosen_NHWC[rows].copy(), self.device)

    def means(self, count: int, columns: int, values: Callable[[int, slice], Tensor]) -> Means:
        """Return the means over `count` images of what `values(position, rows)` gives for a batch, (B, C)."""

        def sums(position: int, rows: slice) -> Tensor:
            means = Means(columns)
            means.add(values(position, rows).cpu())
            return means.sums

        found = Means(columns)
        found.sums = self.added(count, (3, columns), sums)
        return found

    def added(self, count: int, shape: tuple[int, ...], part: Callable[[int, slice], Tensor]) -> Tensor:
        """Return the sum over batches of `part(position, rows)`, float64, in their order on any workers."""
        batches = -(-count // BATCH)
        parts_P = torch.zeros(batches, *shape, dtype=torch.float64)
        for position, rows in self.share.batches(count):
            parts_P[position] = part(position, rows)
        return self.share.total(parts_P).sum(0)

    def rows(self, count: int, columns: int, values: Callable[[int, slice], Tensor]) -> Tensor:
        """Return what `values(position, rows)` gives for all batches, (N, C), float64, on every worker."""
        values_NC = torch.zeros(count, columns, dtype=torch.float64)
        for position, rows in self.share.batches(count):
            values_NC[rows] = values(position, rows).double().cpu()
        return self.share.total(values_NC)


_AIS_CHAINS = 1000
_AIS_TEMPERATURES = 300


@torch.no_grad()
def evaluate(subject: Subject, measures: Mapping[str, bool], provenance: Mapping[str, str]) -> Findings:
    """Return the sections of `measures` (name -> in full), with where all of it comes from.

    `provenance` is that of the evaluating process: versions, revision. Raises ConfigError where the data are
    too few, have no labels where a measure needs them, or the feature net is not there.
    """
    began = datetime.now(UTC)
    sections = []
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
    return Findings(
        {**_origin(subject, began), **provenance}, config_to_dict(subject.config), tuple(sections)
    )


def _origin(subject: Subject, began: datetime) -> dict[str, str]:
    origin, data = subject.origin, subject.images.manifest
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
    if "net" in vars(subject):  # a measure has asked for it
        facts |= {"features": subject.net.name, "features_sha256": subject.net.sha256}
    return facts


# --------------------------------------------------------------------------------------- words and pictures


def _figure(
    name: str,
    value: float | Estimate | None,
    meaning: str,
    *,
    unit: str = "",
    better: Literal["lower", "higher"] | None = None,
    error: float | None = None,
) -> Figure:
    if isinstance(value, Estimate):
        value, error = value
    known = None if value is None or not math.isfinite(value) else float(value)
    return Figure(name, known, _finite(error) if known is not None else None, unit, better, meaning)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _picture(title: str, file: str, x_RKCHW: Tensor, meaning: str) -> Picture:
    """Return a table of images in [-1, 1] as a PNG, a white line between them; small ones twice as large."""
    x_RKHWC = to_uint8(x_RKCHW.nan_to_num()).permute(0, 1, 3, 4, 2).cpu().numpy()
    x_RKHWC = np.pad(x_RKHWC, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
    rows, columns, height, width, channels = x_RKHWC.shape
    page = x_RKHWC.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    image = Image.fromarray(page[:, :, 0] if channels == 1 else page)
    if max(height, width) <= _SMALL_PIXELS:
        image = image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return Picture(title, file, data.getvalue(), meaning)


_SMALL_PIXELS = 65


def _table_of(x_BCHW: Tensor, columns: int) -> Tensor:
    """Return a batch of images as a table (R, K, C, H, W); what does not fill a row is left out."""
    rows = len(x_BCHW) // columns
    return x_BCHW[: rows * columns].view(rows, columns, *x_BCHW.shape[1:])


# ------------------------------------------------------------------------------------------------ likelihood


@torch.no_grad()
def likelihood_section(subject: Subject, *, full: bool = False) -> Section:
    """Return log Z from both sides, the ELBO with it, rates by layer; in full, a tighter bound."""
    found = _likelihood(subject, len(subject.images_NHWC), "likelihood", subject.log_z)
    channels, height, width = subject.batch(slice(0, 1)).shape[1:]
    pixels, variance = channels * height * width, subject.model.likelihood_std**2
    mse = 2 * variance * (found.distortion.value - found.constant) / pixels
    mse_error = 2 * variance * found.distortion.standard_error / pixels
    figures = [
        _figure(
            "ELBO",
            found.elbo,
            "Lower bound of log p(x) for one image, with the normalised prior and all constants; a little "
            "too high where log Z is taken from below and its effective share is small.",
            unit="nats",
            better="higher",
        ),
        _figure(
            "gain of the tilt",
            found.gain,
            "E_q[f] - log Z: what the EBM prior adds to the ELBO; 0 for the Gaussian prior.",
            unit="nats",
            better="higher",
        ),
        _figure(
            "bits per dimension",
            found.bits_per_dim,
            "The ELBO for one of the pixel values, as for 8-bit images.",
            unit="bits/dim",
            better="lower",
        ),
        _figure(
            "distortion",
            found.distortion,
            "-E_q[log p(x|z)], with its constant: what the code leaves to say.",
            unit="nats",
            better="lower",
        ),
        _figure(
            "rate",
            found.rate,
            "KL(q(z|x) || N(0, I)) of all layers together: what the code costs without the tilt.",
            unit="nats",
        ),
        _figure(
            "reconstruction MSE",
            mse,
            "Mean squared error of a pixel in [-1, 1], decoded from z ~ q(z|x).",
            better="lower",
            error=mse_error,
        ),
        _figure("E_q[f]", found.f_posterior, "Mean f of posterior samples.", unit="nats"),
    ]
    warnings: list[str] = []
    if subject.tilt is not None and subject.annealed is not None:
        figures += _log_z_figures(subject, found, warnings)
    if full:
        images = min(_IWAE_IMAGES, len(subject.images_NHWC))
        weighted = _likelihood(
            subject, images, "importance-weighted bound", subject.log_z, importance_samples=_IWAE_SAMPLES
        )
        figures += [
            _figure(
                f"importance-weighted bound, K = {_IWAE_SAMPLES}",
                weighted.importance_weighted,
                f"Of the first {images:,} images: nearer to log p(x) than the ELBO, which is K = 1.",
                unit="nats",
                better="higher",
            ),
            _figure("ELBO of the same images", weighted.elbo, "K = 1, for comparison.", unit="nats"),
        ]
    dims = subject.model.latent_dims
    rows = zip(subject.layers, dims, found.rate_L, found.active_units, strict=True)
    layers = Table(
        "Layers, bottom first",
        ("layer", "latents", "rate (nats)", "± standard error", "active units"),
        tuple((layer, dim, rate.value, rate.standard_error, active) for layer, dim, rate, active in rows),
        "Rate: KL(q || N(0, I)) of the layer. Active: latents whose posterior mean has a variance over "
        "images above 0.01 (Burda et al. 2016).",
    )
    return Section(
        "likelihood",
        "Likelihood",
        f"How likely the model finds {found.images:,} images, with the prior normalised: log Z of the tilt "
        "is estimated by annealed importance sampling, from below and from above.",
        0.0,
        tuple(figures),
        (layers,),
        warnings=tuple(warnings),
    )


_IWAE_SAMPLES = 100
_IWAE_IMAGES = 1000
_LEAST_SHARE = 0.2
"""Of the effective share of annealing chains: below it, log Z is not to be trusted (docs/evaluation.md)."""


def _likelihood(
    subject: Subject, count: int, purpose: str, log_z: Estimate, *, importance_samples: int = 0
) -> Likelihood:
    def sums(position: int, rows: slice) -> Tensor:
        one = LikelihoodSums(subject.model, importance_samples=importance_samples)
        one.add(subject.batch(rows), subject.noise(position, purpose))
        return one.means.sums.cpu()

    all_ = LikelihoodSums(subject.model, importance_samples=importance_samples)
    all_.means.sums = subject.added(count, tuple(all_.means.sums.shape), sums)
    return all_.result(log_z)


def _log_z_figures(subject: Subject, found: Likelihood, warnings: list[str]) -> list[Figure]:
    tilt, below = subject.tilt, subject.annealed
    if tilt is None or below is None:
        return []
    above = log_partition_reverse(
        tilt, below.end_BD, subject.noise(0, "log Z from above"), temperatures=_AIS_TEMPERATURES
    )
    plain = log_partition_importance(
        tilt, subject.model.latent_dim, subject.noise(0, "log Z by importance"), _IMPORTANCE_SAMPLES
    )
    if below.effective_share < _LEAST_SHARE:
        warnings.append(
            f"the annealing chains behind log Z are worth {below.effective_share:.0%} of their number (asked "
            f"for: {_LEAST_SHARE:.0%}): ELBO and gain are too high by an unknown amount"
        )
    error = math.hypot(below.log_z.standard_error, above.log_z.standard_error)
    if above.log_z.value < below.log_z.value - 4 * error:
        warnings.append(
            f"log Z from above, {above.log_z.value:.3f}, is below that from below, {below.log_z.value:.3f}: "
            "the chains have missed a part of the prior"
        )
    return [
        _figure("log Z from below", below.log_z, "By annealing from N(0, I) to the prior.", unit="nats"),
        _figure(
            "log Z from above",
            above.log_z,
            "By annealing back, from where the chains have ended: log Z lies between the two.",
            unit="nats",
        ),
        _figure(
            "ELBO with log Z from above",
            found.elbo.value + below.log_z.value - above.log_z.value,
            "The cautious one of the two.",
            unit="nats",
            better="higher",
            error=math.hypot(found.elbo.standard_error, above.log_z.standard_error),
        ),
        _figure(
            "effective share of log Z",
            below.effective_share,
            "Effective sample size of the annealing chains over their number; below 0.2, do not trust log Z.",
            unit="share",
            better="higher",
        ),
        _figure(
            "log Z by importance sampling",
            plain.log_z,
            f"From {_IMPORTANCE_SAMPLES:,} draws of N(0, I), a check; its effective share is "
            f"{plain.effective_share:.2g}.",
            unit="nats",
        ),
    ]


_IMPORTANCE_SAMPLES = 100_000


# --------------------------------------------------------------------------------------------------- samples


@torch.no_grad()
def samples_section(subject: Subject, *, full: bool = False) -> Section:
    """Return distances of prior samples to real images and to the posterior's; the same in full."""
    config = subject.config
    real_NF = image_features(subject.images_NHWC, subject.net, share=subject.share)
    quality = sample_quality(
        subject.model,
        config.langevin,
        subject.images_NHWC,
        real_NF,
        subject.net,
        subject.noise,
        count=subject.samples,
        chain_factor=config.evaluation.chain_factor,
        gaussian=True,
        share=subject.share,
    )
    short, long = quality["samples"], quality["samples_long"]
    names = {
        "real_floor": "real against real (halves)",
        "reconstructions": "reconstructions",
        "posterior_samples": "decoded from z ~ q(z|x)",
        "samples": _chains(short["steps"]),
        "samples_long": _chains(long["steps"]),
        "samples_gaussian": "the same generator, z ~ N(0, I)",
    }
    columns = ("frechet", "kid", "kid_standard_error", "precision", "recall", "density", "coverage")
    distances = Table(
        "Distances to real images",
        ("images", "Fréchet", "KID", "± standard error", "precision", "recall", "density", "coverage", "n"),
        tuple(
            (shown, *(quality[name][column] for column in columns), quality[name]["n"])
            for name, shown in names.items()
        ),
        f"In the features of {subject.net.name}, so no FID. Fréchet: distance of two Gaussians with these "
        "moments, biased upwards for few images; KID: unbiased, cubic kernel. Precision: samples that could "
        "be real; recall: real images that could be samples. The last row has no tilt: what the EBM prior is "
        "worth is the difference to it.",
    )
    posterior = Table(
        "The prior against the aggregate posterior, through the same decoder",
        ("samples", "Fréchet", "KID", "± standard error", "n", "n of the posterior"),
        tuple(
            (names[name], *quality[f"{name}_to_posterior"].values())
            for name in ("samples", "samples_long", "samples_gaussian")
        ),
        "Distance between images decoded from the prior and images decoded from z ~ q(z|x) of held-out "
        "images: the decoder's blur cancels; 0 but for chance where the prior is the aggregate posterior.",
    )
    to_posterior, gaussian = quality["samples_long_to_posterior"], quality["samples_gaussian"]
    figures = (
        _figure(
            "Fréchet distance, long chains",
            long["frechet"],
            f"Between {subject.samples:,} prior samples and {len(subject.images_NHWC):,} real images, after "
            f"{long['steps']} Langevin steps: the prior itself, where the chains have mixed.",
            better="lower",
        ),
        _figure(
            "Fréchet distance to the posterior, long chains",
            to_posterior["frechet"],
            "Between images decoded from the prior and from q(z|x): what the prior alone has wrong.",
            better="lower",
        ),
        _figure(
            "Fréchet distance, short chains",
            short["frechet"],
            f"After the {short['steps']} steps of training: a sampler of its own.",
            better="lower",
        ),
        _figure(
            "Fréchet distance, N(0, I)",
            gaussian["frechet"],
            "Of the same generator without the tilt: the Gaussian prior's figure.",
        ),
        _figure(
            "Fréchet distance to the posterior, N(0, I)",
            quality["samples_gaussian_to_posterior"]["frechet"],
            "The same without the tilt.",
        ),
        _figure(
            "Fréchet distance of real images",
            quality["real_floor"]["frechet"],
            "One half of the real images against the other: the floor, at half the number of images.",
        ),
        _figure(
            "KID, long chains",
            long["kid"],
            "Kernel distance (unbiased) after the long chains.",
            better="lower",
            error=long["kid_standard_error"],
        ),
    )
    warnings = [
        f"{quality[name]['not_finite']:,} of {quality[name]['n']:,} images are not finite: {names[name]}"
        for name in names
        if quality[name]["not_finite"]
    ]
    return Section(
        "samples",
        "Samples",
        "How far images of the prior are from real ones, beside what the decoder alone could reach "
        "(reconstructions), what chance gives (real against real) and what N(0, I) gives without the tilt.",
        0.0,
        figures,
        (distances, posterior),
        pictures=_sample_pictures(subject, long["steps"]),
        warnings=tuple(warnings),
    )


def _chains(steps: int) -> str:
    return f"prior samples, {steps:,} Langevin steps" if steps else "prior samples (exact)"


_SHOWN = 100


def _sample_pictures(subject: Subject, long_steps: int) -> tuple[Picture, ...]:
    langevin = subject.config.langevin
    shown = {"samples": langevin.steps, "samples-long": long_steps} if long_steps else {"samples": 0}
    pictures = []
    for file, steps in shown.items():
        config = replace(langevin, steps=steps or langevin.steps)
        x_BCHW = next(prior_samples(subject.model, config, _SHOWN, subject.noise))
        title = _chains(steps)[0].upper() + _chains(steps)[1:]
        meaning = "The same noise in each picture: a longer chain goes on where the shorter one ended."
        pictures.append(_picture(title, f"{file}.png", _table_of(x_BCHW, 10), meaning))
    x_BCHW = subject.batch(slice(0, 50))
    pairs = torch.stack([_table_of(x_BCHW, 10), _table_of(reconstruct(subject.model, x_BCHW), 10)], 1)
    title, meaning = "Images and their reconstructions", "A row of images, below it their reconstructions."
    return (*pictures, _picture(title, "reconstructions.png", pairs.flatten(0, 1), meaning))


# ------------------------------------------------------------------------------------------------- hierarchy


@torch.no_grad()
def hierarchy_section(subject: Subject, *, full: bool = False) -> Section:
    """Return what each layer does: in pictures; in full also in classes, active units and shares in f."""
    pictures = _hierarchical_pictures(subject, "conditional")
    meaning = "What each latent layer does: samples in which one layer alone is drawn anew."
    if not full:
        return Section("hierarchy", "Hierarchy", meaning, 0.0, pictures=tuple(pictures))
    pictures += _hierarchical_pictures(subject, "marginal") + _walks(subject)
    accuracy = _latent_accuracy(subject)
    changed = {source: _changed(subject, source) for source in _SOURCES}
    posterior = _posterior_means(subject)
    active = [int((part > _ACTIVE_VARIANCE).sum()) for part in _split(subject, posterior.variances())]
    top, bottom = subject.layers[-1], subject.layers[0]
    classes = Table(
        "Layers, bottom first",
        (
            "layer",
            "classifier accuracy",
            "± standard error",
            "class changed, layer from its conditional",
            "± standard error",
            "class changed, layer of another sample",
            "± standard error",
            "active units",
        ),
        tuple(
            (layer, *accuracy[i], *changed["conditional"][i], *changed["marginal"][i], active[i])
            for i, layer in enumerate(subject.layers)
        ),
        "Accuracy of a classifier of the layer's posterior mean alone (linear to 256, ReLU, linear; 5,000 "
        "updates; paper, table 1). Changed: share of reconstructions whose class another classifier sees "
        f"change when this layer alone is drawn anew, of {_CHANGED_IMAGES:,} images at most. Active: latents "
        "whose posterior mean has a variance above 0.01.",
    )
    figures = [
        _figure(
            f"classifier accuracy, {top}",
            accuracy[-1],
            "Share of held-out images whose class the top layer's code tells (paper, table 1).",
            unit="share",
            better="higher",
        ),
        _figure(
            f"classifier accuracy, {bottom}",
            accuracy[0],
            "The same of the bottom layer, which is to hold detail, not the class.",
            unit="share",
        ),
        *(
            _figure(
                f"class changed, {layer}",
                changed["conditional"][i],
                "Share of images whose class changes when this layer is drawn anew given the others.",
                unit="share",
            )
            for i, layer in enumerate(subject.layers)
        ),
    ]
    return Section(
        "hierarchy",
        "Hierarchy",
        meaning + " The paper's claim is that the class lies at the top and detail at the bottom.",
        0.0,
        tuple(figures),
        (classes, *_effects(subject)),
        pictures=tuple(pictures),
    )


_SOURCES: tuple[Source, ...] = ("conditional", "marginal")
_ACTIVE_VARIANCE = 0.01
_GRID = 10


def _hierarchical_pictures(subject: Subject, source: Source) -> list[Picture]:
    drawn = {
        "conditional": "given the others, by Langevin with the others clamped",
        "marginal": "from another sample of the prior, whatever the others are",
    }
    pictures = []
    for layer in reversed(range(len(subject.layers))):
        x_RKCHW = hierarchical_samples(
            subject.model,
            subject.config.langevin,
            layer,
            subject.noise(0, "hierarchical samples"),
            rows=_GRID,
            columns=_GRID,
            source=source,
        )
        name = subject.layers[layer]
        title = f"{name} varies along a row{_place(subject, layer)}, {source}"
        file = f"hierarchy-{name}.png" if source == "conditional" else f"hierarchy-{name}-{source}.png"
        meaning = f"In each row one sample of the prior of which {name} alone is drawn anew, {drawn[source]}."
        pictures.append(_picture(title, file, x_RKCHW, meaning))
    return pictures


def _place(subject: Subject, layer: int) -> str:
    return {0: " (bottom)", len(subject.layers) - 1: " (top)"}.get(layer, "")


def _split(subject: Subject, values_D: Tensor) -> tuple[Tensor, ...]:
    return torch.split(values_D, subject.model.latent_dims)


def _posterior_means(subject: Subject) -> Means:
    def means(_position: int, rows: slice) -> Tensor:
        mean_BD: Tensor = subject.model.inference(subject.batch(rows)).mean_BD
        return mean_BD

    return subject.means(len(subject.images_NHWC), subject.model.latent_dim, means)


def _walks(subject: Subject) -> list[Picture]:
    """Return traversals of each layer, by one latent and by two, and interpolations between images."""
    model = subject.model
    z_BD = model.inference(subject.batch(slice(0, 2 * _PAIRS))).mean_BD
    variances = _split(subject, _posterior_means(subject).variances())
    values_K = torch.linspace(-_REACH, _REACH, _GRID + 1, device=subject.device)
    pictures = []
    for layer, columns in enumerate(subject.layer_columns):
        name = subject.layers[layer]
        # The latents that vary most over images, most first.
        chosen = [columns[i] for i in variances[layer].argsort(descending=True)[:_GRID].tolist()]
        z_RKD = torch.cat([traverse(z_BD[:1], column, values_K) for column in chosen])
        pictures.append(
            _picture(
                f"One latent of {name} varies along a row",
                f"traversal-{name}.png",
                pictured(model, z_RKD),
                f"The code of the first image, of which one latent of {name} goes from {-_REACH:g} to "
                f"{_REACH:g}; the latents that vary most over images, most first.",
            )
        )
        if len(chosen) > 1:
            z_KKD = traverse_plane(z_BD[0], (chosen[0], chosen[1]), values_K)
            pictures.append(
                _picture(
                    f"Two latents of {name} vary",
                    f"plane-{name}.png",
                    pictured(model, z_KKD),
                    f"The two latents of {name} that vary most, one downwards and one to the right.",
                )
            )
    pairs = len(z_BD) // 2
    z_RKD = interpolate(z_BD[:pairs], z_BD[pairs : 2 * pairs], _GRID, spherical=False)
    meaning = "Straight from the posterior mean of one image to that of another, in equal steps."
    return [*pictures, _picture("Interpolations", "interpolation.png", pictured(model, z_RKD), meaning)]


_PAIRS = 8
_REACH = 2.5


def _labels(images: ImageSet, count: int) -> Tensor:
    """Return the labels of the first images, (N,), int64; ConfigError where there are none."""
    if images.labels_N is None or not bool((images.labels_N[:count] >= 0).any()):
        name = f"{images.manifest.name} ({images.manifest.split})"
        raise ConfigError(f"suite: {name} has no labels, which the measure needs; name other measures")
    return torch.from_numpy(images.labels_N[:count].astype(np.int64))


def _latent_accuracy(subject: Subject) -> list[Estimate]:
    """Return the accuracy on held-out images of each layer's classifier, trained on the training images."""
    labels_N = _labels(subject.train, len(subject.train.images_NHWC))
    test_labels_N = _labels(subject.images, len(subject.images_NHWC))

    def training_batch(step: int) -> tuple[Tensor, Tensor]:
        stream = generator(subject.seed, 0, step, "latent classifiers' images")
        chosen_B = torch.randint(len(labels_N), (_CLASSIFIER_BATCH,), generator=stream)
        x_BCHW = to_float(subject.train.images_NHWC[chosen_B.numpy()], subject.device)
        return x_BCHW, labels_N[chosen_B].to(subject.device)

    with torch.enable_grad():
        classifiers = train_latent_classifiers(
            subject.model,
            training_batch,
            classes=int(max(labels_N.max(), test_labels_N.max())) + 1,
            updates=_CLASSIFIER_UPDATES,
            seed=subject.seed,
        )
    layers = len(subject.layers)

    def correct(_position: int, rows: slice) -> Tensor:
        labels_B = test_labels_N[rows].to(subject.device)
        right = torch.full((len(labels_B), layers), math.nan, dtype=torch.float64, device=subject.device)
        right[labels_B >= 0] = correct_by_layer(
            subject.model, classifiers, subject.batch(rows), labels_B
        ).double()
        return right

    right_NL = subject.rows(len(test_labels_N), layers, correct)
    means = Means(layers)
    means.add(right_NL[test_labels_N >= 0])
    return means.result()


_CLASSIFIER_UPDATES = 5000
_CLASSIFIER_BATCH = 128
_CHANGED_IMAGES = 1000


def _changed(subject: Subject, source: Source) -> list[Estimate]:
    def changed(position: int, rows: slice) -> Tensor:
        normal = subject.noise(position, f"changed classes, {source}")
        x_BCHW = subject.batch(rows)
        predict, langevin = subject.classifier.predict, subject.config.langevin
        return changed_classes(subject.model, x_BCHW, predict, langevin, normal, source=source)

    count = min(_CHANGED_IMAGES, len(subject.images_NHWC))
    return subject.means(count, len(subject.layers), changed).result()


def _effects(subject: Subject) -> list[Table]:
    """Return the layers' shares in f under N(0, I) and under the prior; none for the Gaussian prior."""
    if subject.tilt is None:
        return []
    langevin, dims = subject.config.langevin, subject.model.latent_dims
    normal = subject.noise(0, "layers' share in f")
    start_BD = normal(_DRAWS, subject.model.latent_dim)
    trace = run_chains(
        subject.tilt,
        start_BD,
        normal,
        steps=langevin.steps,
        step_size=langevin.step_size,
        every=langevin.steps,
    )
    laws = {
        "N(0, I)": energy_draws(subject.tilt, dims, start_BD, normal, None),
        "the prior": energy_draws(subject.tilt, dims, trace.z_TBD[-1], normal, langevin),
    }
    return [
        Table(
            f"Effect of each layer on f, z from {law}",
            ("layer", "alone", "±", "with others", "±", "change of f (nats)", "±"),
            tuple(
                (layer, *effect.first_order, *effect.total, *effect.change)
                for layer, effect in zip(subject.layers, layer_effects(draws), strict=True)
            ),
            "Alone: share of f's variance that the layer tells by itself; with others: share that the other "
            "layers leave open (Sobol's indices). Change: mean |f(z) - f(z')| when it alone is drawn anew. "
            "± is a standard error.",
        )
        for law, draws in laws.items()
    ]


_DRAWS = 2000


# ------------------------------------------------------------------------------------------------------- ood


@torch.no_grad()
def ood_section(subject: Subject, *, full: bool = True) -> Section:
    """Return how well each score tells other data sets, or one class of the data, from the data."""
    normal = _scores(subject, subject.images_NHWC, "scores")
    figures, tables = [], []
    paper, conditional = "log p(x, z)", f"L>{len(subject.layers) - 1}"
    for name, images in subject.out.items():
        found = detections(normal, _scores(subject, images.images_NHWC[: subject.samples], f"scores {name}"))
        tables.append(
            Table(
                f"Against {name}",
                ("score", "AUROC", "AUPRC", "FPR80", "FPR95"),
                tuple((score, *map(_finite, found[score])) for score in found),
                f"{len(subject.images_NHWC):,} images of the data are normal, "
                f"{min(subject.samples, len(images.images_NHWC)):,} of {name} are anomalies, the positive "
                "class. A random score has an AUROC of 0.5, and an AUPRC of the share of anomalies. FPR80: "
                "share of normal images taken for anomalies where 80 % of the anomalies are found.",
            )
        )
        shown = [paper, *([conditional] if conditional in found else [])]
        figures += [
            _figure(
                f"AUROC of {score}, {name}",
                found[score].auroc,
                "Chance that a normal image scores higher than an anomaly; 0.5 for a random score.",
                unit="share",
                better="higher",
            )
            for score in shown
        ]
    labels_N = None if subject.images.labels_N is None else _labels(subject.images, len(subject.images_NHWC))
    if labels_N is not None:
        tables.append(_by_label(normal, labels_N))
    nothing = "no other data set was given (--out-of-distribution), and there are no labels"
    return Section(
        "ood",
        "Out of distribution",
        "How well scores of the model tell images that it does not know: higher is more in-distribution, and "
        "the sign of each score is fixed by what it is. Of one run: intervals need several seeds.",
        0.0,
        tuple(figures),
        tuple(tables),
        warnings=() if tables else (nothing,),
    )


def _scores(subject: Subject, images_NHWC: npt.NDArray[np.uint8], purpose: str) -> dict[str, Tensor]:
    """Return score -> values of all images, (N,), on every worker."""
    layers = len(subject.layers)
    names = ["log p(x, z)", "log p(x|z)", "f", "log prior", "ELBO"]
    names += [f"{score}>{k}" for score in ("L", "-LLR") for k in range(1, layers)]
    log_z = subject.log_z.value

    def scored(position: int, rows: slice) -> Tensor:
        x_BCHW = subject.batch(rows, images_NHWC)
        normal = subject.noise(position, purpose)
        found = scores(subject.model, x_BCHW, normal, subject.config.langevin, log_z=log_z)
        return torch.stack([found[name] for name in names], 1)

    values_NC = subject.rows(len(images_NHWC), len(names), scored)
    columns = dict(zip(names, values_NC.T, strict=True))
    if subject.tilt is None:
        del columns["f"]  # constant
    return columns


def _by_label(normal: Mapping[str, Tensor], labels_N: Tensor) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    for label in sorted(set(labels_N[labels_N >= 0].tolist())):
        found: dict[str, Detection] = detections_by_label(normal, labels_N, label)
        rows.append((label, *(_finite(found[score].auprc) for score in normal)))
    return Table(
        "Each class as the anomaly: AUPRC",
        ("class", *normal),
        tuple(rows),
        "One class of the data against all others (paper, table 3). It tells something where the model was "
        "trained without that class; a random score has the class's share of the images.",
    )


# ---------------------------------------------------------------------------------------------------- chains


@torch.no_grad()
def chains_section(subject: Subject, *, full: bool = False) -> Section:
    """Return whether the sampler is valid; in full, a long chain in pictures and 2,000 steps more."""
    config = subject.config.langevin
    if subject.tilt is None:
        exact = "The prior is Gaussian: its samples are exact, and need no chain."
        return Section("chains", "Chains", exact, 0.0)
    factor = subject.config.evaluation.chain_factor
    if full:
        factor = max(factor, 1 + math.ceil(_DRIFT_STEPS / config.steps))
    normal = subject.noise(0, "chains from the prior")
    from_prior = chain_report(
        subject.tilt, normal(_CHAINS, subject.model.latent_dim), normal, config, factor=factor
    )
    normal = subject.noise(0, "chains from the posterior")
    posterior = subject.model.inference(subject.batch(slice(0, _CHAINS)))
    start_BD = posterior.rsample(normal(*posterior.mean_BD.shape))
    from_posterior = chain_report(subject.tilt, start_BD, normal, config, factor=factor)
    k, n = from_prior.steps, from_prior.long_steps
    figures = (
        _figure(
            "acceptance",
            from_prior.acceptance,
            "Share of the steps that a Metropolis check would take; below 0.8 the step size biases the "
            "samples.",
            unit="share",
            better="higher",
        ),
        _figure(
            "drift of f",
            from_prior.f_drift,
            f"Mean f after {n:,} steps less that after {k}: 0 where {k} steps are enough.",
            unit="nats",
        ),
        _figure("drift of |z|", from_prior.norm_drift, f"The same for |z|, from {k} to {n:,} steps."),
        _figure(
            "split R-hat of f",
            from_prior.f_r_hat,
            "1 where chains agree with one another and over time; above 1.1 they do not.",
            better="lower",
        ),
        _figure("largest split R-hat of z", from_prior.z_r_hat, "The same over the latents.", better="lower"),
        _figure(
            "effective samples of f",
            from_prior.f_effective_samples,
            f"Independent draws that tell as much of f as {_CHAINS} chains of {n - k:,} steps.",
            unit="samples",
            better="higher",
        ),
        _figure(
            "effective samples of z",
            from_prior.z_effective_samples,
            "The fewest over the latents.",
            unit="samples",
            better="higher",
        ),
        _figure(
            "what is left of the start",
            from_prior.start_left,
            f"(1 - s²/2)^{k}: of the noise that a chain begins with, where f is flat.",
            unit="share",
            better="lower",
        ),
        _figure(
            "stationary variance",
            from_prior.stationary_variance,
            "What the chain makes of a variance of 1 where f is flat.",
        ),
        _figure(
            "f of posterior samples",
            from_posterior.trace[0].f,
            f"Mean over {len(start_BD)} images; chains from N(0, I) end at {from_prior.trace[-1].f:.3f}.",
            unit="nats",
        ),
    )
    curves = []
    for name, what in (("f", "f"), ("norm", "|z|"), ("gradient_norm", "|grad log p(z)|")):
        lines = {
            label: tuple(float(getattr(point, name)) for point in report.trace)
            for label, report in (("from N(0, I)", from_prior), ("from posterior samples", from_posterior))
        }
        x = tuple(float(point.step) for point in from_prior.trace)
        meaning_ = "Means over the chains. Where both lines end together, neither start matters."
        curves.append(Curve(f"{what} along the chains", "Langevin steps", what, x, lines, meaning_))
    warnings = [f"from N(0, I): {line}" for line in warnings_of(from_prior)]
    pictures: list[Picture] = []
    if full:
        curve, picture = _long_chain(subject, subject.tilt)
        curves.append(curve)
        pictures.append(picture)
    return Section(
        "chains",
        "Chains",
        "Whether the Langevin sampler is valid at its step size, and its chains long enough: "
        f"{_CHAINS} chains of {n:,} steps, with langevin.steps {k} and langevin.step_size "
        f"{config.step_size:g}.",
        0.0,
        figures,
        curves=tuple(curves),
        pictures=tuple(pictures),
        warnings=tuple(warnings),
    )


_CHAINS = 200
_DRIFT_STEPS = 2000
_LONG_STEPS = 2500
_PICTURED_EVERY = 100
_PICTURED_CHAINS = 8


def _long_chain(subject: Subject, tilt: Tilt) -> tuple[Curve, Picture]:
    """Return the paper's long chain: its f, and a picture each 100 steps."""
    normal = subject.noise(0, "long chains")
    start_BD = normal(_PICTURED_CHAINS, subject.model.latent_dim)
    size = subject.config.langevin.step_size
    trace = run_chains(tilt, start_BD, normal, steps=_LONG_STEPS, step_size=size, every=_PICTURED_EVERY)
    curve = Curve(
        f"f along {_LONG_STEPS:,} steps",
        "Langevin steps",
        "f",
        tuple(map(float, trace.steps)),
        {f"chain {i + 1}": tuple(values) for i, values in enumerate(trace.f_TB.T.double().tolist())},
        "Each chain by itself: one that has settled goes up and down about the same value.",
    )
    picture = _picture(
        f"Chains of {_LONG_STEPS:,} steps",
        "chains-long.png",
        pictured(subject.model, trace.z_TBD.transpose(0, 1)),
        f"Each row a chain from N(0, I), decoded after each {_PICTURED_EVERY} steps. Images that stay good, "
        "and change, are those of a sampler that stays in the prior and moves in it.",
    )
    return curve, picture


_SECTIONS: Mapping[str, Callable[..., Section]] = {
    "likelihood": likelihood_section,
    "samples": samples_section,
    "hierarchy": hierarchy_section,
    "ood": ood_section,
    "chains": chains_section,
}
