"""The Optuna study of a sweep, kept as one journal file beside the trials' runs.

    <sweep>/sweep.json      the search, the base config, what it was made with
    <sweep>/study.log       Optuna's journal; JournalStorage(JournalFileBackend("study.log")) opens it
    <sweep>/trials/t0000/   the run of trial 0

A trial that is RUNNING in the journal when a sweep starts was interrupted: it comes first, under its number
and with its parameters, so that its run goes on from its checkpoint. Trials that have ended never come again;
in place of those that failed, another start of the sweep runs new ones.
"""

import json
import logging
import math
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from jebm.config import Config, config_to_dict, leaves
from jebm.errors import ConfigError, StoreError
from jebm.rng import generator
from jebm.store.storage import ObjectMissingError, Store
from jebm.sweep.space import Search

__all__ = [
    "Status",
    "StudyLog",
    "Suggestion",
    "SweepStudy",
    "check_same",
    "read_record",
    "run_name",
    "sampler_of",
]

Status: TypeAlias = Literal["finished", "pruned", "diverged", "failed"]

_LOG = logging.getLogger("jebm.sweep")
_RECORD, _JOURNAL = "sweep.json", "study.log"
_FORMAT, _VERSION = "jebm-sweep", 1
_MIRROR_EVERY_SECONDS = 3.0
_RETRY_SECONDS = 2.0
_LAST_PATIENCE_SECONDS = 600.0
_PROGRESS_EVERY_SECONDS = 10.0  # between two notes of a trial's seconds and images in the journal
_FREE_SEARCH = ("trials", "max_concurrent")
_FREE_CONFIG = (
    *("run.storage", "run.deterministic", "run.accept_changes", "data.", "cluster.", "checkpoint."),
    *("langevin.kernel", "train.report_every_steps", "train.pictures_every_steps"),
)
"""What a start may change of a sweep: where it runs and how many trials; the data's content is compared."""
_STATES = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def run_name(number: int) -> str:
    """Return the name of a trial's run, such as t0007."""
    return f"t{number:04d}"


@dataclass(frozen=True)
class Suggestion:
    """A trial to be run."""

    number: int
    parameters: dict[str, Any]
    interrupted: bool
    """Whether it was begun before this start of the sweep."""


class StudyLog(BaseJournalBackend):
    """Optuna's journal in memory; a thread keeps a copy of it in a store, as JournalFileBackend writes it.

    While the store cannot be reached the sweep goes on, and the copy follows.
    """

    def __init__(self, store: Store, every_seconds: float = _MIRROR_EVERY_SECONDS) -> None:
        """Read the journal from the store; a sweep without one begins an empty one.

        Raises:
            StoreError: the store cannot be read, or what stands there is no journal.
        """
        self._store, self._every_seconds = store, every_seconds
        try:
            self._lines = store.get(_JOURNAL).splitlines(keepends=True)
        except ObjectMissingError:
            self._lines = []
        try:
            self._entries: list[dict[str, Any]] = [json.loads(line) for line in self._lines]
        except ValueError as error:
            raise StoreError(f"{store.uri}/{_JOURNAL} is no journal of Optuna's: {error}") from error
        self._stored = len(self._lines)
        self._error: StoreError | None = None
        self._changed = threading.Condition()
        self._together = threading.RLock()
        self._urgent = self._closing = False
        self._thread = threading.Thread(target=self._mirror, name="study log", daemon=True)
        self._thread.start()

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """Return the entries from a number on."""
        return self._entries[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries; the copy in the store follows within seconds."""
        lines = [(json.dumps(log, separators=(",", ":")) + "\n").encode() for log in logs]
        with self._together, self._changed:
            self._entries += (json.loads(line) for line in lines)
            self._lines += lines
            self._changed.notify_all()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within it, no copy is taken: what is appended arrives in the store as a whole."""
        with self._together:
            yield

    def flush(self, seconds: float) -> bool:
        """Return whether all that was appended before is in the store, waiting for it at most so long."""
        with self._changed:
            wanted = len(self._lines)
            if self._stored < wanted:
                self._urgent = True
                self._changed.notify_all()
            return self._changed.wait_for(lambda: self._stored >= wanted, seconds)

    def close(self, seconds: float = _LAST_PATIENCE_SECONDS) -> None:
        """Store what is left and end.

        Raises:
            StoreError: it could not be stored within `seconds`.
        """
        stored = self.flush(seconds)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if not stored:
            raise self._error or StoreError(f"{self._store.uri}/{_JOURNAL} could not be stored")

    def _mirror(self) -> None:
        store = self._store.patient(0)  # patience is here: a flush must be able to say how things stand
        last = -math.inf
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._stored < len(self._lines))
                if self._closing:
                    return
                due = last + self._every_seconds - time.monotonic()
                self._changed.wait_for(lambda: self._closing or self._urgent, max(due, 0))
            with self._together:
                self._urgent, lines = False, self._lines[:]
            last = time.monotonic()
            try:
                store.put(_JOURNAL, b"".join(lines))
            except StoreError as error:
                if self._error is None:
                    _LOG.warning("the study cannot be stored, trying on: %s", error)
                with self._changed:
                    self._error = error
                    self._changed.wait_for(lambda: self._closing, _RETRY_SECONDS)
                    if not self._closing:
                        self._urgent = True
                continue
            with self._changed:
                self._stored, self._error = len(lines), None
                self._changed.notify_all()


