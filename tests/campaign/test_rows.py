"""What a campaign trains, measures, keeps and does not do twice: with a quick trainer and a known measure."""

import json
import math
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch

from jebm.campaign.rows import Row, Rows
from jebm.campaign.runs import rows_of
from jebm.campaign.trials import Trial, describe, trials_of
from jebm.config import Config, config_to_dict
from jebm.errors import ConfigError, DivergedError
from jebm.parser import override
from jebm.store.checkpoint import Checkpoints, Facts
from jebm.store.storage import Store, open_store
from jebm.train.loop import Result
from jebm.untrusted import JsonObject

FASHION = str(Path(__file__).resolve().parents[2] / "jobs/data/fashion_mnist_2000/train")
STEPS = 16


@dataclass
class Ruler:
    """Measures the step of a run's newest checkpoint; `made_with` is what rows depend on."""

    made_with: int = 1
    measured: list[str] = field(default_factory=list)

    def identity(self, trial: Trial) -> JsonObject:
        return {"made with": self.made_with}

    def measure(self, trial: Trial) -> Row:
        self.measured.append(trial.name)
        manifest = trial.latest()
        return {"step": manifest.step if manifest else 0, "lost": math.nan, "of seeds": {"seed": trial.seed}}


@dataclass
class Trainer:
    """Leaves a checkpoint at the last step, without training; some arms diverge, one trial is stopped."""

    diverging: tuple[str, ...] = ()
    stopped: str = ""
    trained: list[str] = field(default_factory=list)

    def __call__(self, trial: Trial, asked: threading.Event) -> Result:
        self.trained.append(trial.name)
        if trial.arm in self.diverging:
            raise DivergedError("not finite")
        step = STEPS // 2 if trial.name == self.stopped else trial.total_steps
        facts = Facts(
            step=step,
            attempt=1,
            world_size=1,
            config=config_to_dict(trial.config),
            provenance={},
            metrics={},
            state={},
            parent=None,
        )
        Checkpoints(open_store(trial.config.run.storage), trial.name).save({"a": torch.zeros(1)}, facts)
        status = "finished" if step == trial.total_steps else "stopped"
        return Result(status, step, trial.total_steps, {}, trial.uri)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    changes = {"run.name": "duel", "run.storage": str(tmp_path / "runs"), "data.train": FASHION}
    return override(Config(), changes | {"train.batch_size": 100, "train.epochs": 1.0})


@pytest.fixture
def output(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "output"))


def test_each_trial_is_trained_and_measured_once(config: Config, output: Store) -> None:
    trials = trials_of(config, ["joint", "gaussian"], [3, 4])
    assert [trial.name for trial in trials] == [
        *("duel-gaussian-3", "duel-joint-3", "duel-gaussian-4", "duel-joint-4")
    ]
    assert {trial.total_steps for trial in trials} == {STEPS}
    ruler, trainer = Ruler(), Trainer()
    found = rows_of(trials, Rows(output, ruler), train=trainer)
    assert found is not None
    assert list(found) == ruler.measured == trainer.trained == [trial.name for trial in trials]
    assert found["duel-joint-4"]["of seeds"] == {"seed": 4}
    again, idle = Ruler(), Trainer()
    rows = rows_of(trials, Rows(output, again), train=idle)
    assert again.measured == idle.trained == []
    assert rows is not None
    assert {name: (row["step"], row["of seeds"]) for name, row in rows.items()} == {
        name: (row["step"], row["of seeds"]) for name, row in found.items()
    }
    assert math.isnan(rows["duel-joint-4"]["lost"])  # null in JSON
    assert describe(trials).count("finished") == 4


def test_what_a_row_depends_on_decides_whether_it_is_kept(config: Config, output: Store) -> None:
    trials = trials_of(config, ["gaussian", "joint"], [0])
    rows_of(trials, Rows(output, Ruler()), train=Trainer())
    other, idle = Ruler(made_with=2), Trainer()
    rows_of(trials, Rows(output, other), train=idle)
    assert (other.measured, idle.trained) == ([trial.name for trial in trials], [])


