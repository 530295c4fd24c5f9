"""What each key of the configuration is there for; every list of keys derives from it."""

from collections.abc import Set
from dataclasses import field
from typing import Literal, TypeAlias, TypeVar

from jebm.errors import ConfigError

__all__ = ["RESUME_MAY_CHANGE", "SHAPES_RESULT", "Role", "key", "require"]

T = TypeVar("T")

Role: TypeAlias = Literal["where", "start", "judge", "length", "shape", "result"]
"""where: where and how a run computes, keeps and logs; start: its name and what it begins with; judge: how
its model is measured; length: how long it trains; shape: sizes of generator and inference net; result:
everything else that decides what comes out."""

RESUME_MAY_CHANGE: Set[Role] = frozenset({"where", "start", "judge", "length"})
"""Roles of the keys in which a resumed run may differ from its checkpoint.

The content of the data is compared as well: a checkpoint holds its hash."""

SHAPES_RESULT: Set[Role] = frozenset({"length", "shape", "result"})
"""Roles of the keys that a sweep may search, and that stand beside the final metrics."""


def key(default: T, role: Role, *, place: bool = False) -> T:
    """Return the field of a value with a role of its own; `place` marks a path or a URI."""
    value: T = field(default=default, metadata={"role": role, "place": place})
    return value


def require(condition: bool, key: str, message: str) -> None:
    """Raise `ConfigError` under a dotted key unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: {message}")
