"""What computes Langevin chains without autograd: torch, or a compiled kernel of `jebm.native`.

Shapes: B chains, D dimensions, K steps, S width of the latents that f sees.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jebm.core.energy import EnergyNet, ResolvedEnergy
from jebm.core.parts import Energy, by_autograd
from jebm.errors import ConfigError
from jebm.native import chain as native
from jebm.native import triton_chain
from jebm.native.perceptron import Perceptron

__all__ = ["TORCH", "Compiled", "Kernel", "check_own_energy", "fastest", "without_autograd"]

_SMALL = 2_000_000
"""Chains times weights of a dense net up to which torch is faster with one thread than with several."""

_TOLERANCE, _TINY = 0.01, 1e-6
"""Relative error of a user's closed form; float32's own is a thousand times smaller."""


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


class Draw(Protocol):
    """Philox noise as one call."""

    def __call__(
        self, key: tuple[int, int], step: int, chains: int, dims: int, device: torch.device
    ) -> Tensor:
        """Return the noise of a step, (B, D), float32."""


@dataclass(frozen=True)
class Kernel:
    """A way to compute chains."""

    description: str
    """Short text; for torch, why no compiled kernel runs."""
    compiled: Compiled | None
    """None: torch operations in place."""
    draw: Draw | None = None
    """How it draws philox noise by itself; None: as `PhiloxNoise` does."""
    small: int = 0
    """The most chains for which an energy's own gradient is computed by one thread of torch."""


TORCH = Kernel("torch", None)


def fastest(energy: Perceptron, z_BD: Tensor, *, philox: bool) -> Kernel:
    """Return the fastest kernel for this energy, positions and noise; compiled ones take only float32."""
    if z_BD.dtype != torch.float32:
        return TORCH
    hindrance = triton_chain.hindrance(energy, z_BD, philox=philox)
    if hindrance is None:
        return Kernel("Triton kernel", triton_chain.run, triton_chain.draw)
    if not z_BD.is_cpu:
        return Kernel(f"torch (no Triton kernel: {hindrance})", None)
    if not native.usable(z_BD):
        return Kernel(native.describe(), None)
    return Kernel(native.describe(), native.run, native.draw)


def check_own_energy(energy: Energy, like: Tensor, seen: int) -> None:
    """Hold a user's energy to what chains take from it: `frozen` and `gradient` against `forward`.

    `like` gives device and precision, `seen` the width of the latents.

    Raises:
        ConfigError: f or its gradient is another one, or has another shape.

    """
    if type(energy) is EnergyNet:
        return
    name, frozen = type(energy).__name__, energy.frozen()
    z_BS = torch.sin(torch.arange(1, 8 * seen + 1, device=like.device).to(like.dtype)).view(8, seen)
    f_B, gradient_BS = by_autograd(energy, z_BS)
    found_B, (again_B, found_BS) = frozen.f(z_BS).detach(), frozen.value_and_gradient(z_BS)
    for what, found, expected in (
        ("f of frozen()", found_B, f_B),
        ("f of frozen()", again_B, f_B),
        ("gradient", found_BS, gradient_BS),
        ("gradient", frozen.gradient(z_BS), gradient_BS),
    ):
        if found.shape != expected.shape:
            raise ConfigError(
                f"energy: the {what} of {name} has the shape {tuple(found.shape)} for latents of "
                f"{tuple(z_BS.shape)}; it must be {tuple(expected.shape)}"
            )
        error = float((found - expected).norm() / (expected.norm() + _TINY))
        if not error < _TOLERANCE:
            raise ConfigError(
                f"energy: the {what} of {name} is not that of its forward (relative error {error:.2g})"
            )


def without_autograd(energy: Energy, probe_BS: Tensor, *, compiled: bool, philox: bool) -> Kernel | None:
    """Return what computes chains of this energy without autograd; None if it has no closed-form gradient.

    `probe_BS` are latents of the device and precision that the chains will have; `compiled` allows a kernel,
    which with `philox` draws that noise.
    """
    frozen = energy.frozen()
    if isinstance(frozen, ResolvedEnergy):
        return fastest(frozen, probe_BS, philox=philox) if compiled else TORCH
    with torch.no_grad():
        gradient_BS = energy.gradient(probe_BS)
    if gradient_BS is None:
        return None
    # In a dense net each weight is one product per chain; in a convolution each takes part many times.
    parameters = list(energy.parameters())
    weights = sum(parameter.numel() for parameter in parameters)
    dense = all(parameter.dim() <= 2 for parameter in parameters)
    small = _SMALL // max(1, weights) if probe_BS.is_cpu and dense else 0
    return Kernel("torch (the energy's own gradient)", None, small=small)
