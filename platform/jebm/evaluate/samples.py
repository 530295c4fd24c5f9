"""How good a model's samples are: its prior's images against real ones, in the features of a net.

The work is cut into batches, which workers share. The noise of a batch belongs to its position, and features
are gathered in the order of the images, so that the result does not depend on the number of workers.

Shapes: N real images, M samples, B batch, C channels, H rows, W columns, F features.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from jebm.config import Langevin
from jebm.core.model import JointModel
from jebm.core.objective import reconstruct
from jebm.core.prior import sample_prior
from jebm.data.loader import to_float, to_uint8
from jebm.errors import ConfigError
from jebm.evaluate.distances import (
    Distances,
    Moments,
    distances,
    frechet_distance,
    kernel_distance,
    real_floor,
)
from jebm.evaluate.features import FeatureNet
from jebm.rng import Noise

__all__ = [
    "ALONE",
    "BATCH",
    "Share",
    "gaussian_samples",
    "group_share",
    "image_features",
    "posterior_samples",
    "prior_samples",
    "sample_quality",
]

BATCH = 250
"""Images of a batch; fixed, since the noise of an image depends on it."""


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Share:
    """What of the work is this worker's: the batches rank, rank + world_size and so on.

    `total` returns the sum of a floating-point tensor on the CPU over all workers; all call it equally often.
    """

    rank: int = 0
    world_size: int = 1
    total: Callable[[Tensor], Tensor] = _same

    def batches(self, images: int) -> Iterator[tuple[int, slice]]:
        """Yield position and range of each batch of this worker, of so many images."""
        for position in range(self.rank, -(-images // BATCH), self.world_size):
            yield position, slice(position * BATCH, min(images, (position + 1) * BATCH))


ALONE = Share()
"""One worker that does it all."""


def group_share() -> Share:
    """Return this process's share of the work of torch.distributed's group (gloo); all of it without one."""
    if not dist.is_initialized():
        return ALONE

    def total(tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    return Share(dist.get_rank(), dist.get_world_size(), total)


@torch.no_grad()
def prior_samples(
    model: JointModel, config: Langevin, count: int, noise: Noise, *, share: Share = ALONE
) -> Iterator[Tensor]:
    """Yield this worker's batches (B, C, H, W) of `count` images decoded from prior samples, in (-1, 1).

    `config.steps` is the length of the chains: a longer chain goes on where a shorter one with the same noise
    ends. `noise` is that of rank 0 on every worker.
    """
    for position, rows in share.batches(count):
        normal = noise(position, "evaluated prior samples")
        z_BD, _ = sample_prior(model, config, rows.stop - rows.start, normal)
        yield model.generator(z_BD)


@torch.no_grad()
def gaussian_samples(
    model: JointModel, count: int, noise: Noise, *, share: Share = ALONE
) -> Iterator[Tensor]:
    """Yield images decoded from N(0, I), as `prior_samples`: from where their chains begin, without f."""
    for position, rows in share.batches(count):
        noise_BD = noise(position, "evaluated prior samples")(rows.stop - rows.start, model.latent_dim)
        yield model.generator(model.generator.latents(noise_BD))


@torch.no_grad()
def posterior_samples(
    model: JointModel, images_NHWC: npt.NDArray[np.uint8], noise: Noise, *, share: Share = ALONE
) -> Iterator[Tensor]:
    """Yield this worker's batches of images decoded from one z ~ q(z|x) of each real image."""
    device = next(model.parameters()).device
    for position, rows in share.batches(len(images_NHWC)):
        posterior = model.inference(to_float(images_NHWC[rows].copy(), device))
        normal = noise(position, "evaluated posterior samples")
        yield model.generator(posterior.rsample(normal(*posterior.mean_BD.shape)))


def image_features(images_NHWC: npt.NDArray[np.uint8], net: FeatureNet, *, share: Share = ALONE) -> Tensor:
    """Return the features (N, F) of all images, float32, on the CPU of every worker.

    Raises ConfigError where nodes have different nets.
    """
    return _gathered(_real_parts(images_NHWC, "cpu", share), len(images_NHWC), net, share)


def _real_parts(
    images_NHWC: npt.NDArray[np.uint8], device: torch.device | str, share: Share
) -> Iterator[Tensor]:
    for _, rows in share.batches(len(images_NHWC)):
        yield to_float(images_NHWC[rows].copy(), device)  # torch warns of memory that is read-only


