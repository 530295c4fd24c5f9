"""`fit` from the outside: what it writes, how it resumes, how it stops, what it refuses."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import ROOT, stop_in, tiny_config

from jebm.config import Config
from jebm.data.dataset import load_images
from jebm.data.shards import write_dataset
from jebm.data.source import source_from_arrays
from jebm.errors import CheckpointError, ConfigError, DataError, DivergedError
from jebm.store.checkpoint import Checkpoints
from jebm.store.retrieve import open_checkpoint, open_run
from jebm.store.storage import open_store
from jebm.train.loop import Result, fit
from jebm.train.plan import make_plan
from jebm.train.recorder import Report
from jebm.train.runtime import process_runtime
from jebm.train.state import TrainState


def train(config: Config, **keywords: object) -> Result:
    with process_runtime(config) as runtime:
        return fit(config, runtime, provenance={"git_revision": "test"}, **keywords)  # type: ignore[arg-type]


def saved(config: Config) -> dict[str, torch.Tensor]:
    """Return the tensors of the run's newest checkpoint."""
    checkpoints = Checkpoints(open_store(config.run.storage), config.run.name)
    manifest = checkpoints.latest()
    assert manifest is not None
    with process_runtime(config) as runtime:
        tensors = TrainState.build(config, runtime).tensors()
    checkpoints.load(manifest, tensors)
    return tensors


def test_a_run_leaves_all_that_a_user_looks_for(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, checkpoint__every_steps=10)
    reports: list[int] = []
    result = train(config, on_report=lambda report: reports.append(report.step) or False)
    assert (result.status, result.step, reports) == ("finished", 20, [5, 10, 15, 20, 20])
    folder = tmp_path / "smoke"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert rows[-1]["distortion"] < rows[0]["distortion"]
    assert {"rate/1", "rate/2", "rate/3", "f_posterior", "f_prior", "chain/gradient_norm"} <= rows[0].keys()
    assert 0 <= rows[0]["time/chain_share"] <= 1
    assert 0 <= rows[0]["time/data_share"] <= 1
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["energy"]["width"] == 16
    assert record["attempts"][0]["tf32"] == {"convolutions": False, "linear": False}
    assert record["attempts"][0]["data_sha256"].startswith("af98b5219de3")
    assert record["attempts"][0]["provenance"] == {"git_revision": "test"}
    assert (folder / "pictures" / "step-00000020.png").read_bytes()[:4] == b"\x89PNG"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard" / "smoke"))
    board.Reload()
    tags = board.Tags()
    cards = sorted(tags["scalars"])
    assert cards[0] == "1 model/distortion"
    assert {"1 model/rate/1", "1 model/f_prior", "5 time/images_per_second"} <= set(cards)
    assert len(tags["images"]) == 5  # reconstructions, samples, and three layers varied
    assert [event.step for event in board.Scalars("1 model/distortion")] == [5, 10, 15, 20]


def test_after_each_end_the_newest_stay_and_what_was_resumed_from(tmp_path: Path) -> None:
    def kept(epochs: float, stop_at: int = 1000) -> tuple[str, list[int]]:
        config = tiny_config(
            tmp_path, train__epochs=epochs, checkpoint__every_steps=3, checkpoint__keep_last=3
        )
        steps: list[int] = []

        def stop() -> bool:
            return bool(steps) and steps[-1] >= stop_at

        result = train(config, on_report=lambda report: steps.append(report.step) or False, should_stop=stop)
        return result.status, [found.step for found in Checkpoints(open_store(str(tmp_path)), "smoke").list()]

    assert kept(0.8) == ("finished", [20, 18, 15])
    assert kept(0.8) == ("already finished", [20, 18, 15])
    assert kept(1.6, stop_at=35) == ("stopped", [36, 33, 30, 20])
    assert kept(2.4, stop_at=40) == ("stopped", [41, 39, 36])
    assert kept(2.4) == ("finished", [60, 57, 54, 41])


