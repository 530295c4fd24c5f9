"""Trials that would repeat an earlier one are not run, and no sampler can tell the difference."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from test_study import next_of, search, start

from jebm.config import Config, config_to_dict, leaves
from jebm.evaluate.quick import quick_look
from jebm.parser import load_config
from jebm.store.storage import open_store
from jebm.sweep.findings import sweep_findings
from jebm.sweep.results import read_sweep
from jebm.sweep.sampler import sampler_of
from jebm.sweep.study import Suggestion, SweepStudy
from jebm.train.loop import fit
from jebm.train.runtime import process_runtime

ROOT = Path(__file__).parents[2]

# A third of the widths is no energy, and then the step size is idle; without it, only steps of two values.
SPACE = {
    "energy.width": ["choice", [0, 20, 50]],
    "langevin.step_size": ["uniform", 0.1, 1.0],
    "train.ema_decay": ["choice", [0.0, 0.9]],
}
TRIALS = 24


def truth(parameters: Mapping[str, Any]) -> float:
    """A loss that, like training, does not see the step size where there is no energy."""
    width = parameters["energy.width"]
    return parameters["train.ema_decay"] + (
        1 + parameters["langevin.step_size"] - width / 50 if width else 1.5
    )


def finish(study: SweepStudy, suggestion: Suggestion) -> None:
    value = truth(suggestion.parameters)
    study.report(suggestion.number, {"distortion": value}, images=640, step=10, seconds=2.0)
    study.end(suggestion.number, "finished", {"distortion": value})


def test_without_an_energy_its_keys_change_nothing_to_the_bit(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways to have none, with other values of every key that is then said to be idle."""
    monkeypatch.setenv("JEBM_CACHE", str(cache))
    other: dict[str, object] = {
        "prior.kind": "gaussian",
        "energy.depth": 3,
        "energy.spectral_norm": False,
        "energy.output_scale": 7.0,
        "energy.activation": "silu",
        "energy.penalty": 0.5,
        "energy.width": 33,
        "langevin.steps": 9,
        "langevin.step_size": 0.9,
        "langevin.noise": "philox",
        "langevin.kernel": "autograd",
        "train.gaussian_share": 0.5,
        "train.energy_updates": 3,
        **{
            f"optimizer.energy.{name}": value
            for name, value in {
                "lr": 0.5,
                "beta1": 0.7,
                "beta2": 0.8,
                "weight_decay": 0.1,
                "schedule": "cosine",
                "decay_per_epoch": 0.5,
                "warmup_steps": 7,
                "clip_norm": 0.1,
            }.items()
        },
    }
    small: dict[str, object] = {
        "data.train": str(ROOT / "jobs/data/fashion_mnist_2000/train"),
        "data.held_out": str(ROOT / "jobs/data/fashion_mnist_2000/test"),
        "inference.channels": [4, 8],
        "inference.width": 32,
        "generator.channels": [4, 8],
        "generator.width": 32,
        "train.batch_size": 64,
        "train.epochs": 0.24,  # 6 steps
        "train.pictures_every_steps": 0,
        "evaluation.every_steps": 3,
        "evaluation.samples": 100,
        "cluster.workers": 1,
        "cluster.engine": "process",
    }
    results, configs = [], []
    for name, values in (("zero", {"energy.width": 0}), ("gaussian", other)):
        place = {"run.storage": str(tmp_path / name)}
        config = load_config(ROOT / "jobs/configs/smoke.yaml", small | place | values)
        with process_runtime(config) as runtime:
            ended = fit(config, runtime, provenance={}, measure=quick_look(config))
        results.append({k: v for k, v in ended.metrics.items() if not k.startswith(("time/", "memory"))})
        configs.append(config)
    assert results[0] == results[1]
    assert any(name.startswith("evaluation/") for name in results[0])
    keys = dict(leaves(config_to_dict(configs[0])))
    by_class = {"energy.class_path", "energy.init_args"}  # idle as well: nothing builds the class
    assert {key for key in keys if configs[0].is_idle(key)} - by_class == set(other)
    assert not any(Config().is_idle(key) for key in keys)


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_a_sampler_draws_what_it_would_have_drawn_if_all_had_run(sampler: str) -> None:
    what = search(space=SPACE, sampler=sampler, trials=TRIALS)
    plain = optuna.create_study(direction="minimize")
    for number in range(TRIALS):
        plain.sampler = sampler_of(what, number, [])
        trial = plain.ask(what.space)
        trial.report(truth(trial.params), 640)
        plain.tell(trial, truth(trial.params))
    for restarts in (False, True):
        store = open_store(f"memory://twins-{sampler}-{restarts}/sweep")
        study, run = start(store, what), 0
        while (suggestion := study.suggest(10)) is not None:
            study.begin(suggestion.number)
            finish(study, suggestion)
            run += 1
            if restarts:
                study.close()
                study = start(store, what)
        study.close()
        assert study.left == 0
        assert [(t.params, t.values, t.intermediate_values) for t in study.trials] == [
            (t.params, t.values, t.intermediate_values) for t in plain.trials
        ]
        without = [t for t in study.trials if t.params["energy.width"] == 0]
        copies = [t for t in study.trials if "same_as" in t.user_attrs]
        assert len(without) - len(copies) == 2 < len(without)  # one run for each of the two decays
        assert run == TRIALS - len(copies)
        twins = {t.params["train.ema_decay"]: t.user_attrs["run"] for t in reversed(without)}
        assert all(t.user_attrs["same_as"] == twins[t.params["train.ema_decay"]] for t in copies)