def test_a_stopped_training_resumes(config: Config, output: Store) -> None:
    trials = trials_of(config, ["gaussian", "joint"], [0, 1])
    trainer = Trainer(stopped="duel-joint-0")
    assert rows_of(trials, Rows(output, Ruler()), train=trainer) is None
    assert trainer.trained == ["duel-gaussian-0", "duel-joint-0"]
    assert "duel-joint-0     16 steps, resumes at step 8" in describe(trials)
    rest = Trainer()
    assert rows_of(trials, Rows(output, Ruler()), train=rest) is not None
    assert rest.trained == ["duel-joint-0", "duel-gaussian-1", "duel-joint-1"]


def test_a_signal_ends_it_before_the_next_training(config: Config, output: Store) -> None:
    trials = trials_of(config, ["gaussian", "joint"], [0])
    trainer, handler = Trainer(), signal.getsignal(signal.SIGTERM)  # Ray may have left its own

    def interrupted(trial: Trial, asked: threading.Event) -> Result:
        signal.raise_signal(signal.SIGTERM)
        assert asked.is_set()
        return trainer(trial, asked)

    assert rows_of(trials, Rows(output, Ruler()), train=interrupted) is None
    assert trainer.trained == ["duel-gaussian-0"]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_run_that_diverged_is_a_result(config: Config, output: Store) -> None:
    trials = trials_of(config, ["gaussian", "joint", "two_stage"], [0])
    trainer = Trainer(diverging=("gaussian",))
    found = rows_of(trials, Rows(output, Ruler()), train=trainer)
    assert found is not None
    assert [name for name, row in found.items() if not row] == ["duel-gaussian-0", "duel-two_stage-0"]
    assert trainer.trained == ["duel-gaussian-0", "duel-joint-0"]  # two_stage has nothing to begin with
    idle = Trainer()
    assert rows_of(trials, Rows(output, Ruler()), train=idle) is not None
    assert idle.trained == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"identity": {}, "row": {"step": "x"}}', b'{"identity": {}, "row": [1]}']
)
def test_a_damaged_row_is_set_aside_and_measured_again(
    config: Config, output: Store, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = trials_of(config, ["gaussian", "joint"], [0])
    rows_of(trials, Rows(output, Ruler()), train=Trainer())
    output.put("rows/duel-joint-0.json", content)
    ruler, idle = Ruler(), Trainer()
    assert rows_of(trials, Rows(output, ruler), train=idle) is not None
    assert (ruler.measured, idle.trained) == (["duel-joint-0"], [])
    assert output.get("rows/duel-joint-0.json.damaged-1") == content
    assert "is damaged (" in capsys.readouterr().out
    assert json.loads(output.get("rows/duel-joint-0.json"))["row"]["step"] == STEPS


def test_a_run_of_another_config_is_refused(config: Config, output: Store) -> None:
    rows_of(trials_of(config, ["gaussian", "joint"], [0]), Rows(output, Ruler()), train=Trainer())
    other = trials_of(override(config, {"energy.depth": 3}), ["gaussian", "joint"], [0])
    with pytest.raises(ConfigError, match=r"duel-gaussian-0 has a checkpoint .* another energy\.depth"):
        rows_of(other, Rows(output, Ruler()), train=Trainer())


def test_an_arm_may_change_any_key(config: Config) -> None:
    arms = ["gaussian", "wide=energy.width:200,optimizer.energy.lr:3e-4,model.latent_dims:[2, 2, 6]"]
    with pytest.raises(ConfigError, match="is not KEY:VALUE"):
        trials_of(config, arms, [0])  # a comma ends a change, in a list too
    (_, wide) = trials_of(config, ["gaussian", "wide=energy.width:200,optimizer.energy.lr:3e-4"], [0])
    assert wide.name == "duel-wide-0"
    assert (wide.config.energy.width, wide.config.optimizer.energy.lr) == (200, 3e-4)
    assert wide.config.prior.kind == "joint"


def test_a_stop_reaches_runs_that_only_start(config: Config, output: Store) -> None:
    """They do not listen yet, and end as unfinished, not as failed."""

    def stop() -> None:
        deadline = time.monotonic() + 300
        while not set(psutil.Process().children()) - others and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    trials, others = trials_of(config, ["joint", "gaussian"], [3]), set(psutil.Process().children())
    stopper = threading.Thread(target=stop)
    stopper.start()
    assert rows_of(trials, Rows(output, Ruler()), parallel=2) is None
    stopper.join()
    assert not any(trial.finished() for trial in trials)
