"""The EBM prior p(z) proportional to exp(f(z)) p0(z), and sampling from it (paper eq. 5, 13-14).

Chains run in noise space: z = T(e), p(e) proportional to exp(f(T(e))) N(e; 0, I). Shapes: B batch, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from jebm.config import Langevin
from jebm.core.chain import closed_form_langevin
from jebm.core.energy import EnergyNet
from jebm.core.kernels import TORCH, Kernel, fastest
from jebm.core.langevin import ChainInfo, langevin, score_of
from jebm.core.model import JointModel
from jebm.core.philox import PhiloxNoise
from jebm.rng import Normal

__all__ = ["PriorSampler", "log_density", "sample_prior"]


def log_density(energy: EnergyNet, latents: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return e -> f(T(e)) - |e|^2/2, (B, D) to (B,): the log-density of noise, up to log Z and log 2 pi.

    The energy's weights are resolved once (spectral norm does not depend on z) and held as constants.
    """
    f = energy.resolved().f

    def density(noise_BD: Tensor) -> Tensor:
        return f(latents(noise_BD)) - 0.5 * noise_BD.square().sum(1)

    return density


class PriorSampler:
    """Samples a model's prior; construction chooses what computes the chains, for the model's device.

    With an energy: `config.steps` Langevin steps from fresh N(0, I) (short-run: the chain is part of the
    model), without autograd if T is the identity. Without one (the Gaussian prior): exact samples, no chain.
    The weights may change between calls.
    """

    def __init__(self, model: JointModel, config: Langevin) -> None:
        self._model, self._config = model, config
        self._kernel: Kernel | None = None
        self.kernel = "none (Gaussian prior)"
        """Short description of what computes the chains."""
        energy = model.energy
        if energy is None:
            return
        probe_BD = next(energy.parameters()).detach().new_zeros(1, model.latent_dim)
        if config.kernel == "autograd" or model.generator.latents(probe_BD) is not probe_BD:
            self.kernel = "autograd"
            return
        layers = [(linear.weight, linear.bias) for linear in energy.layers()]
        self._kernel = TORCH if config.kernel == "torch" else fastest(layers, probe_BD[:, energy.unseen :])
        self.kernel = self._kernel.description

    @torch.no_grad()
    def __call__(self, count: int, normal: Normal) -> tuple[Tensor, ChainInfo | None]:
        """Return `count` latents (B, D), and the chain's info."""
        model, steps, step_size = self._model, self._config.steps, self._config.step_size
        start_BD = normal(count, model.latent_dim)
        if model.energy is None:
            return model.generator.latents(start_BD), None
        if self._config.noise == "philox":
            normal = PhiloxNoise(normal)
        if self._kernel is not None:
            # Columns that f does not see are N(0, I) and independent of the rest: exact as drawn.
            unseen = model.energy.unseen
            seen = model.energy.resolved().without_columns(unseen)
            z_BD, info = closed_form_langevin(
                seen, start_BD[:, unseen:], normal, steps=steps, step_size=step_size, kernel=self._kernel
            )
            return torch.cat([start_BD[:, :unseen], z_BD], 1), info
        score = score_of(log_density(model.energy, model.generator.latents))
        noise_BD, info = langevin(score, start_BD, normal, steps=steps, step_size=step_size)
        return model.generator.latents(noise_BD), info


def sample_prior(
    model: JointModel, config: Langevin, count: int, normal: Normal
) -> tuple[Tensor, ChainInfo | None]:
    """Return what one call of a `PriorSampler` returns: latents (B, D) and the chain's info."""
    return PriorSampler(model, config)(count, normal)
