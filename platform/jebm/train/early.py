"""Early stopping: whether a run's evaluations have stopped improving, a function of its journal alone.

A resumed run replays the journal, so it ends where an uninterrupted one would have.
"""

import math
from collections.abc import Mapping

from jebm.config import Config
from jebm.errors import ConfigError
from jebm.report.catalogue import of_metric
from jebm.store.storage import Store
from jebm.train.history import rows_between

__all__ = ["Patience", "patience_of"]


class Patience:
    """Counts evaluations without an improvement; without `train.early_stopping.metric` it never ends.

    Evaluations before the energy has joined do not count: the prior is another one then.
    """

    def __init__(self, config: Config, total_steps: int) -> None:
        """Begin without any evaluation.

        Raises:
            ConfigError: no measure has the metric's name, or it has no better direction.
        """
        self._rule = rule = config.train.early_stopping
        self._from_step = config.energy_joins_at(total_steps) or 0
        measure = of_metric(rule.metric) if rule.metric else None
        if rule.metric and (measure is None or measure.better is None):
            raise ConfigError(
                f"train.early_stopping.metric: {rule.metric} is no measure that has a better and a worse; "
                "give evaluation/elbo or another of docs/evaluation.md"
            )
        self._sign = -1.0 if measure is not None and measure.better == "higher" else 1.0
        self._best, self._waited = math.inf, 0

    @property
    def over(self) -> bool:
        """Whether the last `patience` evaluations were no better than the best before them."""
        return self._rule.metric is not None and self._waited >= self._rule.patience

    def see(self, step: int, metrics: Mapping[str, float]) -> None:
        """Count a report, if it has the metric; a value that is not finite is no improvement."""
        value = metrics.get(self._rule.metric or "")
        if value is None or step <= self._from_step:
            return
        score = self._sign * value
        if score < self._best - self._rule.min_improvement:
            self._best, self._waited = score, 0
        else:
            self._waited += 1


def patience_of(config: Config, run: Store, step: int, total_steps: int) -> Patience:
    """Return the patience left at a step, from the journal in the run's store.

    Raises:
        ConfigError: as `Patience`.
        StoreError: the store cannot be reached.
    """
    patience = Patience(config, total_steps)
    metric = config.train.early_stopping.metric
    for at, metrics in rows_between(run, -1, step) if metric and step else ():
        patience.see(at, metrics)
    return patience
