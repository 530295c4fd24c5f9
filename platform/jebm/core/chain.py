"""The chain on p(z) proportional to exp(f(z)) N(z; 0, I) without autograd: grad f in closed form.

`jebm.core.langevin.langevin` with `score_of` defines the result; with the same noise, all implementations
here (in-place torch operations, for our energy net or for any energy that brings its gradient; the C kernel;
the Triton kernel) differ from it only by rounding. Shapes: B chains, D dimensions, K steps.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from jebm.core.energy import ResolvedEnergy
from jebm.core.kernels import Compiled, Kernel, fastest
from jebm.core.langevin import ChainInfo
from jebm.core.parts import FrozenEnergy
from jebm.core.philox import PhiloxNoise
from jebm.rng import Normal

__all__ = ["chain_kernel", "closed_form_langevin"]

_SMALL = 20_000
"""Chains times hidden width up to which torch is faster with one thread than with several."""

_NOISE_NUMBERS = 1_000_000
"""Draws held at a time for a kernel."""


def chain_kernel(device: torch.device) -> tuple[bool, str]:
    """Return whether a compiled kernel computes small energies' chains there, and briefly what does."""
    hidden, last = (
        (torch.zeros(rows, 2, device=device), torch.zeros(rows, device=device)) for rows in (2, 1)
    )
    kernel = fastest(ResolvedEnergy((hidden, last)), torch.zeros(1, 2, device=device), philox=False)
    return kernel.compiled is not None, kernel.description


@torch.no_grad()
def closed_form_langevin(
    energy: FrozenEnergy,
    start_BD: Tensor,
    normal: Normal,
    *,
    steps: int,
    step_size: float,
    kernel: Kernel | None = None,
) -> tuple[Tensor, ChainInfo]:
    """Return what `langevin` returns for the score grad f(z) - z: positions (B, D) and chain info.

    Noise is drawn as in `langevin`, one `normal(B, D)` per step. `start_BD` is not modified. The kernel, by
    default the fastest, changes only rounding.
    """
    z_BD = start_BD.clone(memory_format=torch.contiguous_format)
    if not isinstance(energy, ResolvedEnergy):
        with _one_thread(kernel is not None and len(z_BD) <= kernel.small):
            gradient_BD = _by_its_gradient(energy, z_BD, normal, steps, step_size)
    elif (compiled := (kernel or _fastest(energy, z_BD, normal)).compiled) is None:
        gradient_BD = _in_place(energy, z_BD, normal, steps, step_size)
    else:
        gradient_BD = _in_kernel(compiled, energy, z_BD, normal, steps, step_size)
    return z_BD, ChainInfo(start_BD, z_BD, gradient_BD)


def _fastest(energy: ResolvedEnergy, z_BD: Tensor, normal: Normal) -> Kernel:
    return fastest(energy, z_BD, philox=isinstance(normal, PhiloxNoise))


def _in_place(energy: ResolvedEnergy, z_BD: Tensor, normal: Normal, steps: int, step_size: float) -> Tensor:
    """Advance `z_BD` by `steps` in place; return the gradient of log p at the last step."""
    gradient_BD = torch.zeros_like(z_BD)
    first_weight = energy.layers[0][0]
    buffers = energy.buffers(z_BD)
    half_square = 0.5 * step_size**2
    with _one_thread(z_BD.is_cpu and buffers[0][0].numel() <= _SMALL):
        for step in range(steps):
            first = energy.first_layer_gradient(z_BD, buffers)
            if step == steps - 1:
                gradient_BD = torch.addmm(z_BD, first, first_weight, beta=-1)
            z_BD.addmm_(first, first_weight, beta=1 - half_square, alpha=half_square)
            z_BD.add_(normal(*z_BD.shape), alpha=step_size)
    return gradient_BD


def _by_its_gradient(
    energy: FrozenEnergy, z_BD: Tensor, normal: Normal, steps: int, step_size: float
) -> Tensor:
    """Do the same as `_in_place` for an energy of which only the gradient is known."""
    gradient_BD = torch.zeros_like(z_BD)
    for step in range(steps):
        gradient_of_f = energy.gradient(z_BD)
        if step == steps - 1:
            gradient_BD = gradient_of_f - z_BD
        z_BD.lerp_(gradient_of_f, 0.5 * step_size**2)  # z + s^2/2 (grad f - z)
        z_BD.add_(normal(*z_BD.shape), alpha=step_size)
    return gradient_BD


def _in_kernel(
    compiled: Compiled,
    energy: ResolvedEnergy,
    z_BD: Tensor,
    normal: Normal,
    steps: int,
    step_size: float,
) -> Tensor:
    """Do the same as `_in_place`, in a kernel."""
    run = functools.partial(compiled, energy, z_BD, step_size=step_size)
    if isinstance(normal, PhiloxNoise):
        first_step, normal.step = normal.step, normal.step + steps
        return run(normal.key, steps=steps, first_step=first_step)
    gradient_BD = torch.zeros_like(z_BD)
    at_once = max(1, _NOISE_NUMBERS // max(1, z_BD.numel()))
    for done in range(0, steps, at_once):
        count = min(at_once, steps - done)
        # One draw per step: torch's stream depends on how it is split, unless B x D is a multiple of 16.
        noise_KBD = torch.stack([normal(*z_BD.shape) for _ in range(count)])
        gradient_BD = run(noise_KBD, steps=count)
    return gradient_BD


@contextmanager
def _one_thread(when: bool) -> Iterator[None]:
    """Restrict torch to one thread inside, if `when`."""
    threads = torch.get_num_threads()
    if when:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
