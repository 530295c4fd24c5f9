"""Convert values to the configuration's types; refuse those that do not fit, naming the key."""

import dataclasses
import difflib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jebm.config import (
    PLACES,
    Config,
    Features,
    config_to_dict,
    current_name,
    fields,
    leaves,
)
from jebm.errors import ConfigError
from jebm.paths import expanded
from jebm.plain import converted, is_plain, shown

__all__ = [
    "OLD_SWITCH",
    "checked",
    "class_arguments",
    "config_from_dict",
    "is_class_argument",
    "key_types",
    "meant",
    "merged",
    "override",
    "sections",
    "with_home",
]


OLD_SWITCH = "cluster.gpu"
"""Was true or false before it became a number."""


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Return the config with these nested values and defaults elsewhere; keys may also be dotted.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type, or values are incompatible.
    """
    config: Config = _changed(Config(), "", dict(checked(values)))
    return config


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return the config with the values of these dotted keys, `merged`; raises as `config_from_dict`."""
    return config_from_dict(merged(dict(leaves(config_to_dict(config))), dict(checked(changes))))


def merged(
    earlier: Mapping[str, Any], later: Mapping[str, Any], keep: Collection[str] = ()
) -> dict[str, Any]:
    """Return earlier values of dotted keys with later ones on top.

    Where a later value names another class for a part (`class_path`), the part's earlier keys go, since they
    were another class's or those of jebm's own part; except those to `keep`.
    """
    renewed = [
        key.removesuffix("class_path")
        for key, value in later.items()
        if key.endswith(".class_path") and earlier.get(key) != value
    ]
    left = {
        key: value
        for key, value in earlier.items()
        if key in keep or not any(key.startswith(section) for section in renewed)
    }
    return left | dict(later)


def checked(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, converted value) for all keys of nested values; raises `ConfigError`."""
    yield from _checked(values, "")


def _checked(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if not isinstance(value, Mapping):
            if key == Features.SECTION:  # a kind in place of the section, and of a class there
                yield f"{key}.class_path", None
            was_switch = key == OLD_SWITCH and isinstance(value, bool)
            key = current_name(key)
            if was_switch:
                yield key, float(value)
                continue
        if key in class_arguments() and isinstance(value, Mapping | None):
            yield from _checked(value or {}, f"{key}.")
        elif key in class_arguments():
            raise ConfigError(f"{key}: needs arguments below it, such as {key}.width, not {shown(value)}")
        elif is_class_argument(key):
            yield key, _argument(value, key)
        elif key in key_types():
            yield key, _with_home(key, converted(value, key_types()[key], key))
        elif isinstance(value, Mapping):
            if not value and key not in sections():
                raise ConfigError(_unknown(key))
            yield from _checked(value, f"{key}.")
        elif key in sections():
            raise ConfigError(f"{key}: needs keys below it, not {shown(value)}")
        else:
            raise ConfigError(_unknown(key))


def _changed(section: Any, prefix: str, given: Mapping[str, Any]) -> Any:  # noqa: ANN401  (of the same kind)
    """Return the section with these values of dotted keys."""
    arguments = {}
    for field in dataclasses.fields(section):
        key = f"{prefix}{field.name}"
        if key in sections():
            arguments[field.name] = _changed(getattr(section, field.name), f"{key}.", given)
        elif key in class_arguments():
            names = [name for name in given if name.startswith(f"{key}.")]
            arguments[field.name] = {name.rpartition(".")[2]: given[name] for name in names}
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


@functools.cache
def class_arguments() -> Collection[str]:
    """Return the dotted keys under which the arguments of a user's own class stand."""
    return {key for key in key_types() if key.endswith(".init_args")}


def is_class_argument(key: str) -> bool:
    """Return whether a dotted key is an argument of a user's own class: energy.init_args.width."""
    section, _, name = key.rpartition(".")
    return section in class_arguments() and name.isidentifier()


def _argument(value: Any, key: str) -> Any:  # noqa: ANN401  (as given)
    if not is_plain(value):
        raise ConfigError(f"{key}: needs a plain value or a list of them, not {shown(value)}")
    return value


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
