"""The variational joint objective (paper eq. 9-12).

For one image, with z ~ q(z|x):
    ELBO(x) = E_q[log p(x|z)] - KL(q(z|x) || p0(z)) + E_q[f(z)] - log Z.
Gradient descent on the scalar

    loss = distortion + sum of rates - mean f(z_q) + mean f(z_p),      z_q ~ q(z|x), z_p ~ p(z), z_p constant,

gives each player its own gradient in one backward pass: generator and inference net see -ELBO (log Z does not
depend on them), the energy net sees E_p[grad f] - E_q[grad f] (the contrastive estimate of its own -ELBO,
since grad log Z = E_p[grad f]). The loss itself bounds nothing: f(z_p) only stands in for log Z.

Latents are codes here, z = T(u) (`jebm.core.parts`): f(z_p) is f(T(u_p)) with the code held constant, so that
where T has parameters they get the gradient of log Z as well. Rates may be weighted by layer, so that lower
layers join late (`jebm.core.schedule`).

Shapes: B batch, C channels, H height, W width, D width of a code, L latent layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jebm.core.model import JointModel

__all__ = ["Objective", "Terms", "energy_loss", "reconstruct"]


class Terms(NamedTuple):
    """Means over the batch, in nats, and features of q(u|x). Only `loss` carries a gradient."""

    loss: Tensor
    distortion: Tensor
    """-log p(x|z_q) without the likelihood's constant."""
    rate_L: Tensor
    """KL(q(z_i|x) || N(0, I)) of each layer, bottom first, without weights."""
    f_posterior: Tensor
    """f(z_q); zero for the Gaussian prior."""
    f_prior: Tensor
    """f(z_p); zero for the Gaussian prior."""
    features: tuple[Tensor, ...]
    """What the inference net makes of the images: see `jebm.core.parts.Inference`."""


@torch.no_grad()
def reconstruct(model: JointModel, x_BCHW: Tensor) -> Tensor:
    """Return the decoder's mean at the posterior's mean, (B, C, H, W), in [-1, 1]."""
    return model.decode(model.mean_code(x_BCHW))


class Objective(nn.Module):
    """The objective as a module, so that DDP sees one forward and one backward of all parts."""

    def __init__(
        self, model: JointModel, *, autocast: torch.dtype | None = None, penalty: float = 0.0
    ) -> None:
        """Take the model and the weight of the energy's penalty, mean f^2.

        `autocast` (bfloat16 or None) is for the convolutional nets, never for f.
        """
        super().__init__()
        self.penalty = penalty
        self.model = model
        self.autocast = autocast

    def forward(
        self,
        x_BCHW: Tensor,
        posterior_noise_BD: Tensor,
        prior_code_BD: Tensor | None,
        rate_weight_L: Tensor | None = None,
    ) -> Terms:
        """Return the terms for images in [-1, 1], noise for z_q, and codes of samples z_p of the prior.

        Without `prior_code_BD` they are those of the Gaussian prior, even if there is an energy net.
        `rate_weight_L` multiplies each layer's rate in the loss; None is 1 for all.
        """
        model, precision = self.model, x_BCHW.dtype
        with torch.autocast(x_BCHW.device.type, self.autocast, enabled=self.autocast is not None):
            features = model.inference(x_BCHW)
        # Moments, samples, rates, likelihood and f in the images' precision: bf16 is too coarse for exp and
        # sums of squares.
        features = tuple(each.to(precision) for each in features)
        posterior = model.along(features, posterior_noise_BD)
        with torch.autocast(x_BCHW.device.type, self.autocast, enabled=self.autocast is not None):
            parameters_BPHW = model.generator(posterior.code_BD)
        distortion = model.likelihood.distortion(x_BCHW, parameters_BPHW.to(precision)).mean()
        rate_L = torch.stack(
            [part.sum(1).mean() for part in torch.split(posterior.rate(), model.latent_dims, dim=1)]
        )
        loss = distortion + (rate_L if rate_weight_L is None else rate_weight_L * rate_L).sum()
        # The energy's two terms.
        f_posterior = f_prior = loss.new_zeros(())
        if model.energy is not None and prior_code_BD is not None:
            f_posterior, f_prior = _mean_f(model, posterior.code_BD, prior_code_BD.detach())
            loss = loss - f_posterior + f_prior
            if self.penalty > 0:
                loss = loss + self.penalty * _penalty(model, posterior.code_BD, prior_code_BD)
        elif model.energy is not None:
            # DDP waits for the gradient of every parameter: give it zeros.
            loss = loss + 0 * model.f(posterior.code_BD[:1].detach()).sum()
        return Terms(
            loss,
            distortion.detach(),
            rate_L.detach(),
            f_posterior.detach(),
            f_prior.detach(),
            tuple(each.detach() for each in features),
        )


def _mean_f(model: JointModel, posterior_BD: Tensor, prior_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean f of codes of both kinds, () each: the energy ascends the first and descends the second."""
    f_q, f_p = torch.split(model.f(torch.cat([posterior_BD, prior_BD])), [len(posterior_BD), len(prior_BD)])
    return f_q.mean(), f_p.mean()


def energy_loss(
    model: JointModel, features: Sequence[Tensor], noise_BD: Tensor, prior_BD: Tensor, penalty: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the energy's own loss, mean f(z_p) - mean f(z_q) with the penalty, then both means, ().

    z_q is drawn by standard normal noise from the features of q(u|x), z_p is given; only f is differentiated.
    """
    with torch.no_grad():
        posterior_BD = model.along(features, noise_BD).code_BD
    f_posterior, f_prior = _mean_f(model, posterior_BD, prior_BD)
    loss = f_prior - f_posterior
    if penalty > 0:
        loss = loss + penalty * _penalty(model, posterior_BD, prior_BD)
    return loss, f_posterior.detach(), f_prior.detach()


def _penalty(model: JointModel, posterior_BD: Tensor, prior_BD: Tensor) -> Tensor:
    """Return mean f^2 of posterior codes plus that of prior codes, (): a term of the energy's loss alone.

    Its gradient reaches the parameters of f and no others: both codes and latents are constants here.
    """
    if model.energy is None:
        return posterior_BD.new_zeros(())
    z_BS = model.seen(torch.cat([posterior_BD, prior_BD])).detach()
    f_q, f_p = torch.split(model.energy(z_BS), [len(posterior_BD), len(prior_BD)])
    return f_q.square().mean() + f_p.square().mean()