def test_what_is_measured_joins_the_metrics_of_its_step_alone(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train__epochs=0.64, evaluation__every_steps=7)
    reports: list[tuple[int, float | None]] = []

    def note(report: Report) -> bool:
        reports.append((report.step, report.metrics.get("evaluation/step")))
        return False

    result = train(config, on_report=note, measure=lambda model, step, runtime: {"step": float(step)})
    assert reports == [(5, None), (7, 7), (10, None), (14, 14), (15, None), (16, 16), (16, 16)]
    rows = [json.loads(line) for line in (tmp_path / "smoke" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "evaluation/step" in row] == [7, 14, 16]
    assert result.metrics["evaluation/step"] == 16
    manifest = Checkpoints(open_store(config.run.storage), "smoke").latest()
    assert manifest is not None
    assert manifest.metrics["evaluation/step"] == 16
    unmeasured = tiny_config(tmp_path / "unmeasured", train__epochs=0.64)
    train(unmeasured)
    expected, found = saved(unmeasured), saved(config)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_stopped_and_resumed_in_mid_epoch_equals_uninterrupted(tmp_path: Path) -> None:
    straight = tiny_config(tmp_path / "straight", train__epochs=1.6, train__ema_decay=0.9)
    train(straight)
    parts = tiny_config(tmp_path / "parts", train__epochs=1.6, train__ema_decay=0.9)
    first = train(parts, should_stop=stop_in(16))
    assert (first.status, first.step) == ("stopped", 17)
    second = train(parts)
    assert (second.status, second.step, second.total_steps) == ("finished", 40, 40)
    expected, found = saved(straight), saved(parts)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert train(parts).status == "already finished"


def test_a_set_in_windows_trains_and_resumes_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JEBM_CACHE", str(tmp_path / "cache"))
    shipped = load_images(open_store(tiny_config(tmp_path).data.train)).images_NHWC
    source = source_from_arrays(shipped, name="in eight parts")
    write_dataset(source, open_store(str(tmp_path / "set")), images_per_part=200)

    def config(name: str, parts: int = 3 * 2) -> Config:
        room = {"data__train": str(tmp_path / "set"), "data__cache_gb": parts * 200 * 784 / 1e9}
        return tiny_config(tmp_path / name, train__epochs=1.2, **room)

    with pytest.raises(ConfigError, match=r"data\.cache_gb: .* set it to ≥ 0\.001"):
        make_plan(config("straight", parts=2))
    make_plan(config("straight"))
    train(config("straight"))
    assert train(config("parts"), should_stop=stop_in(16)).status == "stopped"
    assert train(config("parts")).step == 30
    expected, found = saved(config("straight")), saved(config("parts"))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_lines_after_the_checkpoint_are_dropped_at_resume(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train__epochs=0.4)
    train(config)
    log = tmp_path / "smoke" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 15, "loss": 1}\n{"step": 20, "lo')  # what a crash leaves
    train(tiny_config(tmp_path, train__epochs=0.8))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert rows[2]["loss"] != 1


def test_a_damaged_newest_checkpoint_costs_only_its_own_steps(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train__epochs=0.8, checkpoint__every_steps=10)
    train(config)
    expected = saved(config)
    (data,) = (tmp_path / "smoke" / "checkpoints" / "step-00000020-a0001" / "data").iterdir()
    before = data.stat()
    content = bytearray(data.read_bytes())
    content[-100] ^= 4
    data.write_bytes(content)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nobody had touched it
    result = train(tiny_config(tmp_path, train__epochs=0.88, checkpoint__every_steps=10))
    assert (result.status, result.step) == ("finished", 22)
    record = json.loads((tmp_path / "smoke" / "run.json").read_text())
    assert record["attempts"][1]["resumed_from"] == "step-00000010-a0001"
    straight = tiny_config(tmp_path / "straight", train__epochs=0.88)
    train(straight)
    assert expected.keys() == saved(straight).keys()


def test_a_damaged_only_checkpoint_is_an_error_and_no_new_start(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, train__epochs=0.4))
    (data,) = (tmp_path / "smoke" / "checkpoints" / "step-00000010-a0001" / "data").iterdir()
    before = data.stat()
    content = bytearray(data.read_bytes())
    content[-100] ^= 4
    data.write_bytes(content)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match="CRC32"):
        train(tiny_config(tmp_path, train__epochs=0.8))


