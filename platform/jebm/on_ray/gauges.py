"""A run's reports as Ray's metrics, which Prometheus reads at each node: `ray_jebm_…`, by the run's name.

They are set at reports, so a step costs nothing more. A worker's gauges vanish with its process.
"""

import math
import re
import time

from ray.util.metrics import Gauge

from jebm.config import Config
from jebm.train.logs import without_secrets
from jebm.train.recorder import Report

__all__ = ["Gauges", "gauge", "tags_of"]

_OF_EACH_RANK = ("time/", "checkpoint/")


class Gauges:
    """Shows each report of one rank: its own speed and saves; rank 0 also shows what is the same on all.

    The gauge of a metric has its name in `metrics.jsonl`, with `_` for `/`. There are two more: `step`, and
    `last_commit_time_seconds`, since 1970; before the first commit, when this attempt began.
    """

    def __init__(self, config: Config, rank: int) -> None:
        self._tags, self._is_main = {**tags_of(config), "rank": str(rank)}, rank == 0
        self._committed = time.time()
        self._gauges: dict[str, Gauge] = {}

    def __call__(self, report: Report) -> None:
        """Show a report."""
        values = {"step": float(report.step), **report.metrics, **report.saving}
        if self._is_main:
            moments = [manifest.created.timestamp() for manifest in report.checkpoints]
            self._committed = max([self._committed, *moments])
            values["last_commit_time_seconds"] = self._committed
        for name, value in values.items():
            if self._is_main or name == "step" or name.startswith(_OF_EACH_RANK):
                self._set(name, value)

    def close(self) -> None:
        """Show no values any more, for a process that outlives this run, such as Tune's for trials."""
        for each in self._gauges.values():
            each.set(math.nan)

    def _set(self, name: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = gauge(name, self._tags)
        self._gauges[name].set(value)


def tags_of(config: Config) -> dict[str, str]:
    """Return what tells a run from all others of a cluster: trials of two sweeps have the same names."""
    return {"run": config.run.name, "storage": without_secrets(config.run.storage, ())}


def gauge(name: str, tags: dict[str, str]) -> Gauge:
    """Return a gauge `jebm_…` with these tags."""
    named = Gauge("jebm_" + re.sub(r"\W", "_", name, flags=re.ASCII), tag_keys=tuple(tags))
    named.set_default_tags(tags)
    return named
