"""Convert values to the configuration's types; refuse those that do not fit, naming the key."""

import dataclasses
import difflib
import functools
import json
import math
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from jebm.config import PLACES, Config, config_to_dict, current_name, fields, leaves
from jebm.errors import ConfigError
from jebm.parser.yaml_file import read_value, resolved
from jebm.paths import expanded

__all__ = [
    "checked",
    "config_from_dict",
    "converted",
    "key_types",
    "meant",
    "override",
    "sections",
    "with_home",
]

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


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Return the config with these nested values and defaults elsewhere; keys may also be dotted.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type, or values are incompatible.
    """
    config: Config = _changed(Config(), "", dict(checked(values)))
    return config


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return the config with the values of these dotted keys; raises as `config_from_dict`."""
    return config_from_dict(dict(leaves(config_to_dict(config))) | dict(changes))


def checked(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, converted value) for all keys of nested values; raises `ConfigError`."""
    yield from _checked(values, "")


def _checked(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = current_name(f"{prefix}{name}")
        if key in key_types():
            yield key, _with_home(key, converted(value, key_types()[key], key))
        elif isinstance(value, Mapping):
            if not value and key not in sections():
                raise ConfigError(_unknown(key))
            yield from _checked(value, f"{key}.")
        elif key in sections():
            raise ConfigError(f"{key}: needs keys below it, not {_shown(value)}")
        else:
            raise ConfigError(_unknown(key))


def _changed(section: Any, prefix: str, given: Mapping[str, Any]) -> Any:  # noqa: ANN401  (of the same kind)
    """Return the section with these values of dotted keys."""
    arguments = {}
    for field in dataclasses.fields(section):
        key = f"{prefix}{field.name}"
        if key in sections():
            arguments[field.name] = _changed(getattr(section, field.name), f"{key}.", given)
        elif key in given:
            arguments[field.name] = given[key]
    return dataclasses.replace(section, **arguments)


@functools.cache
def key_types() -> Mapping[str, Any]:
    """Return the types of all config values by dotted key."""
    return {key: entry.type for key, entry in fields(Config) if key not in sections()}


@functools.cache
def sections() -> Mapping[str, Any]:
    """Return the classes of all config sections by dotted key."""
    return {key: entry.type for key, entry in fields(Config) if dataclasses.is_dataclass(entry.type)}


def _unknown(key: str) -> str:
    close = meant(key, key_types())
    hint = f"did you mean {' or '.join(close)}?" if close else "see --help for all keys"
    return f"unknown key {key}; {hint}"


def meant(key: str, known: Collection[str]) -> Sequence[str]:
    """Return the known keys that a wrong one probably means, perhaps in another section."""
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return close
    last = {name: name.rsplit(".", 1)[-1] for name in known}
    words = difflib.get_close_matches(key.rsplit(".", 1)[-1], last.values(), n=1, cutoff=0.75)
    return [name for name, word in last.items() if word in words]


def with_home(path: str, key: str) -> str:
    """Return a path with ~ or ~name expanded; raises `ConfigError` if there is no such home."""
    try:
        return str(expanded(path)) if path.startswith("~") else path
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def _with_home(key: str, value: Any) -> Any:  # noqa: ANN401  (as given)
    return with_home(value, key) if key in PLACES and isinstance(value, str) else value


def converted(value: Any, kind: Any, key: str) -> Any:  # noqa: ANN401  (any plain value, of that type)
    """Return the value as this type; text is read as YAML would read it.

    Raises:
        ConfigError: it does not fit the type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None or (value == "null" and str not in inner):
            return None
        (kind,) = (one for one in inner if one is not types.NoneType)
        return converted(value, kind, key)
    if value is None:
        raise ConfigError(f"{key}: needs a value, not null")
    # A choice of words, a list, or a plain value.
    if origin is Literal:
        return _chosen(value, inner, key)
    if origin in (tuple, list):
        items = read_value(value) if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{key}: needs {_list_of(value, inner[0])}, not {_shown(value)}")
        return origin(converted(item, inner[0], f"{key}[{i}]") for i, item in enumerate(items))
    fitting = _plain(value, kind)
    if fitting is None:
        hint = "; put it in quotes" if kind is str and isinstance(value, int | float) else ""
        raise ConfigError(f"{key}: needs {_NEEDS[kind]}, not {_shown(value)}{hint}")
    return fitting


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
    raise ConfigError(f"{key}: must be one of {', '.join(map(str, allowed))}, not {_shown(value)}{hint}")


def _list_of(value: object, kind: type) -> str:
    """Return an example of the required list: the one that the value was probably meant to be."""
    items = str(value).strip("()[]{} ").replace(",", " ").split()
    if items and all(_plain(item, kind) is not None for item in items):
        return f"a list: [{','.join(items)}]"
    return "a list, such as [2,10]" if kind is int else "a list, such as [a,b]"


def _shown(value: object) -> str:
    """Return a value as an error shows it: as the user would write it, shortened if long."""
    try:
        text = f"'{value}'" if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
