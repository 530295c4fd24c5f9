"""Numbers with their standard errors, and means of columns over images.

Sums are float64 and accumulate over batches with `add`; add `sums` to combine objects or ranks.

Shapes: B batch, C columns.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Estimate", "Means", "less"]


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    standard_error: float


class Means:
    """Means of columns over images, their variances and standard errors."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        """Start with no images; `sums` holds counts, sums and sums of squares, (3, C), float64."""
        self.sums = torch.zeros(3, columns, dtype=torch.float64, device=device)

    def add(self, values_BC: Tensor) -> None:
        """Add a batch of images."""
        values_BC = values_BC.double()
        self.sums += torch.stack(
            [torch.full_like(values_BC[0], len(values_BC)), values_BC.sum(0), values_BC.square().sum(0)]
        )

    def variances(self) -> Tensor:
        """Return the variance of each column over images, (C,), float64; NaN for fewer than two images."""
        count_C, sum_C, squares_C = self.sums
        variance_C: Tensor = (squares_C - sum_C.square() / count_C) / (count_C - 1)
        return variance_C.clamp(min=0)  # rounding can leave a constant below zero

    def result(self) -> list[Estimate]:
        """Return the mean of each column over images, and its standard error."""
        mean_C = self.sums[1] / self.sums[0]
        error_C = (self.variances() / self.sums[0]).sqrt()
        return [Estimate(*pair) for pair in zip(mean_C.tolist(), error_C.tolist(), strict=True)]


def less(one: Estimate, other: Estimate) -> Estimate:
    """Return the difference of two independent estimates."""
    return Estimate(one.value - other.value, math.hypot(one.standard_error, other.standard_error))
