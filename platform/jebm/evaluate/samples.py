"""How good a model's samples are: images of its prior against real ones, in the features of a net.

`sample_quality` compares these sets of images:

    real_floor         one half of the real images against the other
    reconstructions    the real images, decoded from the mean of q(z|x)
    posterior_samples  decoded from one z ~ q(z|x) for each real image
    samples            from the prior, with chains of `langevin.steps` (0 for the Gaussian prior)
    samples_long       the same chains, several times as long: do they stay where they were?
    samples_gaussian   N(0, I) through the same generator, without the tilt

Workers share the work, in batches. A batch's noise depends on its position, and features are gathered in the
order of the images, so that the result does not depend on the number of workers.

Shapes: N real images, M samples, B batch, C channels, H rows, W columns, F features.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jebm.config import Langevin
from jebm.core.model import JointModel
from jebm.core.objective import reconstruct
from jebm.core.prior import sample_prior
from jebm.data.loader import to_float
from jebm.evaluate.distances import Distances, Moments, distances, frechet_distance, kernel_distance
from jebm.evaluate.features.of_images import features_of
from jebm.evaluate.share import ALONE, Share
from jebm.evaluate.subject import Subject
from jebm.rng import Noise

__all__ = [
    "gaussian_samples",
    "posterior_samples",
    "prior_samples",
    "sample_measures",
    "sample_quality",
]

_KINDS = {"samples": "", "samples_long": "_long", "samples_gaussian": "_gaussian"}
"""Sets of samples -> suffix of the names of their measures."""


@torch.no_grad()
def prior_samples(
    model: JointModel, config: Langevin, count: int, noise: Noise, *, share: Share = ALONE
) -> Iterator[Tensor]:
    """Yield this worker's batches (B, C, H, W) of `count` images decoded from prior samples, in (-1, 1).

    `config.steps` is the length of the chains: a longer chain continues a shorter one with the same noise.
    All workers pass the `noise` of rank 0.
    """
    for position, rows in share.batches(count):
        normal = noise(position, "evaluated prior samples")
        z_BD, _ = sample_prior(model, config, rows.stop - rows.start, normal)
        yield model.decode(z_BD)


@torch.no_grad()
def gaussian_samples(
    model: JointModel, count: int, noise: Noise, *, share: Share = ALONE
) -> Iterator[Tensor]:
    """Yield images decoded from N(0, I), as `prior_samples`: from the start of their chains, without f."""
    for position, rows in share.batches(count):
        noise_BD = noise(position, "evaluated prior samples")(rows.stop - rows.start, model.latent_dim)
        yield model.decode(noise_BD)


@torch.no_grad()
def posterior_samples(
    model: JointModel, images_NHWC: npt.NDArray[np.uint8], noise: Noise, *, share: Share = ALONE
) -> Iterator[Tensor]:
    """Yield this worker's batches of images decoded from one z ~ q(z|x) for each real image."""
    device = next(model.parameters()).device
    for position, rows in share.batches(len(images_NHWC)):
        x_BCHW = to_float(images_NHWC[rows].copy(), device)
        normal = noise(position, "evaluated posterior samples")
        yield model.decode(model.posterior(x_BCHW, normal(len(x_BCHW), model.latent_dim)).code_BD)


def sample_quality(subject: Subject, *, factor: int, gaussian: bool = False) -> dict[str, dict[str, Any]]:
    """Return how far images of the model are from real ones, by set and measure, as plain values.

    `features` has name, dimension and sha256 of the net. Each set of the module's list has the fields of
    `Distances`, and `not_finite`, how many images were not finite: if any, the distances are None. Long
    chains are `factor` times as long as short ones; `gaussian` adds samples_gaussian. Each set SET of samples
    is also compared with posterior_samples, both through the same decoder, so that its blur does not count:
    SET_to_posterior has frechet, kid, kid_standard_error, n, n_posterior; 0 up to chance if prior and
    aggregate posterior agree.

    Raises:
        ConfigError: a distance needs more images, or nodes have trained different classifiers.
    """
    model, real, share, net = subject.model, subject.real, subject.share, subject.real.net
    reconstructions = (reconstruct(model, x) for x in real.batches(subject.device, share))
    posterior = posterior_samples(model, real.images_NHWC, subject.noise, share=share)
    posterior_NF = features_of(posterior, len(real.images_NHWC), net, share)
    reconstructed_NF = features_of(reconstructions, len(real.images_NHWC), net, share)
    result: dict[str, dict[str, Any]] = {
        "features": {"name": net.name, "dimension": net.dimension, "sha256": net.sha256},
        "real_floor": {**asdict(real.floor), "not_finite": 0},
        "reconstructions": _compared(real.features_NF, reconstructed_NF),
        "posterior_samples": _compared(real.features_NF, posterior_NF),
    }
    for name, steps, parts in _sample_sets(subject, factor, gaussian=gaussian):
        samples_MF = features_of(parts, subject.samples, net, share)
        result[name] = {"steps": steps, **_compared(real.features_NF, samples_MF)}
        result[f"{name}_to_posterior"] = _to_posterior(posterior_NF, samples_MF)
    # Samples of the Gaussian prior are exact: longer chains and N(0, I) give the same set.
    for name in ("samples_long", *(["samples_gaussian"] if gaussian else [])):
        result.setdefault(name, result["samples"])
        result.setdefault(f"{name}_to_posterior", result["samples_to_posterior"])
    return result


def _sample_sets(
    subject: Subject, factor: int, *, gaussian: bool
) -> Iterator[tuple[str, int, Iterable[Tensor]]]:
    """Yield the name, chain steps and batches of images of each set of samples."""
    model, count, noise, share = subject.model, subject.samples, subject.noise, subject.share
    langevin = subject.config.langevin
    exact = model.energy is None
    for name, times in (("samples", 1), *([] if exact else [("samples_long", factor)])):
        longer = replace(langevin, steps=times * langevin.steps)
        yield name, 0 if exact else longer.steps, prior_samples(model, longer, count, noise, share=share)
    if gaussian and not exact:
        yield "samples_gaussian", 0, gaussian_samples(model, count, noise, share=share)


def sample_measures(quality: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the results of `sample_quality` under the names of the catalogue."""
    values = {
        "frechet_reconstructions": quality["reconstructions"]["frechet"],
        "frechet_floor": quality["real_floor"]["frechet"],
    }
    for kind, ending in _KINDS.items():
        if kind in quality:
            taken = ("frechet", "kid", "precision", "recall")
            values |= {f"{name}{ending}": quality[kind][name] for name in taken}
            values[f"frechet_posterior{ending}"] = quality[f"{kind}_to_posterior"]["frechet"]
    return values


def _to_posterior(posterior_NF: Tensor, samples_MF: Tensor) -> dict[str, Any]:
    """Return the distances between two sets of generated images; None if an image is not finite."""
    frechet = kid = error = None
    if bool(posterior_NF.isfinite().all()) and bool(samples_MF.isfinite().all()):
        frechet = frechet_distance(Moments.of(posterior_NF), Moments.of(samples_MF))
        kid, error = kernel_distance(posterior_NF, samples_MF)
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
