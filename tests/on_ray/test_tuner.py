"""Between Tune and the study, without a cluster: Tune's calls in the order in which its loop makes them."""

import json
import runpy
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from jebm.errors import ConfigError
from jebm.on_ray.searcher import StudyPruner, StudySearcher
from jebm.on_ray.trial import METRICS
from jebm.on_ray.tuner import SweepPlan, plan_sweep
from jebm.parser import config_from_dict, load_config
from jebm.store.storage import open_store
from jebm.sweep.space import Halving, search_from_dict
from jebm.sweep.study import SweepStudy
from jebm.train.plan import make_plan

ROOT = Path(__file__).parents[2]
IMAGES, BATCH = 1280, 128
RUN = {"name": "sweep", "storage": "memory://base"}
BASE = config_from_dict({"run": RUN, "train": {"batch_size": BATCH}})
GOAL = {"metric": "distortion", "direction": "minimize"}
SEARCH = search_from_dict({"space": {"energy.width": ["int", 1, 100]}, "objective": GOAL, "trials": 5}, BASE)
PLAN = SweepPlan(BASE, SEARCH, "d", IMAGES, IMAGES, begun=False)


class Driver:
    """One start of a sweep."""

    def __init__(self, place: str, plan: SweepPlan = PLAN) -> None:
        self.study = SweepStudy(
            open_store(place), "sweep", plan.search, BASE, data_sha256="d", provenance={"jebm": "1"}
        )
        self.stopping = threading.Event()
        self.searcher = StudySearcher(plan, self.study, self.stopping, self.stopping.set)

    def next(self, trial_id: str) -> Any:
        sample = self.searcher.suggest(trial_id)
        if isinstance(sample, dict):
            self.report(trial_id, 0, status="begun")
        return sample

    def report(
        self, trial_id: str, step: int, status: str = "running", error: str = "", **metrics: float
    ) -> None:
        self.searcher.on_trial_result(trial_id, result(step, status, **metrics) | {"error": error})

    def end(self, trial_id: str, step: int, status: str, error: str = "", **metrics: float) -> None:
        self.searcher.on_trial_complete(trial_id, result(step, status, **metrics) | {"error": error})

    def states(self) -> list[tuple[TrialState, Any]]:
        return [(trial.state, trial.user_attrs.get("status")) for trial in self.study.trials]


def result(step: int, status: str, **metrics: float) -> dict[str, Any]:
    values = {METRICS + name: value for name, value in metrics.items()}
    return {"status": status, "step": step, "images": step * BATCH, "seconds": step / 10, **values}


def test_every_end_of_a_trial_is_told_as_what_it_was() -> None:
    driver = Driver("memory://ends/sweep")
    samples = [driver.next(name) for name in "abcde"]
    assert [sample["number"] for sample in samples] == [0, 1, 2, 3, 4]
    config = config_from_dict(json.loads(samples[1]["config"]))
    assert (config.run.storage, config.run.name) == ("memory://base/sweep/trials", "t0001")
    assert config.energy.width == driver.study.trials[1].params["energy.width"]
    assert driver.next("f") == Searcher.FINISHED

    driver.report("a", 5, distortion=2.0)
    driver.end("a", 10, "finished", distortion=1.5)
    driver.report("b", 5, distortion=3.0)
    driver.study.prune(1)
    driver.end("b", 6, "stopped", distortion=2.9)
    driver.end("c", 2, "diverged", error="not finite at step 2")
    driver.report("d", 5, distortion=2.5)
    driver.report("d", 5, status="error", error="OSError: disk full")
    driver.searcher.on_trial_complete("d", error=True)
    driver.end("e", 3, "stopped", distortion=4.0)
    assert driver.states() == [
        (TrialState.COMPLETE, "finished"),
        (TrialState.PRUNED, "pruned"),
        (TrialState.PRUNED, "diverged"),
        (TrialState.FAIL, "failed"),
        (TrialState.RUNNING, None),
    ]
    finished, halted, diverged, failed, stopped = driver.study.trials
    assert finished.value == 1.5
    assert finished.intermediate_values == {5 * BATCH: 2.0, 10 * BATCH: 1.5}
    assert halted.intermediate_values == {5 * BATCH: 3.0, 6 * BATCH: 2.9}
    assert diverged.user_attrs["error"] == "not finite at step 2"
    assert failed.user_attrs["error"] == "OSError: disk full"
    assert (stopped.user_attrs["images"], stopped.user_attrs["seconds"]) == (3 * BATCH, 0.3)


