"""Untrusted text, above all from a store: parsed strictly, printed escaped.

All code that reads untrusted JSON, numbers or names uses this module, so that there is one answer to "what if
it is damaged, huge, deep or hostile": a one-line `ValueError`, which the caller turns into its own error.
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
"""A JSON object: string keys; lists, strings, finite numbers, booleans, None and objects as values."""

DEEPEST_JSON = 64
"""Limit on nested lists and objects; our own files have fewer than ten levels."""

_Kind = TypeVar("_Kind")


def escaped(text: str) -> str:
    r"""Return the text on one line, safe for a terminal: unprintable characters become \x1b, \n and so on.

    That covers control characters, line breaks, bidirectional marks, and lone surrogates (a file name that is
    not UTF-8).
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def encoded_json(value: object) -> bytes:
    """Return a value's canonical JSON: equal values give equal bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def parsed_json(encoded: bytes, most_bytes: int) -> Any:  # noqa: ANN401  (JSON has no narrower type)
    """Return the value of untrusted JSON.

    Raises:
        ValueError: the only error, for anything odd: more than `most_bytes`, not UTF-8, not JSON, a repeated
            key, non-finite or absurdly long numbers, lone surrogates, or more than `DEEPEST_JSON` levels.
    """
    if len(encoded) > most_bytes:
        raise ValueError(f"more than {most_bytes} bytes")
    try:
        content = json.loads(encoded.decode("utf-8"), object_pairs_hook=_no_duplicates)
        _check_depth(content)
        encoded_json(content)  # text that UTF-8 cannot encode would fail when printed
    except RecursionError as error:
        raise ValueError(f"more than {DEEPEST_JSON} levels deep") from error
    return content


def parsed_object(encoded: bytes, most_bytes: int) -> JsonObject:
    """Return an untrusted JSON object; raises ValueError as `parsed_json`, and for any other JSON value."""
    content = parsed_json(encoded, most_bytes)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def typed(content: Mapping[str, object], name: str, kind: type[_Kind]) -> _Kind:
    """Return the field `name` of a JSON object; raises ValueError if missing or of another type."""
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
