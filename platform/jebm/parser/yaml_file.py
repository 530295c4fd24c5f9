"""The one reader of untrusted YAML: configs, search files, and values on the command line.

Plain values only: text, numbers, true and false, null, lists and mappings. Numbers follow YAML 1.2: 1e-4 is a
number and 010 is ten. A repeated key is refused at any level.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from jebm.errors import ConfigError
from jebm.plain import resolved

__all__ = ["read_value", "read_yaml"]

_MOST_BYTES = 1 << 20
_MOST_VALUES = 10_000
"""Counted with all aliases expanded: a few lines of them can stand for billions."""
_DEEPEST = 30
_TAG = "tag:yaml.org,2002:"
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def read_yaml(path: str | Path, example: str = "train: {epochs: 3}") -> dict[str, Any]:
    """Return the mapping in a YAML file, empty for an empty file; a refusal shows the `example` of a line.

    Raises:
        ConfigError: the file cannot be read, is not YAML, holds anything but one mapping of plain values, or
            repeats a key; one line that names the file and the line.
    """
    text = _text(Path(path))
    with _about(f"{path}: "):
        values = _Reader().read(_composed(text))
        if not isinstance(values, dict | None):
            raise ConfigError(f"holds no keys; give a YAML file with lines such as `{example}`")
        return values or {}


def read_value(text: str) -> Any:  # noqa: ANN401  (any plain value)
    """Return the value of a command-line word as YAML, or the word itself if it is not YAML."""
    try:
        return _Reader().read(_composed(text))
    except (ConfigError, yaml.YAMLError):
        return text


def _text(path: Path) -> str:
    """Return a file's text; raises ConfigError that names the file."""
    try:
        with path.open("rb") as file:  # may be a pipe
            data = file.read(_MOST_BYTES + 1)
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give a YAML file in it") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read ({reason})") from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(
            f"{path}: is larger than {_MOST_BYTES >> 20} MB: no file of settings; give a YAML file"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text in UTF-8; give a YAML file") from error
    if found := _CONTROL.search(text):
        raise ConfigError(
            f"{path}: holds the byte {ord(found[0]):#04x}, which no text does; give a YAML file"
        )
    return text


@contextmanager
def _about(place: str) -> Iterator[None]:
    """Turn errors raised within into a one-line `ConfigError` that begins with `place`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}{error}") from error
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise ConfigError(
            f"{place}{where}invalid YAML ({error.problem}); correct it, or give another file"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{place}invalid YAML ({' '.join(str(error).split())}); give another file"
        ) from error


class _Composer(yaml.SafeLoader):
    """Parses text to nodes with unresolved plain scalars, and limits their nesting."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.yaml_implicit_resolvers = {"<": [(f"{_TAG}merge", re.compile("<<"))]}
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401
        self._depth += 1
        if self._depth > _DEEPEST:
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise ConfigError(f"line {line}: more than {_DEEPEST} levels deep; give a YAML file of settings")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _composed(text: str) -> yaml.Node | None:
    composer = _Composer(text)
    try:
        return composer.get_single_node()
    finally:
        composer.dispose()


class _Reader:
    """Turns nodes into plain values; remembers each dotted key's line, to report repeated keys."""

    def __init__(self) -> None:
        self._lines: dict[str, int] = {}
        self._within: list[yaml.Node] = []
        self._count = 0

    def read(self, node: yaml.Node | None, key: str = "") -> Any:  # noqa: ANN401
        """Return the value of the node at a dotted key."""
        if node is None:  # an empty text
            return None
        line = node.start_mark.line + 1
        self._count += 1
        if self._count > _MOST_VALUES:
            raise ConfigError(f"line {line}: more than {_MOST_VALUES:,} values, with all aliases written out")
        if any(node is outer for outer in self._within):
            raise ConfigError(f"line {line}: {key or 'the file'} holds itself by an alias; write it out")
        if len(self._within) == _DEEPEST:  # possible through aliases
            raise ConfigError(f"line {line}: more than {_DEEPEST} levels deep; give a YAML file of settings")
        self._within.append(node)
        try:
            if node.tag == f"{_TAG}map":
                return self._mapping(node, key)
            if node.tag == f"{_TAG}seq":
                return [self.read(item, f"{key}[{i}]") for i, item in enumerate(node.value)]
            if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}str":
                return resolved(node.value) if node.style is None else node.value  # quoted scalars are text
        finally:
            self._within.pop()
        tag = node.tag.replace(_TAG, "!!")
        raise ConfigError(f"line {line}: the tag {tag} is not read; write a plain value")

    def _mapping(self, node: yaml.Node, prefix: str) -> dict[str, Any]:
        own: dict[str, Any] = {}
        inherited: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == f"{_TAG}merge":
                inherited = self._merged(value_node) | inherited
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"line {line}: a key must be a word, not a list or a mapping")
            name = key_node.value
            key = f"{prefix}.{name}" if prefix else name
            if key in self._lines:
                lines = f"line {self._lines[key]} and line {line}"
                raise ConfigError(f"{key}: stands twice ({lines}); keep one of the two")
            self._lines[key] = line
            own[name] = self.read(value_node, key)
        return inherited | own

    def _merged(self, node: yaml.Node) -> dict[str, Any]:
        """Return what `<<:` merges in: a mapping, or several of which the first wins."""
        line = node.start_mark.line + 1
        mappings = node.value if node.tag == f"{_TAG}seq" else [node]
        merged: dict[str, Any] = {}
        for mapping in mappings:
            outside, self._lines = self._lines, {}  # its keys may occur beside the merge as well
            try:
                values = self.read(mapping)
            finally:
                self._lines = outside
            if not isinstance(values, dict):
                raise ConfigError(f"line {line}: << needs an alias of a mapping")
            merged = values | merged
        return merged
