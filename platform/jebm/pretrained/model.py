"""A trained model in Python: sample, encode, decode, and how likely images are.

Shapes: N images or codes, C channels, H height, W width, D width of a code (all layers, bottom first), L
layers.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jebm.classes import trusted_name
from jebm.config import Config, require_seed
from jebm.core.by_class import changed_origins
from jebm.core.model import JointModel, build_model
from jebm.core.precision import true_fp32
from jebm.data.loader import to_float
from jebm.errors import CheckpointError, ConfigError, DataError
from jebm.evaluate.estimates import Estimate
from jebm.evaluate.export import draw
from jebm.evaluate.hierarchy import tilt_of
from jebm.evaluate.likelihood import Likelihood, LikelihoodSums
from jebm.evaluate.partition import log_partition_annealed
from jebm.evaluate.restore import Restored, check_fit, config_of, planned, restored
from jebm.evaluate.share import ALONE, BATCH
from jebm.evaluate.subject import REPORT
from jebm.pretrained.folder import DESCRIPTION, WEIGHTS, Place, read_description, read_weights
from jebm.pretrained.hub import HUB, downloaded
from jebm.rng import Normal, gaussian_noise
from jebm.store.storage import open_store

__all__ = ["Codes", "Pretrained", "from_pretrained", "origin_of_run"]

_LOG = logging.getLogger("jebm.pretrained")
_MOST = 1.001  # floats that someone has scaled to [-1, 1]


class Codes(NamedTuple):
    """The posterior q(u|x) of some images."""

    mean_ND: Tensor
    """Its mean: each layer's given the means above it."""
    sample_ND: Tensor
    """One draw."""
    rate_NL: Tensor
    """KL(q || N(0, I)) of each layer along the draw, in nats."""


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A trained model; the same arguments give the same numbers, however many images there are.

    Samples to the bit; codes, of batches that may be smaller, to rounding.
    """

    model: JointModel
    """In evaluation mode; no parameter requires a gradient."""
    config: Config
    place: str
    """Where it was loaded from."""
    origin: Mapping[str, str]
    """run, step, checkpoint, weights, data_sha256, config_sha256, workers, created."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Return samples of the prior, (N, C, H, W), in [-1, 1]: those of `jebm sample` with this seed.

        Raises ConfigError if they are not finite, or count or seed cannot be.
        """
        if count < 1:
            raise ConfigError(f"count: {count} must be 1 or more")
        require_seed(seed, "seed")
        noise = gaussian_noise(seed, 0, self.device)
        return torch.cat([each.x_NCHW for each in draw(self.model, self.config.langevin, count, noise)])

    def encode(self, images: npt.NDArray[np.uint8] | Tensor, seed: int = 0) -> Codes:
        """Return the codes of images: pixels, uint8, (N, H, W, C), or floats, (N, C, H, W), in [-1, 1].

        Raises DataError for images of another shape or kind, or floats beyond [-1, 1]; ConfigError for a
        number that is no seed.
        """
        return Codes(*map(torch.cat, zip(*self.encoded(images, seed), strict=True)))

    def encoded(self, images: npt.NDArray[np.uint8] | Tensor, seed: int = 0) -> Iterator[Codes]:
        """Yield the codes of `encode` batch by batch, 250 images each, for more images than memory holds."""
        self._check(images)
        for x_BCHW, normal in self._batches(images, seed, "codes"):
            yield self._encoded(x_BCHW, normal)

    @torch.no_grad()
    def decode(self, codes_ND: Tensor) -> Tensor:
        """Return the means of p(x|u), (N, C, H, W), in [-1, 1].

        Raises DataError unless the codes are finite floats of the model's width.
        """
        wanted = self.model.latent_dim
        if (
            not isinstance(codes_ND, Tensor)
            or not codes_ND.is_floating_point()
            or codes_ND.dim() != 2
            or codes_ND.shape[1] != wanted
            or not len(codes_ND)
            or not codes_ND.isfinite().all()
        ):
            raise DataError(f"codes: {_kind(codes_ND)}; give a tensor of finite floats, (N, {wanted})")
        batches = torch.split(codes_ND.to(self.device, torch.float32), BATCH)
        return torch.cat([self.model.decode(code_BD) for code_BD in batches])

    @true_fp32()
    def likelihood(self, images: npt.NDArray[np.uint8] | Tensor, seed: int = 0) -> Likelihood:
        """Return the bound of log p(x) and its terms, as `jebm evaluate` measures them; images as `encode`.

        The first call takes seconds for log Z.
        """
        self._check(images)
        sums = LikelihoodSums(self.model)
        for x_BCHW, normal in self._batches(images, seed, "likelihood"):
            sums.add(x_BCHW, normal)
        return sums.result(self.log_z)

    @cached_property
    def log_z(self) -> Estimate:
        """The lower bound of log Z, with `jebm evaluate`'s seed 0; exactly 0 for the Gaussian prior."""
        tilt = tilt_of(self.model)
        if tilt is None:
            return Estimate(0.0, 0.0)
        normal = gaussian_noise(0, 0, self.device)(0, REPORT.below)
        return log_partition_annealed(
            tilt, self.model.latent_dim, normal, chains=REPORT.chains, temperatures=REPORT.temperatures
        ).log_z

    @torch.no_grad()
    def _encoded(self, x_BCHW: Tensor, normal: Normal) -> Codes:
        model = self.model
        features = model.inference(x_BCHW)
        # A whole batch's noise, so that an image's does not depend on how many come after it.
        noise_BD = normal(BATCH, model.latent_dim)[: len(x_BCHW)]
        posterior = model.along(features, noise_BD)
        rates = torch.split(posterior.rate(), model.latent_dims, dim=1)
        return Codes(
            model.along(features, torch.zeros_like(noise_BD)).code_BD,
            posterior.code_BD,
            torch.stack([rate_BD.sum(1) for rate_BD in rates], 1),
        )

    def _check(self, images: npt.NDArray[np.uint8] | Tensor) -> None:
        channels, height, width = self.model.shapes.image
        if isinstance(images, Tensor):
            right = images.is_floating_point() and images.shape[1:] == (channels, height, width)
        else:
            right = isinstance(images, np.ndarray) and images.dtype == np.uint8
            right = right and images.shape[1:] == (height, width, channels)
        if not right or not len(images):
            raise DataError(
                f"images: {_kind(images)}; give uint8 pixels (N, {height}, {width}, {channels}) or a "
                f"float tensor (N, {channels}, {height}, {width}) in [-1, 1]"
            )
        if isinstance(images, Tensor) and not (most := float(images.abs().max())) <= _MOST:
            raise DataError(
                f"images: floats lie in [-1, 1], and these reach {most:g}; give x / 127.5 - 1 for pixels x"
            )

    def _batches(
        self, images: npt.NDArray[np.uint8] | Tensor, seed: int, purpose: str
    ) -> Iterator[tuple[Tensor, Normal]]:
        """Yield the images as floats in [-1, 1] on the device, some at a time, each with its noise."""
        require_seed(seed, "seed")
        noise = gaussian_noise(seed, 0, self.device)
        for position, rows in ALONE.batches(len(images)):
            some = images[rows]
            if isinstance(some, Tensor):
                x_BCHW = some.to(self.device, torch.float32)
            else:
                x_BCHW = to_float(some.copy(), self.device)
            yield x_BCHW, noise(position, purpose)


