"""A run's status, read only from its storage: no cluster, no request to the job that trains it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from jebm.errors import CheckpointError
from jebm.store.checkpoint import Checkpoints
from jebm.store.records import DamagedRecordError
from jebm.store.storage import Store
from jebm.train.heartbeat import Heartbeat, last_heartbeat
from jebm.train.history import METRICS, last_row, metrics_in, planned_steps
from jebm.train.lease import LastHolder, last_holder
from jebm.untrusted import JsonObject

__all__ = ["RunStatus", "State", "finer", "run_status", "state_of"]

State = Literal["running", "waiting", "hung", "finished", "dead", "stopped", "unknown"]

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
    damage: str | None
    """Why run.json cannot be read, so that the total is not known."""
    holder: LastHolder | None
    heartbeat: Heartbeat | None
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
    holder, damage = last_holder(run), None
    try:
        total = planned_steps(run)
    except DamagedRecordError as error:
        total, damage = None, str(error)
    heartbeat = last_heartbeat(run)
    return RunStatus(
        name=name,
        state=finer(state_of(holder, manifest.step if manifest else 0, total), holder, heartbeat),
        step=step,
        total_steps=total,
        damage=damage,
        holder=holder,
        heartbeat=heartbeat,
        checkpoint=manifest.name if manifest else None,
        checkpoint_written=manifest.created if manifest else None,
        metrics=metrics_in(row),
        metrics_written=info.modified if info and row else None,
    )


def finer(state: State, holder: LastHolder | None, heartbeat: Heartbeat | None) -> State:
    """Return what a run does whose job lives: it runs, hangs, or waits for its workers to speak."""
    if state != "running":
        return state
    if heartbeat is None or heartbeat.silent:
        return "waiting"
    if holder is not None and holder.since is not None and heartbeat.written < holder.since:
        return "waiting"  # that was a job before
    return "hung" if heartbeat.hung else "running"


def state_of(holder: LastHolder | None, saved_step: int, total_steps: int | None) -> State:
    """Return the state of a run whose newest checkpoint is of `saved_step` (0 for none)."""
    ours = holder is not None and not holder.released
    silent = holder is not None and datetime.now(UTC) - holder.renewed > _SILENCE
    # A live lease means running; otherwise the checkpoints tell whether the run is finished.
    if ours and not silent:
        return "running"
    if total_steps is not None and 0 < total_steps <= saved_step:
        return "finished"
    if ours:
        return "dead"
    return "stopped" if holder else "unknown"
