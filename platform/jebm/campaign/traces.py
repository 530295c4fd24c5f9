"""What runs have left in their storages, read to be compared: configs, reports, pictures, evaluations.

All of it may come from a bucket, so none of it is assumed to be well formed.
"""

import io
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from jebm.config import leaves
from jebm.store.records import DamagedRecordError, listed_objects, read_object
from jebm.store.retrieve import open_run
from jebm.store.storage import ObjectMissingError, Store
from jebm.train.history import recorded_config, rows_between
from jebm.train.status import RunStatus, run_status
from jebm.untrusted import JsonObject, typed

__all__ = [
    "Evaluated",
    "Trace",
    "evaluated",
    "evaluations",
    "picture_of",
    "pictures",
    "png_at",
    "read_traces",
]

_LAST_STEP = 2**53
_PICTURE = re.compile(r"pictures/step-(\d{8,15})\.png", re.ASCII)
_PICTURE_BYTES, _PICTURE_PIXELS = 16 * 2**20, 2**24
_EVALUATION = re.compile(r"evaluations/[^/]+/evaluation\.json")


@dataclass(frozen=True)
class Evaluated:
    """A figure of an evaluation: value, standard error if known, unit, and which way is better."""

    value: float
    error: float | None
    unit: str
    better: str


@dataclass(frozen=True)
class Trace:
    """What one run has left: `pictures` by step (keys in `store`), `evaluation` by (section, figure)."""

    name: str
    store: Store
    config: Mapping[str, object]
    """By dotted key."""
    rows: Sequence[tuple[int, Mapping[str, float]]]
    pictures: Mapping[int, str]
    evaluation: Mapping[tuple[str, str], Evaluated]
    evaluation_key: str
    """Where the evaluation lies in `store`; empty if there is none."""
    status: RunStatus

    @property
    def batch_size(self) -> int:
        """Images per step; 1 if the config does not say."""
        size = self.config.get("train.batch_size")
        return size if isinstance(size, int) and size > 0 else 1

    @property
    def metrics(self) -> dict[str, float]:
        """The newest value of each metric."""
        return {name: value for _, row in self.rows for name, value in row.items()}


def read_traces(uris: Sequence[str]) -> list[Trace]:
    """Return what the runs at `run.storage/run.name` have left, under names that differ.

    Raises:
        StoreError: a URI names no run, or its storage cannot be reached.
    """
    traces = [_trace(uri) for uri in uris]
    names = [trace.name for trace in traces]
    return [
        trace
        if names.count(trace.name) == 1
        else replace(trace, name=trace.store.uri.removeprefix("file://"))
        for trace in traces
    ]


def picture_of(trace: Trace, step: int) -> bytes | None:
    """Return the sheet of pictures of a step; None if it is not a PNG of a sane size."""
    return png_at(trace.store, trace.pictures[step])


def png_at(store: Store, key: str) -> bytes | None:
    """Return a picture that a run has left; None if it is not a PNG of a sane size."""
    info = store.head(key)
    if info is None or info.size > _PICTURE_BYTES:
        return None
    png = store.get(key)
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            sane = math.prod(image.size) <= _PICTURE_PIXELS
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return png if sane else None


def _trace(uri: str) -> Trace:
    run = open_run(uri)
    store = run.root.child(run.name)
    config = dict(leaves(recorded_config(store)))
    # The newest evaluation, whichever suite it was.
    newest = next(iter(evaluations(store)), "")
    return Trace(
        name=run.name,
        store=store,
        config=config,
        rows=rows_between(store, -1, _LAST_STEP),
        pictures=pictures(store),
        evaluation=_figures(store, newest) if newest else {},
        evaluation_key=newest,
        status=run_status(run.root, run.name),
    )


def pictures(store: Store) -> dict[int, str]:
    """Return the keys of a run's sheets of pictures by step."""
    found = (_PICTURE.fullmatch(info.key) for info in store.list("pictures/"))
    return {int(each[1]): each[0] for each in found if each}


def evaluations(store: Store) -> list[str]:
    """Return the keys of a run's evaluation.json files, the newest first."""
    reports = [info for info in store.list("evaluations/") if _EVALUATION.fullmatch(info.key)]
    return [info.key for info in sorted(reports, key=lambda info: info.modified, reverse=True)]


def _figures(store: Store, key: str) -> dict[tuple[str, str], Evaluated]:
    """Return an evaluation's figures; none of a damaged one, and none that has no value."""
    found = {}
    try:
        for section in listed_objects(read_object(store, key), "sections"):
            for figure in listed_objects(section, "figures"):
                if figure.get("value") is not None:
                    found[typed(section, "name", str), typed(figure, "name", str)] = evaluated(figure)
    except (DamagedRecordError, ObjectMissingError, ValueError):
        return {}
    return found


def evaluated(figure: JsonObject) -> Evaluated:
    """Return a figure as stored; raises ValueError for anything else."""
    value, error = figure["value"], figure.get("error")
    for number in (value, error):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise ValueError("a figure's value is no number")
        if number is not None and abs(number) > sys.float_info.max:
            raise ValueError("a figure's value is too large")
    return Evaluated(
        float(value),
        None if error is None else float(error),
        typed(figure, "unit", str),
        figure["better"] if figure.get("better") in ("lower", "higher") else "",
    )
