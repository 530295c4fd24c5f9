"""What a sweep remembers: in a journal that Optuna opens by itself, across starts and outages."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from jebm.config import Config
from jebm.errors import ConfigError
from jebm.store.storage import Store, open_store
from jebm.sweep.record import check_same
from jebm.sweep.space import Search, search_from_dict
from jebm.sweep.study import Suggestion, SweepStudy

GOAL = {"metric": "distortion", "direction": "minimize"}
SPACE = {"langevin.step_size": ["loguniform", 0.05, 1.0], "energy.width": ["int", 10, 100]}


def search(**changes: object) -> Search:
    return search_from_dict({"space": SPACE, "objective": GOAL, "trials": 6} | changes, Config())


def start(store: Store, what: Search, base: Config | None = None, data: str = "d") -> SweepStudy:
    return SweepStudy(store, "sweep", what, base or Config(), data_sha256=data, provenance={"jebm": "1"})


def next_of(study: SweepStudy) -> Suggestion:
    suggestion = study.suggest(10)
    assert suggestion is not None
    study.begin(suggestion.number)
    return suggestion


def loss(parameters: Mapping[str, Any]) -> float:
    return (math.log(parameters["langevin.step_size"]) + 1) ** 2 + parameters["energy.width"] / 100


def finish(study: SweepStudy, suggestion: Suggestion) -> None:
    value = loss(suggestion.parameters)
    study.report(suggestion.number, {"distortion": value}, images=640, step=10, seconds=2.0)
    study.end(suggestion.number, "finished", {"distortion": value, "loss": math.nan})


def test_the_journal_is_optunas_own(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "sweep"))
    study = start(store, search())
    first, second, third, fourth, fifth, sixth = (next_of(study) for _ in range(6))
    assert study.suggest(10) is None
    finish(study, first)
    study.report(second.number, {"distortion": 9.0}, images=64, step=1, seconds=0.5)
    study.report(second.number, {"distortion": math.nan}, images=128, step=2, seconds=0.7)
    study.end(second.number, "diverged", {"distortion": 9.0}, error="not finite\nat step 2")
    study.report(third.number, {"distortion": 8.0}, images=64, step=1, seconds=0.5)
    study.prune(third.number)
    study.end(third.number, "pruned", {"distortion": 8.0})
    study.end(fourth.number, "failed", {}, error="OSError: gone")
    # A run that has come to its end is no result without its objective, or with one that is not finite.
    assert study.end(fifth.number, "finished", {"loss": 1.0}) == (
        "failed",
        "distortion was not measured at the end",
    )
    assert study.end(sixth.number, "finished", {"distortion": math.inf})[0] == "diverged"
    study.close()

    storage = JournalStorage(JournalFileBackend(str(tmp_path / "sweep" / "study.log")))
    opened = optuna.load_study(study_name="sweep", storage=storage)
    assert opened.user_attrs == {"objectives": ["distortion"]}
    assert opened.metric_names == ["distortion"]
    assert opened.direction == optuna.study.StudyDirection.MINIMIZE
    complete, pruned, fail = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
    assert [trial.state for trial in opened.trials] == [complete, pruned, pruned, fail, fail, pruned]
    assert opened.best_trial.params == first.parameters
    assert opened.best_value == loss(first.parameters)
    assert opened.trials[0].user_attrs == {
        "run": "t0000",
        "attempts": 1,
        "seconds": 2.0,
        "images": 640,
        "step": 10,
        "status": "finished",
        "metrics": {"distortion": loss(first.parameters)},
    }
    assert opened.trials[1].intermediate_values == {64: 9.0}
    assert opened.trials[1].user_attrs["error"] == "not finite at step 2"
    assert [trial.user_attrs["status"] for trial in opened.trials[1:4]] == ["diverged", "pruned", "failed"]


def test_a_sweep_that_was_killed_goes_on_where_it_was() -> None:
    """Nothing is told to end: another start finds what the store has."""
    store = open_store("memory://killed/sweep")
    study = start(store, search())
    done, running, decided = (next_of(study) for _ in range(3))
    finish(study, done)
    study.report(running.number, {"distortion": 5.0}, images=64, step=1, seconds=3.0)
    study.report(decided.number, {"distortion": 9.0}, images=64, step=1, seconds=1.0)
    study.prune(decided.number)
    unbegun = study.suggest(10)  # its trial never began
    assert unbegun is not None

    again = start(store, search())
    assert again.left == 4  # of the six, one has finished and one was to end
    assert again.trials[decided.number].state == TrialState.PRUNED
    assert again.trials[decided.number].values == [9.0]
    assert again.suggest(10) == Suggestion(running.number, running.parameters, interrupted=True)
    assert again.suggest(10) == Suggestion(unbegun.number, unbegun.parameters, interrupted=True)
    # Its seconds and attempts add up.
    again.begin(running.number)
    again.report(running.number, {"distortion": 4.0}, images=128, step=2, seconds=1.5)
    attributes = again.trials[running.number].user_attrs
    assert (attributes["attempts"], attributes["seconds"]) == (2, 4.5)
    assert again.trials[running.number].intermediate_values == {64: 5.0, 128: 4.0}
    assert next_of(again).number == 4
    assert again.left == 1


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_what_is_drawn_does_not_depend_on_restarts(sampler: str) -> None:
    drawn = []
    for restarts in (False, True):
        store = open_store(f"memory://drawn-{sampler}-{restarts}/sweep")
        what = search(sampler=sampler, trials=14)
        study = start(store, what)
        for number in range(14):
            if restarts and number % 5 == 4:
                study.close()
                study = start(store, what)
            finish(study, next_of(study))
        drawn.append([trial.params for trial in study.trials])
    assert drawn[0] == drawn[1]
    assert len({json.dumps(parameters) for parameters in drawn[0]}) == 14


def test_another_start_tries_again_in_place_of_what_failed() -> None:
    store = open_store("memory://failed/sweep")
    space = {"energy.width": ["choice", [0, 10, 20, 50]]}
    grid = search(space=space, sampler="grid", trials=4)
    study = start(store, grid)
    for _ in range(4):
        suggestion = next_of(study)
        if suggestion.parameters["energy.width"] in (10, 50):
            study.end(suggestion.number, "failed", {}, error="no credentials")
        else:
            study.end(suggestion.number, "finished", {"distortion": 1.0})
    assert study.left == 0
    study.close()
    again = start(store, grid)
    assert again.left == 2
    assert [next_of(again).parameters["energy.width"] for _ in range(2)] == [10, 50]
    assert again.left == 0


def test_several_objectives_have_a_front_and_keep_the_first_ones_course() -> None:
    goals = [{"metric": "frechet", "direction": "minimize"}, {"metric": "elbo", "direction": "maximize"}]
    study = start(open_store("memory://front/sweep"), search(objective=goals, trials=3))
    for values in (
        {"frechet": 3.0, "elbo": 1.0},
        {"frechet": 2.0, "elbo": 0.0},
        {"frechet": 4.0, "elbo": 0.5},
    ):
        suggestion = next_of(study)
        study.report(suggestion.number, values, images=64, step=1, seconds=1)
        study.end(suggestion.number, "finished", values)
    assert [trial.number for trial in study.best] == [1, 0]
    assert [trial.intermediate_values for trial in study.trials] == [{64: 3.0}, {64: 2.0}, {64: 4.0}]


def test_another_search_or_base_under_the_name_is_refused_by_naming_it() -> None:
    store = open_store("memory://same/sweep")
    start(store, search(), Config()).close()

    def differs(what: Search, base: Config | None = None, data: str = "d") -> str:
        with pytest.raises(ConfigError, match=r"^run\.name: the sweep sweep was begun otherwise") as refused:
            check_same(store, "sweep", what, base or Config(), data)
        return str(refused.value)

    assert 'langevin.step_size was ["loguniform", 0.05, 1.0], is null' in differs(
        search(space={"energy.width": SPACE["energy.width"]})
    )
    assert "objective was" in differs(search(objective=GOAL | {"direction": "maximize"}))
    assert 'sampler was "tpe", is "random"' in differs(search(sampler="random"))
    longer = replace(Config(), train=replace(Config().train, epochs=2.0))
    assert "train.epochs was 1.0, is 2.0" in differs(search(), longer)
    assert "data.train or data.validation has other content" in differs(search(), data="e")
    # More trials, other machines and places are no other sweep.
    elsewhere = replace(
        Config(),
        cluster=replace(Config().cluster, workers=4),
        data=replace(Config().data, train="s3://bucket/data"),
    )
    assert check_same(store, "sweep", search(trials=9, max_concurrent=2), elsewhere, "d") is not None
    assert check_same(open_store("memory://same/other"), "other", search(), Config(), "d") is None


def test_an_outage_delays_the_next_trial_and_loses_nothing(tmp_path: Path) -> None:
    """The folder is gone, and a file stands in its place: every write fails until it is back."""
    place, away = tmp_path / "sweep", tmp_path / "away"
    store = open_store(str(place))
    study = start(store, search())
    first = next_of(study)
    assert study.suggest(10) is not None
    place.rename(away)
    place.touch()
    finish(study, first)
    assert study.suggest(0.2) is None
    assert study.left == 4
    place.unlink()
    away.rename(place)
    third = study.suggest(20)
    assert third is not None
    assert third.number == 2
    study.close()
    assert [trial.state for trial in start(store, search()).trials[:2]] == [
        TrialState.COMPLETE,
        TrialState.RUNNING,
    ]
