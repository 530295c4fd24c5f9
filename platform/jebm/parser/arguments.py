"""The jobs' parsers: configuration keys and options, from files and the command line.

An unknown key or a value of the wrong type raises a one-line `ConfigError` that names it, before any cluster
starts. That check is ours (`jebm.parser.words`); jsonargparse does help, `--print_config`, commands and the
config's objects.
"""

import dataclasses
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from jebm.classes import short_names, trusted_name
from jebm.config import Config, config_to_dict
from jebm.errors import ConfigError
from jebm.parser.own_classes import class_help, part_names, with_own_classes
from jebm.parser.values import checked, config_from_dict, is_class_argument, merged, override
from jebm.parser.words import Option, checked_words, read_config
from jebm.parser.yaml_file import read_value
from jebm.plain import hint_at

__all__ = [
    "JobParser",
    "add_trust",
    "argument_parser",
    "config_to_yaml",
    "job_parser",
    "load_config",
    "parse",
    "parse_arguments",
    "trusted_names",
    "word_or_class",
]


class _Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps a description's line breaks, since it holds examples."""


class JobParser(ArgumentParser):
    """A parser that remembers its arguments, so that we can report a wrong command line ourselves."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:  # noqa: ANN401  (jsonargparse's)
        self.options: list[Option] = []
        self.commands: dict[str, JobParser] = {}
        self.has_keys = False
        """Whether its arguments include the config's keys."""
        self.values: dict[str, Any] = {}
        """The config keys of the command line that was checked last."""
        super().__init__(*arguments, **settings)

    def add_argument(self, *names: str, **settings: Any) -> Any:  # noqa: ANN401
        """Add an argument, as jsonargparse does."""
        action = settings.get("action")
        if action in (None, "store_true") and "." not in names[-1]:  # neither a config key nor a section
            option = Option(
                names=names,
                kind=None if action else settings.get("type", str),
                choices=tuple(settings.get("choices") or ()),
                many=settings.get("nargs") == "+",
                required=settings.get("required", not names[-1].startswith("-")),
                help=settings.get("help") or "",
            )
            if not dataclasses.is_dataclass(option.kind):
                self.options.append(option)
        return super().add_argument(*names, **settings)

    def add_command(self, name: str, parser: "JobParser", summary: str) -> None:
        """Add a command; its values are stored under its name, and the chosen name under `command`."""
        if not self.commands:
            self._choice = self.add_subcommands(dest="command", metavar="COMMAND")
        self.commands[name] = parser
        self._choice.add_subcommand(name, parser, help=summary)

    def dump(self, cfg: Namespace, **settings: Any) -> str:  # noqa: ANN401  (jsonargparse's)
        """Return the config keys of `--print_config`: a file for `--config`, which takes no options."""
        keys = cfg.clone()
        for option in self.options if self.has_keys else []:
            keys.pop(option.names[-1].lstrip("-").replace("-", "_"), None)
        text: str = super().dump(keys, **settings)
        return text

    def checked(self, words: Sequence[str]) -> list[str]:
        """Return the command line in plain form; raises `ConfigError` if it is wrong."""
        if self.commands:
            return self._with_command(words)
        if any(word in ("-h", "--help") for word in words):
            return ["--help"]
        if self.has_keys:
            self._explain_class(words)
        plain, self.values = checked_words(words, self.options, keys=self.has_keys)
        return plain

    def _explain_class(self, words: Sequence[str]) -> None:
        """Print the help of a class and exit, for `--energy.help mylab.Mine`."""
        for word, after in zip(words, [*words[1:], ""], strict=True):
            name, _, path = word.removeprefix("--").partition("=")
            if name.removesuffix(".help") in part_names() and name.endswith(".help"):
                path = path or after
                if not path or path.startswith("-"):
                    raise ConfigError(f"--{name}: needs a class, such as mylab.nets.Mine")
                _end_with(f"{class_help(name.removesuffix('.help'), path)}\n", SystemExit(0))

    def _with_command(self, words: Sequence[str]) -> list[str]:
        command, *rest = words or [""]
        if command in ("-h", "--help"):
            return ["--help"]
        if command in self.commands:
            return [command, *self.commands[command].checked(rest)]
        hint = hint_at(command, self.commands)
        raise ConfigError(
            f"unknown command {command}; {hint}" if command else f"a command is missing; {hint}"
        )


