"""Every run and sweep of a storage, a line each: one listing, then at most eight small reads for each.

A sweep's trials are runs below it; they are counted and share the sweep's line.
"""

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias

from jebm.errors import StoreError
from jebm.store.judge import MANIFEST
from jebm.store.manifest import RUN_NAME, step_and_attempt
from jebm.store.records import DamagedRecordError
from jebm.store.storage import BucketMissingError, EndpointError, ObjectInfo, Store
from jebm.train.heartbeat import last_heartbeat
from jebm.train.history import METRICS, RUN, end_of_metrics, metrics_in, newest_row, planned_steps
from jebm.train.lease import LastHolder, last_holder
from jebm.train.status import State, finer, state_of

__all__ = ["ListedRun", "Metric", "listed_runs"]

_LOG = logging.getLogger("jebm.train")
_SWEEP = "sweep.json"  # the object that makes a folder a sweep
_THREADS = 16  # requests at a time; they are small and mostly wait
_JOURNAL_BYTES = 2**20
_ALIVE = ("running", "waiting", "hung")
_NUMBER = rb"-?\d{1,20}(?:\.\d{1,20})?(?:[eE][+-]?\d{1,3})?"

_Objects: TypeAlias = Mapping[str, ObjectInfo]


@dataclass(frozen=True)
class Metric:
    """A metric of the reports, and which of its values is the best."""

    name: str
    mode: Literal["min", "max"]

    def values(self, rows: bytes) -> list[float]:
        """Return its finite values in lines of metrics.jsonl, in order."""
        name = re.escape(json.dumps(self.name).encode())
        found = re.findall(name + rb": (" + _NUMBER + rb")[,}]", rows)
        return [value for value in map(float, found) if math.isfinite(value)]

    def names(self, rows: bytes) -> frozenset[str]:
        """Return the names of the metrics in lines of metrics.jsonl: the newest row's, and this one."""
        own = {self.name} if json.dumps(self.name).encode() + b": " in rows else set()
        return frozenset(own | metrics_in(newest_row(rows) or {}).keys())

    def best(self, values: list[float]) -> float | None:
        """Return the best of some values; None if there is none."""
        return (min if self.mode == "min" else max)(values, default=None)


@dataclass(frozen=True)
class ListedRun:
    """A run, or a sweep with its trials.

    `last` and `best` are values of one metric: of a run's reports (of the last MiB of them), or of the last
    reports of a sweep's trials, of which there is no last. `size` is in bytes, `changed` when anything was
    last written. `holder` is whoever trains it now, `metrics` the names in its reports.
    """

    name: str
    kind: Literal["run", "sweep"]
    state: State
    step: int
    total_steps: int | None
    trials: int
    last: float | None
    best: float | None
    changed: datetime
    size: int
    holder: str | None
    metrics: frozenset[str]


def listed_runs(store: Store, metric: Metric) -> list[ListedRun]:
    """Return the runs and sweeps of a storage, the last changed first; damaged records count as missing.

    A run that cannot be read is logged, and left out if it cannot be listed.

    Raises:
        StoreError: the storage cannot be reached, or holds neither.
    """
    places = _places(store)
    if not places:
        raise StoreError(f"{store.uri}: holds no run; give run.storage")
    sweeps: dict[str, list[str]] = {name: [] for name, objects in places.items() if _SWEEP in objects}
    above = {name: next((one for one in _above(name) if one in sweeps), None) for name in places}
    for name, sweep in above.items():
        if sweep is not None:
            sweeps[sweep].append(name)

    def line(name: str) -> ListedRun:
        return _run(store.child(name), name, places[name], metric)

    runs = [name for name in places if name not in sweeps]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="jebm-list") as pool:
        lines = dict(zip(runs, pool.map(line, runs), strict=True))
        holders = list(pool.map(lambda name: last_holder(store.child(name)), sweeps))
    shown = [lines[name] for name in runs if above[name] is None]
    for (name, trials), holder in zip(sweeps.items(), holders, strict=True):
        shown.append(_sweep(name, places[name], [lines[trial] for trial in trials], holder, metric))
    return sorted(shown, key=lambda one: one.changed, reverse=True)


def _places(store: Store) -> dict[str, dict[str, ObjectInfo]]:
    """Return each run and sweep with its objects by key within it, from one listing."""
    infos = _infos(store)
    places: dict[str, dict[str, ObjectInfo]] = {}
    for info in infos:
        above, _, last = info.key.rpartition("/")
        place, _, checkpoint = above.partition("/checkpoints/")
        marks = last in (RUN, _SWEEP) or step_and_attempt(checkpoint.partition("/")[0])
        if marks and RUN_NAME.fullmatch(place):
            places[place] = {}
    for info in infos:
        place = next((one for one in _above(info.key) if one in places), "")
        if place:
            places[place][info.key[len(place) + 1 :]] = info
    return places


def _infos(store: Store) -> list[ObjectInfo]:
    """Return all objects; where some may not be listed, log it and leave out the folder that holds them."""
    try:
        return list(store.list())
    except (BucketMissingError, EndpointError):
        raise
    except StoreError:
        folders = list(store.folders())
    infos: list[ObjectInfo] = []
    for folder in folders:
        try:
            infos += store.list(f"{folder}/")
        except StoreError as error:
            _LOG.error("%s is left out: %s", folder, error)
    return infos


def _above(key: str) -> Iterator[str]:
    """Yield the folders above a key, the nearest first."""
    while key := key.rpartition("/")[0]:
        yield key


def _run(run: Store, name: str, objects: _Objects, metric: Metric) -> ListedRun:
    """Return a run's line; one that cannot be read hides no other."""
    folders = (key.split("/")[1] for key in objects if key.endswith(f"/{MANIFEST}"))
    saved = max((position[0] for folder in folders if (position := step_and_attempt(folder))), default=0)
    try:
        rows = end_of_metrics(run, objects[METRICS].size, _JOURNAL_BYTES) if METRICS in objects else b""
        total = None
        if RUN in objects:
            with suppress(DamagedRecordError):
                total = planned_steps(run)
        holder = last_holder(run) if any(key.startswith("lease/") for key in objects) else None
        state = state_of(holder, saved, total)
        if state == "running":
            state = finer(state, holder, last_heartbeat(run))
    except (BucketMissingError, EndpointError):
        raise
    except StoreError as error:
        _LOG.error("%s: %s", name, error)
        rows, total, holder, state = b"", None, None, "unknown"
    values = metric.values(rows)
    return ListedRun(
        name=name,
        kind="run",
        state=state,
        step=max(saved, (newest_row(rows) or {}).get("step", 0)),
        total_steps=total,
        trials=0,
        last=values[-1] if values else None,
        best=metric.best(values),
        changed=max(info.modified for info in objects.values()),
        size=sum(info.size for info in objects.values()),
        holder=holder.description if holder and state in _ALIVE else None,
        metrics=metric.names(rows),
    )


def _sweep(
    name: str, objects: _Objects, trials: list[ListedRun], holder: LastHolder | None, metric: Metric
) -> ListedRun:
    state = state_of(holder, 0, None)
    return ListedRun(
        name=name,
        kind="sweep",
        state=state,
        step=sum(trial.step for trial in trials),
        total_steps=None,
        trials=len(trials),
        last=None,
        best=metric.best([trial.last for trial in trials if trial.last is not None]),
        changed=max([info.modified for info in objects.values()] + [trial.changed for trial in trials]),
        size=sum(info.size for info in objects.values()) + sum(trial.size for trial in trials),
        holder=holder.description if holder and state == "running" else None,
        metrics=frozenset(name for trial in trials for name in trial.metrics),
    )
