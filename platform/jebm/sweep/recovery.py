"""Recover a sweep with a damaged or missing study.log: keep its sound part, restore trials from runs."""

import re
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution

from jebm.config import leaves
from jebm.errors import CheckpointError, ConfigError
from jebm.store.checkpoint import Checkpoints
from jebm.store.protocol import one_line
from jebm.store.records import DamagedRecordError, set_aside
from jebm.store.storage import ObjectMissingError, Store
from jebm.sweep.dimensions import Value, contains, label
from jebm.sweep.space import Search
from jebm.sweep.study_log import LOG, encoded_entry, first_problem, is_of_another, read_entries, run_name
from jebm.untrusted import JsonObject

__all__ = ["check_log", "good_entries", "lost_trials"]

_RUN = re.compile(r"t(\d{4}|[1-9]\d{4,8})", re.ASCII)


def check_log(store: Store, name: str, search: Search) -> None:
    """Compare a search with study.log, if sweep.json cannot tell what the sweep was started with.

    Raises:
        ConfigError: the first trial is of another space, or the study has other objectives.
        StoreError: the store cannot be reached.
    """
    try:
        entries, _ = read_entries(store)
    except (ObjectMissingError, DamagedRecordError):
        return
    if is_of_another(entries, search):
        raise ConfigError(
            f"run.name: the sweep {name} was begun with another search, as {store.uri}/{LOG} shows; "
            "put that back to go on with it, or choose a new run.name"
        )


def good_entries(store: Store, name: str, search: Search) -> tuple[list[JsonObject], str]:
    """Return the sound entries of study.log, and a message about the others ("" if there are none).

    A damaged log is set aside, and a new one starts with its sound entries. A new sweep has none.

    Raises:
        StoreError: the store cannot be reached, or a damaged log cannot be set aside.
    """
    entries: list[JsonObject] = []
    try:
        entries, unread = read_entries(store)
    except ObjectMissingError:
        return [], ""
    except DamagedRecordError as error:
        return [], f"{error}; it is kept as {set_aside(store, LOG)}"
    count, wrong = first_problem(entries, name, search)
    if not (wrong or unread):
        return entries, ""
    good, kept = entries[:count], set_aside(store, LOG)
    store.put(LOG, b"".join(map(encoded_entry, good)))
    why = one_line(wrong or unread)[:300]
    return good, f"{store.uri}/{LOG}: is damaged ({why}); it is kept as {kept}, its first {count} lines stay"


def lost_trials(store: Store, search: Search, known: int) -> list[dict[str, Any] | None]:
    """Return the parameters of the trials, from number `known` on, whose runs are in trials/.

    None marks a trial in between that left no checkpoint, or one of another search.

    Raises:
        StoreError: the store cannot be reached.
    """
    runs = store.child("trials")
    found = sorted(int(name[1:]) for name in runs.folders() if _RUN.fullmatch(name))
    lost = [number for number in found if number >= known]
    # A name with a huge number is no trial, and must not imply all those before it. Trials that took the
    # result of another have no run, so gaps may be long.
    few = (n for i, n in enumerate(lost) if n < search.trials or n <= known + 2 * i + 8)
    last = max(few, default=known - 1)
    names = {number: run_name(number) for number in lost}
    parameters = [
        _parameters(runs, names[number], search) if number in names else None
        for number in range(known, last + 1)
    ]
    while parameters and parameters[-1] is None:
        parameters.pop()
    return parameters


def _parameters(runs: Store, name: str, search: Search) -> dict[str, Any] | None:
    try:
        manifest = Checkpoints(runs, name).latest()
    except CheckpointError:
        return None
    if manifest is None:
        return None
    values = dict(leaves(manifest.config))
    try:
        return {key: _parameter(values[key], axis) for key, axis in search.space.items()}
    except (ArithmeticError, KeyError, TypeError, ValueError):
        return None


def _parameter(value: object, axis: BaseDistribution) -> Value:
    """Return a config's value in Optuna's form; raises if it is not in the search."""
    drawn = float(value) if isinstance(axis, FloatDistribution) else label(value)  # type: ignore[arg-type]
    if not contains(axis, drawn):
        raise ValueError("outside of what is searched")
    return axis.to_external_repr(axis.to_internal_repr(drawn))
