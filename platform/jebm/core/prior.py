"""The EBM prior p(z) proportional to exp(f(z)) p0(z), and sampling from it (paper eq. 5, 13-14).

Chains run in noise space: z = T(e), p(e) proportional to exp(f(T(e))) N(e; 0, I). Shapes: B batch, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from jebm.config import Langevin
from jebm.core.chain import closed_form_langevin
from jebm.core.energy import EnergyNet
from jebm.core.langevin import ChainInfo, langevin, score_of
from jebm.core.model import JointModel
from jebm.core.philox import PhiloxNoise
from jebm.native import chain as native
from jebm.native import triton_chain
from jebm.rng import Normal

__all__ = ["chain_kernel", "log_density", "sample_prior"]


def log_density(energy: EnergyNet, latents: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return e -> f(T(e)) - |e|^2/2, (B, D) to (B,): the log-density of noise, up to log Z and log 2 pi.

    The energy's weights are resolved once (spectral norm does not depend on z) and held as constants.
    """
    f = energy.resolved().f

    def density(noise_BD: Tensor) -> Tensor:
        return f(latents(noise_BD)) - 0.5 * noise_BD.square().sum(1)

    return density


@torch.no_grad()
def sample_prior(
    model: JointModel, config: Langevin, count: int, normal: Normal
) -> tuple[Tensor, ChainInfo | None]:
    """Return `count` latents (B, D) from the model's prior, and the chain's info.

    With an energy: `config.steps` Langevin steps from fresh N(0, I) (short-run: the chain is part of the
    model), without autograd where T is the identity. Without (the Gaussian prior): exact samples, and no
    chain.
    """
    start_BD = normal(count, model.latent_dim)
    start_z_BD = model.generator.latents(start_BD)
    if model.energy is None:
        return start_z_BD, None
    if config.noise == "philox":
        normal = PhiloxNoise(normal)
    if start_z_BD is start_BD and config.kernel != "autograd":  # T is the identity
        unseen = model.energy.unseen
        z_BD, info = closed_form_langevin(
            model.energy.resolved().without_columns(unseen),
            start_BD[:, unseen:],
            normal,
            steps=config.steps,
            step_size=config.step_size,
            compiled=config.kernel == "auto",
        )
        # What f does not see is N(0, I) and independent of the rest: exact, as it was drawn.
        return torch.cat([start_BD[:, :unseen], z_BD], 1), info
    score = score_of(log_density(model.energy, model.generator.latents))
    noise_BD, info = langevin(score, start_BD, normal, steps=config.steps, step_size=config.step_size)
    return model.generator.latents(noise_BD), info


@torch.no_grad()
def chain_kernel(model: JointModel, config: Langevin) -> str:
    """Return in a few words what computes the chains of `sample_prior` for this model, where it is now."""
    if model.energy is None:
        return "none (Gaussian prior)"
    noise_BD = next(model.energy.parameters()).new_zeros(1, model.latent_dim)
    if config.kernel == "autograd" or model.generator.latents(noise_BD) is not noise_BD:
        return "autograd"
    if config.kernel == "torch" or noise_BD.dtype != torch.float32:
        return "torch"
    layers = model.energy.resolved().without_columns(model.energy.unseen).layers
    seen_BD = noise_BD[:, model.energy.unseen :]
    if not noise_BD.is_cpu or triton_chain.usable(layers, seen_BD):
        return triton_chain.describe(layers, seen_BD)
    return native.describe()
