"""What a sweep searches: dimensions by dotted key, objectives, sampler and pruning, from one YAML file.

    space:
      langevin.step_size: [loguniform, 0.05, 1.0]
      langevin.steps: [choice, [20, 40, 80]]
    objective: {metric: evaluation/frechet_long, direction: minimize}
    trials: 16

All of it is checked before anything starts, each value of the space through the parser of the config.
"""

import difflib
import importlib.util
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from jebm.config import SHAPES_RESULT, Config, role_of
from jebm.errors import ConfigError
from jebm.parser import override
from jebm.parser.values import sections
from jebm.parser.yaml_file import read_yaml
from jebm.paths import shipped

__all__ = [
    "Halving",
    "Objective",
    "SamplerName",
    "Search",
    "load_search",
    "search_from_dict",
    "with_parameters",
]

Direction = Literal["minimize", "maximize"]
SamplerName = Literal["tpe", "random", "nsga2", "gp", "grid"]
_KINDS = ("uniform", "loguniform", "int", "logint", "choice")
_KEYS = ("space", "objective", "trials", "sampler", "seed", "scheduler", "max_concurrent")
_REDUCTION = 3.0


@dataclass(frozen=True)
class Objective:
    """A metric of training's reports, and where it should go."""

    metric: str
    direction: Direction


@dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving (ASHA, arXiv 1810.05934), in images seen.

    After grace_images, and then each time the images have grown by the factor reduction, a trial ends unless
    it is among the best 1/reduction of those that came so far.
    """

    grace_images: int
    reduction: float


@dataclass(frozen=True)
class Search:
    """A checked search."""

    space: dict[str, BaseDistribution]
    """By dotted key. A choice that is a list stands there as text: Optuna keeps only plain values."""
    objectives: tuple[Objective, ...]
    trials: int
    sampler: SamplerName
    seed: int
    scheduler: Halving | None
    max_concurrent: int | None
    values: dict[str, Any]
    """What `search_from_dict` was given, with the defaults: for JSON."""

    @property
    def grid(self) -> list[dict[str, Any]]:
        """All points of the space, the last key moving fastest; empty unless the sampler is grid."""
        return _grid(self.space) if self.sampler == "grid" else []

    def describe(self) -> list[str]:
        """Return the search as a few lines for a person."""
        lines = []
        for key, entry in self.values["space"].items():
            kind, *rest = entry
            lines.append(f"{key} {kind} " + (json.dumps(rest[0]) if kind == "choice" else _range(rest)))
        goals = ", ".join(f"{goal.direction} {goal.metric}" for goal in self.objectives)
        halving = ""
        if self.scheduler is not None:
            halving = (
                f"; asha from {self.scheduler.grace_images:,} images on, the best"
                f" 1/{self.scheduler.reduction:g} go on"
            )
        return [
            *(f"{'space' if i == 0 else '':9}{line}" for i, line in enumerate(lines)),
            f"goal     {goals}",
            f"trials   {self.trials} by {self.sampler}, seed {self.seed}{halving}",
        ]


def load_search(path: str | Path, base: Config, trials: int | None = None) -> Search:
    """Return the search of a YAML file, every value of its space checked against `base`.

    `trials` stands in for the file's.

    Raises:
        ConfigError: in one line that names the file, the key and the remedy.
    """
    path = shipped(path, "searches")
    values = read_yaml(path)
    if "space" not in values and any(key in sections() for key in values):
        raise ConfigError(f"{path}: that is a config; give it as --config {path}")
    try:
        return search_from_dict(values if trials is None else values | {"trials": trials}, base)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def search_from_dict(values: Mapping[str, Any], base: Config) -> Search:
    """Return the search that a YAML file's content gives; raises `ConfigError` as `load_search` does."""
    _only(values, _KEYS, "")
    for key in ("space", "objective"):
        if key not in values:
            raise ConfigError(f"{key}: is missing")
    sampler = _one_of(values.get("sampler", "tpe"), get_args(SamplerName), "sampler")
    space = _space(values["space"], base, grid=sampler == "grid")
    objectives = _objectives(values["objective"], base)
    points = _grid(space) if sampler == "grid" else None
    if points is None and "trials" not in values:
        raise ConfigError("trials: is missing")
    trials = _whole(values.get("trials", len(points or ())), "trials", 1)
    if points is not None and trials > len(points):
        raise ConfigError(f"trials: {trials} are more than the {len(points)} points of the grid")
    scheduler = _halving(values.get("scheduler"))
    if scheduler is not None and len(objectives) > 1:
        raise ConfigError("scheduler: asha needs one objective to rank by; give one, or set it to none")
    if sampler == "gp" and importlib.util.find_spec("scipy") is None:
        raise ConfigError("sampler: gp needs scipy; install it, or take tpe")
    most = values.get("max_concurrent")
    search = Search(
        space=space,
        objectives=objectives,
        trials=trials,
        sampler=sampler,
        seed=_whole(values.get("seed", 0), "seed", 0),
        scheduler=scheduler,
        max_concurrent=None if most is None else _whole(most, "max_concurrent", 1),
        values={
            "space": dict(values["space"]),
            "objective": [vars(objective) for objective in objectives],
            "trials": trials,
            "sampler": sampler,
            "seed": values.get("seed", 0),
            "scheduler": "none" if scheduler is None else {"asha": vars(scheduler)},
            "max_concurrent": most,
        },
    )
    for point in points or ():
        try:
            with_parameters(base, point)
        except ConfigError as error:
            raise ConfigError(f"space: the point {_point(point)} is no config: {error}") from error
    return search


