"""Early stopping, from the config and from a callback: where a run ends, also an interrupted one."""

import inspect
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import stop_in, tiny_config

import jebm
from jebm.config import Config
from jebm.errors import ConfigError
from jebm.parser import config_from_dict
from jebm.store.checkpoint import Checkpoints
from jebm.store.storage import open_store
from jebm.train.early import Patience
from jebm.train.loop import Result, fit
from jebm.train.plan import make_plan
from jebm.train.recorder import Report
from jebm.train.runtime import process_runtime
from jebm.train.status import run_status

ELBO = {5: 1.0, 10: 2.0, 15: 1.5, 20: 2.04, 25: 1.0, 30: 9.0, 35: 9.0, 40: 9.0}
"""Step -> what an evaluation finds: the best of the first 25 steps is that of step 10, or by little of 20."""


def stopping(storage: Path, *, least: float) -> Config:
    return tiny_config(
        storage,
        train__epochs=1.6,
        evaluation__every_steps=5,
        train__early_stopping__metric="evaluation/elbo",
        train__early_stopping__patience=2,
        train__early_stopping__min_improvement=least,
    )


def train(config: Config, should_stop: Callable[[], bool] = lambda: False) -> Result:
    with process_runtime(config) as runtime:
        return fit(
            config,
            runtime,
            provenance={},
            should_stop=should_stop,
            measure=lambda model, step, runtime: {"elbo": ELBO.get(step, 0.0)},
        )


def ends_after(values: list[float], metric: str = "evaluation/elbo", **rule: object) -> int | None:
    """Return after how many evaluations a run ends; None if it never does."""
    section = {"metric": metric, "patience": 2, **rule}
    config = config_from_dict({"train": {"early_stopping": section}, "evaluation": {"every_steps": 10}})
    patience = Patience(config, 1000)
    for count, value in enumerate(values, start=1):
        patience.see(10 * count, {metric: value, "loss": 0.0})
        patience.see(10 * count + 5, {"loss": 0.0})  # a report without an evaluation
        if patience.over:
            return count
    return None


@pytest.mark.parametrize(
    ("values", "rule", "end"),
    [
        ([1, 2, 3, 4, 5], {}, None),
        ([1, 2, 2, 2], {}, 4),  # as good is no improvement
        ([3, 2, 4, 3, 3.9, 1], {}, 5),
        ([1, math.nan, math.nan], {}, 3),
        ([math.nan, math.nan], {}, 2),
        ([1, 1.5, 2.2, 2.9], {"min_improvement": 1.0}, None),
        ([1, 1.5, 1.9, 2.5], {"min_improvement": 1.0}, 3),
        ([1, 0], {"patience": 1}, 2),
        ([5, 4, 3, 3, 4], {"metric": "evaluation/frechet_long"}, 5),  # lower is better
        ([9, 1, 2, 3, 4], {"gaussian_share": 0.02}, None),
    ],
)
def test_a_run_ends_after_as_many_evaluations_without_improvement(
    values: list[float], rule: dict[str, object], end: int | None
) -> None:
    if "gaussian_share" in rule:  # the energy joins at step 20; what was before it does not count
        train = {"gaussian_share": 0.02, "early_stopping": {"metric": "evaluation/elbo", "patience": 2}}
        patience = Patience(config_from_dict({"train": train, "evaluation": {"every_steps": 10}}), 1000)
        for count, value in enumerate(values, start=1):
            patience.see(10 * count, {"evaluation/elbo": value})
        assert not patience.over
        return
    assert ends_after(values, **rule) == end  # type: ignore[arg-type]


