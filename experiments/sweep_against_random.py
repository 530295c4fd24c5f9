r"""Compare Optuna with pruning to random search, at equal budget, on real training curves.

  python experiments/sweep_against_random.py --config jobs/configs/smoke.yaml --table table.jsonl \
    --data.train data/fashion_mnist/train --data.validation data/fashion_mnist/validation \
    --run.storage runs/sweep \
    --cluster.engine process --cluster.workers 1 --evaluation.every_steps 44 --train.epochs 0.66 …

First the table: `fit` trains every point of a grid of Langevin step sizes and energy widths, and the
objective is measured along the way and at the end. Points already in the file are not trained again. Then
sweeps are simulated on it, with many seeds of each kind: a trial's step size is rounded to the nearest in the
grid, its curve comes from the table, and time is counted in images. Two trials run at once. Suggestions come
from the sampler that jobs/tune.py uses, pruning from Ray's ASHA with the same settings.

  random          random points, each trained in full
  random + asha   random points, pruned
  tpe             Optuna's TPE, each trained in full
  tpe + asha      what the shipped searches do

Prints the distance of the best fully trained trial from the best of the table (regret), for budgets counted
in full trainings, as means over seeds with 95 % intervals, and the paired differences from random search.
Before that, it prints the rank correlation of earlier measurements with the last: if it is low, pruning ends
the wrong trials.
"""

import heapq
import json
import logging
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import numpy as np
import optuna
from optuna.trial import Trial, TrialState
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from jebm.cli import run
from jebm.config import Config
from jebm.errors import ConfigError, DivergedError
from jebm.evaluate.quick import quick_look
from jebm.parser import argument_parser, override, parse_arguments
from jebm.sweep.judge import rank_correlation
from jebm.sweep.sampler import sampler_of
from jebm.sweep.space import Search, search_from_dict
from jebm.train.loop import fit
from jebm.train.provenance import provenance
from jebm.train.recorder import Report
from jebm.train.runtime import process_runtime

Point = tuple[float, int]
Curve = list[tuple[int, float]]
"""(images, objective) at each measurement; the objective is inf if training had diverged by then."""

_WORKERS = 2
_KINDS = (("random", False), ("random", True), ("tpe", False), ("tpe", True))


def trained(config: Config, objective: str) -> Curve:
    """Train one point and return its curve."""
    curve: Curve = []

    def note(report: Report) -> bool:
        images = report.step * config.train.batch_size
        value = report.metrics.get(objective)
        if value is not None and (not curve or curve[-1][0] < images):
            curve.append((images, value if math.isfinite(value) else math.inf))
        return False

    with process_runtime(config) as runtime:
        try:
            fit(config, runtime, provenance=provenance(), on_report=note, measure=quick_look(config))
        except DivergedError:
            curve.append((curve[-1][0] + 1 if curve else 1, math.inf))
    return curve


def table(config: Config, path: Path, points: Sequence[Point], objective: str) -> dict[Point, Curve]:
    """Return the curve of every point; trains those missing from the file."""
    curves: dict[Point, Curve] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            curve = [(images, math.inf if value is None else value) for images, value in row["curve"]]
            curves[row["step_size"], row["width"]] = curve
    for step_size, width in points:
        if (step_size, width) in curves:
            continue
        name = f"{config.run.name}-{step_size:g}-{width}"
        changes = {"run.name": name, "langevin.step_size": step_size, "energy.width": width}
        point = override(config, changes)
        curve = curves[step_size, width] = trained(point, objective)
        plain = [(images, value if math.isfinite(value) else None) for images, value in curve]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step_size": step_size, "width": width, "curve": plain}) + "\n")
        print(
            f"step size {step_size:<8g} width {width:<4} " + " ".join(f"{v:.1f}" for _, v in curve),
            flush=True,
        )
    return curves


def play(curves: dict[Point, Curve], search: Search, *, pruned: bool, budget: int) -> list[tuple[int, float]]:
    """Return (images spent, best final value so far) after each fully trained trial of one sweep."""
    whole = max(images for curve in curves.values() for images, _ in curve)
    step_sizes = np.array(sorted({step_size for step_size, _ in curves}))
    study = optuna.create_study(direction="minimize")
    scheduler: Any = ASHAScheduler(  # it uses only a trial's name
        time_attr="images",
        metric="value",
        mode="min",
        max_t=whole,
        grace_period=search.scheduler.grace_images if search.scheduler else whole,
        reduction_factor=search.scheduler.reduction if search.scheduler else 3,
        stop_last_trials=False,
    )
    events: list[tuple[int, int, int]] = []  # (time, number, place in its curve)
    running: dict[int, tuple[Trial, Curve]] = {}
    best: list[tuple[int, float]] = []
    spent = 0

    def begin(time: int) -> None:
        number = len(study.trials)
        study.sampler = sampler_of(search, number, [trial.params for trial in study.trials])
        trial = study.ask(search.space)
        wanted = math.log(trial.params["langevin.step_size"])
        step_size = float(step_sizes[np.abs(np.log(step_sizes) - wanted).argmin()])
        curve = curves[step_size, trial.params["energy.width"]]
        running[number] = (trial, curve)
        scheduler.on_trial_add(None, SimpleNamespace(trial_id=str(number)))
        heapq.heappush(events, (time + curve[0][0], number, 0))

    # Simulate in order of time: each event is the next measurement of a running trial.
    for _ in range(_WORKERS):
        begin(0)
    while events:
        time, number, place = heapq.heappop(events)
        trial, curve = running[number]
        images, value = curve[place]
        spent += images - (curve[place - 1][0] if place else 0)
        if spent > budget:
            break
        last = place == len(curve) - 1
        stop = False
        if math.isfinite(value):
            trial.report(value, images)
            if pruned and not last:
                result = {"images": images, "value": value}
                decision = scheduler.on_trial_result(None, SimpleNamespace(trial_id=str(number)), result)
                stop = decision == TrialScheduler.STOP
        else:
            stop = True
        if stop:
            study.tell(trial, state=TrialState.PRUNED)
        elif last:
            study.tell(trial, value)
            best.append((spent, min([value, *(earlier for _, earlier in best)])))
        else:
            heapq.heappush(events, (time + curve[place + 1][0] - images, number, place + 1))
            continue
        begin(time)
    return best