def with_parameters(
    base: Config, parameters: Mapping[str, Any], *, storage: str | None = None, name: str | None = None
) -> Config:
    """Return `base` with a trial's parameters, and with another run.storage and run.name where given.

    Raises:
        ConfigError: a key is unknown, or the values cannot work together.
    """
    place = {"run.storage": storage, "run.name": name}
    return override(base, {**parameters, **{key: value for key, value in place.items() if value is not None}})


def _only(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"unknown key {where}{key}; {hint}")


def _one_of(value: object, allowed: tuple[Any, ...], key: str) -> Any:  # noqa: ANN401  (one of `allowed`)
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{key}: must be one of {', '.join(allowed)}, not {value}{hint}")
    return value


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{key}: needs a number, not {value!r}")
    return value


def _whole(value: object, key: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key}: needs a whole number, not {value!r}")
    if value < least:
        raise ConfigError(f"{key}: must be at least {least}, not {value}")
    return value


def _space(values: object, base: Config, *, grid: bool) -> dict[str, BaseDistribution]:
    if not isinstance(values, dict) or not values:
        raise ConfigError("space: needs at least one key, such as langevin.step_size: [loguniform, 0.05, 1]")
    space, probes = {}, {}
    for key, entry in values.items():
        if role_of(key) not in SHAPES_RESULT:
            raise ConfigError(f"space: {key} cannot be searched: it does not shape the model or its training")
        space[key], probes[key] = _dimension(key, entry, grid=grid)
    try:
        for i in range(max(map(len, probes.values()))):  # fewer configs to parse than one by one
            with_parameters(base, {key: values[i] for key, values in probes.items() if i < len(values)})
    except ConfigError:
        _find_wrong(base, probes)
    return space


def _find_wrong(base: Config, probes: Mapping[str, Sequence[Any]]) -> None:
    """Raise the error of a value that is no config even alone; values may be so only together."""
    for key, values in probes.items():
        for value in values:
            try:
                with_parameters(base, {key: value})
            except ConfigError as error:
                raise ConfigError(f"space: {key} = {value}: {error}") from error


