"""Show the status of a run, or of all runs of a storage. Needs only the storage, not Ray.

  jebm status runs/fashion_mnist
  jebm status s3://bucket/runs/fashion_mnist --json
  jebm status s3://bucket/runs    a line for each run, as `jebm runs`

running   its job renews its lease, and its workers make progress
waiting   its job lives, and no worker has said anything for a minute: they start, wait for room, or rank 0
          stands still
hung      no step ends, and no worker is busy with anything else; the job's log says where they stand
finished  the last step has a checkpoint
stopped   its job ended before that; the same command resumes the run
dead      its job has not renewed its lease for a minute, by this machine's clock and the storage's, which
          must agree; the same command resumes the run
unknown   no job has ever held a lease on it, as for a sweep's trial

Exit code 0: status printed; 2: usage error, no run there, or the storage cannot be reached.
"""

import logging
import sys
from dataclasses import asdict
from datetime import datetime
from typing import Any

from jebm.cli import age_text, log_lines, table, tell, tell_json
from jebm.commands.runs import tell_runs
from jebm.parser import job_parser, parse
from jebm.store.retrieve import open_run
from jebm.store.storage import Store, open_store
from jebm.train.heartbeat import Heartbeat
from jebm.train.history import RUN
from jebm.train.listing import Metric
from jebm.train.status import RunStatus, run_status

__all__ = ["main"]


def main() -> None:
    """Read the status and print it."""
    log_lines(logging.ERROR, sys.stderr)
    parser = job_parser(__doc__ or "")
    parser.add_argument("place", type=str, help="run.storage/run.name, or run.storage")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parse(parser)
    store = open_store(arguments.place)
    store.probe(write=False)
    if not is_run(store):
        tell_runs(store, Metric("distortion", "min"), as_json=arguments.json)
        return
    run = open_run(arguments.place)
    status = run_status(run.root, run.name)
    if arguments.json:
        tell_json({"place": store.uri, **plain(status)})
    else:
        tell(f"run         {run.uri}\n{described(status)}")


def is_run(store: Store) -> bool:
    """Return whether the place is a run, not a storage, nor a sweep, whose job holds a lease as well."""

    def holds(part: str) -> bool:
        return next(iter(store.list(part)), None) is not None

    return (
        store.head(RUN) is not None
        or holds("checkpoints/")
        or (holds("lease/") and store.head("sweep.json") is None)
    )


def described(status: RunStatus) -> str:
    """Return a run's status for people: a table of facts and a table of metrics."""
    holder = status.holder
    released = "ended" if holder and holder.released else "renewed"
    facts = {
        "state": f"{status.state}, step {steps(status)}" + (f"; {status.damage}" if status.damage else ""),
        "lease": f"{holder.description}; {released} {ago(holder.renewed)}" if holder else "none",
        "workers": doing(status.heartbeat),
        "checkpoint": f"{status.checkpoint}, {ago(status.checkpoint_written)}"
        if status.checkpoint
        else "none",
        "metrics": ago(status.metrics_written) if status.metrics else "none",
    }
    values = [
        (f"  {name}", "-" if value is None else f"{value:.6g}") for name, value in status.metrics.items()
    ]
    return "\n".join([table(list(facts.items())), *([table(values)] if values else [])])


def doing(heartbeat: Heartbeat | None) -> str:
    """Return what the ranks did last, in a line: those that are behind, of how many."""
    if heartbeat is None or not heartbeat.ranks:
        return "none"
    last = min(heartbeat.ranks, key=lambda note: (note.step, note.doing != "images"))
    return f"{len(heartbeat.ranks)}; {last}: {last.doing} of step {last.step + 1:,}, {ago(heartbeat.written)}"


def steps(status: RunStatus) -> str:
    """Return the step, with the total if known."""
    return f"{status.step:,}" + (f" of {status.total_steps:,}" if status.total_steps is not None else "")


def ago(moment: datetime | None) -> str:
    """Return how long ago a moment was."""
    return f"{age_text(moment)} ago" if moment else "-"


def plain(status: RunStatus) -> dict[str, Any]:
    """Return a run's status as plain JSON values; times in UTC, in ISO 8601."""
    values = asdict(status)
    for part in (values, values["holder"] or {}, values["heartbeat"] or {}):
        part.update({name: item.isoformat() for name, item in part.items() if isinstance(item, datetime)})
    return values
