"""The one parser that every value of the configuration passes through.

YAML files, the command line and a sweep's sample all arrive here as dotted keys (`energy.width`). An
unknown key or a value of the wrong type raises `ConfigError` in one line that names the key, before any
cluster starts.
"""

import dataclasses
import difflib
import functools
import json
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from jebm.config import Config, config_to_dict, leaves
from jebm.errors import ConfigError

__all__ = [
    "argument_parser",
    "config_from_dict",
    "config_to_yaml",
    "job_parser",
    "load_config",
    "parse",
    "parse_arguments",
]


class _Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of a description: they hold examples."""


def job_parser(description: str) -> ArgumentParser:
    """Return an empty parser whose errors `parse` turns into one line."""
    return ArgumentParser(description=description, exit_on_error=False, formatter_class=_Help)


def parse(parser: ArgumentParser, arguments: Sequence[str] | None = None) -> Namespace:
    """Return what the command line (default: this process's) gives, sections as objects of the config.

    Raises:
        ConfigError: an unknown key, a missing or wrong argument, or values that a section refuses.
    """
    try:
        values: Namespace = parser.instantiate(_without_nulls(parser.parse_args(arguments)))
    except (ArgumentError, ValueError) as error:
        raise ConfigError(_one_line(parser, error)) from error
    return values


def argument_parser(description: str) -> ArgumentParser:
    """Return a parser of `--config FILE` (repeatable), every dotted key of `Config`, and `--print_config`."""
    parser = job_parser(description)
    parser.usage = "%(prog)s [--config FILE] [--KEY VALUE ...]"
    parser.add_argument("--config", action="config", help="YAML file with the keys below; later ones win")
    for section in dataclasses.fields(Config):
        kind = type(getattr(Config(), section.name))
        summary = (kind.__doc__ or "").partition("\n")[0]
        parser.add_argument(f"--{section.name}", type=kind, default=kind(), help=summary)
    return parser


def parse_arguments(
    parser: ArgumentParser, arguments: Sequence[str] | None = None
) -> tuple[Config, Namespace]:
    """Return the config that the command line (default: this process's) gives, and the whole namespace.

    `parser` is `argument_parser`'s, perhaps with a job's own arguments added.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or values that cannot work together.
    """
    values = parse(parser, arguments)
    return Config(**{section.name: values[section.name] for section in dataclasses.fields(Config)}), values


def _without_nulls(values: Namespace) -> Namespace:
    """Refuse null and sections that are no mapping: jsonargparse lets both pass when they come from YAML."""
    if "config" not in values:
        return values  # of a job that takes none
    for key, default in leaves(config_to_dict(Config())):
        *sections, leaf = key.split(".")
        branch: Any = values
        for depth, section in enumerate(sections, 1):
            branch = branch.get(section)
            if not isinstance(branch, Namespace):
                raise ConfigError(f"{'.'.join(sections[:depth])}: needs keys below it, not {branch}")
        if default is not None and branch.get(leaf) is None:
            raise ConfigError(f"{key}: needs a value, not null")
    return values


def _unknown(parser: ArgumentParser, key: str) -> str:
    keys = [name for name in parser.get_defaults().keys() if name != "config"]  # noqa: SIM118  (a Namespace)
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if not close:  # the right last word under the wrong section
        last = key.rsplit(".", 1)[-1]
        close = difflib.get_close_matches(last, [name.rsplit(".", 1)[-1] for name in keys], n=1, cutoff=0.75)
        close = [name for name in keys if close and name.rsplit(".", 1)[-1] == close[0]][:1]
    hint = f"did you mean {close[0]}?" if close else "see --help for all keys"
    return f"unknown key {key}; {hint}"


def _one_line(parser: ArgumentParser, error: Exception) -> str:
    """Return what jsonargparse says, as one line in our words where the case is a common one."""
    text = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error).split())).replace("typing.", "")
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text):
        return _unknown(parser, ".".join(found.groups()))
    if found := re.search(r"Option '([\w.]+)' is not accepted", text):
        return _unknown(parser, found[1])
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        word = found[1].partition("=")[0]
        return (
            _unknown(parser, word[2:]) if word.startswith("--") else f"unexpected argument {word}; see --help"
        )
    if found := re.search(r'Parser key "([\w.]+)": (.*)', text):
        return f"{found[1]}: {found[2]}"
    return text


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Return the config with the given nested values and defaults elsewhere; raises `ConfigError`."""
    parser = _plain_parser()
    try:
        parsed = parser.instantiate(_without_nulls(parser.parse_object(dict(values))))
    except (ArgumentError, ValueError) as error:
        raise ConfigError(_one_line(parser, error)) from error
    return Config(**{section.name: parsed[section.name] for section in dataclasses.fields(Config)})


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Return the config of a YAML file, with dotted `overrides` (`{"energy.width": 50}`) on top."""
    arguments = ["--config", str(path)]
    for key, value in (overrides or {}).items():
        arguments.append(f"--{key}={json.dumps(value) if not isinstance(value, str) else value}")
    return parse_arguments(_plain_parser(), arguments)[0]


@functools.cache
def _plain_parser() -> ArgumentParser:
    """Return the parser of no job, made once: to make it takes longer than to parse."""
    return argument_parser("")


def config_to_yaml(config: Config) -> str:
    """Return the config as YAML that `--config` reads back to an equal config."""
    text: str = yaml.safe_dump(config_to_dict(config), sort_keys=False)
    return text
