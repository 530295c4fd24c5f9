"""The EBM prior p(z) proportional to exp(f(z)) p0(z), and sampling from it (paper eq. 5, 13-14).

Chains run in noise space: z = T(e), p(e) proportional to exp(f(T(e))) N(e; 0, I). Shapes: B batch, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from jebm.config import Langevin
from jebm.core.energy import SLOPE, EnergyNet
from jebm.core.langevin import ChainInfo, langevin, score_of
from jebm.core.model import JointModel
from jebm.rng import Normal

__all__ = ["log_density", "sample_prior"]


def log_density(energy: EnergyNet, latents: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return e -> f(T(e)) - |e|^2/2, (B, D) to (B,): the log-density of noise, up to log Z and log 2 pi.

    The energy's weights are resolved once (spectral norm does not depend on z) and held as constants.
    """
    layers = energy.resolved()

    def density(noise_BD: Tensor) -> Tensor:
        h = latents(noise_BD)
        for weight, bias in layers[:-1]:
            h = F.leaky_relu(F.linear(h, weight, bias), SLOPE)
        weight, bias = layers[-1]
        return F.linear(h, weight, bias).squeeze(1) - 0.5 * noise_BD.square().sum(1)

    return density


@torch.no_grad()
def sample_prior(
    model: JointModel, config: Langevin, count: int, normal: Normal
) -> tuple[Tensor, ChainInfo | None]:
    """Return `count` latents (B, D) from the model's prior, and the chain's info.

    With an energy: `config.steps` Langevin steps from fresh N(0, I) (short-run: the chain is part of the
    model). Without (the Gaussian prior): exact samples, and no chain.
    """
    noise_BD = normal(count, model.latent_dim)
    if model.energy is None:
        return model.generator.latents(noise_BD), None
    score = score_of(log_density(model.energy, model.generator.latents))
    noise_BD, info = langevin(score, noise_BD, normal, steps=config.steps, step_size=config.step_size)
    return model.generator.latents(noise_BD), info