def test_a_grid_runs_what_differs_and_its_report_says_so() -> None:
    store = open_store("memory://twins-grid/sweep")
    space = {"energy.width": ["choice", [0, 20]], "langevin.steps": ["choice", [10, 20, 40]]}
    study = start(store, search(space=space, sampler="grid", trials=6))
    run = []
    while (suggestion := study.suggest(10)) is not None:
        study.begin(suggestion.number)
        study.report(suggestion.number, {"distortion": 1.0}, images=640, step=10, seconds=2.0)
        study.end(suggestion.number, "finished", {"distortion": 1.0})
        run.append(suggestion.number)
    assert run == [0, 3, 4, 5]
    study.close()
    sweep = read_sweep(store)
    assert [(t.same_as, t.status, t.images, t.seconds) for t in sweep.trials[:4]] == [
        ("", "finished", 640, 2.0),
        ("t0000", "finished", 640, 0.0),
        ("t0000", "finished", 640, 0.0),
        ("", "finished", 640, 2.0),
    ]
    sections = {section.name: section for section in sweep_findings(sweep, store).sections}
    assert sections["trials"].meaning == (
        "6 trials, 2 of them not run again: each has the result of its twin."
    )
    statuses = [row[-4] for row in sections["trials"].tables[0].rows]
    assert statuses == ["finished", *["finished, as t0000"] * 2, *["finished"] * 3]
    assert sections["cost"].tables[0].rows[-1][-1] == 4 * 640


def test_a_twin_that_still_runs_is_waited_for_and_replaced_if_it_fails() -> None:
    store = open_store("memory://twins-wait/sweep")
    space = {"energy.width": ["choice", [0]], "langevin.steps": ["choice", [10, 20, 40]]}
    what = search(space=space, sampler="grid", trials=3)
    study = start(store, what)
    first = next_of(study)
    assert study.suggest(10) is None  # both others wait
    assert (len(study.trials), study.left) == (3, 2)
    study.close()
    # A later start waits for it as well, and runs the next one in its place.
    study = start(store, what)
    assert (study.suggest(10), study.suggest(10)) == (Suggestion(0, first.parameters, interrupted=True), None)
    study.end(0, "failed", {}, error="OSError: gone")
    second = next_of(study)
    assert (second.number, study.suggest(10), study.left) == (1, None, 1)
    study.report(1, {"distortion": 2.0}, images=64, step=1, seconds=1.0)
    study.end(1, "diverged", {"distortion": 2.0}, error="not finite")
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.PRUNED, TrialState.PRUNED]
    assert study.trials[2].user_attrs["same_as"] == "t0001"
    assert study.trials[2].user_attrs["error"] == "not finite"
    assert study.left == 0
