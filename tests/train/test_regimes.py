"""The Gaussian beginning of a run, further updates of the energy, and the energy alone (two_stage)."""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny_config
from test_fit import saved, train

from jebm.data.dataset import load_images
from jebm.data.loader import to_float
from jebm.errors import ConfigError
from jebm.store.storage import open_store
from jebm.train.plan import make_plan
from jebm.train.runtime import process_runtime
from jebm.train.state import TrainState
from jebm.train.update import features_of


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], part: str) -> list[str]:
    names = [name for name in one if name.startswith(f"model.{part}.")]
    assert names
    return [name for name in names if not torch.equal(one[name], other[name])]


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_until_the_energy_joins_a_run_is_that_with_the_gaussian_prior(tmp_path: Path) -> None:
    gaussian = tiny_config(tmp_path / "gaussian", prior__kind="gaussian")
    joins = tiny_config(tmp_path / "joins", train__gaussian_share=0.5, train__energy_updates=3)
    train(gaussian)
    train(joins)
    ours, theirs = rows(tmp_path / "joins/smoke"), rows(tmp_path / "gaussian/smoke")
    assert [row["distortion"] for row in ours[:2]] == [row["distortion"] for row in theirs[:2]]
    assert [row["f_posterior"] for row in ours[:2]] == [0.0, 0.0]
    assert [row["f_posterior"] != 0 for row in ours[2:]] == [True, True]
    assert [row["gradient_norm/generator"] for row in ours[:2]] == [
        row["gradient_norm/generator"] for row in theirs[:2]
    ]
    never = tiny_config(tmp_path / "never", train__gaussian_share=0.99)  # 20 of 20 steps
    train(never)
    with process_runtime(never) as runtime:
        initial = TrainState.build(never, runtime).tensors()
    assert different(saved(gaussian), saved(never), "generator") == []
    assert different(saved(gaussian), saved(never), "inference") == []
    assert different(initial, saved(never), "energy") == []
    assert different(initial, saved(joins), "energy") != []


def test_each_further_update_of_the_energy_has_noise_of_its_own(tmp_path: Path) -> None:
    """With three a step the energy has gone elsewhere than with one, the others not before the next step."""
    one = tiny_config(tmp_path / "one", train__epochs=0.04)
    three = tiny_config(tmp_path / "three", train__epochs=0.04, train__energy_updates=3)
    train(one)
    train(three)
    assert different(saved(one), saved(three), "generator") == []
    assert different(saved(one), saved(three), "energy") != []
    counts = {
        n: float(t) for n, t in saved(three).items() if n.startswith("optimizer.") and n.endswith(".step")
    }
    assert {count for name, count in counts.items() if name.startswith("optimizer.energy.")} == {3.0}
    assert {count for name, count in counts.items() if name.startswith("optimizer.generator.")} == {1.0}


def test_the_second_stage_keeps_a_learned_sigma(tmp_path: Path) -> None:
    learned = {"likelihood__learn_std": "shared", "train__epochs": 0.4}
    first = tiny_config(tmp_path, run__name="first", prior__kind="gaussian", **learned)
    train(first)
    stage = {"run__init_from": f"{tmp_path}/first", "train__regime": "two_stage"}
    second = tiny_config(tmp_path, run__name="second", **learned, **stage)
    train(second)
    assert different(saved(first), saved(second), "likelihood") == []
    sigma = float(saved(second)["model.likelihood.log_std"].exp())
    assert abs(sigma - second.likelihood.std) > 0.01  # it was learned


def test_the_second_stage_moves_the_energy_alone_and_resumes(tmp_path: Path) -> None:
    first = tiny_config(tmp_path, run__name="first", prior__kind="gaussian")
    train(first)
    second = {
        "run__init_from": f"{tmp_path}/first",
        "train__regime": "two_stage",
        "train__energy_updates": 2,
        "train__ema_decay": 0.9,
    }
    straight = tiny_config(tmp_path, run__name="straight", **second)
    assert f"only the energy, on the nets of {tmp_path}/first" in make_plan(straight).describe()
    result = train(straight)
    assert different(saved(first), saved(straight), "generator") == []
    assert different(saved(first), saved(straight), "inference") == []
    tensors = saved(straight)
    kept = [name.removeprefix("model.") for name in tensors if name.startswith("model.generator.")]
    assert [name for name in kept if not torch.equal(tensors[f"ema.{name}"], tensors[f"model.{name}"])] == []
    assert result.metrics["f_posterior"] > result.metrics["f_prior"]
    assert not any(name.startswith("optimizer.generator.") for name in saved(straight))
    parts = tiny_config(tmp_path, run__name="parts", **second)
    reached: list[int] = []
    train(
        parts,
        on_report=lambda report: reached.append(report.step) or False,
        should_stop=lambda: max(reached, default=0) >= 10,
    )
    train(parts)
    assert reached
    expected, found = saved(straight), saved(parts)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_penalty_holds_f_near_zero(tmp_path: Path) -> None:
    """Both in the joint update and in the updates of the energy only; the other nets do not see it."""
    for regime in ("joint", "two_stage"):
        metrics = {}
        for penalty in (0.0, 100.0):
            name = f"{regime}-{penalty:.0f}"
            origin = {"run__init_from": f"{tmp_path}/joint-0"} if regime == "two_stage" else {}
            config = {"run__name": name, "train__regime": regime, "energy__penalty": penalty, **origin}
            faster = {"optimizer__energy__lr": 0.01, "train__epochs": 0.4}
            metrics[penalty] = train(tiny_config(tmp_path, **config, **faster)).metrics
        level = {p: abs(m["f_posterior"]) + abs(m["f_prior"]) for p, m in metrics.items()}
        assert level[100.0] < 0.5 * level[0.0]
        gap = {p: m["f_prior"] - m["f_posterior"] for p, m in metrics.items()}
        if regime == "two_stage":
            assert metrics[0.0]["loss"] == pytest.approx(gap[0.0], abs=1e-6)
            assert metrics[100.0]["loss"] > gap[100.0]


def test_the_second_stage_is_refused_without_nets_that_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^run.init_from: train.regime two_stage needs the run whose"):
        tiny_config(tmp_path, train__regime="two_stage")
    with pytest.raises(ConfigError, match=r"^prior.kind: train.regime two_stage trains an energy"):
        tiny_config(tmp_path, train__regime="two_stage", run__init_from="runs/first", energy__width=0)
    train(tiny_config(tmp_path, run__name="first", prior__kind="gaussian", train__epochs=0.04))
    wider = tiny_config(
        tmp_path, train__regime="two_stage", run__init_from=f"{tmp_path}/first", generator__width=33
    )
    for refused in (make_plan, train):
        with pytest.raises(
            ConfigError, match=r"^run.init_from: .*/first was trained with another generator.width;"
        ):
            refused(wider)


def test_posteriors_of_all_images_are_those_of_the_inference_net(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    images = load_images(open_store(config.data.train)).images_NHWC
    with process_runtime(config) as runtime:
        model = TrainState.build(config, runtime).model
        found = features_of(model, images, runtime)
    with torch.no_grad():
        expected = model.inference(to_float(images[700:800].copy(), "cpu"))
    for of_all, of_some in zip(found, expected, strict=True):
        torch.testing.assert_close(of_all[700:800], of_some, rtol=0, atol=1e-5)
        assert len(of_all) == len(images)
