"""The activations of the energy net, each with its slope in closed form and without a graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from jebm.native.perceptron import SLOPE

__all__ = ["ACTIVATIONS", "Activation"]

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """A function a of each element: for autograd, and as a pair of steps in buffers."""

    apply: Callable[[Tensor], Tensor]
    """Return a(x), differentiable."""
    forward_: Callable[[Tensor, Tensor], Tensor]
    """Return a(x) for `(x, spare)`, written to x or to `spare`; x keeps what `backward_` needs."""
    backward_: Callable[[Tensor, Tensor, Tensor], object]
    """Write gradient * a'(x) for `(gradient, kept, out)`: `kept` is what `forward_` left in x; `out` may be
    the gradient, or the spare buffer."""


ACTIVATIONS: Mapping[str, Activation] = {
    # A LeakyReLU keeps the sign, so its output determines its slope: 1 above zero, else 0.2, as in autograd.
    "leaky_relu": Activation(
        lambda x: F.leaky_relu(x, SLOPE),
        lambda x, _: F.leaky_relu_(x, SLOPE),
        lambda gradient, kept, out: _ATEN.leaky_relu_backward.grad_input(
            gradient, kept, SLOPE, True, grad_input=out
        ),
    ),
    "silu": Activation(
        F.silu,
        lambda x, spare: _ATEN.silu.out(x, out=spare),
        lambda gradient, kept, out: _ATEN.silu_backward.grad_input(gradient, kept, grad_input=out),
    ),
    "softplus": Activation(
        F.softplus,
        lambda x, spare: _ATEN.softplus.out(x, 1, 20, out=spare),
        lambda gradient, kept, out: _ATEN.softplus_backward.grad_input(gradient, kept, 1, 20, grad_input=out),
    ),
}
"""By their names in `energy.activation`."""
