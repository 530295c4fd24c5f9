"""List, download, verify and prune the checkpoints of a run. Needs only the store.

  jebm checkpoints list s3://bucket/runs/fashion_mnist
  jebm checkpoints get s3://bucket/runs/fashion_mnist --best distortion --output checkpoint
  jebm checkpoints verify s3://bucket/runs/fashion_mnist --deep

RUN is run.storage/run.name. Every command takes --json: one document on stdout and nothing else.
Exit code 0: fine; 1: damaged or not found; 2: usage error, or the storage cannot be reached.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any, Literal

from jsonargparse import Namespace

from jebm.cli import log_lines, tell, tell_json, warn
from jebm.commands.checkpoints import act, look
from jebm.commands.checkpoints.answer import Answer
from jebm.errors import CheckpointError, JebmError
from jebm.parser import JobParser, job_parser, parse
from jebm.store.retrieve import RunStore, open_run
from jebm.store.storage import ObjectChangedError, ObjectMissingError

_COMMANDS: dict[str, Callable[[RunStore, Namespace], Answer]] = {
    "list": look.list_,
    "show": look.show,
    "get": act.get,
    "verify": look.verify,
    "prune": act.prune,
    "pin": act.pin,
    "unpin": act.unpin,
    "diff": look.diff,
}

_EXAMPLES = {
    "list": ["", "--metric loss --mode min", "--json"],
    "show": ["", "--step 1200", "--best distortion"],
    "get": ["--output checkpoint", "--best distortion --output checkpoint"],
    "verify": ["", "--step 1200 --deep"],
    "prune": ["--keep-last 3 --keep-every 10000", "--keep-last 3 --orphans --yes"],
    "pin": ["--step 1200"],
    "unpin": ["--step 1200"],
    "diff": ["1000 1200"],
}

_NOTES = {
    "get": "Afterwards the folder is a storage of its own: --run.storage FOLDER. A broken download resumes\n"
    "where it broke: parts that are good are kept, damaged ones are fetched again.",
    "verify": "Exit code 1 if something is damaged. Partial ones are no damage: a save may be under way.",
    "prune": "Never deleted: the newest, what is pinned, and what the newest was resumed from.",
    "diff": "What equal checksums of parts show to be equal is not downloaded.",
}

_CHOICE: dict[str, dict[str, Any]] = {
    "--step": {"type": int | None, "default": None, "help": "the checkpoint of this step"},
    "--latest": {"action": "store_true", "help": "the newest that is whole"},
    "--best": {"type": str | None, "default": None, "metavar": "METRIC", "help": "the best by a metric"},
    "--mode": {"type": Literal["min", "max"], "default": "min", "help": "what is best"},
}
_STEP = {"--step": {"type": int, "required": True, "help": "the checkpoint of this step"}}

_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "list": {
        "--mode": _CHOICE["--mode"],
        "--metric": {"default": "distortion", "help": "to show and to mark the best by"},
        "--limit": {"type": int, "default": 100, "help": "how many, the newest; 0 for all"},
    },
    "show": _CHOICE,
    "get": _CHOICE | {"--output": {"required": True, "metavar": "FOLDER", "help": "where to"}},
    "verify": _CHOICE | {"--deep": {"action": "store_true", "help": "read every byte, compare all CRC32s"}},
    "prune": {
        "--keep-last": {"type": int, "required": True, "help": "how many of the newest stay"},
        "--keep-every": {"type": int | None, "default": None, "help": "steps divisible by it stay"},
        "--orphans": {"action": "store_true", "help": "also what killed writers left"},
        "--orphan-hours": {"type": float, "default": 24.0, "help": "the age that makes an orphan"},
        "--yes": {"action": "store_true", "help": "do it"},
    },
    "pin": _STEP,
    "unpin": _STEP,
    "diff": {"first": {"type": int, "help": "a step"}, "second": {"type": int, "help": "another step"}},
}


def build_parser() -> JobParser:
    """Return the parser of all commands."""
    parser = job_parser(__doc__ or "")
    for name, command in _COMMANDS.items():
        summary = command.__doc__ or ""
        examples = [
            f"  jebm checkpoints {name} s3://bucket/runs/mine {example}" for example in _EXAMPLES[name]
        ]
        one = job_parser("\n\n".join(filter(None, [summary, "\n".join(examples), _NOTES.get(name, "")])))
        one.add_argument("run", type=str, help="run.storage/run.name: s3://bucket/prefix/name or a folder")
        for option, settings in _OPTIONS[name].items():
            one.add_argument(option, **settings)
        one.add_argument("--json", action="store_true", help="one JSON document on stdout")
        parser.add_command(name, one, summary.rstrip("."))
    return parser


def main() -> int | None:
    """Run one command, print its answer and return its exit code, None if all is well."""
    log_lines(logging.WARNING, sys.stderr)
    values = parse(build_parser())
    arguments = values[values.command]
    try:
        run = open_run(arguments.run)
        if run.uri.startswith("s3://"):
            # At startup a wrong location is likelier than a busy one, so probe with less patience.
            run.root.probe(write=False)
        answer = _COMMANDS[values.command](run, arguments)
    except JebmError as error:
        if arguments.json:
            tell_json({"error": " ".join(str(error).split())})
        if not isinstance(error, CheckpointError | ObjectChangedError | ObjectMissingError):
            raise
        warn(f"error: {error}")
        return 1  # not fixable by another command line or key
    if arguments.json:
        tell_json(answer.document)
    else:
        tell(answer.text)
    return answer.code or None
