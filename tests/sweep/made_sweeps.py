"""Sweeps whose truth is known: real Optuna journals, filled from functions written here."""

import datetime
import json
import math
import random
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from jebm.config import Config, config_to_dict
from jebm.store.storage import open_store
from jebm.sweep.results import Sweep, Trial, read_sweep
from jebm.sweep.space import Objective

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = {
    "langevin.step_size": FloatDistribution(0.05, 1.0, log=True),
    "optimizer.generator.lr": FloatDistribution(1e-5, 1e-2, log=True),
    "energy.width": IntDistribution(10, 200),
    "langevin.steps": CategoricalDistribution([10, 20, 40]),
    "model.latent_dims": CategoricalDistribution(["[2, 2, 10]", "[4, 4, 8]"]),
}


FULL = 60_000
START = datetime.datetime(2026, 3, 1, 12, 0, 0)


def draw(generator: random.Random) -> dict[str, object]:
    """A point of SPACE, evenly on its scales."""
    return {
        "langevin.step_size": 0.05 * 20 ** generator.random(),
        "optimizer.generator.lr": 1e-5 * 1000 ** generator.random(),
        "energy.width": generator.randint(10, 200),
        "langevin.steps": generator.choice([10, 20, 40]),
        "model.latent_dims": generator.choice(["[2, 2, 10]", "[4, 4, 8]"]),
    }


def value_at(params: dict[str, object]) -> float:
    """The step size decides, the learning rate matters, the rest does nothing. Best: 0.2, 1e-3, value 10."""
    return (
        10
        + 40 * math.log10(params["langevin.step_size"] / 0.2) ** 2
        + 2 * math.log10(params["optimizer.generator.lr"] / 1e-3) ** 2
    )


def curve_to(value: float, images: int = FULL) -> dict[int, float]:
    return {seen: value + 50 * math.exp(-seen / 5000) for seen in range(5000, images + 1, 5000)}


def trial(
    params: dict[str, object],
    values: float | list[float] | None = None,
    *,
    state: TrialState = TrialState.COMPLETE,
    curve: dict[int, float] | None = None,
    space: dict = SPACE,
    **attributes: object,
) -> FrozenTrial:
    """A trial as the tuner leaves it; `values` alone make a finished one."""
    status = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}.get(state.name)
    values = values if isinstance(values, list) or values is None else [values]
    if curve is None:
        curve = curve_to(values[0]) if values else {}
    made = create_trial(
        state=state,
        values=values,
        params=params,
        distributions={key: space[key] for key in params},
        intermediate_values=curve,
        user_attrs={
            "status": status,
            "images": max(curve, default=0),
            "seconds": max(curve, default=0) / 100,
            "attempts": 1,
            **attributes,
        },
    )
    made.datetime_start = START
    made.datetime_complete = START + datetime.timedelta(hours=2) if state.is_finished() else None
    return made


def pruned(params, images, *, status="pruned", value=30.0, **attributes):
    curve = curve_to(value, images)
    return trial(params, state=TrialState.PRUNED, curve=curve, status=status, **attributes)


def running(params, images=0):
    return trial(params, state=TrialState.RUNNING, curve=curve_to(20.0, images), status="running")


def make_sweep(
    folder: Path,
    trials: list[FrozenTrial],
    *,
    objectives: tuple[tuple[str, str], ...] = (("distortion", "minimize"),),
    name: str = "sweep",
    config: dict | None = None,
    search: dict | None = None,
    facts: dict | None = None,
) -> str:
    """Write a sweep's folder, and return it."""
    folder.mkdir(parents=True)
    description = {
        "format": "jebm-sweep",
        "version": 1,
        "data_sha256": "",
        "starts": [],
        "search": {"trials": len(trials), "space": {}} if search is None else search,
        "config": config_to_dict(Config()) if config is None else config,
        "provenance": {"jebm": "1.2.3", "git_revision": "0123abcd"} if facts is None else facts,
    }
    (folder / "sweep.json").write_text(json.dumps(description))
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    study = optuna.create_study(
        study_name=name, storage=storage, directions=[direction for _, direction in objectives]
    )
    study.set_user_attr("objectives", [metric for metric, _ in objectives])
    for number, each in enumerate(trials):
        if "run" not in each.user_attrs:
            each.set_user_attr("run", f"t{number:04d}")
        study.add_trial(each)
    return str(folder)


def read(folder: str) -> Sweep:
    return read_sweep(open_store(folder))


def center() -> dict[str, object]:
    return {"langevin.step_size": 0.2, "optimizer.generator.lr": 3e-4, "energy.width": 100}


def sweep_of(
    trials: list[Trial],
    space: dict = SPACE,
    objectives: tuple[tuple[str, str], ...] = (("distortion", "minimize"),),
) -> Sweep:
    """A sweep as it is read, without a journal."""
    goals = tuple(Objective(metric, direction) for metric, direction in objectives)
    return Sweep("sweep", goals, tuple(trials), space, {}, config_to_dict(Config()), {}, None, None)


def ended(number: int, params: dict[str, object], *values: float, status: str = "", **facts: object) -> Trial:
    """A trial as it is read: finished where it has values, else pruned unless `status` says otherwise."""
    plain = {"curve": (), "seconds": 1.0, "images": FULL, "attempts": 1, "error": ""}
    status = status or ("finished" if values else "pruned")
    return Trial(number, f"t{number:04d}", status, params, values, **plain | facts)
