"""What computes Langevin chains without autograd: torch, or a compiled kernel of `jebm.native`.

Shapes: B chains, D dimensions, K steps.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jebm.native import chain as native
from jebm.native import triton_chain
from jebm.native.perceptron import Perceptron

__all__ = ["TORCH", "Compiled", "Kernel", "fastest"]


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
