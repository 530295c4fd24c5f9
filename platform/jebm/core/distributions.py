"""Diagonal Gaussians. Shapes: B batch, D latent width (all layers together)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DiagGaussian", "standard_log_density"]


class DiagGaussian(NamedTuple):
    """N(mean, diag exp(log_variance)), both (B, D); a tuple, so that DDP can handle it."""

    mean_BD: Tensor
    log_variance_BD: Tensor

    def rsample(self, noise_BD: Tensor) -> Tensor:
        """Return mean + std * noise, (B, D): a sample if the noise is standard normal."""
        return torch.addcmul(self.mean_BD, noise_BD, torch.exp(0.5 * self.log_variance_BD))

    def log_density(self, z_BD: Tensor) -> Tensor:
        """Return log N(z; mean, variance) of each coordinate, (B, D), in nats."""
        scaled_BD = (z_BD - self.mean_BD) * torch.exp(-0.5 * self.log_variance_BD)
        return -0.5 * (scaled_BD.square() + self.log_variance_BD + math.log(2 * math.pi))

    def rate(self) -> Tensor:
        """Return KL(self || N(0, 1)) of each coordinate, (B, D), in nats, never negative."""
        variance_BD = torch.exp(self.log_variance_BD)
        return 0.5 * (self.mean_BD.square() + variance_BD - 1 - self.log_variance_BD)


def standard_log_density(z_BD: Tensor) -> Tensor:
    """Return log N(z; 0, I), (B,), in nats."""
    return -0.5 * (z_BD.square().sum(1) + z_BD.shape[1] * math.log(2 * math.pi))
