"""The section on likelihood: log Z of the tilt from both sides, the ELBO with it, rates by layer.

Shapes: B batch, D latent width of all layers together, L layers.
"""

import math

import torch
from torch import Tensor

from jebm.evaluate.estimates import Estimate
from jebm.evaluate.likelihood import Likelihood, LikelihoodSums
from jebm.evaluate.partition import log_partition_importance, log_partition_reverse
from jebm.evaluate.subject import AIS_TEMPERATURES, Subject, figure
from jebm.report.findings import Figure, Section, Table

__all__ = ["likelihood_section"]


@torch.no_grad()
def likelihood_section(subject: Subject, *, full: bool = False) -> Section:
    """Return log Z from both sides, the ELBO with it, rates by layer; in full, a tighter bound."""
    found = _likelihood(subject, len(subject.images_NHWC), "likelihood", subject.log_z)
    channels, height, width = subject.batch(slice(0, 1)).shape[1:]
    pixels, variance = channels * height * width, subject.model.likelihood_std**2
    mse = 2 * variance * (found.distortion.value - found.constant) / pixels
    mse_error = 2 * variance * found.distortion.standard_error / pixels
    figures = [
        figure(
            "ELBO",
            found.elbo,
            "Lower bound of log p(x) for one image, with the normalised prior and all constants; a little "
            "too high where log Z is taken from below and its effective share is small.",
            unit="nats",
            better="higher",
        ),
        figure(
            "gain of the tilt",
            found.gain,
            "E_q[f] - log Z: what the EBM prior adds to the ELBO; 0 for the Gaussian prior.",
            unit="nats",
            better="higher",
        ),
        figure(
            "bits per dimension",
            found.bits_per_dim,
            "The ELBO for one of the pixel values, as for 8-bit images.",
            unit="bits/dim",
            better="lower",
        ),
        figure(
            "distortion",
            found.distortion,
            "-E_q[log p(x|z)], with its constant: what the code leaves to say.",
            unit="nats",
            better="lower",
        ),
        figure(
            "rate",
            found.rate,
            "KL(q(z|x) || N(0, I)) of all layers together: what the code costs without the tilt.",
            unit="nats",
        ),
        figure(
            "reconstruction MSE",
            mse,
            "Mean squared error of a pixel in [-1, 1], decoded from z ~ q(z|x).",
            better="lower",
            error=mse_error,
        ),
        figure("E_q[f]", found.f_posterior, "Mean f of posterior samples.", unit="nats"),
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
            figure(
                f"importance-weighted bound, K = {_IWAE_SAMPLES}",
                weighted.importance_weighted,
                f"Of the first {images:,} images: nearer to log p(x) than the ELBO, which is K = 1.",
                unit="nats",
                better="higher",
            ),
            figure("ELBO of the same images", weighted.elbo, "K = 1, for comparison.", unit="nats"),
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
        tilt, below.end_BD, subject.noise(0, "log Z from above"), temperatures=AIS_TEMPERATURES
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
        figure("log Z from below", below.log_z, "By annealing from N(0, I) to the prior.", unit="nats"),
        figure(
            "log Z from above",
            above.log_z,
            "By annealing back, from where the chains have ended: log Z lies between the two.",
            unit="nats",
        ),
        figure(
            "ELBO with log Z from above",
            found.elbo.value + below.log_z.value - above.log_z.value,
            "The cautious one of the two.",
            unit="nats",
            better="higher",
            error=math.hypot(found.elbo.standard_error, above.log_z.standard_error),
        ),
        figure(
            "effective share of log Z",
            below.effective_share,
            "Effective sample size of the annealing chains over their number; below 0.2, do not trust log Z.",
            unit="share",
            better="higher",
        ),
        figure(
            "log Z by importance sampling",
            plain.log_z,
            f"From {_IMPORTANCE_SAMPLES:,} draws of N(0, I), a check; its effective share is "
            f"{plain.effective_share:.2g}.",
            unit="nats",
        ),
    ]


_IMPORTANCE_SAMPLES = 100_000