class SweepStudy:
    """The study of one sweep: what to run next, and what has come of it. For one thread."""

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
        """Open the sweep in its store, or begin it there.

        Raises:
            ConfigError: there is a sweep of this name with another search, base config or data.
            StoreError: the store cannot be reached, or holds something else.
        """
        record = check_same(store, name, search, base, data_sha256)
        starts = [] if record is None else record["starts"]
        starts.append({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "trials": search.trials})
        record = {
            "format": _FORMAT,
            "version": _VERSION,
            "name": name,
            "search": search.values,
            "config": config_to_dict(base),
            "data_sha256": data_sha256,
            "provenance": dict(provenance),
            "starts": starts,
        }
        store.put(_RECORD, json.dumps(record, indent=2).encode() + b"\n")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._search = search
        self._log = StudyLog(store)
        self._storage = JournalStorage(self._log)
        with self._log.together():
            self.study = optuna.create_study(
                study_name=name,
                storage=self._storage,
                directions=[objective.direction for objective in search.objectives],
                load_if_exists=True,
            )
            metrics = [goal.metric for goal in search.objectives]
            if "objectives" not in self.study.user_attrs:
                self.study.set_user_attr("objectives", metrics)
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                if self.study.metric_names is None:  # what Optuna's own pages call the values
                    self.study.set_metric_names(metrics)
        self._noted: dict[int, float] = {}
        self._seconds_before: dict[int, float] = {}
        self._interrupted = []
        self._failed_before = {trial.number for trial in self.trials if trial.state == TrialState.FAIL}
        for trial in self.trials:
            if trial.state == TrialState.RUNNING:
                if trial.user_attrs.get("status") == "pruned":  # decided, and the driver died
                    self.study.tell(trial.number, state=TrialState.PRUNED)
                else:
                    self._interrupted.append(trial.number)
        self._waiting: Suggestion | None = None

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials by number; not to be changed."""
        return self.study.get_trials(deepcopy=False)

    @property
    def left(self) -> int:
        """How many trials are still to be begun or gone on with."""
        return (self._waiting is not None) + len(self._interrupted) + self._new

    @property
    def best(self) -> list[FrozenTrial]:
        """The finished trial with the best objective, or those that no other beats, best first one first."""
        if not any(trial.state == TrialState.COMPLETE for trial in self.trials):
            return []
        if len(self._search.objectives) == 1:
            return [self.study.best_trial]
        sign = 1 if self._search.objectives[0].direction == "minimize" else -1
        return sorted(self.study.best_trials, key=lambda trial: sign * trial.values[0])

    def suggest(self, wait_seconds: float) -> Suggestion | None:
        """Return the next trial, once the store knows of it; None where that takes longer, or none is left.

        What is None for the store's sake is returned by a later call.
        """
        if self._waiting is None:
            if self._interrupted:
                trial = self.trials[self._interrupted.pop(0)]
                self._waiting = Suggestion(trial.number, trial.params, interrupted=True)
            elif self._new:
                self._waiting = self._ask()
            else:
                return None
        if not self._log.flush(wait_seconds):
            return None
        suggestion, self._waiting = self._waiting, None
        return suggestion

    def begin(self, number: int) -> None:
        """Note that another attempt at a trial begins."""
        attributes = self.trials[number].user_attrs
        self._seconds_before[number] = attributes.get("seconds", 0.0)
        self._set(number, {"attempts": attributes.get("attempts", 0) + 1})
        self._log.flush(0)  # at once, without waiting for it

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
        """Note a report of a trial, `seconds` after its attempt began; return its first objective, if new."""
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
        """Note the decision to end a trial, so that another start of the sweep does not forget it."""
        self._set(number, {"status": "pruned"})

    def is_pruned(self, number: int) -> bool:
        """Return whether it has been decided to end a trial."""
        return self.trials[number].user_attrs.get("status") == "pruned"

    def end(
        self, number: int, status: Status, metrics: Mapping[str, float], *, error: str = ""
    ) -> tuple[Status, str]:
        """Note how a trial has ended, and its last metrics; return status and error as noted.

        A trial that finished with an objective that is not finite has diverged; without one it has failed.
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
        self._log.flush(0)
        return status, error

    def close(self) -> None:
        """Store what is left; raises StoreError where that is not possible for ten minutes."""
        self._log.close()

    @property
    def _new(self) -> int:
        """How many trials are still to be suggested."""
        return max(0, self._search.trials - (len(self.trials) - len(self._failed_before)))

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


