"""What a sweep found: its folder read, its trials ranked, its doubts named. Plain values and text, no markup.

The folder holds `sweep.json` (search, base config, provenance), `study.log` (an Optuna journal) and one run
for each trial under `trials/`. All of it may come from a bucket: nothing in it is believed to be well formed.
"""

import json
import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.storages import JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from jebm.config import leaves
from jebm.errors import CheckpointError, StoreError
from jebm.report.findings import number, plural
from jebm.store.records import DamagedRecordError, read_object, understood
from jebm.store.storage import ObjectMissingError, Store
from jebm.sweep.space import Objective
from jebm.sweep.study_log import Entries, read_entries
from jebm.untrusted import JsonObject, typed

__all__ = [
    "STATUSES",
    "TOP",
    "Importance",
    "Sweep",
    "Trial",
    "concerns",
    "confidence",
    "find_importances",
    "position",
    "read_sweep",
    "searched",
    "setting",
    "what_mattered",
]

STATUSES = ("finished", "pruned", "diverged", "failed", "running", "waiting")
"""How a trial stands; the order of tables and legends."""

TOP = 5
"""Trials that count as the top ones."""

Value: TypeAlias = Any
"""The value of a searched key: bool, int, float, str or None, which Optuna knows and mypy need not."""

_REMEDY = "the command that began the sweep keeps what is good of it"
_SHUFFLES = 50
_FEWEST_RANKED = 10  # below it the top of the ranking is a handful that chance put together
_EDGE = 0.05  # of a range, on its own scale


@dataclass(frozen=True)
class Trial:
    """One trial. `values` has one number per objective where the trial finished, and is empty elsewhere.

    `curve` holds (images seen, first objective), by images, finite values only.
    """

    number: int
    name: str
    status: str
    params: Mapping[str, Value]
    values: tuple[float, ...]
    curve: tuple[tuple[int, float], ...]
    seconds: float
    images: int
    attempts: int
    error: str

    @property
    def last(self) -> float | None:
        """The first objective at the end, or at the last report; None before the first."""
        return self.values[0] if self.values else self.curve[-1][1] if self.curve else None


