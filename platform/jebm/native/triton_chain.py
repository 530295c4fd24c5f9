"""The Langevin chain of `jebm.core.chain` as one launch on a GPU, if triton is installed.

Torch for CUDA installs triton, which compiles the kernel, `triton_kernel.py`, on first use. With
TRITON_INTERPRET=1 triton interprets it, even on a CPU: slow, for tests. Shapes: B chains, D dimensions, K
steps, L layers, W width of a hidden layer.
"""

import functools
import importlib.util
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from jebm.native.perceptron import SLOPE, Perceptron

__all__ = ["draw", "hindrance", "options", "padded", "run"]

_BLOCK = 16
"""Chains per program."""

_DEEPEST = 32
"""The most hidden layers: the kernel keeps their signs in one word."""

_WIDEST = 512
"""The largest padded layer: up to here its values stay in registers (tests/core/test_triton_compiled.py)."""


def hindrance(energy: Perceptron, z_BD: Tensor, *, philox: bool) -> str | None:
    """Return briefly why `run` cannot take this energy and these positions, or None.

    It takes LeakyReLU and float32 on a GPU that can run the kernel, with philox noise or torch's.
    """
    if not z_BD.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "positions are not on a GPU"
    if z_BD.dtype != torch.float32:
        return "positions are not float32"
    if energy.activation != "leaky_relu":
        return f"it has no {energy.activation}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    depth, width, dims = _sizes(energy.layers)
    if depth > _DEEPEST:
        return f"{depth} hidden layers, more than {_DEEPEST}"
    if max(width, dims) > _WIDEST:
        return f"a layer is wider than {_WIDEST}"
    return _failure(z_BD.device, depth, width, dims, philox)


def run(
    energy: Perceptron,
    z_BD: Tensor,
    noise: Tensor | tuple[int, int],
    *,
    first_step: int = 0,
    steps: int,
    step_size: float,
) -> Tensor:
    """Advance the chains `z_BD` by `steps` in place; return the gradient (B, D) of log p at the last step.

    `noise` is (K, B, D), or the key (two 32-bit words) of `jebm.core.philox` noise that the kernel draws
    itself from `first_step` on. A chain's result does not depend on the other chains.
    """
    from jebm.native.triton_kernel import chain_kernel  # noqa: PLC0415 (imports triton)

    # Pad matrices to the sizes that Triton's products need: rows and columns of zeros change nothing.
    chains, dims = z_BD.shape
    layers = energy.layers
    depth, width, padded_dims = _sizes(layers)
    first_WD = _pad(layers[0][0], width, padded_dims)
    hidden = [_pad(weight, width, width) for weight, _ in layers[1:-1]]
    hidden_LWW = torch.stack(hidden) if hidden else first_WD[None]  # not read then
    biases_LW = torch.cat([_pad(bias[None], 1, width) for _, bias in layers[:-1]])
    gradient_BD = torch.empty_like(z_BD)
    given, key = (noise.contiguous(), (0, 0)) if isinstance(noise, Tensor) else (None, noise)
    # One program for each block of chains.
    programs = -(-chains // _BLOCK)
    scratch_PBM = z_BD.new_empty(programs * _BLOCK * max(width, padded_dims))
    if chains:
        with torch.cuda.device(z_BD.get_device()):  # triton launches on the current device
            chain_kernel[(programs,)](
                *(z_BD, gradient_BD, given),
                *(first_WD, first_WD.mT.contiguous(), hidden_LWW, hidden_LWW.mT.contiguous()),
                *(biases_LW, _pad(layers[-1][0], 1, width), scratch_PBM),
                *_as_int32(key),
                *(chains, dims, steps, first_step),
                *(step_size, 0.5 * step_size**2, SLOPE),
                BLOCK=_BLOCK,
                DIMS=padded_dims,
                WIDTH=width,
                DEPTH=depth,
                **options(width, padded_dims),
            )
    return gradient_BD


def draw(key: tuple[int, int], step: int, chains: int, dims: int, device: torch.device) -> Tensor:
    """Return the `jebm.core.philox` noise of a step, (B, D)."""
    from jebm.native.triton_kernel import noise_kernel  # noqa: PLC0415 (imports triton)

    noise_BD = torch.empty(chains, dims, device=device)
    if chains:
        with torch.cuda.device(noise_BD.get_device()):
            noise_kernel[(-(-chains // _BLOCK),)](
                *(noise_BD, *_as_int32(key), chains, dims, step), BLOCK=_BLOCK, DIMS=padded(dims)
            )
    return noise_BD


def _as_int32(key: tuple[int, int]) -> list[int]:
    """Return the words of a key as int32 of the same bits, which Triton takes."""
    return [word - ((word >> 31) << 32) for word in key]


class _Zero(NamedTuple):
    """f = 0."""

    layers: Sequence[tuple[Tensor, Tensor]]
    activation: str = "leaky_relu"


@functools.cache
def _failure(device: torch.device, depth: int, width: int, dims: int, philox: bool) -> str | None:
    """Return in one line how compiling or launching the kernel fails, or None; tries a chain of no steps.

    It is the variant that will run: with noise of this kind. Causes are an old GPU, or no C compiler, which
    triton needs to launch.
    """
    widths = [dims, *[width] * depth, 1]
    layers = [
        (torch.zeros(rows, columns, device=device), torch.zeros(rows, device=device))
        for columns, rows in pairwise(widths)
    ]
    z_BD = torch.zeros(1, dims, device=device)
    try:
        run(_Zero(layers), z_BD, (0, 0) if philox else z_BD[None], steps=0, step_size=0.0)
        if philox:
            draw((0, 0), 0, 1, dims, device)
    except Exception as error:  # any error: torch can compute the chain instead
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['failed'])[0]}"
    return None


def options(width: int, dims: int) -> dict[str, int]:
    """Return how the kernel is compiled for padded sizes: pieces of sums, warps, no pipelining."""
    largest = max(width, dims)
    return {"PIECE": 32 if largest <= 256 else 16, "num_warps": 4 if largest <= 64 else 8, "num_stages": 1}


def _sizes(layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[int, int, int]:
    """Return the number of hidden layers, their padded width, and the padded dimensions."""
    width = max(len(weight) for weight, _ in layers[:-1])
    return len(layers) - 1, padded(width), padded(layers[0][0].shape[1])


def padded(size: int) -> int:
    """Return the least power of two >= 16 and >= `size`, as Triton's products require."""
    return max(16, 1 << (size - 1).bit_length())


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Return a matrix padded with rows and columns of zeros at the end."""
    return F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - len(matrix)))