def read_record(store: Store) -> dict[str, Any] | None:
    """Return what sweep.json says; None where there is none.

    Raises:
        StoreError: it is not a sweep's, or the store cannot be read.
    """
    try:
        record = json.loads(store.get(_RECORD))
    except ObjectMissingError:
        return None
    except ValueError as error:
        raise StoreError(f"{store.uri}/{_RECORD} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT or record.get("version") != _VERSION:
        raise StoreError(f"{store.uri}/{_RECORD} is not the record of a sweep that this version reads")
    return record


def check_same(
    store: Store, name: str, search: Search, base: Config, data_sha256: str
) -> dict[str, Any] | None:
    """Return the record of the sweep that this start goes on with; None for a new one.

    Raises:
        ConfigError: a sweep of this name has another search, base config or data.
    """
    record = read_record(store)
    if record is None:
        return None
    then, now = record["search"], search.values
    differences = [
        _change(key, old, new)
        for key in now
        if key not in (*_FREE_SEARCH, "space") and (old := then.get(key)) != (new := now[key])
    ]
    pairs = [
        (then["space"], now["space"]),
        (dict(leaves(record["config"])), dict(leaves(config_to_dict(base)))),
    ]
    for old, new in pairs:
        differences += [
            _change(key, old.get(key), new.get(key))
            for key in {**old, **new}
            if old.get(key) != new.get(key) and not key.startswith(_FREE_CONFIG)
        ]
    if record["data_sha256"] != data_sha256:
        differences.append("data.train has other content")
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ConfigError(
            f"run.name: the sweep {name} was begun otherwise: {'; '.join(differences[:3])}{more}; "
            "put that back to go on with it, or choose a new run.name"
        )
    return record


def sampler_of(search: Search, number: int, before: Sequence[Mapping[str, Any]]) -> BaseSampler:
    """Return the sampler of one trial: what it draws depends on the seed, the number and the trials before.

    So a sweep that was interrupted goes on drawing what it would have drawn, and repeats nothing. `before`
    has the parameters of those trials: a grid gives its first point that is not among them.
    """
    seed = generator(search.seed, 0, number, "trial").initial_seed() % 2**32
    match search.sampler:
        case "grid":
            return _Point(next(point for point in search.grid if point not in before))
        case "random":
            return RandomSampler(seed=seed)
        case "tpe":
            return TPESampler(seed=seed)
        case "nsga2":
            return NSGAIISampler(seed=seed)
        case "gp":
            return GPSampler(seed=seed)


class _Point(BaseSampler):
    """Always the same parameters."""

    def __init__(self, point: Mapping[str, Any]) -> None:
        self._point = point

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:  # noqa: ANN401  (the protocol's)
        return self._point[param_name]


def _change(key: str, old: object, new: object) -> str:
    return f"{key} was {json.dumps(old)}, is {json.dumps(new)}"
