"""Which searched keys decided how a trial ended, and which effects may be chance."""

import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import create_trial

from jebm.sweep.dimensions import listed, setting
from jebm.sweep.results import Sweep

__all__ = ["FEWEST_RANKED", "Importance", "find_importances", "what_mattered"]

FEWEST_RANKED = 10
"""The fewest trials for a ranking; with fewer, chance picks the top."""

_SHUFFLES = 50


@dataclass(frozen=True)
class Importance:
    """How much a searched key decides whether a trial ends in the better half; shares sum to 1.

    `chance` is the largest share that it reached on a shuffled ranking.
    """

    key: str
    share: float
    chance: float

    @property
    def significant(self) -> bool:
        """Whether the share is larger than on any shuffled ranking."""
        return self.share > self.chance


def find_importances(sweep: Sweep) -> list[Importance]:
    """Return the importance of each searched key, largest first; none if there are too few trials.

    PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255) on the full ranking: how much the distribution of the
    better half's values differs from that of all. (On known functions the better half finds more of the keys
    that matter than the best third or fifth, and no more of the others.) Using ranks instead of values
    includes pruned and diverged trials, and limits outliers. The same on 50 shuffled rankings shows how large
    a share chance produces.
    """
    ranked = sweep.full_ranking()
    if len(ranked) < FEWEST_RANKED or not sweep.space:
        return []
    # A study whose values are ranks, for Optuna's evaluator.
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
    # The real ranking, then shuffled ones for the level of chance.
    evaluator = PedAnovaImportanceEvaluator(target_quantile=0.5)
    order = list(range(len(ranked)))
    shuffle = random.Random(0)  # noqa: S311  (the same report from the same sweep)
    chance = dict.fromkeys(sweep.space, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a minimised target and a small regime
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
    """Return an empty study in memory, without Optuna's log line about it."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study()
    finally:
        optuna.logging.set_verbosity(verbosity)


def what_mattered(sweep: Sweep, importances: Sequence[Importance]) -> str:
    """Return a sentence or two on which keys decided, and which cannot be distinguished from noise."""
    ranked = len(sweep.full_ranking())
    if not importances:
        return (
            f"Too few trials to say: {ranked} finished, were pruned or diverged, and {FEWEST_RANKED} are "
            f"the least from which importances are worth showing."
        )
    certain = [item for item in importances if item.significant]
    if not certain:
        return (
            f"Nothing that {ranked} trials could show: no key sets the better half apart more than a "
            f"shuffled ranking does."
        )
    deciding = listed([f"{item.key} ({item.share:.0%})" for item in certain])
    # Keys without an effect: no effect, or too little variation to tell.
    silent = [item.key for item in importances if not item.significant]
    settled = [key for key in silent if _settled(sweep, key)]
    silent = [key for key in silent if key not in settled]
    rest = f" For {listed(silent)} the trials show no effect beyond chance." if silent else ""
    if settled:
        rest += (
            f" {listed(settled)} hardly varied, since the search soon settled on one part of the range: "
            f"what it gained there these numbers cannot show."
        )
    decided = "decides" if len(certain) == 1 else "decide"
    return f"Of the searched keys {deciding} {decided} whether a trial ends in the better half.{rest}"


def _settled(sweep: Sweep, key: str) -> bool:
    """Return whether four fifths of the trials have one choice, or lie within a quarter of the range."""
    ranking = sweep.full_ranking()
    if isinstance(sweep.space[key], CategoricalDistribution):
        values = [setting(trial.params[key]) for trial in ranking if key in trial.params]
        return Counter(values).most_common(1)[0][1] >= 0.8 * len(values)
    places = sorted(sweep.places(key, ranking))
    tenth = len(places) // 10
    return len(places) > 0 and places[-1 - tenth] - places[tenth] <= 0.25
