"""Read a sweep's folder and rank its trials.

The folder holds `sweep.json` (search, base config, provenance), `study.log` (an Optuna journal) and one run
for each trial under `trials/`. All of it may come from a bucket, so none of it is assumed to be well formed.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from jebm.errors import CheckpointError, StoreError
from jebm.store.protocol import one_line
from jebm.store.records import DamagedRecordError
from jebm.store.storage import ObjectMissingError, Store
from jebm.sweep.dimensions import Value, contains, position
from jebm.sweep.record import read_record
from jebm.sweep.space import Objective
from jebm.sweep.study_log import Entries, read_entries, run_name
from jebm.sweep.twins import SAME_AS
from jebm.untrusted import JsonObject

__all__ = [
    "STATUSES",
    "TOP",
    "Sweep",
    "Trial",
    "read_sweep",
]

STATUSES = ("finished", "pruned", "diverged", "failed", "running", "waiting")
"""The states of a trial, in the order of tables and legends."""

TOP = 5
"""How many trials count as the top."""

_REMEDY = "the command that began the sweep keeps what is good of it"
_LONGEST_LINE = 300
_NAME = re.compile(r"t\d{1,9}", re.ASCII)


@dataclass(frozen=True)
class Trial:
    """One trial. `values` has one number per objective if the trial finished, else none.

    `curve` holds pairs (images seen, first objective), sorted by images.
    """

    number: int
    name: str
    status: str
    params: dict[str, Value]
    values: tuple[float, ...]
    curve: tuple[tuple[int, float], ...]
    seconds: float
    images: int
    attempts: int
    error: str
    same_as: str = ""
    """The earlier trial whose result this one has, since it would have repeated it; "" if it was run."""

    @property
    def last(self) -> float | None:
        """The first objective at the end, or at the last report; None before the first."""
        return self.values[0] if self.values else self.curve[-1][1] if self.curve else None


@dataclass(frozen=True)
class Sweep:
    """Everything in a sweep that a report needs, except the pictures.

    `space` maps searched keys to distributions, sorted by key; times are those of the sweep's machine.
    """

    name: str
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]
    space: Mapping[str, BaseDistribution]
    search: Mapping[str, Any]
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    started: datetime | None
    ended: datetime | None

    def having(self, *statuses: str) -> list[Trial]:
        """Return the trials with these statuses, by number."""
        return [trial for trial in self.trials if trial.status in statuses]

    @property
    def judged(self) -> list[Trial]:
        """The trials that ended on their merits (finished, pruned or diverged), by number."""
        return self.having("finished", "pruned", "diverged")

    def ranking(self) -> list[Trial]:
        """Return the finished trials, best by the first objective first; ties by number."""
        sign = self.objectives[0].sign
        return sorted(self.having("finished"), key=lambda trial: sign * trial.values[0])

    def full_ranking(self) -> list[Trial]:
        """Return every trial that ended on its merits: first finished, then pruned, then diverged.

        Pruned trials are ranked by images seen, then by their last report; diverged ones by images seen.
        """
        sign = self.objectives[0].sign
        pruned = sorted(
            self.having("pruned"),
            key=lambda trial: (-trial.images, math.inf if trial.last is None else sign * trial.last),
        )
        diverged = sorted(self.having("diverged"), key=lambda trial: -trial.images)
        return [*self.ranking(), *pruned, *diverged]

    def front(self) -> list[Trial]:
        """Return the Pareto front (no trial dominates these), best by the first objective first."""

        def dominates(one: Trial, other: Trial) -> bool:
            pairs = list(zip(self.objectives, one.values, other.values, strict=True))
            return one.values != other.values and all(o.sign * a <= o.sign * b for o, a, b in pairs)

        finished = self.ranking()
        return [trial for trial in finished if not any(dominates(other, trial) for other in finished)]

    def leaders(self) -> list[Trial]:
        """Return the top trials; with several objectives, the Pareto front."""
        return self.front() if len(self.objectives) > 1 else self.ranking()[:TOP]

    def best(self) -> Trial | None:
        """Return the best finished trial by the first objective; it is always on the Pareto front."""
        return next(iter(self.leaders()), None)

    def places(self, key: str, trials: Sequence[Trial]) -> list[float]:
        """Return where the trials' values of a key lie in the searched range, 0 to 1, as `position` does.

        Skips trials without the key, or whose value has no order.
        """
        found = [position(self.space[key], trial.params[key]) for trial in trials if key in trial.params]
        return [place for place in found if place is not None]


def read_sweep(folder: Store) -> Sweep:
    """Return the sweep in a folder, finished or not.

    Raises:
        CheckpointError: there is no sweep, or it cannot be read.
        StoreError: the store denies access or cannot be reached.
    """
    try:
        record = read_record(folder)
        if record is None:
            remedy = "give the folder <run.storage>/<name of the sweep>"
            raise CheckpointError(f"{folder.uri}: no sweep here (no sweep.json); {remedy}")
        entries, wrong = read_entries(folder)
        if wrong:
            raise ValueError(wrong)
        return _sweep(entries, record)
    except ObjectMissingError as error:
        raise CheckpointError(
            f"{folder.uri}: the sweep has not begun (no study.log); come back after its first trials"
        ) from error
    except DamagedRecordError as error:
        raise CheckpointError(f"{error}; {_REMEDY}") from error
    except (CheckpointError, StoreError):
        raise
    except Exception as error:  # a damaged journal can raise anything
        why = one_line(error)[:_LONGEST_LINE]
        raise CheckpointError(
            f"{folder.uri}/study.log: no readable Optuna journal with one study: {why}; {_REMEDY}"
        ) from error


def _sweep(entries: Sequence[JsonObject], record: JsonObject) -> Sweep:
    """Return the sweep in a journal; a damaged one can raise anything."""
    storage = JournalStorage(Entries(entries))
    (name,) = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    trials = sorted(study.get_trials(), key=lambda trial: trial.number)
    space: dict[str, BaseDistribution] = {}
    for trial in trials:
        space |= trial.distributions
        for key, value in trial.params.items():
            if not contains(trial.distributions[key], value):
                raise ValueError(f"trial {trial.number} has {key} {value}, outside of what was searched")
    starts = [trial.datetime_start for trial in trials if trial.datetime_start]
    ends = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    return Sweep(
        name=name,
        objectives=_objectives(study),
        trials=tuple(_trial(trial) for trial in trials),
        space=dict(sorted(space.items())),
        search=record["search"],
        config=record["config"],
        provenance=record["provenance"],
        started=min(starts, default=None),
        ended=max(ends, default=None),
    )


def _objectives(study: optuna.Study) -> tuple[Objective, ...]:
    names = study.user_attrs.get("objectives")
    directions = study.directions
    if not isinstance(names, list) or len(names) != len(directions):
        names = [f"objective {i}" for i in range(1, len(directions) + 1)]
    return tuple(
        Objective(str(name), "maximize" if direction == StudyDirection.MAXIMIZE else "minimize")
        for name, direction in zip(names, directions, strict=True)
    )


def _trial(trial: FrozenTrial) -> Trial:
    attributes = trial.user_attrs
    status = {
        TrialState.COMPLETE: "finished",
        TrialState.PRUNED: "diverged" if attributes.get("status") == "diverged" else "pruned",
        TrialState.FAIL: "failed",
        TrialState.RUNNING: "running",
        TrialState.WAITING: "waiting",
    }[trial.state]
    # The journal is strict JSON, so no number is NaN or infinite; anything but a number is damage and raises.
    curve = tuple((images, float(value)) for images, value in sorted(trial.intermediate_values.items()))
    name, same_as = (str(attributes.get(key, "")) for key in ("run", SAME_AS))
    return Trial(
        number=trial.number,
        name=name if _NAME.fullmatch(name) else run_name(trial.number),  # used as a folder name
        status=status,
        params=dict(sorted(trial.params.items())),
        values=tuple(map(float, trial.values or ())) if status == "finished" else (),
        curve=curve,
        seconds=_amount(attributes.get("seconds")),
        images=int(_amount(attributes.get("images"))) or max((images for images, _ in curve), default=0),
        attempts=int(_amount(attributes.get("attempts"))),
        error=one_line(attributes.get("error") or "")[:_LONGEST_LINE],
        same_as=same_as if _NAME.fullmatch(same_as) else "",
    )


def _amount(value: object) -> float:
    """Return an untrusted value as a number >= 0; 0 if it is not one."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return max(0.0, float(value)) if good else 0.0  # type: ignore[arg-type]
