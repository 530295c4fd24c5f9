"""Counter-based normal noise for Langevin chains: a draw is a function of (key, chain, step, dimension).

Philox4x32-10 (Salmon et al. 2011) and the Box-Muller transform. Draws do not depend on the number of chains
or threads, nor on the device. These torch operations are the definition; the kernel in `native/chain.c`
computes the same up to rounding. Shapes: B chains, D dimensions, Q = ceil(D / 4) blocks of four words.
"""

import math

import torch
from torch import Tensor

from jebm.rng import Draws, Normal

__all__ = ["PhiloxNoise", "philox"]

_MASK = 0xFFFFFFFF


class PhiloxNoise:
    """A `Normal` for one run of chains: a call returns the noise (B, D) of step `step`, then advances `step`.

    The chains' start is the noise of step -1. The key is the next one of the place that it is made from: it
    depends on seed, rank, position and purpose, not on the device. Magnitudes end at 5.77 (the radius has 24
    bits); N(0, 1) has a mass of 8e-9 beyond.
    """

    def __init__(self, normal: Normal, *, step: int = 0) -> None:
        """Take a `Normal` of `gaussian_noise`, which knows its place; raises TypeError for others."""
        if not isinstance(normal, Draws):
            raise TypeError("counter-based noise belongs to a place: give it a Normal of gaussian_noise")
        self.key, self.device = normal.key(), normal.device
        self.step = step

    def __call__(self, *shape: int) -> Tensor:
        """Return the noise of the next step; `shape` is (B, D)."""
        chains, dims = shape
        blocks = -(-dims // 4)

        def counter(count: int, view: tuple[int, int]) -> Tensor:
            return torch.arange(count, device=self.device).view(view).expand(chains, blocks)

        chain_BQ, block_BQ = counter(chains, (-1, 1)), counter(blocks, (1, -1))
        step_BQ = torch.full_like(chain_BQ, self.step & _MASK)
        self.step += 1
        a, b, c, d = philox((chain_BQ, step_BQ, block_BQ, torch.zeros_like(chain_BQ)), self.key)
        noise = torch.stack([*_box_muller(a, b), *_box_muller(c, d)], dim=2)
        return noise.view(chains, 4 * blocks)[:, :dims].to(torch.get_default_dtype())


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four words of Philox4x32-10 for a counter; words are int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low0, high0 = _multiply(c0, 0xD2511F53)
        low1, high1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Return the low and high words of the 64-bit product; int64 overflow keeps the bits."""
    product = a * by
    return product & _MASK, (product >> 32) & _MASK


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return two normals from two words, in double precision: radius from 24 bits of a, angle from 25 of b.

    Two bits of b choose a quarter turn, centred on 0, 90, 180 or 270 degrees; the others the angle within it.
    """
    radius = (-2 * (((a >> 8) + 1).double() * 2**-24).log()).sqrt()
    quarter, rest = b >> 30, ((b << 2) & _MASK) >> 9
    angle = (quarter + rest.double() * 2**-23 + 2**-24 - 0.5) * (math.pi / 2)
    return radius * angle.cos(), radius * angle.sin()
