"""How a run stands, told by its storage alone: no cluster, no request to the job that trains it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from jebm.errors import CheckpointError, StoreError
from jebm.store.checkpoint import Checkpoints
from jebm.store.manifest import RUN_NAME, step_and_attempt
from jebm.store.protocol import in_parallel
from jebm.store.storage import Store
from jebm.train.history import METRICS, RUN, last_row, planned_steps
from jebm.train.lease import LastHolder, last_holder
from jebm.untrusted import JsonObject

__all__ = ["RunStatus", "State", "run_status", "statuses"]

State = Literal["running", "finished", "dead", "stopped", "unknown"]

_SILENCE = timedelta(seconds=60)
"""After this time without a renewal a holder counts as dead; by two machines' clocks, hence far above 5 s."""


@dataclass(frozen=True)
class RunStatus:
    """What a run's storage tells of it; `checkpoint` is the newest whole one, `metrics` the newest row."""

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
    """Return how the run `name` under a storage stands; damaged records count as missing.

    `unknown` is the state of a run that no job has held a lease on, such as a trial of a sweep.

    Raises:
        StoreError: the store cannot be reached or read.
        CheckpointError: the name is none of a run.
    """
    run, checkpoints = store.child(name), Checkpoints(store, name)
    try:
        manifest = checkpoints.latest()
    except CheckpointError:  # there are some, and none is whole
        manifest = None
    row, info = last_row(run) or {}, run.head(METRICS)
    step = max(row.get("step", 0), manifest.step if manifest else 0)
    total, holder = planned_steps(run), last_holder(run)
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
    """Return how each run under a storage stands, by name; raises StoreError where it holds none."""
    names = set()
    for info in store.list():
        above, _, last = info.key.rpartition("/")
        place, _, checkpoint = above.partition("/checkpoints/")
        if last == RUN or step_and_attempt(checkpoint.partition("/")[0]):
            names.add(place)
    names = {name for name in names if RUN_NAME.fullmatch(name)}
    if not names:
        raise StoreError(f"{store.uri}: holds no run; give run.storage, or run.storage/run.name")
    return in_parallel(lambda _, name: run_status(store, name), sorted(names))
