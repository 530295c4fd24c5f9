"""A command's answer, and the checkpoint that a command line chooses."""

from dataclasses import dataclass

from jsonargparse import Namespace

from jebm.errors import ConfigError
from jebm.store.checkpoint import Manifest
from jebm.store.retrieve import RunStore
from jebm.untrusted import JsonObject

__all__ = ["Answer", "chosen", "is_chosen"]


@dataclass(frozen=True)
class Answer:
    """A command's output: text for people, a document for programs, and an exit code."""

    text: str
    document: JsonObject
    code: int = 0


def is_chosen(arguments: Namespace) -> bool:
    """Return whether one checkpoint is named; raises ConfigError if several are."""
    given = sum([arguments.step is not None, arguments.best is not None, arguments.latest])
    if given > 1:
        raise ConfigError("give one of --step, --latest and --best")
    return bool(given)


def chosen(run: RunStore, arguments: Namespace) -> Manifest:
    """Return the named checkpoint, else the newest; raises CheckpointError if it does not exist."""
    is_chosen(arguments)
    return run.choose(step=arguments.step, best=arguments.best, mode=arguments.mode)
