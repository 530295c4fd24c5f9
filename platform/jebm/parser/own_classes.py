"""A user's own classes in their config: the arguments are checked against `__init__`, and explained."""

import inspect
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from jebm.classes import arguments_of, full_path, loaded, module_of, parameters_of
from jebm.config import Config, Part
from jebm.parser.values import override, sections
from jebm.plain import shown

__all__ = ["class_help", "part_names", "with_own_classes"]

_LEADING = 1
"""Arguments of a part's `__init__` that jebm gives: `shapes`, `layers`, `channels` or `image`."""


def part_names() -> list[str]:
    """Return the dotted keys of the sections that take a class."""
    return [key for key, kind in sections().items() if issubclass(kind, Part)]


def with_own_classes(config: Config) -> Config:
    """Return the config with the arguments of its classes in the types that their `__init__` names.

    Only for a user's own config: it imports the classes. Raises ConfigError, one line that names the key, if
    a class cannot be loaded, or an argument is unknown, missing or of another type.
    """
    changed: dict[str, Any] = {}
    for name in part_names():
        part: Part = attrgetter(name)(config)
        if part.class_path is not None:
            kind, key = _class(part.class_path, name), f"{name}.init_args"
            arguments = arguments_of(kind, part.init_args, key, leading=_LEADING)
            changed |= {f"{key}.{argument}": value for argument, value in arguments.items()}
    return override(config, changed) if changed else config


def class_help(name: str, path: str) -> str:
    """Return the help of a class for a part: its docstring, and the keys of its arguments."""
    kind = _class(path, name)
    lines = [f"{name}.class_path {path}", "", inspect.getdoc(kind) or "(no docstring)", ""]
    return "\n".join([*lines, *_keys(kind, name)])


def _keys(kind: type, name: str) -> Iterator[str]:
    for argument in parameters_of(kind, _LEADING).values():
        if argument.kind is argument.VAR_KEYWORD:
            yield f"  --{name}.init_args.…  any other argument"
            continue
        annotation = argument.annotation
        of_type = "any" if annotation is argument.empty else inspect.formatannotation(annotation)
        default = "required" if argument.default is argument.empty else f"default: {shown(argument.default)}"
        yield f"  --{name}.init_args.{argument.name}  ({of_type}, {default})"


def _class(path: str, name: str) -> type:
    key = f"{name}.class_path"
    kind: type = loaded(path, object, (module_of(full_path(path, key)),), key)
    return kind
