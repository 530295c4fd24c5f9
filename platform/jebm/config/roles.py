"""The role of each configuration key; every list of keys derives from it."""

from collections.abc import Set
from dataclasses import field
from typing import Literal, TypeAlias, TypeVar

from jebm.errors import ConfigError

__all__ = ["RESUME_MAY_CHANGE", "SHAPES_RESULT", "Role", "key", "require", "require_seed"]

T = TypeVar("T")

_SEED_BITS = 63  # what trackers and tables hold of a whole number

Role: TypeAlias = Literal["where", "start", "judge", "length", "shape", "result"]
"""where: where and how a run computes, stores and logs; start: its name and initial state; judge: how its
model is evaluated; length: how long it trains; shape: sizes of generator and inference net; result:
everything else that affects the result."""

RESUME_MAY_CHANGE: Set[Role] = frozenset({"where", "start", "judge", "length"})
"""Roles of the keys that may change when a run resumes.

The data must still have the content whose hash the checkpoint holds."""

SHAPES_RESULT: Set[Role] = frozenset({"length", "shape", "result"})
"""Roles of the keys that a sweep may search and that are logged with the final metrics."""


def key(default: T, role: Role, *, place: bool = False) -> T:
    """Return a field with a role of its own; `place` marks a path or URI."""
    value: T = field(default=default, metadata={"role": role, "place": place})
    return value


def require(condition: bool, key: str, message: str) -> None:
    """Raise `ConfigError` under a dotted key unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: {message}")


def require_seed(seed: int, key: str) -> None:
    """Raise `ConfigError` under a dotted key or an option unless it is a seed: 0 to 2**63 - 1."""
    require(0 <= seed < 2**_SEED_BITS, key, f"{seed} must lie between 0 and 2**{_SEED_BITS} - 1")