def job_parser(description: str) -> JobParser:
    """Return an empty parser, to be used with `parse`."""
    return JobParser(description=description, exit_on_error=False, formatter_class=_Help)


def add_trust(parser: JobParser) -> None:
    """Add --trust, for a command that builds the model of a config from a store."""
    parser.add_argument(
        "--trust",
        type=str,
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules whose classes the run's config may name: their code runs here",
    )


def trusted_names(arguments: Namespace) -> tuple[str, ...]:
    """Return the modules of --trust; raises `ConfigError` for anything but a top-level module's name."""
    return tuple(map(trusted_name, arguments.trust))


def word_or_class(text: str, key: str, words: Collection[str]) -> str | dict[str, Any]:
    """Return what an option names: one of its own words, or a class as `class_path` and perhaps `init_args`.

    A class is a dotted path, a short name that a package brings, or a mapping with its arguments; one of the
    `words` is never a short name. Raises `ConfigError` for another mapping.
    """
    value = read_value(text)
    if isinstance(value, dict):
        if not isinstance(value.get("class_path"), str) or value.keys() - {"class_path", "init_args"}:
            raise ConfigError(
                f"{key}: needs a mapping such as '{{class_path: mylab.Mine, init_args: {{n: 3}}}}'"
            )
        return value
    is_class = text not in words and ("." in text or text in short_names())
    return {"class_path": text} if is_class else text


def parse(parser: JobParser, arguments: Sequence[str] | None = None) -> Namespace:
    """Return the values of the command line (default: this process's), with sections as config objects.

    Raises:
        ConfigError: an option is unknown, missing or wrong, or a section refuses a value.
    """
    words = parser.checked(sys.argv[1:] if arguments is None else arguments)
    try:
        values: Namespace = parser.instantiate(_parsed(parser, words))
    except (ArgumentError, ValueError) as error:  # not caught by our own check
        raise ConfigError(" ".join(str(error).split())) from error
    return values


def _parsed(parser: JobParser, words: Sequence[str]) -> Namespace:
    """Return the words' values; raises as `_end_with` after --help and --print_config."""
    try:
        with redirect_stdout(StringIO()) as printed:
            return parser.parse_args(words)
    except SystemExit as ended:
        _end_with(printed.getvalue(), ended)


def _end_with(text: str, ended: SystemExit) -> NoReturn:
    """Print a text and end the process; if it cannot be printed, the OSError is the SystemExit's cause."""
    try:
        print(text, end="", flush=True)  # noqa: T201  (the text that was asked for)
    except OSError as error:  # argparse would say nothing
        raise ended from error
    raise ended


def argument_parser(description: str) -> JobParser:
    """Return a parser for `--config FILE` (repeatable), all dotted keys of `Config`, and `--print_config`."""
    parser = job_parser(description)
    parser.usage = "%(prog)s [--config FILE] [--KEY VALUE ...]"
    parser.has_keys = True
    parser.add_argument("--config", action="config", help="YAML file with the keys below; later ones win")
    for section in dataclasses.fields(Config):
        kind = type(getattr(Config(), section.name))
        summary = (kind.__doc__ or "").partition("\n")[0]
        parser.add_argument(f"--{section.name}", type=kind, default=kind(), help=summary)
    return parser


def parse_arguments(parser: JobParser, arguments: Sequence[str] | None = None) -> tuple[Config, Namespace]:
    """Return the config from the command line (default: this process's), and the whole namespace.

    `parser` comes from `argument_parser`, perhaps with a job's own arguments added.

    Classes that the config names are imported: it is the user's own.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type, or values are incompatible.
    """
    values = parse(parser, arguments)
    config = Config(**{section.name: values[section.name] for section in dataclasses.fields(Config)})
    # jsonargparse reads the arguments of classes as YAML a second time; ours are read once.
    arguments_of_classes = {key: value for key, value in parser.values.items() if is_class_argument(key)}
    return with_own_classes(override(config, arguments_of_classes)), values


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Return the config from a YAML file, with dotted `overrides` (`{"energy.width": 50}`) on top.

    Classes that it names are imported: it is the user's own.
    """
    return with_own_classes(config_from_dict(merged(read_config(path), dict(checked(overrides or {})))))


def config_to_yaml(config: Config) -> str:
    """Return the config as YAML that `--config` reads back as an equal config."""
    text: str = yaml.safe_dump(config_to_dict(config), sort_keys=False)
    return text
