"""Trials that would repeat an earlier one, such as those without an energy that differ in the step size."""

import json
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from jebm.config import Config
from jebm.errors import ConfigError
from jebm.parser import override

__all__ = ["SAME_AS", "Twins"]

SAME_AS = "same_as"
"""Attribute of a trial that was not run: the name of the earlier one whose result it has."""


class Twins:
    """Finds the earlier trial that trains the same model with the same noise, so that it has the same result.

    Keys that are idle in a trial's config (`Config.is_idle`) do not count. The sampler still draws them, so
    every sampler sees what it would have seen if both trials had been run.
    """

    def __init__(self, base: Config) -> None:
        self._base = base
        self._known: dict[int, str | None] = {}

    def of(self, number: int, trials: Sequence[FrozenTrial]) -> int | None:
        """Return the number of the first earlier trial that is a twin and has not failed; None if none is."""
        mine = self._identity(trials[number])
        if mine is None:
            return None
        return next(
            (
                trial.number
                for trial in trials[:number]
                if trial.state != TrialState.FAIL and self._identity(trial) == mine
            ),
            None,
        )

    def _identity(self, trial: FrozenTrial) -> str | None:
        """Return the values of the trial's keys that count; None if they make no config."""
        if trial.number not in self._known:
            try:
                config = override(self._base, trial.params)
            except ConfigError:
                self._known[trial.number] = None
            else:
                counting = {key: value for key, value in trial.params.items() if not config.is_idle(key)}
                self._known[trial.number] = json.dumps([config.has_energy, counting], sort_keys=True)
        return self._known[trial.number]
