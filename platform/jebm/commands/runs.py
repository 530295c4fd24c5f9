"""List the runs and sweeps of a storage, the last changed first. Needs only the storage, not Ray.

  jebm runs runs
  jebm runs s3://bucket/runs --metric evaluation/elbo --mode max
  jebm runs s3://bucket/runs --json

The states are those of `jebm status`, which says more about one run. last and best are values of the metric
in a run's reports (the best of the last thousand or so); for a sweep, best is that of its trials' last
reports.

Exit code 0: list printed; 2: usage error, no run there, or the storage cannot be reached.
"""

import logging
import sys
from dataclasses import asdict
from typing import Literal

from jebm.cli import age_text, log_lines, size_text, table, tell, tell_json, unknown_metric
from jebm.parser import job_parser, parse
from jebm.store.storage import Store, open_store
from jebm.train.listing import ListedRun, Metric, listed_runs

__all__ = ["main", "tell_runs"]


def main() -> None:
    """Read the storage and print a line for each run."""
    log_lines(logging.ERROR, sys.stderr)
    parser = job_parser(__doc__ or "")
    parser.add_argument("storage", type=str, help="run.storage: a folder, or s3://bucket/prefix")
    parser.add_argument("--metric", type=str, default="distortion", help="the metric to show")
    parser.add_argument("--mode", type=Literal["min", "max"], default="min", help="which value is the best")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parse(parser)
    store = open_store(arguments.storage)
    store.probe(write=False)
    tell_runs(store, Metric(arguments.metric, arguments.mode), as_json=arguments.json)


def tell_runs(store: Store, metric: Metric, *, as_json: bool) -> None:
    """Print the runs and sweeps of a storage, as a table or as one JSON document.

    Raises:
        StoreError: the storage cannot be reached, or holds neither.
    """
    found = listed_runs(store, metric)
    if as_json:
        runs = [asdict(run) | {"changed": run.changed.isoformat()} for run in found]
        for run in runs:
            del run["metrics"]  # the same names for every run
        tell_json({"storage": store.uri, "metric": metric.name, "mode": metric.mode, "runs": runs})
        return
    head = ["run", "state", "step", f"last {metric.name}", "best", "changed", "size", "trained by"]
    lines = table([head, *map(row, found)])
    if more := unknown_metric(metric.name, {name for run in found for name in run.metrics}):
        lines += f"\n{more}"
    tell(lines)


def row(run: ListedRun) -> list[str]:
    """Return a run's row in the table."""
    total = f" of {run.total_steps:,}" if run.total_steps is not None else ""
    return [
        run.name,
        run.state,
        f"sweep, {run.trials:,} trials" if run.kind == "sweep" else f"{run.step:,}{total}",
        *("-" if value is None else f"{value:.6g}" for value in (run.last, run.best)),
        f"{age_text(run.changed)} ago",
        size_text(run.size),
        run.holder or "-",
    ]
