"""The Optuna study of a sweep, kept as one journal file next to the trials' runs.

    <sweep>/sweep.json      the search, the base config, provenance
    <sweep>/study.log       Optuna's journal; JournalStorage(JournalFileBackend("study.log")) opens it
    <sweep>/trials/t0000/   the run of trial 0

A trial that is RUNNING in the journal when a sweep starts was interrupted: it comes first, with its number
and parameters, so that its run resumes from its checkpoint. Trials that have ended are not repeated; a later
start of the sweep runs new trials in place of failed ones. A trial that would repeat an earlier one (`Twins`)
is not run: it ends as that one does, with its values.
"""

import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from jebm.config import Config
from jebm.store.records import DamagedRecordError, set_aside
from jebm.store.storage import Store
from jebm.sweep.record import RECORD, check_same, encoded_record
from jebm.sweep.recovery import good_entries, lost_trials
from jebm.sweep.sampler import sampler_of
from jebm.sweep.space import Search
from jebm.sweep.study_log import StudyLog, run_name
from jebm.sweep.twins import SAME_AS, Twins

__all__ = ["Status", "Suggestion", "SweepStudy"]

Status: TypeAlias = Literal["finished", "pruned", "diverged", "failed"]

_LOG = logging.getLogger("jebm.sweep")
_PROGRESS_EVERY_SECONDS = 10.0  # between records of a trial's seconds and images
_COPIED = ("status", "images", "step", "metrics", "error")
"""What a trial that is not run takes from its twin; it costs no seconds and has no attempts."""

_STATES = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True)
class Suggestion:
    """A trial to run."""

    number: int
    parameters: dict[str, Any]
    interrupted: bool
    """Whether it started before this start of the sweep."""