def test_a_killed_trial_fails_with_a_word_about_it() -> None:
    driver = Driver("memory://killed-trial/sweep")
    driver.next("a")
    driver.searcher.on_trial_complete("a", error=True)
    assert "its process died" in driver.study.trials[0].user_attrs["error"]


def test_when_asked_to_stop_no_trial_begins() -> None:
    driver = Driver("memory://stopping/sweep")
    driver.next("a")
    driver.stopping.set()
    assert driver.next("b") == Searcher.FINISHED
    assert len(driver.study.trials) == 1


def test_an_objective_that_is_no_metric_ends_the_sweep() -> None:
    for typo, metrics in (("distorsion", {}), ("evaluation/elbow", {"evaluation/elbo": 1.0})):
        goals = (replace(SEARCH.objectives[0], metric=typo),)
        plan = replace(PLAN, search=replace(SEARCH, objectives=goals))
        driver = Driver(f"memory://unknown-{typo.partition('/')[0]}/sweep", plan)
        driver.next("a")
        driver.report("a", 5, distortion=2.0, **metrics)
        assert driver.stopping.is_set()
        names = ", ".join(["distortion", *metrics])
        assert f"objective: there is no metric {typo}; there are {names};" in str(driver.searcher.failure)


def test_where_the_first_trials_all_fail_the_rest_is_spared() -> None:
    driver = Driver("memory://failures/sweep")
    for name in "abc":
        driver.next(name)
        assert driver.searcher.failure is None
        driver.end(name, 0, "failed", error="s3://bucket: no credentials")
    line = "the first 3 trials have failed, the last one by s3://bucket: no credentials;"
    assert line in str(driver.searcher.failure)
    assert driver.next("d") == Searcher.FINISHED
    driver.study.close()
    assert Driver("memory://failures/sweep").study.left == 5


@pytest.mark.parametrize("start", [1.0, 1.9, 2.1, 9.0])
def test_pruning_after_a_restart_is_as_without_one(start: float) -> None:
    """Trials 0 and 1 have finished and 2 is half way when the driver dies: what becomes of 2 and of 3?

    The answer is that of Ray's own ASHA that has seen everything. Each course is start/step: at every rung
    the trials stand as they did at the first.
    """
    straight = ASHAScheduler(
        time_attr="images",
        metric=f"{METRICS}distortion",
        mode="min",
        max_t=IMAGES,
        grace_period=2 * BATCH,
        reduction_factor=2,
        stop_last_trials=False,
    )
    driver = Driver(f"memory://asha-{start}/sweep")
    trials = [SimpleNamespace(trial_id=f"old{i}", config={"number": i, "images": IMAGES}) for i in range(4)]
    for trial in trials:
        straight.on_trial_add(None, trial)
    starts, before = [2.0, 3.0, 1.5, start], [10, 10, 5, 0]
    for trial, begin, steps in zip(trials[:3], starts, before, strict=False):
        driver.next(trial.trial_id)
        for step in range(1, steps + 1):
            straight.on_trial_result(None, trial, result(step, "running", distortion=begin / step))
            driver.report(trial.trial_id, step, distortion=begin / step)
        if steps == 10:
            driver.end(trial.trial_id, 10, "finished", distortion=begin / 10)
    driver.study.close()

    again, pruned = Driver(f"memory://asha-{start}/sweep"), list[int]()
    halving, goal = Halving(grace_images=2 * BATCH, reduction=2), SEARCH.objectives[0]
    pruner = StudyPruner(halving, goal, again.study, images=IMAGES, prune=pruned.append)
    # Tune knows the trials by new ids, and hears the reports since the last checkpoint for a second time.
    for number, first in ((2, 4), (3, 1)):
        trial = SimpleNamespace(trial_id=f"new{number}", config=again.next(f"new{number}"))
        assert trial.config["number"] == number
        pruner.on_trial_add(None, trial)
        expected = False
        for step in range(first, 11):
            report = result(step, "running", distortion=starts[number] / step)
            if step > before[number]:
                decision = straight.on_trial_result(None, trials[number], report)
                expected |= decision == "STOP" and step < 10
            assert pruner.on_trial_result(None, trial, report) == "CONTINUE"
            again.report(trial.trial_id, step, distortion=starts[number] / step)
        assert (number in pruned) == again.study.is_pruned(number) == expected
    assert pruned == [3] * (start > 2.0)  # worse than the median of 1.5, 2.0 and 3.0


