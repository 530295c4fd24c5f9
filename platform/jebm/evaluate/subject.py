"""What all measures share: the model, data, noise and this worker's batches; how to write pictures.

Workers share work on images in batches of `share.BATCH`; a batch's noise depends on its position, and
statistics are added in the order of the batches, so that the findings do not depend on the number of workers.
Images are read a batch at a time; only their features and scores are kept.

Shapes: N images, B batch, C columns of a statistic (channels in x_BCHW), H height, W width, P batches, R rows
and K columns of a picture.
"""

import io
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from jebm.config import Config
from jebm.core.model import JointModel
from jebm.data.dataset import ImageSet, load_images
from jebm.data.loader import to_float, to_uint8
from jebm.errors import ConfigError
from jebm.evaluate.chains import Tilt
from jebm.evaluate.estimates import Estimate, Means
from jebm.evaluate.features import FeatureNet, feature_net
from jebm.evaluate.features.classifier import ClassifierFeatures, classifier_features
from jebm.evaluate.features.of_images import RealImages, real_images
from jebm.evaluate.hierarchy import tilt_of
from jebm.evaluate.likelihood import Likelihood, LikelihoodSums
from jebm.evaluate.partition import (
    PILOT_CHAINS,
    AnnealedLogPartition,
    log_partition_annealed,
    log_partition_inside,
    log_partition_reverse,
)
from jebm.evaluate.share import ALONE, BATCH, Share
from jebm.report.findings import Picture
from jebm.rng import Noise, Normal, gaussian_noise
from jebm.store.storage import open_store

__all__ = ["COMPARED", "QUICK", "REPORT", "Sizes", "Subject", "finite", "labels", "picture"]

_SMALL_PIXELS = 65
"""Images up to this size are enlarged twice."""


@dataclass(frozen=True)
class Sizes:
    """How much work goes into log Z, and the purposes of its noise."""

    chains: int = 1000
    temperatures: int = 300
    """For annealing from below, from above and from inside."""
    below: str = "log Z from below"
    above: str = "log Z from above"


REPORT = Sizes()
QUICK = Sizes(500, 100, below="quick log Z")
COMPARED = Sizes(below="log Z", above="log Z, reverse")