def _dimension(key: str, entry: object, *, grid: bool) -> tuple[BaseDistribution, list[Any]]:
    """Return the distribution of one entry, and the values that must each give a valid config."""
    where = f"space: {key}"
    if not isinstance(entry, list) or not entry:
        raise ConfigError(f"{where}: must be a list such as [uniform, 0.1, 1.0] or [choice, [1, 2]]")
    kind = _one_of(entry[0], _KINDS, where)
    if kind == "choice":
        if len(entry) != 2 or not isinstance(entry[1], list) or not entry[1]:
            raise ConfigError(f"{where}: needs one list of values, [choice, [1, 2]]")
        labels = [json.dumps(value) if isinstance(value, list) else value for value in entry[1]]
        for label in labels:
            if not isinstance(label, str | int | float | None):
                raise ConfigError(f"{where}: a choice must be a plain value or a list, not {label!r}")
        if len({json.dumps(label) for label in labels}) < len(labels):
            raise ConfigError(f"{where}: a choice stands twice")
        return CategoricalDistribution(labels), labels
    if len(entry) != 3:
        raise ConfigError(f"{where}: needs two bounds, [{kind}, low, high]")
    low, high = (_number(bound, where) for bound in entry[1:])
    if low >= high:
        raise ConfigError(f"{where}: the low bound {low:g} must lie below the high bound {high:g}")
    if kind.startswith("log") and low <= 0:
        raise ConfigError(f"{where}: {kind} needs a low bound above 0, not {low:g}")
    if kind in ("int", "logint"):
        low, high = (_whole(bound, where, -(2**53)) for bound in (low, high))
        if grid and kind == "logint":
            raise ConfigError(f"{where}: a grid needs choice or int, not logint")
        return IntDistribution(low, high, log=kind == "logint"), [low, high]
    if grid:
        raise ConfigError(f"{where}: a grid needs choice or int, not {kind}")
    inside = low + (high - low) / math.pi  # no whole number: a key that must be one shows itself
    return FloatDistribution(low, high, log=kind == "loguniform"), [low, inside, high]


def _objectives(values: object, base: Config) -> tuple[Objective, ...]:
    entries = values if isinstance(values, list) else [values]
    if not entries:
        raise ConfigError("objective: needs a metric and a direction")
    objectives = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise ConfigError(
                f"objective: needs {{metric: evaluation/frechet_long, direction: minimize}}, not {entry}"
            )
        _only(entry, ("metric", "direction"), "objective.")
        metric = entry.get("metric")
        if not isinstance(metric, str) or not metric:
            raise ConfigError("objective.metric: needs the name of a metric, such as evaluation/frechet_long")
        if "direction" not in entry:
            raise ConfigError(f"objective.direction: is missing for {metric}; minimize or maximize")
        direction = _one_of(entry["direction"], get_args(Direction), "objective.direction")
        if metric.startswith("evaluation/") and base.evaluation.every_steps == 0:
            raise ConfigError(f"objective: {metric} is measured only where evaluation.every_steps is above 0")
        objectives.append(Objective(metric, direction))
    if len({objective.metric for objective in objectives}) < len(objectives):
        raise ConfigError("objective: a metric stands twice")
    return tuple(objectives)


def _halving(values: object) -> Halving | None:
    if values is None or values == "none":
        return None
    if values == "asha" or not isinstance(values, dict):
        raise ConfigError(
            f"scheduler: must be none or, say, {{asha: {{grace_images: 10000, reduction: 3}}}}, not {values}"
        )
    _only(values, ("asha",), "scheduler.")
    options = values["asha"] if isinstance(values.get("asha"), dict) else {}
    _only(options, ("grace_images", "reduction"), "scheduler.asha.")
    if "grace_images" not in options:
        raise ConfigError("scheduler.asha.grace_images: is missing: images that every trial sees")
    reduction = _number(options.get("reduction", _REDUCTION), "scheduler.asha.reduction")
    if reduction <= 1:
        raise ConfigError(f"scheduler.asha.reduction: must be above 1, not {reduction:g}")
    return Halving(_whole(options["grace_images"], "scheduler.asha.grace_images", 1), float(reduction))


def _grid(space: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    values = [
        list(axis.choices) if isinstance(axis, CategoricalDistribution) else range(axis.low, axis.high + 1)
        for axis in space.values()
        if isinstance(axis, CategoricalDistribution | IntDistribution)
    ]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*values)]


def _point(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in parameters.items())


def _range(bounds: list[float]) -> str:
    return " to ".join(f"{bound:g}" for bound in bounds)
