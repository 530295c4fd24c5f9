"""Factors of variation: what is known of an image besides its class, such as its hair or its background.

A factor has a name and categories; an image has one category of each, by number. Shapes: N images, F factors.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from jebm.untrusted import JsonObject, typed

__all__ = ["Factor", "factors_of"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]{0,63}")
_TAKEN = {"image", "label"}
_MOST_FACTORS = 256
_MOST_CATEGORIES = 10_000
_LONGEST_CATEGORY = 200


@dataclass(frozen=True)
class Factor:
    """One factor; its number in a table is an index into its categories."""

    name: str
    categories: tuple[str, ...]


def factors_of(content: JsonObject) -> tuple[Factor, ...]:
    """Return the checked factors of a JSON object; ValueError names what is wrong.

    Names are letters, digits and underscores, since they become columns; categories are printable text, none
    twice.
    """
    entries = typed(content, "factors", list)
    if len(entries) > _MOST_FACTORS:
        raise ValueError(f"factors are {len(entries)}, most are {_MOST_FACTORS}")
    factors = tuple(_each(entries))
    names = {factor.name.lower() for factor in factors}
    if len(names) != len(factors) or names & _TAKEN:
        raise ValueError("factors have a name twice, or one called image or label")
    return factors


def _each(entries: list[object]) -> Iterator[Factor]:
    """Yield each factor; ValueErrors name its position."""
    for index, entry in enumerate(entries):
        place = f"factors[{index}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{place} is no JSON object")
        name, categories = typed(entry, "name", str), typed(entry, "categories", list)
        if not _NAME.fullmatch(name):
            raise ValueError(f"{place} has no name of letters, digits and underscores, at most 64")
        if not 1 <= len(categories) <= _MOST_CATEGORIES:
            raise ValueError(f"{place} has {len(categories)} categories, not 1 to {_MOST_CATEGORIES}")
        if not all(map(_is_category, categories)) or len(set(categories)) != len(categories):
            raise ValueError(f"{place} has a category twice, or one that is no printable text")
        yield Factor(name, tuple(categories))


def _is_category(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_CATEGORY and value.isprintable()
