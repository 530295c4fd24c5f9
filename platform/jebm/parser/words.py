"""Check the words of a command line against a parser's arguments before jsonargparse sees them.

Refusals use our own messages. Valid words are passed on in one unambiguous form, --key=value: --config files
written out key by key, ~ expanded, and `true` for a switch without a value.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jebm.config import current_name
from jebm.errors import ConfigError
from jebm.parser.values import (
    OLD_SWITCH,
    checked,
    is_class_argument,
    key_types,
    meant,
    merged,
    sections,
    with_home,
)
from jebm.parser.yaml_file import read_value, read_yaml
from jebm.paths import shipped
from jebm.plain import converted

__all__ = ["Option", "checked_words", "read_config"]

_SEARCH = ("space", "objective")
"""Keys that occur only in search files."""


@dataclass(frozen=True)
class Option:
    """A parser's argument that is not a config key."""

    names: tuple[str, ...]
    """--name, perhaps with aliases; for a positional argument its name without dashes."""
    kind: Any
    """The value's type; None for a switch."""
    choices: tuple[Any, ...]
    many: bool
    """Whether it takes one or more words."""
    required: bool
    help: str

    @property
    def name(self) -> str:
        """Return the name shown to people."""
        return self.names[-1]

    def refused(self, why: str) -> ConfigError:
        """Return the error that says why, with what belongs there."""
        return ConfigError(f"{self.name}: {why}" + (f" ({self.help})" if self.help else ""))

    def check(self, word: str) -> str:
        """Return the word in the form to pass on; raises `ConfigError` if it is not a valid value."""
        if self.kind in (str, Path, str | None):
            word = with_home(word, self.name)
        elif self.kind is not None:
            converted(read_value(word), self.kind, self.name)
        if not word:
            raise self.refused("is empty")
        if self.choices and word not in self.choices:
            raise ConfigError(f"{self.name}: must be one of {', '.join(self.choices)}, not '{word}'")
        return word


def checked_words(
    words: Sequence[str], options: Sequence[Option], *, keys: bool
) -> tuple[list[str], dict[str, Any]]:
    """Return a valid command line in plain form, and its config keys; with `keys`, they are options too.

    Raises:
        ConfigError: an option or key is unknown or missing, its value is missing or of the wrong type, or a
            file cannot be read.
    """
    line = _Words(words, options, keys=keys)
    return list(line.checked()), line.values


class _Words:
    """A pass over the words of one command line."""

    def __init__(self, words: Sequence[str], options: Sequence[Option], *, keys: bool) -> None:
        self._left = list(words)
        self._keys = keys
        self._options = options
        self._named = {name: option for option in options for name in option.names if name.startswith("-")}
        self._positional = [option for option in options if not option.name.startswith("-")]
        self._found: set[str] = set()
        self.values: dict[str, Any] = {}
        """The config keys so far; later ones win."""
        self._own: set[str] = set()
        """Those that are not from a file."""

    def checked(self) -> Iterator[str]:
        while self._left:
            word = self._left.pop(0)
            name, given, value = word.partition("=")
            if name in self._named:
                yield from self._option(self._named[name], value if given else None)
            elif self._keys and name == "--config":
                self.values = merged(
                    self.values, read_config(value if given else self._value(name)), self._own
                )
            elif self._keys and _is_key(current_name(name[2:])) and name.startswith("--"):
                self._key(name[2:], value if given else None)
            elif word.startswith("--print_config") and self._keys:
                self._found |= {option.name for option in self._options}  # prints values, runs nothing
                yield word
            elif word.startswith("--") and len(word) > 2:
                raise ConfigError(self._unknown(name[2:]))
            else:
                yield self._argument(word)
        yield from self._plain()
        for option in self._options:
            if option.required and option.name not in self._found:
                raise option.refused("is missing")

    def _option(self, option: Option, value: str | None) -> Iterator[str]:
        self._found.add(option.name)
        if option.kind is None:
            if value is not None:
                raise ConfigError(f"{option.name}: is a switch, and takes no value")
            yield option.name
            return
        first = option.check(self._value(option.name) if value is None else value)
        if not option.many:
            yield f"{option.name}={first}"
            return
        yield option.name
        yield first
        while value is None and self._left and not self._left[0].startswith("--"):
            yield option.check(self._left.pop(0))

    def _key(self, key: str, value: str | None) -> None:
        """Set a config key; a section takes a mapping."""
        kind = key_types().get(current_name(key))
        switch = kind is bool or key == OLD_SWITCH
        if value is None and switch and (not self._left or self._left[0].startswith("--")):
            value = "true"
        text = self._value(f"--{key}") if value is None else value
        as_it_stands = kind is str or (kind == str | None and text != "null")  # whatever it means in YAML
        values = dict(checked({key: text if as_it_stands else read_value(text)}))
        self.values = merged(self.values, values, self._own)
        self._own |= {name for name in values if not is_class_argument(name)}

    def _plain(self) -> Iterator[str]:
        """Yield the words of all config keys."""
        classes: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, value in self.values.items():
            if is_class_argument(key):
                section, _, name = key.rpartition(".")
                classes[section][name] = value
            else:
                yield f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for section, arguments in classes.items():
            yield f"--{section}={json.dumps(arguments)}"

    def _argument(self, word: str) -> str:
        """Return a positional word."""
        if not self._positional or (word.startswith("-") and len(word) > 1):
            raise ConfigError(f"unexpected argument {word or repr(word)}; see --help")
        option = self._positional[0]
        if not option.many:
            self._positional.pop(0)
        self._found.add(option.name)
        return option.check(word)

    def _value(self, name: str) -> str:
        if not self._left or self._left[0].startswith("--"):
            raise ConfigError(f"{name}: needs a value")
        return self._left.pop(0)

    def _unknown(self, key: str) -> str:
        """Return the message for an unknown option, with what was probably meant."""
        keys = list(key_types()) if self._keys else []
        names = [name.removeprefix("--") for name in self._named if name.startswith("--")]
        close = meant(key, keys + names)
        what = f"unknown key {key}" if self._keys else f"unknown option --{key}"
        if not close:
            return f"{what}; see --help for all {'keys' if self._keys else 'options'}"
        shown = [name if name in keys else f"--{name}" for name in close]
        return f"{what}; did you mean {' or '.join(shown)}?"


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the checked dotted keys and values of a config file; jebm ships some, such as `smoke`.

    Raises:
        ConfigError: the file is invalid; one line that names it.
    """
    if not str(path):
        raise ConfigError("--config: is empty; give a YAML file, or leave it out")
    path = shipped(with_home(str(path), "--config"), "configs")
    values = read_yaml(path)
    if all(key in values for key in _SEARCH):
        raise ConfigError(f"{path}: that is a search file; give it to jebm tune as --search {path}")
    try:
        return dict(checked(values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _keys() -> Collection[str]:
    return {**key_types(), **sections()}


def _is_key(key: str) -> bool:
    return key in _keys() or is_class_argument(key)