def _kind(value: object) -> str:
    """Return what kind of array a value is, in words."""
    if isinstance(value, Tensor | np.ndarray):
        return f"are {value.dtype}, {tuple(value.shape)}"
    return f"are a {type(value).__name__}"


def from_pretrained(
    place: str, trust: Collection[str] = (), *, device: torch.device | str = "cpu"
) -> Pretrained:
    """Return the model of a folder that `jebm export` wrote, or of a run (its newest checkpoint).

    `place` is a folder, s3://bucket/…, file://…, hf://org/name (@revision: a branch, tag or commit of the
    hub), a run or one of its checkpoints. Hashes are checked and nothing is unpickled; classes that the
    model's config names are imported only from the top-level modules in `trust`.

    Raises:
        CheckpointError: something is missing or damaged, or does not fit its config.
        ConfigError: the config names a class of a module that is not trusted, or that cannot be built.
        StoreError: the place cannot be read.
    """
    trusted = [trusted_name(name) for name in ([trust] if isinstance(trust, str) else trust)]
    here = downloaded(place) if place.startswith(HUB) else Place(open_store(place))
    files = [here.store.head(f"{here.prefix}{name}") for name in (DESCRIPTION, WEIGHTS)]
    if not any(files) and not place.startswith(HUB):
        if next(iter(here.store.list()), None) is None:
            raise CheckpointError(f"{place}: nothing here; give a folder of jebm export, or a run")
        run = restored(place, device=device, trusted=trusted)
        return Pretrained(run.model, run.config, run.uri, origin_of_run(run))
    # Code is only run, and weights are only read, once the description is known to be complete.
    description = read_description(here)
    config = config_of(description.config, description.provenance, place)
    plan = planned(config, trusted, place)
    if changed := changed_origins(config, trusted, description.provenance):
        _LOG.warning("%s: made with another source of %s", place, ", ".join(changed))
    tensors = read_weights(here, description)
    check_fit(plan, config, tensors, place)
    model = build_model(config, trusted)
    model.load_state_dict(tensors)
    model = model.to(device).eval().requires_grad_(requires_grad=False)
    return Pretrained(model, config, place, description.origin)


def origin_of_run(found: Restored) -> dict[str, str]:
    """Return where a restored model comes from."""
    manifest = found.manifest
    return {
        "run": manifest.run,
        "step": str(manifest.step),
        "checkpoint": manifest.name,
        "weights": "averaged" if found.weights == "ema" else "last",
        "data_sha256": str(manifest.state.get("data_sha256", "unknown")),
        "config_sha256": manifest.config_sha256,
        "workers": str(manifest.world_size),
        "created": manifest.created.isoformat(timespec="seconds"),
    }