def regret(best: list[tuple[int, float]], budget: int, floor: float, worst: float) -> float:
    """Return best value at a budget minus the best of the table; with none yet, the worst."""
    values = [value for spent, value in best if spent <= budget]
    return (values[-1] if values else worst) - floor


def interval(values: Sequence[float]) -> str:
    """Return the mean with the half width of its 95 % interval (normal, since there are many seeds)."""
    return f"{statistics.fmean(values):.2f} ± {1.96 * statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def main() -> None:
    """Make or read the table, simulate the sweeps, print a Markdown table."""
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--table", type=Path, required=True, help="file of curves, made where it is missing")
    parser.add_argument("--objective", default="evaluation/frechet_long", help="metric to minimise")
    parser.add_argument("--widths", type=list[int], default=[10, 25, 50, 100, 200], help="energy widths")
    parser.add_argument("--step_sizes", type=int, default=12, help="number of step sizes from 0.05 to 1")
    parser.add_argument(
        "--grace_images", type=int, help="where ASHA first prunes; else the first measurement"
    )
    parser.add_argument("--seeds", type=int, default=100, help="sweeps of each kind")
    config, arguments = parse_arguments(parser)
    if not config.evaluation.every_steps:
        raise ConfigError("evaluation.every_steps: must be set, to when curves are measured")
    logging.getLogger("jebm").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # The curves, and how well early measurements predict the last.
    step_sizes = [round(float(value), 4) for value in np.geomspace(0.05, 1, arguments.step_sizes)]
    points = [(step_size, width) for width in arguments.widths for step_size in step_sizes]
    curves = table(config, arguments.table, points, arguments.objective)
    ends = [curve[-1][1] for curve in curves.values()]
    finite = [value for value in ends if math.isfinite(value)]
    whole = max(images for curve in curves.values() for images, _ in curve)
    grace = arguments.grace_images or min(curve[0][0] for curve in curves.values())
    rungs = [f"{images:,}" for images, _ in curves[points[0]]]
    print(
        f"\n{len(curves)} points of {whole:,} images, measured at {', '.join(rungs)}; "
        f"best {min(finite):.1f}, median {statistics.median(finite):.1f}, worst {max(finite):.1f}, "
        f"{len(ends) - len(finite)} diverged; {arguments.seeds} sweeps of each kind"
    )
    whole_curves = [[value for _, value in curve] for curve in curves.values() if len(curve) == len(rungs)]
    for place, rung in enumerate(rungs[:-1]):
        correlation = rank_correlation(*zip(*((c[place], c[-1]) for c in whole_curves), strict=True))
        print(f"rank correlation of {rung} images with the last: {correlation:.2f}")
    print()
    # Regret of each kind of sweep, by budget.
    budgets = [4, 8, 16, 32]
    rows: dict[str, dict[int, list[float]]] = {}
    for sampler, pruned in _KINDS:
        kind = sampler + (" + asha" if pruned else "")
        rows[kind] = {budget: [] for budget in budgets}
        for seed in range(arguments.seeds):
            values = {
                "space": {
                    "langevin.step_size": ["loguniform", 0.05, 1.0],
                    "energy.width": ["choice", arguments.widths],
                },
                "objective": {"metric": arguments.objective, "direction": "minimize"},
                "trials": 1000,
                "sampler": sampler,
                "seed": seed,
                "scheduler": {"asha": {"grace_images": grace, "reduction": 3}} if pruned else "none",
            }
            best = play(curves, search_from_dict(values, config), pruned=pruned, budget=whole * budgets[-1])
            for budget in budgets:
                rows[kind][budget].append(regret(best, budget * whole, min(finite), max(finite)))
    print("| budget (full trainings) | " + " | ".join(rows) + " | tpe - random | tpe + asha - random |")
    print("|---|" + "---|" * (len(rows) + 2))
    for budget in budgets:
        cells = [interval(rows[kind][budget]) for kind in rows]
        for kind in ("tpe", "tpe + asha"):
            pairs = zip(rows[kind][budget], rows["random"][budget], strict=True)
            cells.append(interval([value - random for value, random in pairs]))
        print(f"| {budget} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run(main)
