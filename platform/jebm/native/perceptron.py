"""What the compiled chains take as f: a perceptron with constant weights."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["SLOPE", "Perceptron"]

SLOPE = 0.2
"""Slope of the LeakyReLU below zero."""


class Perceptron(Protocol):
    """f(z): linear maps with an activation between them."""

    @property
    def layers(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Weight and bias of each linear map, the last one with one row."""

    @property
    def activation(self) -> str:
        """Name of the activation, as in `energy.activation`."""
