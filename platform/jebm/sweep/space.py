"""What a sweep searches: dimensions by dotted key, objectives, sampler and pruning, from one YAML file.

    space:
      langevin.step_size: [loguniform, 0.05, 1.0]
      langevin.steps: [choice, [20, 40, 80]]
    objective: {metric: evaluation/frechet_long, direction: minimize}
    trials: 16

Everything is checked before anything starts, each value of the space by the config parser.
"""

import importlib.util
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from optuna.distributions import BaseDistribution

from jebm.config import SHAPES_RESULT, Config, role_of
from jebm.errors import ConfigError
from jebm.parser import override, with_own_classes
from jebm.parser.values import sections
from jebm.parser.yaml_file import read_yaml
from jebm.paths import shipped
from jebm.plain import hint_at
from jebm.sweep.dimensions import dimension, finite_number, grid_points, one_of, whole_number

__all__ = [
    "Halving",
    "Objective",
    "SamplerName",
    "Search",
    "load_search",
    "search_from_dict",
]

Direction = Literal["minimize", "maximize"]
SamplerName = Literal["tpe", "random", "nsga2", "gp", "grid"]
_KEYS = ("space", "objective", "trials", "sampler", "seed", "scheduler", "max_concurrent")
_REDUCTION = 3.0


@dataclass(frozen=True)
class Objective:
    """A metric in the reports of training, and its direction."""

    metric: str
    direction: Direction

    @property
    def sign(self) -> int:
        """1 if low values are good, -1 if high ones are."""
        return 1 if self.direction == "minimize" else -1


@dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving (ASHA, arXiv 1810.05934), in images seen.

    After grace_images, and each time the images grow by the factor reduction, a trial ends unless it is among
    the best 1/reduction of the trials that got that far.
    """

    grace_images: int
    reduction: float


@dataclass(frozen=True)
class Search:
    """A checked search."""

    space: dict[str, BaseDistribution]
    """By dotted key. A choice that is a list is kept as text, since Optuna stores only plain values."""
    objectives: tuple[Objective, ...]
    trials: int
    sampler: SamplerName
    seed: int
    scheduler: Halving | None
    max_concurrent: int | None
    values: dict[str, Any]
    """The argument of `search_from_dict` with defaults filled in, for JSON."""

    @property
    def grid(self) -> list[dict[str, Any]]:
        """All points of the space, the last key varying fastest; empty unless the sampler is grid."""
        return grid_points(self.space) if self.sampler == "grid" else []

    def describe(self) -> list[str]:
        """Return the search as a few readable lines."""
        lines = []
        for key, entry in self.values["space"].items():
            kind, *rest = entry
            bounds = " to ".join(f"{bound:g}" for bound in rest if kind != "choice")
            lines.append(f"{key} {kind} {bounds or json.dumps(rest[0])}")
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
    """Return the search in a YAML file, with every value of its space checked against `base`.

    `trials` overrides the file's.

    Raises:
        ConfigError: one line that names the file, the key and the remedy.
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
    """Return the search in a YAML file's content; raises `ConfigError` like `load_search`."""
    _only(values, _KEYS, "")
    for key in ("space", "objective"):
        if key not in values:
            raise ConfigError(f"{key}: is missing")
    # The space determines the default number of trials of a grid.
    sampler = one_of(values.get("sampler", "tpe"), get_args(SamplerName), "sampler")
    space = _space(values["space"], base, grid=sampler == "grid")
    objectives = _objectives(values["objective"], base)
    points = grid_points(space) if sampler == "grid" else None
    if points is None and "trials" not in values:
        raise ConfigError("trials: is missing")
    trials = whole_number(values.get("trials", len(points or ())), "trials", 1)
    if points is not None and trials > len(points):
        raise ConfigError(f"trials: {trials} are more than the {len(points)} points of the grid")
    # What cannot be combined.
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
        seed=whole_number(values.get("seed", 0), "seed", 0),
        scheduler=scheduler,
        max_concurrent=None if most is None else whole_number(most, "max_concurrent", 1),
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
    # Points of a grid can be invalid in combination.
    for point in points or ():
        try:
            with_own_classes(override(base, point))
        except ConfigError as error:
            named = ", ".join(f"{key} {value}" for key, value in point.items())
            raise ConfigError(f"space: the point {named} is no config: {error}") from error
    return search


def _only(values: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {where}{key}; {hint_at(str(key), known)}")


def _space(values: object, base: Config, *, grid: bool) -> dict[str, BaseDistribution]:
    if not isinstance(values, dict) or not values:
        raise ConfigError("space: needs at least one key, such as langevin.step_size: [loguniform, 0.05, 1]")
    space, probes = {}, {}
    for key, entry in values.items():
        if role_of(key) not in SHAPES_RESULT:
            raise ConfigError(f"space: {key} cannot be searched: it does not shape the model or its training")
        space[key], probes[key] = dimension(key, entry, grid=grid)
    try:
        for i in range(max(map(len, probes.values()))):  # parses fewer configs than one by one
            values_now = {key: values[i] for key, values in probes.items() if i < len(values)}
            with_own_classes(override(base, values_now))
    except ConfigError:
        _find_wrong(base, probes)
    return space


def _find_wrong(base: Config, probes: Mapping[str, Sequence[Any]]) -> None:
    """Raise the error of a value that is invalid on its own; some are invalid only in combination."""
    for key, values in probes.items():
        for value in values:
            try:
                with_own_classes(override(base, {key: value}))
            except ConfigError as error:
                raise ConfigError(f"space: {key} = {value}: {error}") from error


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
        direction = one_of(entry["direction"], get_args(Direction), "objective.direction")
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
    reduction = finite_number(options.get("reduction", _REDUCTION), "scheduler.asha.reduction")
    if reduction <= 1:
        raise ConfigError(f"scheduler.asha.reduction: must be above 1, not {reduction:g}")
    return Halving(whole_number(options["grace_images"], "scheduler.asha.grace_images", 1), float(reduction))