class SweepStudy:
    """The study of one sweep: what to run next, and the results so far. Not thread-safe."""

    def __init__(
        self,
        store: Store,
        name: str,
        search: Search,
        base: Config,
        *,
        data_sha256: str,
        provenance: Mapping[str, str],
    ) -> None:
        """Open the sweep in its store, or create it there.

        A damaged sweep.json or study.log is set aside with a log line; trials that study.log has lost resume
        from their own runs.

        Raises:
            ConfigError: there is a sweep of this name with another search, base config or data.
            StoreError: the store cannot be reached, or holds something else.
        """
        self._search = search
        self._noted: dict[int, float] = {}
        self._seconds_before: dict[int, float] = {}
        self._waiting: Suggestion | None = None
        self._twins = Twins(base)
        self._followers: dict[int, int] = {}  # trials that are not run, by number: the twin of each
        # First the record: the sweep of another search must not be changed.
        starts = _starts_before(store, name, search, base, data_sha256)
        starts.append({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "trials": search.trials})
        record = encoded_record(
            name, search, base, data_sha256=data_sha256, provenance=provenance, starts=starts
        )
        store.put(RECORD, record)
        # Then the journal and the trials that it has lost.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        entries, damage = good_entries(store, name, search)
        self._log = StudyLog(store, entries)
        self._storage = JournalStorage(self._log)
        with self._log.together():
            self.study = _opened(name, self._storage, search)
        self._failed_before = {trial.number for trial in self.trials if trial.state == TrialState.FAIL}
        self._recover(store, damage)
        self._interrupted = self._find_interrupted()

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials by number; do not modify them."""
        return self.study.get_trials(deepcopy=False)

    @property
    def left(self) -> int:
        """Number of trials still to start or resume, or that wait for a twin."""
        return (self._waiting is not None) + len(self._interrupted) + len(self._followers) + self._new

    @property
    def best(self) -> list[FrozenTrial]:
        """The best finished trial, or the Pareto front sorted by the first objective, best first."""
        if not any(trial.state == TrialState.COMPLETE for trial in self.trials):
            return []
        if len(self._search.objectives) == 1:
            return [self.study.best_trial]
        sign = self._search.objectives[0].sign
        return sorted(self.study.best_trials, key=lambda trial: sign * trial.values[0])

    def suggest(self, wait_seconds: float) -> Suggestion | None:
        """Return the next trial once it is in the store; None if that takes too long or none is left.

        A trial still waiting for the store is returned by a later call.
        """
        if self._waiting is None:
            self._waiting = self._next()
        if self._waiting is None or not self._log.flush(wait_seconds):
            return None
        suggestion, self._waiting = self._waiting, None
        return suggestion

    def begin(self, number: int) -> None:
        """Record that another attempt at a trial begins."""
        attributes = self.trials[number].user_attrs
        self._seconds_before[number] = attributes.get("seconds", 0.0)
        self._set(number, {"attempts": attributes.get("attempts", 0) + 1})
        self._log.flush(0)  # at once, without waiting

    def report(
        self,
        number: int,
        metrics: Mapping[str, float],
        *,
        images: int,
        step: int,
        seconds: float,
        last: bool = False,
    ) -> float | None:
        """Record a report of a trial, `seconds` into its attempt; return its first objective, if new."""
        value = metrics.get(self._search.objectives[0].metric, math.nan)
        measured = math.isfinite(value) and images not in self.trials[number].intermediate_values
        if measured:
            self._storage.set_trial_intermediate_value(self._id(number), images, value)
        now = time.monotonic()
        if step and (measured or last or now - self._noted.get(number, -math.inf) > _PROGRESS_EVERY_SECONDS):
            self._noted[number] = now
            total = round(self._seconds_before.get(number, 0.0) + seconds, 3)
            self._set(number, {"seconds": total, "images": images, "step": step})
        return value if measured else None

    def prune(self, number: int) -> None:
        """Record the decision to end a trial, so that a later start of the sweep keeps it."""
        self._set(number, {"status": "pruned"})

    def is_pruned(self, number: int) -> bool:
        """Return whether the decision to end a trial is recorded."""
        return self.trials[number].user_attrs.get("status") == "pruned"

    def end(
        self, number: int, status: Status, metrics: Mapping[str, float], *, error: str = ""
    ) -> tuple[Status, str]:
        """Record how a trial ended and its last metrics; return status and error as recorded.

        A trial that finished with an objective that is not finite has diverged; without an objective it
        failed.
        """
        goals = [objective.metric for objective in self._search.objectives]
        if status == "finished":
            for goal in goals:
                if goal not in metrics:
                    status, error = "failed", f"{goal} was not measured at the end"
                elif not math.isfinite(metrics[goal]):
                    status, error = "diverged", f"{goal} is {metrics[goal]} at the end"
        values = [metrics[goal] for goal in goals] if status == "finished" else None
        attributes: dict[str, Any] = {"status": status}
        if error:
            attributes["error"] = " ".join(error.split())
        attributes["metrics"] = {name: value for name, value in metrics.items() if math.isfinite(value)}
        with self._log.together():
            self._set(number, attributes)
            self.study.tell(number, values, state=_STATES[status])
        self._settle(number)
        self._log.flush(0)
        return status, error

    def close(self) -> None:
        """Store what remains; raises StoreError if that fails for ten minutes."""
        self._log.close()

    @property
    def _new(self) -> int:
        """Number of new trials still to suggest."""
        return max(0, self._search.trials - (len(self.trials) - len(self._failed_before)))

    def _next(self) -> Suggestion | None:
        """Return the next trial to run; those that have a twin end, or wait for it."""
        while self._interrupted or self._new:
            if self._interrupted:
                trial = self.trials[self._interrupted.pop(0)]
                suggestion = Suggestion(trial.number, trial.params, interrupted=True)
            else:
                suggestion = self._ask()
            twin = self._twins.of(suggestion.number, self.trials)
            if twin is None:
                return suggestion
            self._followers[suggestion.number] = twin
            self._settle(twin)
        return None

    def _settle(self, twin: int) -> None:
        """End the trials that wait for one that has ended; if that failed, the first of them is run."""
        ended = self.trials[twin]
        if not ended.state.is_finished():
            return
        for number in [follower for follower, one in self._followers.items() if one == twin]:
            del self._followers[number]
            if ended.state == TrialState.FAIL:
                self._interrupted.append(number)
                continue
            with self._log.together():
                for images, value in ended.intermediate_values.items():
                    self._storage.set_trial_intermediate_value(self._id(number), images, value)
                same = {name: ended.user_attrs[name] for name in _COPIED if name in ended.user_attrs}
                self._set(number, same | {SAME_AS: run_name(twin)})
                values = ended.values if ended.state == TrialState.COMPLETE else None
                self.study.tell(number, values, ended.state)
            name, status = run_name(number), same.get("status")
            _LOG.info("%s  %s, as %s, which it would repeat: not run", name, status, run_name(twin))

    def _find_interrupted(self) -> list[int]:
        """Return the trials that an earlier start left running; end those already marked pruned."""
        interrupted = []
        for trial in self.trials:
            if trial.state == TrialState.RUNNING:
                if trial.user_attrs.get("status") == "pruned":  # decided before the driver died
                    self.study.tell(trial.number, state=TrialState.PRUNED)
                else:
                    interrupted.append(trial.number)
        return interrupted

    def _recover(self, store: Store, damage: str) -> None:
        """Add trials found only by their runs as interrupted ones, and log what was damaged."""
        lost = lost_trials(store, self._search, known=len(self.trials))
        first = len(self.trials)
        for number, parameters in enumerate(lost, start=first):
            if parameters is None:
                self._ask()
                continue
            trial = create_trial(
                state=TrialState.RUNNING,
                params=parameters,
                distributions=self._search.space,
                user_attrs={"run": run_name(number)},
            )
            with self._log.together():
                self.study.add_trial(trial)
        if lost:
            names = f"{run_name(first)} to {run_name(first + len(lost) - 1)}"
            unknown = f"it does not know the trials {names}, which resume from their own runs"
            damage = f"{damage or f'{store.uri}/study.log'}; {unknown}"
        if damage:
            _LOG.warning("%s", damage)

    def _ask(self) -> Suggestion:
        number = len(self.trials)
        counted = [trial.params for trial in self.trials if trial.number not in self._failed_before]
        self.study.sampler = sampler_of(self._search, number, counted)
        with self._log.together():
            trial = self.study.ask(self._search.space)
            trial.set_user_attr("run", run_name(number))
        return Suggestion(number, trial.params, interrupted=False)

    def _id(self, number: int) -> int:
        return self.trials[number]._trial_id

    def _set(self, number: int, attributes: Mapping[str, Any]) -> None:
        for name, value in attributes.items():
            self._storage.set_trial_user_attr(self._id(number), name, value)


def _opened(name: str, storage: JournalStorage, search: Search) -> optuna.Study:
    """Return the study of a search, new or from the journal."""
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        directions=[objective.direction for objective in search.objectives],
        load_if_exists=True,
    )
    metrics = [goal.metric for goal in search.objectives]
    if "objectives" not in study.user_attrs:
        study.set_user_attr("objectives", metrics)
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        if study.metric_names is None:  # names of the values in Optuna's own pages
            study.set_metric_names(metrics)
    return study


def _starts_before(store: Store, name: str, search: Search, base: Config, data_sha256: str) -> list[Any]:
    """Return the starts that sweep.json lists; set a damaged record aside. Raises as `check_same`."""
    found = check_same(store, name, search, base, data_sha256)
    if not isinstance(found, DamagedRecordError):
        return [] if found is None else list(found["starts"])
    kept = set_aside(store, RECORD)
    _LOG.warning(
        "%s; it is kept as %s, and nothing can tell whether the sweep was begun otherwise", found, kept
    )
    return []
