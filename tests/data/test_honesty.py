"""Sweeps and early stopping do not choose by test images, whatever they are called."""

from pathlib import Path

import numpy as np
import pytest

from jebm.config import Config
from jebm.data.dataset import load_images
from jebm.data.shards import write_dataset
from jebm.data.source import source_from_arrays
from jebm.errors import ConfigError
from jebm.evaluate.quick import check_quick_look
from jebm.on_ray.tuner import plan_sweep
from jebm.parser import load_config
from jebm.store.storage import open_store
from jebm.sweep.space import search_from_dict
from jebm.train.plan import Plan, make_plan

ROOT = Path(__file__).parents[2]
FASHION = ROOT / "jobs/data/fashion_mnist_2000"


def planned(tmp_path: Path, validation: object, metric: str = "evaluation/elbo") -> Plan:
    """Plan a sweep of the smoke config with an objective; raises what `jebm tune` would."""
    values = {"run.storage": str(tmp_path / "runs"), "evaluation.every_steps": 24}
    config: Config = load_config("smoke", {**values, "data.validation": validation})
    goal = {"metric": metric, "direction": "maximize"}
    space = {"energy.output_scale": ["loguniform", 1, 10]}
    search = search_from_dict({"space": space, "objective": goal, "trials": 2}, config)
    plan = make_plan(config)
    plan_sweep(search, plan)
    return plan


def planted(tmp_path: Path, share: float) -> str:
    """Write 200 images, some of them test images, as split validation; return where."""
    test, train = (load_images(open_store(str(FASHION / part))) for part in ("test", "train"))
    count = round(200 * share)
    images = np.concatenate([train.images_NHWC[: 200 - count], test.images_NHWC[:count]])
    order = np.random.default_rng(0).permutation(200)
    source = source_from_arrays(images[order], name="of my own", split="validation")
    write_dataset(source, open_store(str(tmp_path / "planted")))
    return str(tmp_path / "planted")


def test_a_sweep_sees_validation_images_only(tmp_path: Path) -> None:
    plan = planned(tmp_path, str(FASHION / "validation"))
    assert plan.judging.split == "validation"
    assert "judged   on" in plan.describe()


@pytest.mark.parametrize("share", [1.0, 0.05])
def test_planted_test_images_are_found(tmp_path: Path, share: float) -> None:
    count = round(200 * share)
    with pytest.raises(ConfigError, match=f"data.validation: {count} of its 200 images are in data.held_out"):
        planned(tmp_path, planted(tmp_path, share))


def test_a_few_doubles_are_no_leak(tmp_path: Path) -> None:
    planned(tmp_path, planted(tmp_path, 0.01))


def test_a_test_split_and_none_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is split test of fashion-mnist-2000.*--validation N"):
        planned(tmp_path, str(FASHION / "test"))
    with pytest.raises(ConfigError, match=r"data.validation: is missing.*--validation N"):
        planned(tmp_path, None)
    with pytest.raises(ConfigError, match=r"data.validation: its images are those of data.train"):
        planned(tmp_path, str(FASHION / "train"))


def test_early_stopping_sees_validation_images_only(tmp_path: Path) -> None:
    def checked(validation: object) -> None:
        values = {"run.storage": str(tmp_path / "runs"), "evaluation.every_steps": 24}
        watched = {"train.early_stopping.metric": "evaluation/elbo"}
        config = load_config("smoke", {**values, **watched, "data.validation": validation})
        plan = make_plan(config)
        check_quick_look(config, plan.data, plan.judging, plan.images)

    checked(str(FASHION / "validation"))
    with pytest.raises(ConfigError, match=r"200 of its 200 images are in data.held_out"):
        checked(planted(tmp_path, 1.0))
    with pytest.raises(ConfigError, match=r"data.validation: is missing, and evaluation/elbo may not see"):
        checked(None)


def test_an_objective_of_training_needs_no_validation_and_the_plan_warns(tmp_path: Path) -> None:
    plan = planned(tmp_path, None, metric="distortion")
    assert "of data.held_out, for want of data.validation: choose nothing by" in plan.describe()


def test_an_evaluation_that_is_not_measured_is_no_objective(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluation/elbow is not measured .* did you mean evaluation/elbo\?"
    ):
        planned(tmp_path, str(FASHION / "validation"), metric="evaluation/elbow")