@dataclass(frozen=True)
class Sweep:
    """All that a report needs of a sweep, except the pictures.

    `space` maps each searched key to its distribution, by name; times are as the sweep's machine wrote them.
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
        """Return the trials of these statuses, by number."""
        return [trial for trial in self.trials if trial.status in statuses]

    def ranking(self, objective: int = 0) -> list[Trial]:
        """Return the finished trials, best first; of equals the earlier one."""
        sign = sign_of(self.objectives[objective])
        return sorted(self.having("finished"), key=lambda trial: sign * trial.values[objective])

    def full_ranking(self, objective: int = 0) -> list[Trial]:
        """Return every trial that ended on its merits: finished, then pruned, then diverged ones.

        Of the pruned, those that saw more images got further; of those, the better ones by their last report.
        """
        sign = sign_of(self.objectives[0])
        pruned = sorted(
            self.having("pruned"),
            key=lambda trial: (-trial.images, math.inf if trial.last is None else sign * trial.last),
        )
        diverged = sorted(self.having("diverged"), key=lambda trial: -trial.images)
        return [*self.ranking(objective), *pruned, *diverged]

    def front(self) -> list[Trial]:
        """Return the Pareto front, best of the first objective first: no trial is better in all respects."""

        def dominates(one: Trial, other: Trial) -> bool:
            pairs = list(zip(self.objectives, one.values, other.values, strict=True))
            return one.values != other.values and all(sign_of(o) * a <= sign_of(o) * b for o, a, b in pairs)

        finished = self.ranking()
        return [trial for trial in finished if not any(dominates(other, trial) for other in finished)]

    def leaders(self) -> list[Trial]:
        """Return the top trials; with several objectives the Pareto front."""
        return self.front() if len(self.objectives) > 1 else self.ranking()[:TOP]

    def best(self) -> Trial | None:
        """Return the best finished trial, by the first objective; with several it lies on the front."""
        return next(iter(self.leaders()), None)


@dataclass(frozen=True)
class Importance:
    """How much a searched key decides whether a trial ends in the better half; shares sum to 1.

    `chance` is the largest share that it reached when the ranking was shuffled.
    """

    key: str
    share: float
    chance: float

    @property
    def significant(self) -> bool:
        """Whether no shuffled ranking came as far."""
        return self.share > self.chance


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────


def read_sweep(folder: Store) -> Sweep:
    """Return the sweep in a folder, finished or not.

    Raises:
        CheckpointError: there is no sweep, or it cannot be read.
        StoreError: the store refuses, or cannot be reached.
    """
    description = _read_description(folder)
    try:
        entries, wrong = read_entries(folder)
        if wrong:
            raise ValueError(wrong)
        return _sweep(entries, description)
    except ObjectMissingError as error:
        raise CheckpointError(
            f"{folder.uri}: the sweep has not begun (no study.log); come back after its first trials"
        ) from error
    except DamagedRecordError as error:
        raise CheckpointError(f"{error}; {_REMEDY}") from error
    except StoreError:
        raise
    except Exception as error:  # whatever the replay of a damaged journal stumbles over
        raise CheckpointError(
            f"{folder.uri}/study.log: no readable Optuna journal with one study: {_one_line(error)}; "
            f"{_REMEDY}"
        ) from error


def _sweep(entries: Sequence[JsonObject], description: Mapping[str, Mapping[str, Any]]) -> Sweep:
    """Return the sweep that a journal holds; raises all sorts of errors for one that is damaged."""
    storage = JournalStorage(Entries(entries))
    (name,) = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    trials = sorted(study.get_trials(), key=lambda trial: trial.number)
    space: dict[str, BaseDistribution] = {}
    for trial in trials:
        space |= trial.distributions
        for key, value in trial.params.items():
            distribution = trial.distributions[key]
            if not distribution._contains(distribution.to_internal_repr(value)):
                raise ValueError(f"trial {trial.number} has {key} {value}, outside of what was searched")
    starts = [trial.datetime_start for trial in trials if trial.datetime_start]
    ends = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    return Sweep(
        name=name,
        objectives=_objectives(study),
        trials=tuple(_trial(trial) for trial in trials),
        space=dict(sorted(space.items())),
        search=description["search"],
        config=description["config"],
        provenance=description["provenance"],
        started=min(starts, default=None),
        ended=max(ends, default=None),
    )


def _read_description(folder: Store) -> dict[str, dict[str, Any]]:
    try:
        description = read_object(folder, "sweep.json")
        with understood(folder, "sweep.json"):
            return {key: typed(description, key, dict) for key in ("search", "config", "provenance")}
    except ObjectMissingError as error:
        raise CheckpointError(
            f"{folder.uri}: no sweep here (no sweep.json); give the folder <run.storage>/<name of the sweep>"
        ) from error
    except DamagedRecordError as error:
        raise CheckpointError(f"{error}; {_REMEDY}") from error


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
    values = tuple(trial.values or ()) if status == "finished" else ()
    if not all(math.isfinite(value) for value in values):
        status, values = "diverged", ()
    curve = tuple(
        (images, value) for images, value in sorted(trial.intermediate_values.items()) if math.isfinite(value)
    )
    name = str(attributes.get("run", ""))
    return Trial(
        number=trial.number,
        name=name if re.fullmatch(r"t\d{1,9}", name) else f"t{trial.number:04d}",  # it names a folder
        status=status,
        params=dict(sorted(trial.params.items())),
        values=values,
        curve=curve,
        seconds=_amount(attributes.get("seconds")),
        images=int(_amount(attributes.get("images"))) or max((images for images, _ in curve), default=0),
        attempts=int(_amount(attributes.get("attempts"))),
        error=_one_line(attributes.get("error") or ""),
    )


def _amount(value: object) -> float:
    """Return what somebody wrote as a number; 0 for what is none."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return max(0.0, float(value)) if good else 0.0  # type: ignore[arg-type]


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


# ── Numbers, ranges ─────────────────────────────────────────────────────────────────────────────────────


