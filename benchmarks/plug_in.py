"""The benchmark's energy once more, as a user's own class with its gradient in closed form."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jebm.core.chain import closed_form_langevin
from jebm.core.energy import ResolvedEnergy
from jebm.core.kernels import without_autograd
from jebm.core.parts import Energy, FrozenEnergy, by_autograd
from jebm.native.perceptron import SLOPE
from jebm.rng import Normal

__all__ = ["plug_ins"]

_SLOPED = torch.ops.aten.leaky_relu_backward


class _Own(Energy):
    """An MLP as one writes it: modules in a list, one torch operation after the other."""

    def __init__(self, energy: ResolvedEnergy) -> None:
        super().__init__(((energy.layers[0][0].shape[1],),))
        *hidden, self.last = (nn.Linear(weight.shape[1], weight.shape[0]) for weight, _ in energy.layers)
        self.hidden = nn.ModuleList(hidden)
        for linear, (weight, bias) in zip([*hidden, self.last], energy.layers, strict=True):
            linear.weight.data, linear.bias.data = weight, bias

    def values(self, z_BS: Tensor) -> list[Tensor]:
        """Return the values of the hidden layers, (B, W) each."""
        values = []
        for linear in self.hidden:
            z_BS = F.leaky_relu(linear(z_BS), SLOPE, inplace=True)
            values.append(z_BS)
        return values

    def forward(self, z_BS: Tensor) -> Tensor:
        """Return f, (B,)."""
        f_B: Tensor = self.last(self.values(z_BS)[-1]).squeeze(1)
        return f_B

    def gradient(self, z_BS: Tensor) -> Tensor:
        """Return the gradient of f, (B, S)."""
        gradient = self.last.weight.expand(len(z_BS), -1)
        for linear, values in zip(reversed(self.hidden), reversed(self.values(z_BS)), strict=True):
            gradient = _SLOPED(gradient, values, SLOPE, True) @ linear.weight
        return gradient


class _Frozen(_Own):
    """The same, with the weights taken out of their modules once per chain."""

    def frozen(self) -> FrozenEnergy:
        """Return f with these weights."""
        return _Weights(self)


class _Weights:
    def __init__(self, energy: _Own) -> None:
        self.f = energy
        self._last = energy.last.weight
        linears = [linear for linear in energy.hidden if isinstance(linear, nn.Linear)]
        self._hidden = [(linear.weight, linear.weight.mT, linear.bias) for linear in linears]

    def gradient(self, z_BS: Tensor) -> Tensor:
        kept = []
        for _, transposed, bias in self._hidden:
            z_BS = F.leaky_relu_(torch.addmm(bias, z_BS, transposed), SLOPE)
            kept.append(z_BS)
        gradient = self._last.expand(len(z_BS), -1)
        for (weight, _, _), values in zip(reversed(self._hidden), reversed(kept), strict=True):
            gradient = _SLOPED(gradient, values, SLOPE, True) @ weight
        return gradient

    def value_and_gradient(self, z_BS: Tensor) -> tuple[Tensor, Tensor]:
        return by_autograd(self.f, z_BS)


def plug_ins(
    energy: ResolvedEnergy,
    start_BD: Tensor,
    normal: Normal,
    **how: Any,  # noqa: ANN401 (of `langevin`)
) -> dict[str, Callable[[], Tensor]]:
    """Return the chains of the two classes, by name."""

    def way(own: Energy) -> Callable[[], Tensor]:
        kernel = without_autograd(own, start_BD[:1], compiled=True, philox=False)
        return lambda: closed_form_langevin(own.frozen(), start_BD, normal, kernel=kernel, **how)[0]

    return {
        "a plug-in's gradient": way(_Own(energy).to(start_BD.device)),
        "the same, with `frozen`": way(_Frozen(energy).to(start_BD.device)),
    }
