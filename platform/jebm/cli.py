"""Turn errors into exit codes, and answers and the package's log into lines, for every job.

Everything printed to the terminal is escaped here: names, metrics and messages may come from a store and so
are untrusted.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import TextIOWrapper
from types import TracebackType
from typing import NoReturn, TextIO

from tqdm import tqdm

from jebm.errors import CheckpointError, ConfigError, DataError, JebmError, StoreError
from jebm.untrusted import escaped

__all__ = [
    "STOPPED",
    "age_text",
    "announce",
    "log_lines",
    "progress",
    "run",
    "size_text",
    "table",
    "tell",
    "tell_json",
    "unknown_metric",
    "warn",
]

STOPPED = 3
"""Exit code of training that a signal stopped before its end: `jebm train … && jebm evaluate …` stops too."""

_LINE_SECONDS = 5.0  # between progress lines without a terminal
_unwritable: set[TextIO] = set()  # streams that could not be written, as on a full disk


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit: with its result, or with one line on stderr.

    A result of None is 0, but 2 if stdout could not be written: what was printed is all that was wanted. Work
    that ended well whatever was printed returns 0.

    Exit code 2 for errors that the user can fix before anything was lost (ConfigError, DataError, StoreError,
    CheckpointError); 1 for any other JebmError, its kind before the message (`diverged: …`); 130 on Ctrl-C.
    Anything else is our bug and keeps its traceback.
    """
    code: str | int | None
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a terminal may not know every letter
    try:
        code = main()
    except SystemExit as ended:  # of --help and --print_config
        code = ended.code or None
        if isinstance(ended.__cause__, OSError):
            _drop(sys.stdout, ended.__cause__)
    except (CheckpointError, ConfigError, DataError, StoreError) as error:
        code = _report("error", error, 2)
    except JebmError as error:
        code = _report(type(error).__name__.removesuffix("Error").lower(), error, 1)
    except KeyboardInterrupt:
        code = _report("interrupted", "", 130)
    sys.exit((2 if sys.stdout in _unwritable else 0) if code is None else code)


def tell(text: str) -> None:
    """Print an answer on stdout and flush; escape whatever could move a terminal's cursor.

    An untrusted name in a table must be `escaped` first: a line break in it would forge a row.
    """
    _print(_safe_lines(text))


def tell_json(document: object) -> None:
    """Print one JSON document on one line of stdout, in ASCII; non-finite numbers become null."""
    _print(json.dumps(_plain(document), allow_nan=False).replace("\x7f", "\\u007f"))


def warn(text: str) -> None:
    """Print one line on stderr, escaped."""
    with _or_nowhere(sys.stderr):
        sys.stderr.write(f"{escaped(' '.join(text.split()))}\n")


def announce(text: str) -> None:
    """Print one line on stderr at once; for signal handlers, which may interrupt any other print."""
    with suppress(OSError):
        os.write(2, f"{escaped(text)}\n".encode())


def table(rows: Sequence[Sequence[str]], right: int = 0) -> str:
    """Return aligned columns, the first `right` of them right-aligned; no cell can forge another row."""
    rows = [[escaped(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if index < right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def size_text(size: float) -> str:
    """Return a size in bytes with a unit: 17.9 MB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def age_text(moment: datetime) -> str:
    """Return how long ago a moment was, with a unit: 5 min; a future one is 0 s ago."""
    seconds = max((datetime.now(UTC) - moment).total_seconds(), 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def unknown_metric(name: str, known: Collection[str]) -> str:
    """Return a line that says that none of the metrics has the name; empty if one has, or there are none."""
    if not known or name in known:
        return ""
    return f"none has the metric {escaped(name)}; metrics are {', '.join(map(escaped, sorted(known)))}"


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows progress on stderr: a bar on a terminal, else occasional lines.

    Call it with the bytes done since the last call, and with the total.
    """
    if sys.stderr.isatty():
        with tqdm(desc=title, unit="B", unit_scale=True) as bar:

            def draw(done: int, total: int) -> None:
                bar.total = total
                bar.update(done)

            yield draw
        return
    # Without a terminal: a line every few seconds.
    began = last_line = time.monotonic()
    so_far = 0

    def write(done: int, total: int) -> None:
        nonlocal last_line, so_far
        so_far += done
        now = time.monotonic()
        if now - last_line >= _LINE_SECONDS and so_far:
            last_line = now
            left = (now - began) * (total - so_far) / so_far
            warn(f"{title}: {size_text(so_far)} of {size_text(total)}, {left:.0f} s left")

    yield write


class _Lines(logging.Formatter):
    """One escaped line per record, then its traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        record.message = escaped(record.message)
        return super().formatMessage(record)

    def formatException(  # noqa: N802  (logging's name)
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        return _safe_lines(super().formatException(ei))


class _LineHandler(logging.StreamHandler[TextIO]):
    """Writes lines, and drops them once they cannot be written, as after `… | head`."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        error = sys.exception()
        if isinstance(error, OSError):
            _drop(self.stream, error)
        else:
            super().handleError(record)


def log_lines(level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Print this package's log, from `level` up, as bare lines on `stream` (stdout), and others' warnings."""
    handler = _LineHandler(stream or sys.stdout)
    handler.setFormatter(_Lines())
    handler.setLevel(level)
    logging.basicConfig(handlers=[handler])
    logging.getLogger().setLevel(logging.WARNING)  # even if logging was configured before
    logging.getLogger("jebm").setLevel(logging.INFO)


def _report(kind: str, error: Exception | str, code: int) -> int:
    warn(f"{kind}: {error}" if str(error) else kind)
    return code


def _print(text: str) -> None:
    with _or_nowhere(sys.stdout):
        print(text, flush=True)


@contextmanager
def _or_nowhere(stream: TextIO) -> Iterator[None]:
    """Let what is written to a stream within go nowhere if it cannot be written."""
    try:
        yield
    except OSError as error:
        _drop(stream, error)


def _drop(stream: TextIO, error: OSError) -> None:
    """Send what is still written to a stream nowhere; say why once, unless its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if not isinstance(error, BrokenPipeError):
        _unwritable.add(stream)
        warn(f"{stream.name.strip('<>')} cannot be written: {error.strerror}")


def _plain(value: object) -> object:
    """Return the value as strict JSON can hold it: None for non-finite numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _safe_lines(text: str) -> str:
    return "\n".join(escaped(line) for line in text.split("\n"))
