"""The sampling kernel: unadjusted Langevin dynamics on a given log-density (paper eq. 13-14).

Shapes: B chains, D dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jebm.rng import Normal

__all__ = ["ChainInfo", "langevin", "score_of"]


@dataclass(frozen=True, eq=False)
class ChainInfo:
    """Diagnostics of the chains: means over them, () tensors on their device.

    They are computed when asked for, from tensors that nobody may have changed in place meanwhile.
    """

    start_BD: Tensor
    end_BD: Tensor
    gradient_BD: Tensor
    """grad log p at the last step."""

    @property
    def gradient_norm(self) -> Tensor:
        """Euclidean norm of grad log p at the last step."""
        return _mean_length(self.gradient_BD)

    @property
    def displacement(self) -> Tensor:
        """Distance between the last position and the start."""
        return _mean_length(self.end_BD - self.start_BD)


@torch.no_grad()
def _mean_length(vectors_BD: Tensor) -> Tensor:
    # Tensor.norm has three times the overhead.
    lengths_B: Tensor = torch.linalg.vector_norm(vectors_BD, dim=1)
    return lengths_B.mean()


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
    return z_BD, ChainInfo(start_BD, z_BD, gradient_BD)
