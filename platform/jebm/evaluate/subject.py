"""What all sections of a report work on: the model, data and noise; and how they write figures and pictures.

Work on images is cut into batches of `samples.BATCH`, which workers share; the noise of a batch belongs to
its position, and statistics are added in the order of the batches, so that the findings do not depend on the
number of workers. Images are read a batch at a time; of an image no more stays than its features and scores.

Shapes: N images, B batch, C columns of a statistic (channels in x_BCHW), H height, W width, P batches, R rows
and K columns of a picture.
"""

import io
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from jebm.data.dataset import ImageSet, load_images
from jebm.data.loader import to_float, to_uint8
from jebm.errors import ConfigError
from jebm.evaluate.estimates import Estimate, Means
from jebm.evaluate.features import FeatureNet, feature_net
from jebm.evaluate.features.classifier import ClassifierFeatures, classifier_features
from jebm.evaluate.hierarchy import tilt_of
from jebm.evaluate.partition import AnnealedLogPartition, log_partition_annealed
from jebm.evaluate.restore import Restored
from jebm.evaluate.samples import ALONE, BATCH, Share
from jebm.report.findings import Figure, Picture
from jebm.rng import gaussian_noise
from jebm.store.storage import open_store

__all__ = ["AIS_TEMPERATURES", "Subject", "figure", "finite", "labels", "picture"]


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
        return feature_net(self.config.evaluation, self.train, device=self.device)

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
            self.tilt, self.model.latent_dim, normal, chains=_AIS_CHAINS, temperatures=AIS_TEMPERATURES
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
AIS_TEMPERATURES = 300
"""Of annealing, from below and from above alike."""


def figure(
    name: str,
    value: float | Estimate | None,
    meaning: str,
    *,
    unit: str = "",
    better: Literal["lower", "higher"] | None = None,
    error: float | None = None,
) -> Figure:
    """Return a figure, its standard error that of an `Estimate` or `error`; what is not finite is None."""
    if isinstance(value, Estimate):
        value, error = value
    known = None if value is None or not math.isfinite(value) else float(value)
    return Figure(name, known, finite(error) if known is not None else None, unit, better, meaning)


def finite(value: float | None) -> float | None:
    """Return a plain number; None where it is not finite, as JSON has no such number."""
    return None if value is None or not math.isfinite(value) else float(value)


def picture(title: str, file: str, x_RKCHW: Tensor, meaning: str, *, cover: bool = False) -> Picture:
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
    return Picture(title, file, data.getvalue(), meaning, cover)


_SMALL_PIXELS = 65


def labels(images: ImageSet, count: int) -> Tensor:
    """Return the labels of the first images, (N,), int64; ConfigError where there are none."""
    if images.labels_N is None or not bool((images.labels_N[:count] >= 0).any()):
        name = f"{images.manifest.name} ({images.manifest.split})"
        raise ConfigError(f"suite: {name} has no labels, which the measure needs; name other measures")
    return torch.from_numpy(images.labels_N[:count].astype(np.int64))