@dataclass(eq=False)
class Subject:
    """What all measures work on: model, data, noise and this worker's share.

    All but the share is the same on all workers. What several measures need is computed at first use.
    """

    model: JointModel
    config: Config
    images: ImageSet
    """Images that the model has not seen."""
    out: Mapping[str, ImageSet] = field(default_factory=dict)
    """Images of a kind that the model does not know, by name."""
    samples: int = 10_000
    """Number of prior samples, and the most images of each set that are used."""
    seed: int = 0
    share: Share = ALONE
    sizes: Sizes = REPORT
    known: RealImages | None = None
    """The images of `real` with their features, if already computed."""
    trusted: Collection[str] = ()
    """Modules that a feature net's class may come from."""

    images_NHWC: npt.NDArray[np.uint8] = field(init=False)
    """The first `samples` of the images."""

    def __post_init__(self) -> None:
        """Keep only the first `samples` images."""
        self.images_NHWC = self.images.images_NHWC[: self.samples]

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @cached_property
    def noise(self) -> Noise:
        """The noise of rank 0, on every worker."""
        return gaussian_noise(self.seed, 0, self.device)

    @cached_property
    def tilt(self) -> Tilt | None:
        """The model's f; None for the Gaussian prior."""
        return tilt_of(self.model)

    @property
    def layers(self) -> list[str]:
        """Names of the latent layers, bottom first."""
        return [f"z{layer + 1}" for layer in range(len(self.model.latent_dims))]

    @property
    def layer_columns(self) -> list[list[int]]:
        """The columns of z that hold each layer."""
        return [list(range(*pair)) for pair in pairwise([0, *accumulate(self.model.latent_dims)])]

    @cached_property
    def train(self) -> ImageSet:
        """The images that the model was trained on."""
        return load_images(open_store(self.config.data.train))

    @cached_property
    def net(self) -> FeatureNet:
        """The net in whose features distances between images are computed."""
        if self.known is not None:
            return self.known.net
        if self.config.evaluation.features.name == "classifier":
            return self.classifier
        return feature_net(self.config, self.train, self.trusted, device=self.device)

    @cached_property
    def classifier(self) -> ClassifierFeatures:
        """A classifier of the training images' labels."""
        return classifier_features(self.train, device=self.device)

    @cached_property
    def real(self) -> RealImages:
        """The first `samples` images, which prior samples are compared with."""
        return self.known or real_images(self.images_NHWC, self.net, share=self.share)

    @cached_property
    def annealed(self) -> AnnealedLogPartition | None:
        """The lower bound of log Z; None for the Gaussian prior."""
        if self.tilt is None:
            return None
        normal, sizes = self.noise(0, self.sizes.below), self.sizes
        return log_partition_annealed(
            self.tilt, self.model.latent_dim, normal, chains=sizes.chains, temperatures=sizes.temperatures
        )

    @property
    def log_z(self) -> Estimate:
        """Return log Z from below; exactly 0 for the Gaussian prior."""
        return Estimate(0.0, 0.0) if self.annealed is None else self.annealed.log_z

    @cached_property
    def log_z_above(self) -> Estimate:
        """Log Z from above, annealed down from the final states of the chains from below."""
        if self.tilt is None or self.annealed is None:
            return Estimate(0.0, 0.0)
        start_BD, normal = self.annealed.end_BD, self.noise(0, self.sizes.above)
        return log_partition_reverse(self.tilt, start_BD, normal, temperatures=self.sizes.temperatures).log_z

    @cached_property
    def log_z_inside(self) -> Estimate:
        """Log Z from above, annealed down from corrected chains that have started at posterior samples."""
        if self.tilt is None:
            return Estimate(0.0, 0.0)
        normal, sizes = self.noise(0, "log Z from inside"), self.sizes
        start_BD = self.posterior_codes(sizes.chains + PILOT_CHAINS, normal)
        return log_partition_inside(self.tilt, start_BD, normal, temperatures=sizes.temperatures).log_z

    def posterior_codes(self, count: int, normal: Normal) -> Tensor:
        """Return `count` draws, (N, D), of q(z|x) of the first images; over again where these are fewer."""
        rows_N = np.arange(count) % len(self.images_NHWC)
        codes = []
        for first in range(0, count, BATCH):
            x_BCHW = to_float(self.images_NHWC[rows_N[first : first + BATCH]], self.device)
            codes.append(self.model.posterior(x_BCHW, normal(len(x_BCHW), self.model.latent_dim)).code_BD)
        return torch.cat(codes)

    def likelihood(
        self, images_NHWC: npt.NDArray[np.uint8], purpose: str = "likelihood", *, importance_samples: int = 0
    ) -> Likelihood:
        """Return the likelihood of images, with log Z from below.

        Batch i takes its noise from (i, `purpose`). `importance_samples` is K of the importance-weighted
        bound, 0 for none.
        """

        def sums(position: int, rows: slice) -> Tensor:
            one = LikelihoodSums(self.model, importance_samples=importance_samples)
            one.add(self.batch(rows, images_NHWC), self.noise(position, purpose))
            return one.means.sums.cpu()

        all_ = LikelihoodSums(self.model, importance_samples=importance_samples)
        all_.means.sums = self.added(len(images_NHWC), tuple(all_.means.sums.shape), sums)
        return all_.result(self.log_z)

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
        """Return the sum over batches of `part(position, rows)`, float64, in batch order on any workers."""
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


def finite(value: float | None) -> float | None:
    """Return a plain number; None if it is not finite, which JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else float(value)


def picture(title: str, file: str, x_RKCHW: Tensor, meaning: str, *, cover: bool = False) -> Picture:
    """Return a table of images in [-1, 1] as a PNG, separated by white lines; small ones enlarged twice."""
    x_RKHWC = to_uint8(x_RKCHW.nan_to_num()).permute(0, 1, 3, 4, 2).cpu().numpy()
    x_RKHWC = np.pad(x_RKHWC, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
    rows, columns, height, width, channels = x_RKHWC.shape
    page = x_RKHWC.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    image = Image.fromarray(page[:, :, 0] if channels == 1 else page)
    if max(height, width) <= _SMALL_PIXELS:
        image = image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return Picture(title, file, data.getvalue(), meaning, cover)


def labels(images: ImageSet, count: int) -> Tensor:
    """Return the labels of the first images, (N,), int64; ConfigError if there are none."""
    if images.labels_N is None or not bool((images.labels_N[:count] >= 0).any()):
        name = f"{images.manifest.name} ({images.manifest.split})"
        raise ConfigError(f"suite: {name} has no labels, which the measure needs; name other measures")
    return torch.from_numpy(images.labels_N[:count].astype(np.int64))
