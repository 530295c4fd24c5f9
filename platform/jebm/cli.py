"""From errors to exit codes, and from answers and the package's log to lines: the same for every job.

All that reaches the terminal passes through here, and here it is escaped: names, metrics and messages may
come from a store, and so from anybody.
"""

import json
import logging
import sys
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, TextIO

from jebm.errors import CheckpointError, ConfigError, DataError, JebmError, StoreError
from jebm.untrusted import escaped

__all__ = ["log_lines", "run", "tell", "tell_json", "warn"]


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave the process: with its result (None is 0), or with one line on stderr.

    Exit code 2 for what the user can put right before anything was lost (ConfigError, DataError,
    StoreError, CheckpointError); 1 for any other JebmError, its kind before the message (`diverged: …`);
    130 on Ctrl-C. Anything else is a bug of ours and keeps its traceback.
    """
    try:
        code = main() or 0
    except (CheckpointError, ConfigError, DataError, StoreError) as error:
        code = _report("error", error, 2)
    except JebmError as error:
        code = _report(type(error).__name__.removesuffix("Error").lower(), error, 1)
    except KeyboardInterrupt:
        code = _report("interrupted", "", 130)
    sys.exit(code)


def tell(text: str) -> None:
    """Print the lines of an answer on stdout, at once; what could move a terminal's cursor is escaped.

    A foreign name that goes into a table must be `escaped` before: a line break in it would forge a row.
    """
    print(_safe_lines(text), flush=True)


def tell_json(document: object) -> None:
    """Print one JSON document on one line of stdout, in ASCII."""
    print(json.dumps(document).replace("\x7f", "\\u007f"), flush=True)


def warn(text: str) -> None:
    """Print one line on stderr, escaped."""
    sys.stderr.write(f"{escaped(' '.join(text.split()))}\n")


class _Lines(logging.Formatter):
    """One escaped line a record, then its traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        record.message = escaped(record.message)
        return super().formatMessage(record)

    def formatException(  # noqa: N802  (logging's name)
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        return _safe_lines(super().formatException(ei))


def log_lines(level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Print this package's log, from `level` up, as bare lines on `stream` (stdout), and others' warnings."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(_Lines())
    handler.setLevel(level)
    logging.basicConfig(handlers=[handler])
    logging.getLogger().setLevel(logging.WARNING)  # also where somebody has set up the log before
    logging.getLogger("jebm").setLevel(logging.INFO)


def _report(kind: str, error: Exception | str, code: int) -> int:
    warn(f"{kind}: {error}" if str(error) else kind)
    return code


def _safe_lines(text: str) -> str:
    return "\n".join(escaped(line) for line in text.split("\n"))
