"""study.log: Optuna's journal of a sweep, in memory with a copy in a store; checks of a damaged one."""

import json
import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from jebm.errors import StoreError
from jebm.store.records import read_bytes
from jebm.store.storage import Store
from jebm.sweep.dimensions import contains
from jebm.sweep.space import Search
from jebm.untrusted import JsonObject, parsed_object

__all__ = [
    "LOG",
    "Entries",
    "StudyLog",
    "encoded_entry",
    "first_problem",
    "is_of_another",
    "read_entries",
    "run_name",
]

LOG = "study.log"

_LOGGER = logging.getLogger("jebm.sweep")
_LOG_BYTES = 2**30
_LINE_BYTES = 16 * 2**20
_MIRROR_EVERY_SECONDS = 3.0
_RETRY_SECONDS = 2.0
_LAST_PATIENCE_SECONDS = 600.0
_STATUSES = ("finished", "pruned", "diverged", "failed")


def run_name(number: int) -> str:
    """Return the name of a trial's run, such as t0007."""
    return f"t{number:04d}"


def encoded_entry(entry: JsonObject) -> bytes:
    """Return an entry as a line of the log."""
    return (json.dumps(entry, separators=(",", ":")) + "\n").encode()


class Entries(BaseJournalBackend):
    """An Optuna journal in memory."""

    def __init__(self, entries: Sequence[JsonObject] = ()) -> None:
        self._entries = list(entries)

    def read_logs(self, log_number_from: int) -> Iterable[JsonObject]:
        """Return the entries from a number on."""
        return self._entries[log_number_from:]

    def append_logs(self, logs: list[JsonObject]) -> None:
        """Append entries."""
        self._entries += logs


def read_entries(store: Store) -> tuple[list[JsonObject], str]:
    """Return the entries of study.log up to the first line that is not a JSON object, and its error.

    Half a line at the end is no error: Optuna's own journal files end like that after a crash.

    Raises:
        ObjectMissingError: there is no study.log.
        DamagedRecordError: it is too long, or cannot be read at all.
        StoreError: the store denies access or cannot be reached.
    """
    entries = []
    for number, line in enumerate(read_bytes(store, LOG, _LOG_BYTES).splitlines(keepends=True), start=1):
        try:
            entries.append(parsed_object(line, _LINE_BYTES))
        except ValueError as error:
            half = line.startswith(b"{") and not line.endswith(b"\n")
            return entries, "" if half else f"line {number}: {error}"
    return entries, ""


def first_problem(entries: Sequence[JsonObject], name: str, search: Search) -> tuple[int, str]:
    """Return how many leading entries make a sound study of this search, and what is wrong after them.

    A journal is a list of changes, each applied to the result of those before: after a wrong one, the rest
    lose their meaning.
    """
    good, bad = 0, len(entries)
    why = _problem(entries, name, search)
    if not why:
        good = bad
    while bad - good > 1:
        middle = (good + bad) // 2
        found = _problem(entries[:middle], name, search)
        if found:
            bad, why = middle, found
        else:
            good = middle
    complete = good
    while complete and _last_is_half(entries[:complete], search):
        complete -= 1
    if not why and complete < good:
        why = "it ends within a trial"
    return complete, f"line {complete + 1}: {why}" if why else ""


def is_of_another(entries: Sequence[JsonObject], search: Search) -> bool:
    """Return whether a journal has other objectives, or its first trial comes from another space."""
    goals = [goal.metric for goal in search.objectives]
    try:
        for study, trials in _replayed(entries):
            drawn = trials[0].distributions if trials else {}
            if study.user_attrs.get("objectives", goals) != goals or any(
                search.space.get(key) != distribution for key, distribution in drawn.items()
            ):
                return True
    except Exception:  # damaged, so no evidence
        return False
    return False


def _replayed(entries: Sequence[JsonObject]) -> list[tuple[FrozenStudy, list[FrozenTrial]]]:
    """Return the studies of a journal, each with its trials; a damaged one can raise anything."""
    storage = JournalStorage(Entries(entries))
    studies = storage.get_all_studies()
    return [(study, storage.get_all_trials(study._study_id, deepcopy=False)) for study in studies]


def _problem(entries: Sequence[JsonObject], name: str, search: Search) -> str:
    """Return what is wrong with a journal, such as a trial outside the search; "" if nothing is."""
    directions = [StudyDirection[goal.direction.upper()] for goal in search.objectives]
    try:
        for study, trials in _replayed(entries):
            if study.study_name != name or study.directions != directions:
                raise ValueError(f"it is of the study {study.study_name}, or has other objectives")
            for trial in trials:
                half = trial is trials[-1] and trial.state == TrialState.RUNNING
                _check_trial(trial, search, half=half)
    except Exception as error:  # a damaged journal can raise anything
        return f"{type(error).__name__}: {error}"
    return ""


