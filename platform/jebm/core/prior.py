"""The EBM prior p(u) proportional to exp(f(T(u))) N(u; 0, I) on codes, and sampling from it (eq. 5, 13-14).

Shapes: B batch, D width of a code, S width of the latents that f sees.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from jebm.config import Langevin
from jebm.core.chain import closed_form_langevin
from jebm.core.kernels import Kernel, check_own_energy, without_autograd
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
        self._noise_is_latents = True
        self.kernel = "none (Gaussian prior)"
        """Short description of what computes the chains; of autograd, why nothing else does."""
        energy = model.energy
        if energy is None:
            return
        probe_BD = next(model.parameters()).detach().new_zeros(1, model.latent_dim)
        check_own_energy(energy, probe_BD, model.latent_dim - model.unseen)
        self._noise_is_latents = model.generator.latents(probe_BD) is probe_BD
        if not self._noise_is_latents:
            self.kernel = "autograd (the generator maps codes to latents)"
        elif config.kernel == "autograd":
            self.kernel = "autograd (langevin.kernel)"
        else:
            how = {"compiled": config.kernel == "auto", "philox": config.noise == "philox"}
            self._kernel = without_autograd(energy, model.seen(probe_BD), **how)
            self.kernel = f"autograd ({type(energy).__name__} has no gradient of its own)"
        if self._kernel is not None:
            self.kernel = self._kernel.description

    @torch.no_grad()
    def __call__(self, count: int, normal: Normal) -> tuple[Tensor, ChainInfo | None]:
        """Return `count` codes (B, D), and the chain's info."""
        model = self._model
        if self._config.noise == "philox" and model.energy is not None:
            normal = PhiloxNoise(normal, step=-1)
            start_BD = self._drawn(normal, count)
        else:
            start_BD = normal(count, model.latent_dim)
        if model.energy is None:
            return start_BD, None
        if not self._noise_is_latents:
            return self._by_autograd(log_density(model.energy, model.seen), start_BD, normal)
        # Columns that f does not see are N(0, I) and independent of the rest: exact as drawn.
        exact_BD, start_BS = start_BD[:, : model.unseen], model.seen(start_BD)
        if self._kernel is None:
            code_BS, info = self._by_autograd(log_density(model.energy, lambda z: z), start_BS, normal)
        else:
            frozen, kernel = model.energy.frozen(), self._kernel
            steps, step_size = self._config.steps, self._config.step_size
            code_BS, info = closed_form_langevin(
                frozen, start_BS, normal, steps=steps, step_size=step_size, kernel=kernel
            )
        return torch.cat([exact_BD, code_BS], 1) if self._model.unseen else code_BS, info

    def _drawn(self, noise: PhiloxNoise, count: int) -> Tensor:
        """Return the start of the chains, (B, D), drawn by the kernel if it can."""
        draw, dims = None if self._kernel is None else self._kernel.draw, self._model.latent_dim
        if draw is None:
            return noise(count, dims)
        noise.step += 1
        return draw(noise.key, noise.step - 1, count, dims, noise.device)

    def _by_autograd(
        self, density: Callable[[Tensor], Tensor], start: Tensor, normal: Normal
    ) -> tuple[Tensor, ChainInfo]:
        """Return the chain on a log-density from its start, and the chain's info."""
        steps, step_size = self._config.steps, self._config.step_size
        return langevin(score_of(density), start, normal, steps=steps, step_size=step_size)


def sample_prior(
    model: JointModel, config: Langevin, count: int, normal: Normal
) -> tuple[Tensor, ChainInfo | None]:
    """Return what one call of a `PriorSampler` returns: codes (B, D) and the chain's info."""
    return PriorSampler(model, config)(count, normal)
