"""The sampling kernel: unadjusted Langevin dynamics on a given log-density (paper eq. 13-14).

Shapes: B chains, D dimensions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from jebm.rng import Normal

__all__ = ["ChainInfo", "langevin", "score_of"]


class ChainInfo(NamedTuple):
    """Diagnostics of the chains: means over them, () tensors on their device."""

    gradient_norm: Tensor
    """Euclidean norm of grad log p at the last step."""
    displacement: Tensor
    """Distance between the last position and the start."""


def score_of(log_density: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the gradient by autograd of a log-density that maps (B, D) to (B,): (B, D) to (B, D)."""

    def score(z_BD: Tensor) -> Tensor:
        with torch.enable_grad():
            z_BD = z_BD.detach().requires_grad_()
            (gradient_BD,) = torch.autograd.grad(log_density(z_BD).sum(), z_BD)
        return gradient_BD

    return score


@torch.no_grad()
def langevin(
    score: Callable[[Tensor], Tensor], start_BD: Tensor, normal: Normal, *, steps: int, step_size: float
) -> tuple[Tensor, ChainInfo]:
    """Return the positions (B, D) after `steps` of z <- z + s^2/2 score(z) + s noise, and chain info.

    `score` is the gradient of the log-density to sample (see `score_of`); `normal` draws the noise; s =
    `step_size` is the standard deviation of a step's noise. There is no Metropolis correction: on N(0, I) the
    stationary variance is 1 / (1 - s^2/4). `start_BD` is not modified.
    """
    z_BD = start_BD.clone()
    gradient_BD = torch.zeros_like(z_BD)
    for _ in range(steps):
        gradient_BD = score(z_BD)
        z_BD.add_(gradient_BD, alpha=0.5 * step_size**2)
        z_BD.add_(normal(*z_BD.shape), alpha=step_size)
    info = ChainInfo(gradient_BD.norm(dim=1).mean(), (z_BD - start_BD).norm(dim=1).mean())
    return z_BD, info