def sample_quality(
    model: JointModel,
    config: Langevin,
    images_NHWC: npt.NDArray[np.uint8],
    real_NF: Tensor,
    net: FeatureNet,
    noise: Noise,
    *,
    count: int,
    chain_factor: int,
    floor: Distances | None = None,
    gaussian: bool = False,
    share: Share = ALONE,
) -> dict[str, dict[str, Any]]:
    """Return how far images of the model are from real ones, by name and then by measure, in plain values.

        features         name, dimension and sha256 of the net
        real_floor       one half of the real images against the other
        reconstructions  of the real images, at the mean of q(z|x)
        samples          `count` samples of the prior, chains of `config.steps` (0 for the Gaussian prior)
        samples_long     the same chains, `chain_factor` times as long: do they stay where they were?
        samples_gaussian where `gaussian` asks for it: N(0, I) through the same generator, without the tilt
        posterior_samples    of one z ~ q(z|x) of each real image

    All but the first have the fields of `Distances`, and `not_finite`, how many images were not: where there
    is one, the distances are None. Then, for each of samples, samples_long and samples_gaussian,

        samples_to_posterior, samples_long_to_posterior, samples_gaussian_to_posterior
                         frechet, kid, kid_standard_error, n, n_posterior: prior against aggregate posterior,
                         both through the same decoder, so that its blur is no part of the distance; 0 but
                         for chance where the two agree

    `real_NF` are the `image_features` of the real images, `floor` their `real_floor` where it is known
    already. `noise` is that of rank 0 on every worker; the result is the same on all, and for any number of
    them. Raises ConfigError for fewer images than a distance needs, or where nodes have trained different
    classifiers.
    """
    device = next(model.parameters()).device

    def features(parts: Iterable[Tensor], images: int) -> Tensor:
        return _gathered(parts, images, net, share)

    def sampled(steps: int) -> Tensor:
        return features(prior_samples(model, replace(config, steps=steps), count, noise, share=share), count)

    reconstructions = (reconstruct(model, x) for x in _real_parts(images_NHWC, device, share))
    posterior = posterior_samples(model, images_NHWC, noise, share=share)
    posterior_NF = features(posterior, len(images_NHWC))
    result: dict[str, dict[str, Any]] = {
        "features": {"name": net.name, "dimension": net.dimension, "sha256": net.sha256},
        "real_floor": {**asdict(floor or real_floor(real_NF)), "not_finite": 0},
        "reconstructions": _compared(real_NF, features(reconstructions, len(images_NHWC))),
        "posterior_samples": _compared(real_NF, posterior_NF),
    }

    def judge(name: str, steps: int, samples_MF: Tensor) -> None:
        result[name] = {"steps": steps, **_compared(real_NF, samples_MF)}
        result[f"{name}_to_posterior"] = _to_posterior(posterior_NF, samples_MF)

    samples_MF = sampled(config.steps)
    if model.energy is None:  # its samples are exact, and need no chain
        others = ["samples_long", *(["samples_gaussian"] if gaussian else [])]
        judge("samples", 0, samples_MF)
        for name in others:
            result[name] = dict(result["samples"])
            result[f"{name}_to_posterior"] = dict(result["samples_to_posterior"])
        return result
    judge("samples", config.steps, samples_MF)
    judge("samples_long", chain_factor * config.steps, sampled(chain_factor * config.steps))
    if gaussian:
        judge("samples_gaussian", 0, features(gaussian_samples(model, count, noise, share=share), count))
    return result


def _to_posterior(posterior_NF: Tensor, samples_MF: Tensor) -> dict[str, Any]:
    """Return the distances between two sets of generated images; None where an image is not finite."""
    frechet = kid = error = None
    if bool(posterior_NF.isfinite().all()) and bool(samples_MF.isfinite().all()):
        frechet = frechet_distance(Moments.of(posterior_NF), Moments.of(samples_MF)).value
        kid, error = kernel_distance(posterior_NF, samples_MF).squared
    return {
        "frechet": frechet,
        "kid": kid,
        "kid_standard_error": error,
        "n": len(samples_MF),
        "n_posterior": len(posterior_NF),
    }


def _compared(real_NF: Tensor, generated_MF: Tensor) -> dict[str, Any]:
    lost = int((~generated_MF.isfinite().all(1)).sum())
    if lost == 0:
        return {**asdict(distances(real_NF, generated_MF)), "not_finite": 0}
    unknown: dict[str, Any] = dict.fromkeys(field.name for field in fields(Distances))
    return {**unknown, "n": len(generated_MF), "n_real": len(real_NF), "not_finite": lost}


@torch.no_grad()
def _gathered(parts: Iterable[Tensor], count: int, net: FeatureNet, share: Share) -> Tensor:
    """Return the features of all `count` images, from this worker's batches and those of the others.

    Images are rounded to 8 bits first, as real ones are. Where one is not finite, its features are NaN.
    """
    mark = float(int(net.sha256[:4], 16))
    if float(share.total(torch.tensor([mark]))) != mark * share.world_size:
        raise ConfigError(
            f"evaluation.features: {net.name} is not the same net on all nodes; a classifier, which their"
            " processors round in other ways, needs JEBM_CACHE on a folder that they share, inceptionv3 the"
            " same file of weights on each"
        )
    features_NF = torch.zeros(count, net.dimension)
    for (_, rows), x_BCHW in zip(share.batches(count), parts, strict=True):
        finite_B = x_BCHW.isfinite().flatten(1).all(1)
        rounded_BCHW = to_uint8(x_BCHW.nan_to_num()).to(torch.float32).div_(127.5).sub_(1)
        features_NF[rows] = torch.where(finite_B[:, None], net(rounded_BCHW), torch.nan).cpu()
    # The rows of the others are zero here, so that adding rounds nothing.
    return share.total(features_NF)
