"""The journal left by earlier attempts at a run, read strictly, since anyone may have changed it."""

import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from jebm.errors import StoreError
from jebm.store.records import (
    DamagedRecordError,
    listed_objects,
    read_object,
    read_pieces,
    set_aside,
    understood,
)
from jebm.store.storage import ObjectChangedError, ObjectMissingError, Store
from jebm.untrusted import JsonObject, parsed_object, typed, whole_number

__all__ = [
    "METRICS",
    "RUN",
    "Rows",
    "attempts_before",
    "end_of_metrics",
    "last_row",
    "metrics_in",
    "newest_row",
    "planned_steps",
    "recorded_config",
    "rows_before",
    "rows_between",
]

RUN = "run.json"
METRICS = "metrics.jsonl"

_LOG = logging.getLogger("jebm.train")
_NO_METRICS = ("step", "time", "hosts")
_LAST_STEP = 2**53
_METRICS_BYTES = 2**30
_ROW_BYTES = 2**20


@dataclass(frozen=True)
class Rows:
    """The lines of metrics.jsonl to keep, and whether the store holds exactly these."""

    content: bytes
    stored: bool


def attempts_before(run: Store) -> list[JsonObject]:
    """Return the attempts listed in run.json; a damaged file is set aside and logged.

    Raises:
        StoreError: the store cannot be reached, or a damaged file cannot be set aside.
    """
    try:
        record = read_object(run, RUN)
        with understood(run, RUN):
            attempts = listed_objects(record, "attempts")
            for attempt in attempts:
                typed(attempt, "started", str)
                whole_number(attempt, "from_step", 0, _LAST_STEP)
            return attempts
    except ObjectMissingError:
        return []
    except DamagedRecordError as error:
        name = set_aside(run, RUN)
        _LOG.warning("%s; it is kept as %s, and a new one lists the attempts from this one on", error, name)
        return []


def planned_steps(run: Store) -> int | None:
    """Return the steps planned by the newest attempt; None if run.json is missing or older.

    Raises:
        DamagedRecordError: run.json is damaged.
        StoreError: the store cannot be reached.
    """
    try:
        record = read_object(run, RUN)
    except ObjectMissingError:
        return None
    with understood(run, RUN):
        attempts = listed_objects(record, "attempts")
        if not attempts or "total_steps" not in attempts[-1]:
            return None
        return whole_number(attempts[-1], "total_steps", 0, _LAST_STEP)


def last_row(run: Store) -> JsonObject | None:
    """Return the newest row of metrics.jsonl, with an integer `step`; None if there is none now.

    Only the end of the file is read. Raises StoreError if the store cannot be reached.
    """
    info = run.head(METRICS)
    return None if info is None else newest_row(end_of_metrics(run, info.size, _ROW_BYTES))


def end_of_metrics(run: Store, size: int, most_bytes: int) -> bytes:
    """Return the end of a metrics.jsonl of `size` bytes; empty if a resume has just cut it.

    Raises StoreError if the store cannot be reached.
    """
    end = bytearray(min(size, most_bytes))
    try:
        run.read_into(METRICS, size - len(end), [memoryview(end)])
    except (ObjectChangedError, ObjectMissingError):
        return b""
    return bytes(end)


def newest_row(end: bytes) -> JsonObject | None:
    """Return the last row, with an integer `step`, in the end of a metrics.jsonl; None if there is none."""
    for line in reversed(end.splitlines()):
        try:
            return _parsed(line)
        except ValueError:  # a partial row: being written, or left by a crash
            continue
    return None


def metrics_in(row: JsonObject) -> JsonObject:
    """Return a row without its `step`, `time` and `hosts`; rows of older versions have no more than step."""
    return {name: value for name, value in row.items() if name not in _NO_METRICS}


def recorded_config(run: Store) -> JsonObject:
    """Return the config in a run's run.json, as stored: nested plain values, of whatever version.

    Raises:
        StoreError: there is no run here, or its storage cannot be reached.
        DamagedRecordError: run.json holds no config.
    """
    try:
        record = read_object(run, RUN)
    except ObjectMissingError:
        raise StoreError(f"{run.uri}: no run here; jebm runs lists the runs of a storage") from None
    with understood(run, RUN):
        return typed(record, "config", dict)


def rows_between(run: Store, after: int, until: int) -> list[tuple[int, dict[str, float]]]:
    """Return (step, metrics) of the reports with after < step <= until; NaN for values that were not finite.

    Damaged lines count as missing. Raises StoreError if the store cannot be reached.
    """
    found = []
    try:
        for line in _lines(run):
            try:
                row = _parsed(line)
            except ValueError:
                continue
            if after < row["step"] <= until:
                metrics = metrics_in(row).items()
                found.append((row["step"], {k: math.nan if v is None else float(v) for k, v in metrics}))
    except (DamagedRecordError, ObjectMissingError):
        pass
    return found


def rows_before(run: Store, step: int) -> Rows:
    """Return the rows of metrics.jsonl up to a step; those after it, left by a crash, are dropped.

    A partial last row, also left by a crash, is dropped. After any other damage the good rows are kept, and
    the file is set aside and logged.

    Raises:
        StoreError: the store cannot be reached, or a damaged file cannot be set aside.
    """
    # Collect the good rows, and what is wrong with the others.
    kept, size = bytearray(), 0
    bad: list[str] = []
    try:
        for number, line in enumerate(_lines(run), start=1):
            size += len(line)
            try:
                if line.strip() and _parsed(line)["step"] <= step:
                    kept += line.removesuffix(b"\n") + b"\n"
            except ValueError as error:
                half = not line.endswith(b"\n") and line.startswith(b"{") and len(line) <= _ROW_BYTES
                if not half:
                    bad.append(f"line {number}: {error}")
        # Log the damage and keep the file as it was.
        with understood(run, METRICS):
            if bad:
                raise ValueError(bad[0] + (f"; and {len(bad) - 1:,} more lines" if bad[1:] else ""))
    except ObjectMissingError:
        return Rows(b"", stored=False)
    except DamagedRecordError as error:
        name = set_aside(run, METRICS)
        _LOG.warning("%s; it is kept as %s, and its %d good rows stay", error, name, kept.count(b"\n"))
        return Rows(bytes(kept), stored=False)
    return Rows(bytes(kept), stored=len(kept) == size)


def _parsed(line: bytes) -> JsonObject:
    """Return a row: numbers by name, `step` among them, and perhaps `hosts`; raises ValueError for others."""
    row = parsed_object(line, _ROW_BYTES)
    for name, value in row.items():
        if name == "hosts":
            if not isinstance(value, list) or not all(isinstance(host, str) for host in value):
                raise ValueError("hosts is no list of names")
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name[:40]} is no number")
        elif isinstance(value, int) and abs(value) > sys.float_info.max:
            raise ValueError(f"{name[:40]} is too large")
    whole_number(row, "step", 0, _LAST_STEP)
    return row


def _lines(run: Store) -> Iterator[bytes]:
    """Yield the lines of metrics.jsonl, truncating those far too long for a row."""
    rest = b""
    for piece in read_pieces(run, METRICS, _METRICS_BYTES):
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line + b"\n" for line in lines)
        rest = rest[: _ROW_BYTES + 1]
    if rest:
        yield rest
