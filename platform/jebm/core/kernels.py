"""What computes Langevin chains without autograd: torch, or a compiled kernel of `jebm.native`.

Shapes: B chains, D dimensions, K steps, S width of the latents that f sees.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jebm.core.energy import ResolvedEnergy
from jebm.core.parts import Energy
from jebm.errors import ConfigError
from jebm.native import chain as native
from jebm.native import triton_chain
from jebm.native.perceptron import Perceptron

__all__ = ["TORCH", "Compiled", "Kernel", "fastest", "without_autograd"]

_SMALL = 2_000_000
"""Chains times weights of a dense net up to which torch is faster with one thread than with several."""


class Compiled(Protocol):
    """A chain as one call: advance `z_BD` in place, return the gradient (B, D) of log p at the last step."""

    def __call__(
        self,
        energy: Perceptron,
        z_BD: Tensor,
        noise: Tensor | tuple[int, int],
        *,
        first_step: int = 0,
        steps: int,
        step_size: float,
    ) -> Tensor:
        """Do `steps` from `first_step` on, with noise (K, B, D) or the key of philox noise."""


@dataclass(frozen=True)
class Kernel:
    """A way to compute chains."""

    description: str
    """Short text; for torch, why no compiled kernel runs."""
    compiled: Compiled | None
    """None: torch operations in place."""
    small: int = 0
    """The most chains for which an energy's own gradient is computed by one thread of torch."""


TORCH = Kernel("torch", None)


def fastest(energy: Perceptron, z_BD: Tensor) -> Kernel:
    """Return the fastest kernel for this energy and positions; compiled ones take only float32."""
    if z_BD.dtype != torch.float32:
        return TORCH
    hindrance = triton_chain.hindrance(energy, z_BD)
    if hindrance is None:
        return Kernel("Triton kernel", triton_chain.run)
    if not z_BD.is_cpu:
        return Kernel(f"torch (no Triton kernel: {hindrance})", None)
    return Kernel(native.describe(), native.run if native.usable(z_BD) else None)


def without_autograd(energy: Energy, probe_BS: Tensor, *, compiled: bool) -> Kernel | None:
    """Return what computes chains of this energy without autograd; None if it has no closed-form gradient.

    `probe_BS` are latents of the device and precision that the chains will have; `compiled` allows a kernel.

    Raises:
        ConfigError: the energy's own gradient has another shape than the latents.

    """
    frozen = energy.frozen()
    if isinstance(frozen, ResolvedEnergy):
        return fastest(frozen, probe_BS) if compiled else TORCH
    with torch.no_grad():
        gradient_BS = energy.gradient(probe_BS)
    if gradient_BS is None:
        return None
    if gradient_BS.shape != probe_BS.shape:
        raise ConfigError(
            f"energy: the gradient of {type(energy).__name__} has the shape {tuple(gradient_BS.shape)} "
            f"for latents of {tuple(probe_BS.shape)}: return one of their shape"
        )
    # In a dense net each weight is one product per chain; in a convolution each takes part many times.
    parameters = list(energy.parameters())
    weights = sum(parameter.numel() for parameter in parameters)
    dense = all(parameter.dim() <= 2 for parameter in parameters)
    small = _SMALL // max(1, weights) if probe_BS.is_cpu and dense else 0
    return Kernel("torch (the energy's own gradient)", None, small)
