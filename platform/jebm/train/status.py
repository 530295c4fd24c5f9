"""A run's status, read only from its storage: no cluster, no request to the job that trains it."""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from jebm.errors import CheckpointError, StoreError
from jebm.store.checkpoint import Checkpoints
from jebm.store.manifest import RUN_NAME, step_and_attempt
from jebm.store.protocol import in_parallel
from jebm.store.storage import AccessDeniedError, Store
from jebm.train.history import METRICS, RUN, last_row, planned_steps
from jebm.train.lease import LastHolder, last_holder
from jebm.untrusted import JsonObject

__all__ = ["RunStatus", "State", "run_status", "statuses"]

_LOG = logging.getLogger("jebm.train")

State = Literal["running", "finished", "dead", "stopped", "unknown"]

_SILENCE = timedelta(seconds=60)
"""A holder without a renewal for this long counts as dead. It compares two machines' clocks, so it is far
above the 5 s between renewals."""


@dataclass(frozen=True)
class RunStatus:
    """A run's status from its storage; `checkpoint` is the newest whole one, `metrics` the newest row."""

    name: str
    state: State
    step: int
    total_steps: int | None
    holder: LastHolder | None
    checkpoint: str | None
    checkpoint_written: datetime | None
    metrics: JsonObject
    metrics_written: datetime | None


def run_status(store: Store, name: str) -> RunStatus:
    """Return the status of the run `name` in a storage; damaged records count as missing.

    The state is `unknown` if no job has ever held a lease on the run, as for a sweep's trials.

    Raises:
        StoreError: the store cannot be reached or read.
        CheckpointError: no run can have this name.
    """
    run, checkpoints = store.child(name), Checkpoints(store, name)
    try:
        manifest = checkpoints.latest()
    except CheckpointError:  # there are some, but none is whole
        manifest = None
    row, info = last_row(run) or {}, run.head(METRICS)
    step = max(row.get("step", 0), manifest.step if manifest else 0)
    total, holder = planned_steps(run), last_holder(run)
    # A live lease means running; otherwise the checkpoints tell whether the run is finished.
    state: State = "stopped" if holder else "unknown"
    silent = holder is not None and datetime.now(UTC) - holder.renewed > _SILENCE
    if holder is not None and not holder.released and not silent:
        state = "running"
    elif total is not None and manifest is not None and manifest.step >= total:
        state = "finished"
    elif holder is not None and not holder.released:
        state = "dead"
    return RunStatus(
        name=name,
        state=state,
        step=step,
        total_steps=total,
        holder=holder,
        checkpoint=manifest.name if manifest else None,
        checkpoint_written=manifest.created if manifest else None,
        metrics={key: value for key, value in row.items() if key != "step"},
        metrics_written=info.modified if info and row else None,
    )


def statuses(store: Store) -> list[RunStatus]:
    """Return the status of each run in a storage, sorted by name; raises StoreError if it holds none."""
    names = set()
    for info in store.list():
        above, _, last = info.key.rpartition("/")
        place, _, checkpoint = above.partition("/checkpoints/")
        if last == RUN or step_and_attempt(checkpoint.partition("/")[0]):
            names.add(place)
    names = {name for name in names if RUN_NAME.fullmatch(name)}
    if not names:
        raise StoreError(f"{store.uri}: holds no run; give run.storage, or run.storage/run.name")
    return in_parallel(lambda _, name: _status_or_unknown(store, name), sorted(names))


def _status_or_unknown(store: Store, name: str) -> RunStatus:
    """Return a run's status; one that may not be read hides no other."""
    try:
        return run_status(store, name)
    except AccessDeniedError as error:
        _LOG.error("%s: %s", name, error)
        return RunStatus(name, "unknown", 0, None, None, None, None, {}, None)