def _last_is_half(entries: Sequence[JsonObject], search: Search) -> bool:
    """Return whether a sound journal ends before all parameters of its last trial."""
    trials = [trial for _, of_study in _replayed(entries) for trial in of_study]
    return bool(trials) and trials[-1].params.keys() != search.space.keys()


def _check_trial(trial: FrozenTrial, search: Search, *, half: bool) -> None:
    """Raise ValueError for a trial that is not of this search; with `half`, parameters may be missing."""
    if (
        trial.state == TrialState.WAITING
    ):  # nothing here enqueues trials, and their values are not searched ones
        raise ValueError(f"trial {trial.number} waits, which no trial of ours does")
    if not half and trial.params.keys() != search.space.keys():
        raise ValueError(f"trial {trial.number} has other parameters than the search")
    for key, value in trial.params.items():
        distribution = search.space.get(key)
        if trial.distributions[key] != distribution or not contains(distribution, value):
            raise ValueError(f"trial {trial.number} has {key} {value}, which is not what is searched")
    attributes = trial.user_attrs
    amounts = [attributes.get(name, 0) for name in ("seconds", "images", "step", "attempts")]
    counts = [*amounts[1:], *trial.intermediate_values]
    measured = [*trial.intermediate_values.values(), *(trial.values or ())]
    if (
        not all(_is_number(amount) and amount >= 0 for amount in amounts)
        or not all(isinstance(count, int) and count >= 0 for count in counts)
        or not all(map(_is_number, measured))
    ):
        raise ValueError(f"trial {trial.number} has a number that is none")
    ended = trial.state.is_finished()
    if attributes.get("status", None if ended else "pruned") not in _STATUSES:
        raise ValueError(f"trial {trial.number} has no status of ours")
    if trial.state == TrialState.COMPLETE and len(trial.values) != len(search.objectives):
        raise ValueError(f"trial {trial.number} has not one value of each objective")


def _is_number(value: object) -> bool:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and abs(value) <= 1.7e308  # type: ignore[arg-type] # an int may be any size; NaN fails <=


class StudyLog(BaseJournalBackend):
    """Optuna's journal in memory; a thread mirrors it to a store, in JournalFileBackend's format.

    While the store cannot be reached the sweep continues, and the copy catches up later.
    """

    def __init__(
        self,
        store: Store,
        entries: Sequence[JsonObject] = (),
        *,
        every_seconds: float = _MIRROR_EVERY_SECONDS,
    ) -> None:
        """Start with these entries, which the store is assumed to have."""
        self._store, self._every_seconds = store, every_seconds
        self._entries = list(entries)
        self._lines = [encoded_entry(entry) for entry in entries]
        self._stored = len(self._lines)
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._together = threading.RLock()
        self._urgent = self._closing = False
        self._thread = threading.Thread(target=self._mirror, name="study log", daemon=True)
        self._thread.start()

    def read_logs(self, log_number_from: int) -> Iterable[JsonObject]:
        """Return the entries from a number on."""
        return self._entries[log_number_from:]

    def append_logs(self, logs: list[JsonObject]) -> None:
        """Append entries; the copy in the store follows within seconds."""
        lines = [encoded_entry(log) for log in logs]
        with self._together, self._changed:
            self._entries += (json.loads(line) for line in lines)
            self._lines += lines
            self._changed.notify_all()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Take no copy inside, so that everything appended reaches the store as a whole."""
        with self._together:
            yield

    def flush(self, seconds: float) -> bool:
        """Return whether everything appended so far is in the store, waiting at most `seconds`."""
        with self._changed:
            wanted = len(self._lines)
            if self._stored < wanted:
                self._urgent = True
                self._changed.notify_all()
            return self._changed.wait_for(lambda: self._stored >= wanted, seconds)

    def close(self, seconds: float = _LAST_PATIENCE_SECONDS) -> None:
        """Store what remains and end.

        Raises:
            StoreError: it could not be stored within `seconds`.
        """
        self.flush(seconds)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._stored < len(self._lines):
            raise StoreError(f"{self._store.uri}/{LOG}: could not be stored: {self._error}")

    def _mirror(self) -> None:
        store = self._store.patient(0)  # retries happen here, so that a flush can time out
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
                store.put(LOG, b"".join(lines))
            except Exception as error:  # any error: a dead thread would silently stop the copy
                if self._error is None:
                    _LOGGER.warning("the study cannot be stored, retrying: %s", error)
                with self._changed:
                    self._error = error
                    self._changed.wait_for(lambda: self._closing, _RETRY_SECONDS)
                    if not self._closing:
                        self._urgent = True
                continue
            with self._changed:
                self._stored, self._error = len(lines), None
                self._changed.notify_all()
