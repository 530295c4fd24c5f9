"""What comes from outside, from a store above all, is untrusted text: parsed strictly, printed escaped.

Every room that reads a stranger's JSON, number or name comes through here, so that there is one answer to
"what if it is damaged, huge, deep or hostile": a `ValueError` in one line, which the caller turns into the
error of its own room.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

__all__ = [
    "DEEPEST_JSON",
    "JsonObject",
    "encoded_json",
    "escaped",
    "parsed_json",
    "parsed_object",
    "typed",
    "whole_number",
]

JsonObject: TypeAlias = dict[str, Any]
"""What JSON can say: dicts with string keys, lists, strings, finite numbers, booleans, None."""

DEEPEST_JSON = 64
"""The most levels of lists and objects that are read; our own files have fewer than ten."""

_Kind = TypeVar("_Kind")


def escaped(text: str) -> str:
    r"""Return the text on one line, safe for a terminal: what is not printable becomes \x1b, \n and so on.

    That covers control characters, line breaks, marks that reverse the direction of writing, and half
    characters (a file name that is not UTF-8).
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def encoded_json(value: object) -> bytes:
    """Return the one JSON text of a value: equal values give equal bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def parsed_json(encoded: bytes, most_bytes: int) -> Any:  # noqa: ANN401  (JSON has no narrower type)
    """Return what a stranger's JSON says.

    Raises:
        ValueError: and nothing else, where anything is odd: more than `most_bytes`, not UTF-8, not JSON,
            a key twice, numbers that are not finite or absurdly long, half characters, or more than
            `DEEPEST_JSON` levels.
    """
    if len(encoded) > most_bytes:
        raise ValueError(f"more than {most_bytes} bytes")
    try:
        content = json.loads(encoded.decode("utf-8"), object_pairs_hook=_no_duplicates)
        _check_depth(content)
        encoded_json(content)  # what UTF-8 cannot say would fail in whoever prints it
    except RecursionError as error:
        raise ValueError(f"more than {DEEPEST_JSON} levels deep") from error
    return content


def parsed_object(encoded: bytes, most_bytes: int) -> JsonObject:
    """Return a stranger's JSON object; raises ValueError as `parsed_json`, and for any other JSON."""
    content = parsed_json(encoded, most_bytes)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def typed(content: Mapping[str, object], name: str, kind: type[_Kind]) -> _Kind:
    """Return the field `name` of a JSON object; raises ValueError where it is missing or of another kind."""
    if name not in content:
        raise ValueError(f"{name} is missing")
    value = content[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def whole_number(content: Mapping[str, object], name: str, least: int, most: int) -> int:
    """Return the integer field `name` of a JSON object; raises ValueError unless it is in least..most."""
    value = typed(content, name, int)
    if not least <= value <= most:
        raise ValueError(f"{name} is no number in {least}..{most}")
    return value


def _no_duplicates(pairs: Sequence[tuple[str, object]]) -> JsonObject:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it names something twice")
    return found


def _check_depth(content: object) -> None:
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > DEEPEST_JSON:
            raise ValueError(f"more than {DEEPEST_JSON} levels deep")
        containers = (item for item in level if isinstance(item, dict | list))
        level = [v for item in containers for v in (item.values() if isinstance(item, dict) else item)]
