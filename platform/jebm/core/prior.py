"""The EBM prior p(u) proportional to exp(f(T(u))) N(u; 0, I) on codes, and sampling from it (eq. 5, 13-14).

Shapes: B batch, D width of a code, S width of the latents that f sees.
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
from jebm.core.parts import Energy
from jebm.core.philox import PhiloxNoise
from jebm.rng import Normal

__all__ = ["PriorSampler", "log_density", "sample_prior"]


def log_density(energy: Energy, seen: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return u -> f(T(u)) - |u|^2/2, (B, D) to (B,): the log-density of codes, up to log Z and log 2 pi.

    `seen` maps codes to the latents that f sees (`JointModel.seen`). The energy's weights are resolved once
    (spectral norm does not depend on z) and held as constants.
    """
    f = energy.frozen().f

    def density(code_BD: Tensor) -> Tensor:
        return f(seen(code_BD)) - 0.5 * code_BD.square().sum(1)

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
        self.kernel = "autograd"
        probe_BD = next(energy.parameters()).detach().new_zeros(1, model.latent_dim)
        if config.kernel != "autograd" and model.generator.latents(probe_BD) is probe_BD:
            self._kernel = _kernel_of(energy, model.seen(probe_BD), config)
        if self._kernel is not None:
            self.kernel = self._kernel.description

    @torch.no_grad()
    def __call__(self, count: int, normal: Normal) -> tuple[Tensor, ChainInfo | None]:
        """Return `count` codes (B, D), and the chain's info."""
        model, steps, step_size = self._model, self._config.steps, self._config.step_size
        start_BD = normal(count, model.latent_dim)
        if model.energy is None:
            return start_BD, None
        if self._config.noise == "philox":
            normal = PhiloxNoise(normal)
        if self._kernel is not None:
            # Columns that f does not see are N(0, I) and independent of the rest: exact as drawn.
            exact_BD, start_BS = start_BD[:, : model.unseen], model.seen(start_BD)
            frozen, kernel = model.energy.frozen(), self._kernel
            code_BS, info = closed_form_langevin(
                frozen, start_BS, normal, steps=steps, step_size=step_size, kernel=kernel
            )
            return torch.cat([exact_BD, code_BS], 1), info
        return langevin(
            score_of(log_density(model.energy, model.seen)),
            start_BD,
            normal,
            steps=steps,
            step_size=step_size,
        )


def sample_prior(
    model: JointModel, config: Langevin, count: int, normal: Normal
) -> tuple[Tensor, ChainInfo | None]:
    """Return what one call of a `PriorSampler` returns: codes (B, D) and the chain's info."""
    return PriorSampler(model, config)(count, normal)


def _kernel_of(energy: Energy, probe_BS: Tensor, config: Langevin) -> Kernel | None:
    """Return what computes chains of this energy without autograd; None if nothing can."""
    if isinstance(energy, EnergyNet):
        return TORCH if config.kernel == "torch" else fastest(energy.frozen(), probe_BS)
    with torch.no_grad():
        has_gradient = energy.gradient(probe_BS) is not None
    return Kernel("torch (the energy's own gradient)", None) if has_gradient else None
