"""Randomness is a function of where you are: (seed, rank, position, purpose).

No generator lives from one step to the next, so there is no generator state to save: a resumed run draws
what the uninterrupted run would have drawn.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Noise", "Normal", "gaussian_noise", "generator"]

Normal = Callable[..., Tensor]
"""`normal(*shape)` returns independent standard normal draws of that shape, in torch's default dtype."""

Noise = Callable[[int, str], Normal]
"""`noise(position, purpose)` returns the `Normal` that belongs to that place of the run."""


def generator(
    seed: int, rank: int, position: int, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a fresh generator on `device` whose stream depends on all four arguments and nothing else.

    `position` is a global step, an epoch, an index: whatever counts for the purpose. Streams of different
    arguments are independent as far as hashing and the generator's own seeding make them so: torch's CPU
    generator takes 32 bits of the seed, so that among a million streams some hundred pairs coincide.
    """
    digest = hashlib.blake2b(f"{seed}/{rank}/{position}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def gaussian_noise(seed: int, rank: int, device: torch.device | str = "cpu") -> Noise:
    """Return the standard normal noise of one rank: a function from (position, purpose) to a `Normal`."""

    def noise(position: int, purpose: str) -> Normal:
        stream = generator(seed, rank, position, purpose, device)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=stream, device=stream.device)

        return normal

    return noise