def test_a_trial_is_judged_among_its_like_and_never_at_its_end() -> None:
    """Measured at few steps, as with a rare evaluation."""
    driver, pruned = Driver("memory://rare/sweep"), list[int]()
    halving, goal = Halving(grace_images=2 * BATCH, reduction=2), SEARCH.objectives[0]
    pruner = StudyPruner(halving, goal, driver.study, images=IMAGES, prune=pruned.append)

    def measure(number: int, courses: dict[int, float]) -> None:
        trial = SimpleNamespace(trial_id=f"t{number}", config=driver.next(f"t{number}"))
        pruner.on_trial_add(None, trial)
        for step, value in courses.items():
            pruner.on_trial_result(None, trial, result(step, "running", distortion=value))

    # Past the first rung when it was first measured: nothing to judge others by there.
    measure(0, {5: 1.0, 6: 0.9, 9: 0.8})
    measure(1, {2: 2.0})
    assert pruned == []
    measure(2, {2: 3.0})
    assert pruned == [2]
    measure(3, {10: 9.0})  # the worst of all at the last rung, but it has come to its end
    assert pruned == [2]


def test_what_cannot_be_swept_is_refused(tmp_path: Path) -> None:
    base: dict[str, object] = {
        "run.storage": str(tmp_path),
        "data.train": str(ROOT / "jobs/data/fashion_mnist_2000/train"),
        "data.held_out": str(ROOT / "jobs/data/fashion_mnist_2000/test"),
    }

    def refusal(values: dict[str, object], **search: object) -> str:
        config = load_config(ROOT / "jobs/configs/smoke.yaml", base | values)
        given = {"space": {"langevin.steps": ["int", 1, 9]}, "trials": 2, "objective": GOAL} | search
        found, plan = search_from_dict(given, config), make_plan(config)
        with pytest.raises(ConfigError) as refused:
            plan_sweep(found, plan)
        return str(refused.value)

    assert refusal({"cluster.engine": "process"}) == "cluster.engine: a sweep needs ray, not process"
    assert refusal({"cluster.autoscales": True}).startswith("max_concurrent: is missing")
    assert refusal({}, scheduler={"asha": {"grace_images": 4800}}) == (
        "scheduler.asha: trials would be judged after 4,800 images, and end after 4,800; "
        "lower grace_images or evaluation.every_steps, or set scheduler to none"
    )
    late = {"metric": "evaluation/elbo", "direction": "maximize"}
    assert "judged after 6,000 images" in refusal(
        {"evaluation.every_steps": 60}, objective=late, scheduler={"asha": {"grace_images": 100}}
    )


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run jobs/tune.py in this process; return its exit code, what it printed, and its one line of error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tune.py", *arguments])
        monkeypatch.setenv("JEBM_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "jobs/tune.py"), run_name="__main__")
        printed = capsys.readouterr()
        assert printed.err.count("\n") <= 1, printed.err
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def test_the_job_says_what_it_would_do_and_what_is_wrong(job: Any, tmp_path: Path) -> None:
    search = tmp_path / "search.yaml"
    search.write_text(
        "space: {energy.width: [choice, [0, 50]]}\n"
        "objective: {metric: distortion, direction: minimize}\n"
        "trials: 8\n"
        "scheduler: {asha: {grace_images: 1000}}\n"
    )
    place = tmp_path / "runs"
    given = ["--config=jobs/configs/smoke.yaml", f"--run.storage={place}", f"--search={search}"]
    code, shown, _ = job(*given, "--trials=9", "--dry-run")
    assert code == 0
    for line in (
        f"sweep    smoke in {place} (new)",
        "space    energy.width choice [0, 50]",
        "goal     minimize distortion",
        "trials   9 by tpe, seed 0; asha from 1,000 images on, the best 1/3 go on",
        "each     4,800 images of",
        ", 2 workers x 1 CPU",
    ):
        assert line in shown
    assert not list(place.rglob("*.json"))

    large = ["--cluster.workers=800", "--train.batch_size=1600", "--train.epochs=9", "--dry-run"]
    code, _, line = job(*given, *large)
    assert code == 2
    assert line.startswith("error: cluster.workers: 800 workers of 1 CPU do not fit: this machine has ")

    assert job(*given[:2]) == (
        2,
        "",
        "error: --search: is missing (YAML file: the space, the objective, the trials)\n",
    )
    search.write_text(search.read_text().replace("width", "widht"))
    assert job(*given) == (
        2,
        "",
        f"error: {search}: space: energy.widht = 0: unknown key energy.widht; did you mean energy.width?\n",
    )
    code, _, line = job("report", str(tmp_path / "nowhere"))
    assert code == 2
    assert "no sweep here" in line