def setting(value: object) -> str:
    """Return a value of the configuration as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    return json.dumps(value, default=str)


def searched(distribution: BaseDistribution) -> str:
    """Return a range or the choices as text."""
    if isinstance(distribution, FloatDistribution | IntDistribution):
        log = ", log scale" if distribution.log else ""
        return f"{number(distribution.low)} to {number(distribution.high)}{log}"
    if isinstance(distribution, CategoricalDistribution):
        return " | ".join(setting(choice) for choice in distribution.choices)
    return type(distribution).__name__


def position(distribution: BaseDistribution, value: Value) -> float | None:
    """Return where a value lies between the ends of what was searched, 0 to 1, on the scale of the search.

    Numeric choices count by their order; other choices have none, and the answer is None.
    """
    if isinstance(distribution, FloatDistribution | IntDistribution):
        low, high, at = float(distribution.low), float(distribution.high), float(value)
        if distribution.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return (at - low) / (high - low) if high > low else None
    choices = ordered_choices(distribution)
    return choices.index(value) / (len(choices) - 1) if len(choices) > 1 and value in choices else None


def ordered_choices(distribution: BaseDistribution) -> list[float]:
    """Return numeric choices from low to high; nothing for choices without an order."""
    choices = distribution.choices if isinstance(distribution, CategoricalDistribution) else ()
    if not all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in choices):
        return []
    return sorted(float(choice) for choice in choices if choice is not None and not isinstance(choice, str))


def sign_of(objective: Objective) -> int:
    """Return 1 where low values are good, -1 where high ones are."""
    return 1 if objective.direction == "minimize" else -1


# ── What mattered ───────────────────────────────────────────────────────────────────────────────────────


def find_importances(sweep: Sweep, objective: int = 0) -> list[Importance]:
    """Return the importance of each searched key, largest first; nothing with too few trials to tell.

    PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255) on the full ranking: how far the values of the better
    half are distributed otherwise than those of all. (On known functions the better half finds more of the
    keys that matter than the best third or fifth do, and no more of the others.) Ranks in place of values
    let pruned and diverged trials count, and keep outliers from deciding. The same on 50 shuffled rankings
    says how far chance alone gets.
    """
    ranked = sweep.full_ranking(objective)
    if len(ranked) < _FEWEST_RANKED or not sweep.space:
        return []
    study = _silent_study()
    study.add_trials(
        [
            create_trial(
                params=dict(trial.params),
                distributions={key: sweep.space[key] for key in trial.params},
                value=float(rank),
            )
            for rank, trial in enumerate(ranked)
        ]
    )
    evaluator = PedAnovaImportanceEvaluator(target_quantile=0.5)
    order = list(range(len(ranked)))
    shuffle = random.Random(0)  # noqa: S311  (the same report from the same sweep)
    chance = dict.fromkeys(sweep.space, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a target is minimised, and that a regime is small
        found = evaluator.evaluate(study)
        for _ in range(_SHUFFLES):
            shuffle.shuffle(order)
            for key, value in evaluator.evaluate(
                study, target=lambda trial: float(order[trial.number])
            ).items():
                chance[key] = max(chance[key], value)
    total = sum(found.values())
    if total <= 0:
        return []
    result = [Importance(key, value / total, chance[key] / total) for key, value in found.items()]
    return sorted(result, key=lambda item: (-item.share, item.key))


def _silent_study() -> optuna.Study:
    """Return an empty study in memory, without Optuna's line in the log that there is one."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study()
    finally:
        optuna.logging.set_verbosity(verbosity)


def what_mattered(sweep: Sweep, importances: Sequence[Importance]) -> str:
    """Return in a sentence or two which keys decided, and which cannot be told from noise."""
    ranked = len(sweep.full_ranking())
    if not importances:
        return (
            f"Too few trials to say: {ranked} finished, were pruned or diverged, and {_FEWEST_RANKED} are "
            f"the least from which importances are worth showing."
        )
    certain = [item for item in importances if item.significant]
    if not certain:
        return (
            f"Nothing that {ranked} trials could show: no key sets the better half apart more than a "
            f"shuffled ranking does."
        )
    told = _listed([f"{item.key} ({item.share:.0%})" for item in certain])
    silent = [item.key for item in importances if not item.significant]
    settled = [key for key in silent if _settled(sweep, key)]
    silent = [key for key in silent if key not in settled]
    rest = f" For {_listed(silent)} the trials show no effect beyond chance." if silent else ""
    if settled:
        rest += (
            f" {_listed(settled)} hardly varied, since the search soon settled on one part of the range: "
            f"what it gained there these numbers cannot show."
        )
    decided = "decides" if len(certain) == 1 else "decide"
    return f"Of the searched keys {told} {decided} whether a trial ends in the better half.{rest}"


def _settled(sweep: Sweep, key: str) -> bool:
    """Return whether four fifths of the trials have one choice, or lie within a quarter of the range."""
    values = [trial.params[key] for trial in sweep.full_ranking() if key in trial.params]
    places = sorted(place for value in values if (place := position(sweep.space[key], value)) is not None)
    if isinstance(sweep.space[key], CategoricalDistribution):
        return Counter(map(setting, values)).most_common(1)[0][1] >= 0.8 * len(values)
    tenth = len(places) // 10
    return len(places) > 0 and places[-1 - tenth] - places[tenth] <= 0.25


# ── How sure ────────────────────────────────────────────────────────────────────────────────────────────


