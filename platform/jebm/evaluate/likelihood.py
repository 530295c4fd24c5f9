"""How likely images are under a model: log Z of its prior, the normalised ELBO, importance-weighted bounds.

The prior is p(z) = exp(f(z)) N(z; 0, I) / Z. Training needs no Z; every figure in nats per image does:

    ELBO(x) = E_q[log p(x|z)] - KL(q(z|x) || N(0, I)) + E_q[f(z)] - log Z.

E_q[f] - log Z is what the tilt adds (the *gain*): too low a log Z makes a model look too good.

`jebm.evaluate.partition` estimates log Z, and says which way each estimate errs.

Shapes: B batch, C channels, H height, W width, D latent width of all layers together, bottom layer first,
K importance samples.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from jebm.core.distributions import standard_log_density
from jebm.core.model import JointModel
from jebm.evaluate.estimates import Estimate, Means, less
from jebm.rng import Normal

__all__ = [
    "Likelihood",
    "LikelihoodSums",
    "importance_weighted_bound",
]

_DECODED_AT_ONCE = 1000
_ACTIVE_VARIANCE = 0.01
_FIGURES = 8
"""Columns of `LikelihoodSums` before those of the layers' rates and the posterior means."""


@torch.no_grad()
def importance_weighted_bound(
    model: JointModel, x_BCHW: Tensor, normal: Normal, log_z: float, *, samples: int
) -> Tensor:
    """Return log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), z_k ~ q, of each image, (B,), float64, in nats.

    A lower bound of log p(x) in expectation, which approaches it as K = `samples` grows; K = 1 is the ELBO
    (Burda, Grosse and Salakhutdinov 2016, eq. 8). Here p(z) is the normalised prior. Decodes about a thousand
    images at a time.
    """
    features = model.inference(x_BCHW)
    total_B = torch.full((len(x_BCHW),), -math.inf, dtype=torch.float64, device=x_BCHW.device)
    at_once = max(1, _DECODED_AT_ONCE // len(x_BCHW))
    for first in range(0, samples, at_once):
        count = min(at_once, samples - first)
        repeated = [each.repeat(count, *[1] * (each.dim() - 1)) for each in features]
        posterior = model.along(repeated, normal(count * len(x_BCHW), model.latent_dim))
        z_BD = posterior.code_BD
        log_weight_B = (
            -model.distortion(x_BCHW.repeat(count, 1, 1, 1), z_BD)
            + model.f(z_BD)
            + standard_log_density(z_BD)
            - posterior.log_density().sum(1)
        )
        total_B = torch.logaddexp(total_B, log_weight_B.double().view(count, -1).logsumexp(0))
    return total_B - math.log(samples) - model.likelihood.constant(x_BCHW[0].numel()) - log_z


class Likelihood(NamedTuple):
    """Means over images with standard errors, in nats per image unless another unit is named.

    elbo = -distortion - rate + gain, gain = f_posterior - log_z. Figures that contain log Z count its error
    as well as the spread over images; for two models on the same images, that is not the error of their
    difference.
    """

    images: int
    elbo: Estimate
    bits_per_dim: Estimate
    """-elbo / (C H W log 2), in the usual unit of 256 levels a channel: plus log2(127.5) for a density.

    A density (gaussian) is evaluated at the levels, without dequantisation noise, so it is not a bound on the
    log-probability of discrete images; for sigma well above 1/127.5 the two hardly differ. The discretised
    logistic's is such a bound.
    """
    distortion: Estimate
    """-E_q[log p(x|z)], including the constant, which training leaves out."""
    constant: float
    """The part of the distortion that depends on no parameter (`Likelihood.constant`)."""
    squared_error: Estimate
    """|x - mean of p(x|z)|^2 per pixel, z ~ q(z|x)."""
    rate: Estimate
    """KL(q(z|x) || N(0, I)) of all layers."""
    rate_L: list[Estimate]
    """The same for each layer, bottom first."""
    f_posterior: Estimate
    """E_q[f(z)]; zero for the Gaussian prior."""
    log_z: Estimate
    gain: Estimate
    """E_q[f] - log Z: what the tilt adds to the ELBO, too large if log Z is a lower bound."""
    active_units: list[int]
    """Latents of each layer whose posterior mean varies over images: Var_x E[z|x] > 0.01 (Burda et al.)."""
    importance_weighted: Estimate | None
    """The importance-weighted bound, if requested."""


class LikelihoodSums:
    """The sums over images behind `Likelihood`; log Z enters only in `result`."""

    def __init__(self, model: JointModel, *, importance_samples: int = 0) -> None:
        """Take the model and K of the importance-weighted bound, 0 for none.

        Only `means.sums` must be added over ranks.
        """
        self.model = model
        self.importance_samples = importance_samples
        columns = _FIGURES + len(model.latent_dims) + model.latent_dim
        self.means = Means(columns, next(model.parameters()).device)

    @torch.no_grad()
    def add(self, x_BCHW: Tensor, normal: Normal) -> None:
        """Add a batch of images in [-1, 1], one posterior sample each."""
        model = self.model
        posterior = model.posterior(x_BCHW, normal(len(x_BCHW), model.latent_dim))
        z_BD = posterior.code_BD
        # The terms of the ELBO, with one posterior sample.
        constant = model.likelihood.constant(x_BCHW[0].numel())
        parameters_BPHW = model.generator(z_BD)
        distortion_B = model.likelihood.distortion(x_BCHW, parameters_BPHW).double() + constant
        error_B = (x_BCHW - model.likelihood.mean(parameters_BPHW)).square().mean(dim=(1, 2, 3))
        f_B = model.f(z_BD).double()
        rates = torch.split(posterior.rate().double(), model.latent_dims, dim=1)
        rate_BL = torch.stack([rate.sum(1) for rate in rates], 1)
        rate_B = rate_BL.sum(1)
        weighted_B = torch.zeros_like(f_B)
        if self.importance_samples:
            weighted_B = importance_weighted_bound(
                model, x_BCHW, normal, 0.0, samples=self.importance_samples
            )
        # One row per image: the figures, the layers' rates, the posterior means.
        figures = [
            torch.full_like(f_B, x_BCHW[0].numel()),
            torch.full_like(f_B, constant),
            f_B - distortion_B - rate_B,
            distortion_B,
            rate_B,
            f_B,
            weighted_B,
            error_B.double(),
        ]
        self.means.add(torch.cat([torch.stack(figures, 1), rate_BL, posterior.mean_BD.double()], 1))

    def result(self, log_z: Estimate) -> Likelihood:
        """Return the figures, given log Z (`Estimate(0.0, 0.0)` for the Gaussian prior)."""
        estimates = self.means.result()
        pixels, constant, unnormalised, distortion, rate, f_posterior, weighted, error = estimates[:_FIGURES]
        layers = len(self.model.latent_dims)
        elbo = less(unnormalised, log_z)
        per_bit, offset = pixels.value * math.log(2), self.model.likelihood.levels_offset
        variances = torch.split(self.means.variances()[_FIGURES + layers :], self.model.latent_dims)
        return Likelihood(
            images=int(self.means.sums[0, 0]),
            elbo=elbo,
            bits_per_dim=Estimate(-elbo.value / per_bit + offset, elbo.standard_error / per_bit),
            distortion=distortion,
            constant=constant.value,
            squared_error=error,
            rate=rate,
            rate_L=estimates[_FIGURES : _FIGURES + layers],
            f_posterior=f_posterior,
            log_z=log_z,
            gain=less(f_posterior, log_z),
            active_units=[int((variance > _ACTIVE_VARIANCE).sum()) for variance in variances],
            importance_weighted=less(weighted, log_z) if self.importance_samples else None,
        )
