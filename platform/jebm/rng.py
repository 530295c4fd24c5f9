"""Randomness is a function of where you are: (seed, rank, position, purpose).

No generator lives from one step to the next, so there is no generator state to save: a resumed run draws
what the uninterrupted run would have drawn.
"""

import hashlib
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Draws", "Noise", "Normal", "gaussian_noise", "generator"]

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
    digest = _digest(f"{seed}/{rank}/{position}/{purpose}")
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class Draws:
    """The `Normal` of one place: from the stream of `generator`, or by keys for counter-based noise."""

    def __init__(
        self, seed: int, rank: int, position: int, purpose: str, device: torch.device | str = "cpu"
    ) -> None:
        self._place = seed, rank, position, purpose
        self.device = torch.device(device)
        self._keys = 0

    @cached_property
    def _stream(self) -> torch.Generator:
        return generator(*self._place, self.device)

    def __call__(self, *shape: int) -> Tensor:
        """Return the stream's next draws."""
        return torch.randn(shape, generator=self._stream, device=self.device)

    def key(self) -> tuple[int, int]:
        """Return the place's next key, two words: a hash of the place and the number of keys before it.

        It is computed on the host, and the same for every device.
        """
        digest = _digest("/".join(map(str, (*self._place, "key", self._keys))))
        self._keys += 1
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def gaussian_noise(seed: int, rank: int, device: torch.device | str = "cpu") -> Noise:
    """Return the standard normal noise of one rank: a function from (position, purpose) to a `Normal`."""

    def noise(position: int, purpose: str) -> Draws:
        return Draws(seed, rank, position, purpose, device)

    return noise


def _digest(place: str) -> bytes:
    return hashlib.blake2b(place.encode(), digest_size=8).digest()
