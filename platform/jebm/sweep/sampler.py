"""The sampler of each trial of a sweep."""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from jebm.rng import generator
from jebm.sweep.space import Search

__all__ = ["sampler_of"]


def sampler_of(search: Search, number: int, before: Sequence[Mapping[str, Any]]) -> BaseSampler:
    """Return the sampler of one trial: its draws depend on the seed, the number and the earlier trials.

    So an interrupted sweep draws what it would have drawn without the interruption, and repeats nothing.
    `before` has the parameters of the earlier trials: a grid returns its first point not among them.
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
    """A sampler that always returns the same parameters."""

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
