"""The variational joint objective (paper eq. 9-12).

For one image, with z ~ q(z|x):
    ELBO(x) = E_q[log p(x|z)] - KL(q(z|x) || p0(z)) + E_q[f(z)] - log Z.
Gradient descent on the scalar

    loss = distortion + sum of rates - mean f(z_q) + mean f(z_p),      z_q ~ q(z|x), z_p ~ p(z), z_p constant,

gives each player its own gradient in one backward pass: generator and inference net see -ELBO (log Z does not
depend on them), the energy net sees E_p[grad f] - E_q[grad f] (the contrastive estimate of its own -ELBO,
since grad log Z = E_p[grad f]). The loss itself bounds nothing: f(z_p) only stands in for log Z.

Shapes: B batch, C channels, H height, W width, D latent width, L latent layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from jebm.core.distributions import DiagGaussian
from jebm.core.energy import EnergyNet
from jebm.core.model import JointModel

__all__ = ["Objective", "Terms", "distortion", "mean_f", "reconstruct"]


class Terms(NamedTuple):
    """Means over the batch, in nats, and q(z|x). `loss` carries the gradient; the rest is detached."""

    loss: Tensor
    distortion: Tensor
    """|x - decode(z_q)|^2 / (2 sigma^2): -log p(x|z) without its constant C H W log(2 pi sigma^2) / 2."""
    rate_L: Tensor
    """KL(q(z_i|x) || N(0, I)) of each layer, bottom first."""
    f_posterior: Tensor
    """f(z_q); zero for the Gaussian prior."""
    f_prior: Tensor
    """f(z_p); zero for the Gaussian prior."""
    posterior: DiagGaussian
    """q(z|x), detached: (B, D) each."""


def distortion(model: JointModel, x_BCHW: Tensor, mean_BCHW: Tensor) -> Tensor:
    """Return |x - mean|^2 / (2 sigma^2) of each image, (B,), in nats, in the images' precision."""
    error_B = (x_BCHW - mean_BCHW.to(x_BCHW.dtype)).square().sum(dim=(1, 2, 3))
    return error_B / (2 * model.likelihood_std**2)


@torch.no_grad()
def reconstruct(model: JointModel, x_BCHW: Tensor) -> Tensor:
    """Return the decoder's mean at the posterior's mean, (B, C, H, W), in (-1, 1)."""
    x: Tensor = model.generator(model.inference(x_BCHW).mean_BD)
    return x


class Objective(nn.Module):
    """The objective as a module, so that DDP sees one forward and one backward of all three nets."""

    def __init__(self, model: JointModel, *, autocast: torch.dtype | None = None) -> None:
        """Take the model; `autocast` (bfloat16 or None) is for the convolutional nets, never for f."""
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(self, x_BCHW: Tensor, posterior_noise_BD: Tensor, prior_z_BD: Tensor | None) -> Terms:
        """Return the terms for images in [-1, 1], noise for z_q and samples z_p of the prior.

        Without `prior_z_BD` they are those of the Gaussian prior, even if there is an energy net.
        """
        model = self.model
        with torch.autocast(x_BCHW.device.type, self.autocast, enabled=self.autocast is not None):
            posterior = model.inference(x_BCHW)
        # Moments, samples, rates and f in the images' precision: bf16 is too coarse for exp and sums of
        # squares.
        posterior = DiagGaussian(*(moment.to(x_BCHW.dtype) for moment in posterior))
        z_BD = posterior.rsample(posterior_noise_BD)
        with torch.autocast(x_BCHW.device.type, self.autocast, enabled=self.autocast is not None):
            mean_BCHW = model.generator(z_BD)
        distortion_ = distortion(model, x_BCHW, mean_BCHW).mean()
        rate_L = torch.stack(
            [part.sum(1).mean() for part in torch.split(posterior.rate(), model.latent_dims, dim=1)]
        )
        loss = distortion_ + rate_L.sum()
        f_posterior = f_prior = loss.new_zeros(())
        if model.energy is not None and prior_z_BD is not None:
            f_posterior, f_prior = mean_f(model.energy, z_BD, prior_z_BD.detach())
            loss = loss - f_posterior + f_prior
        elif model.energy is not None:
            # DDP waits for the gradient of every parameter: give it zeros.
            loss = loss + 0 * model.energy(z_BD[:1].detach()).sum()
        return Terms(
            loss,
            distortion_.detach(),
            rate_L.detach(),
            f_posterior.detach(),
            f_prior.detach(),
            DiagGaussian(*(moment.detach() for moment in posterior)),
        )


def mean_f(energy: EnergyNet, posterior_z_BD: Tensor, prior_z_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean f(z_q) and mean f(z_p), () each: the energy ascends the first and descends the second."""
    f_q, f_p = energy(torch.cat([posterior_z_BD, prior_z_BD])).split([len(posterior_z_BD), len(prior_z_BD)])
    return f_q.mean(), f_p.mean()