def confidence(sweep: Sweep) -> list[str]:
    """Return, one sentence each, what says how far the answer can be trusted."""
    said = [_counts(sweep)]
    ranking = sweep.ranking()
    if len(ranking) >= 2 and len(sweep.objectives) == 1:
        said.append(_spread(sweep, ranking[:TOP]))
    if len(ranking) >= 2 * TOP and len(sweep.objectives) == 1:
        said += _agreement(sweep, ranking[:TOP])
    if ranking:
        said += _seeds(sweep)
        said += _foresight(sweep)
    return said


def _counts(sweep: Sweep) -> str:
    counts = Counter(trial.status for trial in sweep.trials)
    parts = [f"{counts[status]} {status}" for status in STATUSES if counts[status]]
    return f"{plural(len(sweep.trials), 'trial')}: {_listed(parts) or 'none yet'}."


def _spread(sweep: Sweep, top: Sequence[Trial]) -> str:
    best, second, last = top[0].values[0], top[1].values[0], top[-1].values[0]
    near = f"the second, {top[1].name}, is {_apart(second, best)} behind"
    if len(top) == 2:
        return f"Of the two finished trials {near}."
    return (
        f"The top {len(top)} lie within {_apart(last, best)} of one another ({sweep.objectives[0].metric} "
        f"{number(best)} to {number(last)}); {near}."
    )


def _agreement(sweep: Sweep, top: Sequence[Trial]) -> list[str]:
    agreed, free = [], []
    for key, distribution in sweep.space.items():
        values = [trial.params[key] for trial in top if key in trial.params]
        places = [place for value in values if (place := position(distribution, value)) is not None]
        if len(places) == len(top):
            low, high = setting(min(values)), setting(max(values))
            told = f"{key} ({low if low == high else f'{low} to {high}'})"
            if max(places) - min(places) <= 0.25:
                agreed.append(told)
            elif max(places) - min(places) >= 0.6:
                free.append(told)
        elif len(values) == len(top) and len(set(map(setting, values))) == 1:
            agreed.append(f"{key} ({setting(values[0])})")
    said = []
    if agreed:
        said.append(f"The top {len(top)} agree on {_listed(agreed)}.")
    if free:
        said.append(f"They reach their values with very different {_listed(free)}.")
    return said


def _seeds(sweep: Sweep) -> list[str]:
    if "run.seed" in sweep.space:
        return []
    seed = dict(leaves(sweep.config)).get("run.seed", 0)
    return [
        f"All trials share run.seed {setting(seed)}, so the luck of a seed is not in these numbers: before "
        f"a small difference counts, train the top trials again with other seeds."
    ]


def _foresight(sweep: Sweep) -> list[str]:
    """Say whether pruning could be trusted: how well early reports of the finished trials rank their ends."""
    curves = [dict(trial.curve) for trial in sweep.ranking()]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    early = [images for images in shared if images <= shared[-1] / 2]
    if not early or len(curves) < 6 or not sweep.having("pruned"):
        return []
    now, later = [curve[early[0]] for curve in curves], [trial.values[0] for trial in sweep.ranking()]
    agreement = float(np.corrcoef(np.argsort(np.argsort(now)), np.argsort(np.argsort(later)))[0, 1])
    told = f"the order at {early[0]:,} images and at the end (rank correlation {agreement:.2f})"
    if agreement >= 0.6:
        return [f"Among the finished trials {told} is much the same: pruning early lost little."]
    return [f"Among the finished trials {told} differs: pruning early may have lost good ones."]


# ── What to mind ────────────────────────────────────────────────────────────────────────────────────────


def concerns(sweep: Sweep, importances: Sequence[Importance]) -> list[str]:
    """Return, one sentence each, what to mind or to do before the best is believed; most urgent first."""
    ended = [trial for trial in sweep.trials if trial.status in STATUSES[:4]]
    finished, diverged, failed = sweep.having("finished"), sweep.having("diverged"), sweep.having("failed")
    said = []
    if ended and len(diverged) == len(ended):
        said.append(
            f"{_all(len(ended))} diverged: there is no best config. Search "
            f"lower learning rates or a smaller langevin.step_size, or set clip_norm."
        )
    elif diverged and len(diverged) >= len(ended) / 10:
        said.append(f"{_share(len(diverged), len(ended))} diverged.{_cause(sweep, diverged)}")
    if failed:
        errors = Counter(trial.error or "without a message" for trial in failed)
        often, times = max(errors.items(), key=lambda item: item[1])
        said.append(f"{_share(len(failed), len(ended))} failed; {times} with: {often}")
    pruned = sweep.having("pruned")
    if len(pruned) >= 0.85 * len(ended) and len(ended) >= TOP:
        said.append(
            f"{_share(len(pruned), len(ended))} were pruned, so the answer rests on few: prune later."
        )
    if 0 < len(finished) < _FEWEST_RANKED:
        said.append(f"Only {plural(len(finished), 'trial')} finished: a first look, not a result.")
    best = sweep.best()
    if best is not None and len(finished) >= TOP:
        said += _edges(sweep, best, {item.key for item in importances if not item.significant})
    if best is not None:
        said += _unfinished_business(sweep, best)
    return said


