"""Plain values (null, booleans, numbers, text, lists) as Python types; those that do not fit are refused."""

import difflib
import json
import math
import re
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from jebm.errors import ConfigError

__all__ = ["converted", "hint_at", "is_plain", "resolved", "shown"]

_SHOWN = 60
"""How many characters of a value an error shows."""
_BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}
_NEEDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}
_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_LONGEST_NUMBER = 100


def hint_at(name: str, known: Collection[str]) -> str:
    """Return what a refusal of an unknown name adds: the known one that is nearest to it, or else all."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def resolved(text: str) -> Any:  # noqa: ANN401  (None, a bool, a number or the text)
    """Return the meaning of unquoted text in YAML: null, true, false, a number, or the text."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) <= _LONGEST_NUMBER:
        if _INTEGER.fullmatch(text):
            return int(text.replace("_", ""))
        if _FLOAT.fullmatch(text):
            return float(re.sub(r"_|\.(?=[a-zA-Z])", "", text))
    return text


def is_plain(value: object) -> bool:
    """Return whether this is a plain value: null, true, false, a finite number, text, or a list of them."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)


def converted(value: Any, kind: Any, key: str) -> Any:  # noqa: ANN401  (any plain value, of that type)
    """Return the value as this type; text is read as YAML would read it, a list in text as JSON.

    Raises:
        ConfigError: it does not fit the type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(value, inner, key)
    if value is None:
        raise ConfigError(f"{key}: needs a value, not null")
    # A choice of words, a list, or a plain value.
    if origin is Literal:
        return _chosen(value, inner, key)
    if origin in (tuple, list):
        items = _list_in(value) if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{key}: needs {_list_of(value, inner[0])}, not {shown(value)}")
        if origin is tuple and inner[-1] is not Ellipsis and len(items) != len(inner):
            raise ConfigError(f"{key}: needs {len(inner)} values, not {len(items)}")
        kinds = [inner[0]] * len(items) if origin is list or inner[-1] is Ellipsis else inner
        return origin(converted(item, kinds[i], f"{key}[{i}]") for i, item in enumerate(items))
    fitting = _plain(value, kind)
    if fitting is None:
        hint = "; put it in quotes" if kind is str and isinstance(value, int | float) else ""
        raise ConfigError(f"{key}: needs {_NEEDS[kind]}, not {shown(value)}{hint}")
    return fitting


def shown(value: object) -> str:
    """Return a value as an error shows it: as the user would write it, shortened if long."""
    try:
        text = f"'{value}'" if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _one_of(value: Any, kinds: Sequence[Any], key: str) -> Any:  # noqa: ANN401  (of one of the types)
    """Return the value as the first of several types that it fits."""
    *others, last = (kind for kind in kinds if kind is not types.NoneType)
    if types.NoneType in kinds and (value is None or (value == "null" and str not in kinds)):
        return None
    for kind in others:
        try:
            return converted(value, kind, key)
        except ConfigError:
            continue
    return converted(value, last, key)


def _plain(value: Any, kind: type) -> Any:  # noqa: ANN401  (None if it does not fit)
    """Return the value as this plain type, or None if it does not fit."""
    if kind in (str, Path):
        return kind(value) if isinstance(value, str) else None
    if isinstance(value, str):
        value = _BOOLEANS.get(value.lower(), value) if kind is bool else value
        value = resolved(value) if isinstance(value, str) else value
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if kind is float and isinstance(value, int | float):
        return _finite(value)
    return value if kind is int and isinstance(value, int) else None


def _finite(value: float) -> float | None:
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _chosen(value: Any, allowed: Sequence[Any], key: str) -> Any:  # noqa: ANN401  (one of `allowed`)
    if value in allowed:
        return value
    close = difflib.get_close_matches(str(value), map(str, allowed), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{key}: must be one of {', '.join(map(str, allowed))}, not {shown(value)}{hint}")


def _list_in(text: str) -> Any:  # noqa: ANN401  (a list, or the text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _list_of(value: object, kind: type) -> str:
    """Return an example of the required list: the one that the value was probably meant to be."""
    items = str(value).strip("()[]{} ").replace(",", " ").split()
    if items and all(_plain(item, kind) is not None for item in items):
        return f"a list: [{','.join(items)}]"
    return "a list, such as [2,10]" if kind is int else "a list, such as [a,b]"