def test_a_run_ends_at_the_evaluation_and_is_finished_there(tmp_path: Path) -> None:
    config = stopping(tmp_path, least=0.1)
    result = train(config)
    assert (result.status, result.step, result.total_steps) == ("stopped early", 20, 40)
    manifest = Checkpoints(open_store(str(tmp_path)), "smoke").latest()
    assert manifest is not None
    assert manifest.step == 20
    record = json.loads((tmp_path / "smoke/run.json").read_text())
    assert (record["attempts"][0]["total_steps"], record["attempts"][0]["planned_steps"]) == (20, 40)
    plan = make_plan(config)
    assert plan.finished
    assert plan.how_finished.startswith("early stopping at step 20; ")
    assert train(config).status == "already finished"
    patient = jebm.override(config, {"train.early_stopping.patience": 3})
    assert train(patient).step == 25
    assert run_status(open_store(str(tmp_path)), "smoke").step == 25


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    config = stopping(tmp_path, least=0.0)
    assert train(config, stop_in(21)).step == 22
    result = train(config)
    assert (result.status, result.step) == ("finished", 40)  # 20 is better than 10 here, and 30 than 20
    strict = stopping(tmp_path / "strict", least=0.1)
    assert train(strict, stop_in(16)).step == 17
    assert train(strict).step == 20


def test_no_checkpoint_is_newer_than_the_evaluations_that_stopping_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a store that is written now and then: a kill after any checkpoint loses no evaluation before it."""
    monkeypatch.setattr("jebm.train.outbox._REMOTE_EVERY_SECONDS", 400.0)
    monkeypatch.setattr("jebm.train.outbox._FLUSH_SECONDS", 60.0)
    config = jebm.override(
        stopping(Path("unused"), least=0.1),
        {"run.storage": "memory://early", "checkpoint.every_steps": 5, "run.track": []},
    )
    store = open_store(config.run.storage)
    seen: list[tuple[int, int]] = []

    def look(report: Report) -> bool:
        checkpoint = max((manifest.step for manifest in report.checkpoints), default=0)
        if store.head("smoke/metrics.jsonl") is not None:
            rows = store.get("smoke/metrics.jsonl").splitlines()
            seen.append((checkpoint, max((json.loads(row)["step"] for row in rows), default=0)))
        return False

    with process_runtime(config) as runtime:
        began = time.monotonic()
        measure = {"elbo": 0.0}
        fit(config, runtime, provenance={}, on_report=look, measure=lambda model, step, ranks: measure)
    assert len(seen) >= 3
    assert all(evaluated >= checkpoint for checkpoint, evaluated in seen), seen
    assert seen[-1][0] >= 5  # two may still be on their way
    assert seen[-1][1] == 15
    assert time.monotonic() - began < 300  # nobody waited until the store was due


def test_what_cannot_be_watched_is_refused() -> None:
    for values, message in (
        ({"metric": "loss"}, "must be a measure on held-out images"),
        ({"metric": "evaluation/elbo", "patience": 0}, "patience: must be at least 1"),
        ({"metric": "evaluation/elbo"}, "needs evaluations to watch"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_from_dict({"train": {"early_stopping": values}})
    with pytest.raises(ConfigError, match="is no measure that has a better"):
        ends_after([1.0], "evaluation/beauty")


def test_a_callback_stops_a_run_from_python_and_the_same_call_resumes_it(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    seen: list[int] = []

    def on_report(report: jebm.Report) -> bool:
        seen.append(report.step)
        return report.step >= 10

    result = jebm.fit(config, on_report=on_report)
    assert (result.status, result.step, seen) == ("stopped early", 10, [5, 10])
    assert jebm.fit(config).status == "finished"
    assert jebm.fit(config).status == "already finished"


def test_the_public_face_is_this_and_costs_no_import() -> None:
    assert jebm.__all__ == [
        *("Config", "JebmError", "Pretrained", "Report", "Result"),
        *("fit", "from_pretrained", "load_config", "override"),
    ]
    assert all(getattr(jebm, name) is not None for name in jebm.__all__)
    assert str(inspect.signature(jebm.fit).parameters.keys()) == "odict_keys(['config', 'on_report'])"
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = jebm.fitt
    code = "import sys, jebm; sys.exit(bool({'torch', 'ray', 'numpy', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