def _cause(sweep: Sweep, diverged: Sequence[Trial]) -> str:
    """Name the key that tells diverged from other trials, where one clearly does (AUC of at least 0.9)."""
    others = sweep.having("finished", "pruned")
    if len(diverged) < 3 or len(others) < 3:
        return ""
    best = (0.4, "")
    for key, distribution in sweep.space.items():
        theirs, rest = (
            [
                place
                for trial in group
                if key in trial.params and (place := position(distribution, trial.params[key])) is not None
            ]
            for group in (diverged, others)
        )
        if len(theirs) < 3 or len(rest) < 3:
            continue
        wins = sum((a > b) + (a == b) / 2 for a in theirs for b in rest) / (len(theirs) * len(rest))
        if abs(wins - 0.5) > best[0]:
            values = [trial.params[key] for trial in diverged if key in trial.params]
            low = wins > 0.5
            bound = f"{'at least' if low else 'at most'} {setting(min(values) if low else max(values))}"
            best = (
                abs(wins - 0.5),
                f" They stand out by a {'high' if low else 'low'} {key}: {bound} in all of them.",
            )
    return best[1]


def _edges(sweep: Sweep, best: Trial, silent: Collection[str]) -> list[str]:
    """Name the keys whose best value lies at an edge; `silent` ones only if most of the top ones do too."""
    said = []
    top = sweep.leaders()
    for key, value in best.params.items():
        distribution = sweep.space[key]
        place = position(distribution, value)
        if place is None or len(ordered_choices(distribution)) == 2:  # of two choices one is always an end
            continue
        high = place > 0.5
        if min(place, 1 - place) > _EDGE:
            continue
        places = [position(distribution, trial.params.get(key)) for trial in top if key in trial.params]
        there = sum(at is not None and (1 - at if high else at) <= 2 * _EDGE for at in places)
        if key in silent and there <= len(top) / 2:
            continue
        said.append(
            f"{key} = {setting(value)} lies at the {'upper' if high else 'lower'} edge of the search "
            f"({_end(distribution, high=high)}), as {'does' if there == 1 else 'do'} {there} of the "
            f"{len(top)} leading trials: widen the range there."
        )
    return said


def _end(distribution: BaseDistribution, *, high: bool) -> str:
    if isinstance(distribution, FloatDistribution | IntDistribution):
        return number(distribution.high if high else distribution.low)
    return number(ordered_choices(distribution)[-1 if high else 0])


def _unfinished_business(sweep: Sweep, best: Trial) -> list[str]:
    """Say what a longer training or a longer sweep might still bring."""
    said = []
    if len(best.curve) >= 4:
        total = best.curve[-1][0]
        before = [value for images, value in best.curve if images <= 0.75 * total]
        now = best.curve[-1][1]
        if before and before[-1] != 0:
            gain = sign_of(sweep.objectives[0]) * (before[-1] - now) / abs(before[-1])
            if gain >= 0.02:
                said.append(
                    f"The best trial still improved by {gain:.0%} over its last quarter: with longer "
                    f"training the order of the top trials may change."
                )
    ended = sweep.having("finished", "pruned", "diverged", "failed")
    after = [trial for trial in ended if trial.number > best.number]
    if len(sweep.objectives) == 1 and len(ended) >= 2 * TOP and len(after) < 0.1 * len(ended):
        said.append(
            f"The best came late ({best.name} of {len(sweep.trials)}): more trials may find a better one."
        )
    return said


# ── Words ───────────────────────────────────────────────────────────────────────────────────────────────


def _apart(one: float, other: float) -> str:
    """Return how far two values are apart, in percent of the second where that means something."""
    difference = abs(one - other)
    if abs(other) < 1e-9:
        return number(difference)
    percent = 100 * difference / abs(other)
    return f"{percent:.2g}%" if percent < 99 else f"{percent:,.0f}%"


def _share(part: int, whole: int) -> str:
    return f"{part} of {plural(whole, 'trial')} ({part / whole:.0%})"


def _all(count: int) -> str:
    return "The only trial" if count == 1 else f"All {count} trials"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