def test_a_new_run_begins_from_another_ones_checkpoint(tmp_path: Path) -> None:
    first = tiny_config(tmp_path, checkpoint__every_steps=10)
    train(first)
    uri = f"{tmp_path}/smoke/checkpoints/step-00000020-a0001"
    second = tiny_config(tmp_path, run__name="second", run__init_from=uri, train__epochs=0.04)
    with process_runtime(second) as runtime:
        fresh = TrainState.build(second, runtime)
        open_run(f"{tmp_path}/smoke").checkpoints.load(open_checkpoint(uri)[1], fresh.tensors())
    assert fresh.step == 0
    assert float(fresh.tensors()["optimizer.generator.inference.trunk.0.0.weight.step"]) == 20
    result = train(second)
    assert result.step == 1
    assert (
        result.metrics["distortion"]
        < 0.9 * json.loads((tmp_path / "smoke" / "metrics.jsonl").read_text().splitlines()[0])["distortion"]
    )
    with pytest.raises(CheckpointError, match=r"^run.init_from: .*: no whole checkpoint"):
        train(tiny_config(tmp_path, run__name="third", run__init_from=f"{tmp_path}/smoke/checkpoints/best"))


def test_another_model_under_the_same_name_is_refused(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, train__epochs=0.2))
    with pytest.raises(ConfigError, match=r"another langevin\.step_size; choose a new run\.name"):
        train(tiny_config(tmp_path, langevin__step_size=0.2))
    accepted = tiny_config(tmp_path, langevin__step_size=0.2, run__accept_changes="true")
    assert train(accepted).step == 20


def test_divergence_is_named_before_any_parameter_moves(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, energy__spectral_norm="false", energy__output_scale=1e30)
    config_before = tiny_config(tmp_path, train__epochs=0.2)
    with pytest.raises(DivergedError, match="not finite at step 0"):
        train(config)
    assert Checkpoints(open_store(str(tmp_path)), "smoke").latest() is None
    assert train(config_before).step == 5


def test_pieces_of_a_batch_add_up_to_the_batch(tmp_path: Path) -> None:
    whole = train(tiny_config(tmp_path / "whole", train__epochs=0.04, train__report_every_steps=1))
    pieces = train(
        tiny_config(tmp_path / "pieces", train__epochs=0.04, train__report_every_steps=1, train__accumulate=4)
    )
    for name in ("loss", "distortion", "rate/3", "f_posterior", "gradient_norm/generator"):
        assert pieces.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-4), name


def test_width_zero_is_the_same_code_with_a_gaussian_prior(tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path, energy__width=0))
    assert result.status == "finished"
    assert result.metrics["f_posterior"] == result.metrics["f_prior"] == 0
    assert "chain/gradient_norm" not in result.metrics
    elbo = result.metrics["distortion"] + sum(result.metrics[f"rate/{i}"] for i in (1, 2, 3))
    assert result.metrics["loss"] == pytest.approx(elbo, rel=1e-6)


def test_bf16_trains_close_to_fp32(tmp_path: Path) -> None:
    full = train(tiny_config(tmp_path / "full"))
    half = train(tiny_config(tmp_path / "half", train__precision="bf16"))
    assert half.metrics["distortion"] == pytest.approx(full.metrics["distortion"], rel=0.05)
    assert half.metrics["distortion"] != full.metrics["distortion"]


def test_the_plan_counts_and_refuses(tmp_path: Path) -> None:
    plan = make_plan(tiny_config(tmp_path))
    assert (plan.steps_per_epoch, plan.total_steps, plan.resumes_at) == (25, 20, None)
    assert set(plan.parameters) == {"inference", "generator", "energy"}
    assert "64 = 1 x 64" in plan.describe()
    forged = make_plan(tiny_config(tmp_path / "a\nsteps    1"))
    assert f"{tmp_path}/a\\nsteps    1" in forged.describe().splitlines()[0]
    with pytest.raises(DataError, match="nowhere"):
        make_plan(tiny_config(tmp_path, data__train=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"data\.train: images are 28x28x1"):
        make_plan(tiny_config(tmp_path, model__image_size=32))
    with pytest.raises(ConfigError, match=r"train\.batch_size: 2000 is more than the 1600 images"):
        make_plan(tiny_config(tmp_path, train__batch_size=2000))


@pytest.mark.parametrize("name", ["smoke", "fashion_mnist", "svhn_hierarchical", "svhn_fid"])
def test_the_shipped_configs_are_valid(name: str) -> None:
    from jebm.parser import load_config

    assert load_config(ROOT / f"jobs/configs/{name}.yaml").run.name == name
