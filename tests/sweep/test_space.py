"""Search files: what they say, and that nothing wrong in them gets as far as a cluster."""

import re
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from jebm.config import Config
from jebm.errors import ConfigError
from jebm.parser import load_config, override
from jebm.sweep.space import Halving, Objective, load_search, search_from_dict

ROOT = Path(__file__).parents[2]
SMOKE = load_config(ROOT / "jobs/configs/smoke.yaml", {"evaluation.every_steps": 10})
GOAL = {"metric": "evaluation/frechet_long", "direction": "minimize"}
LOSS = {"metric": "loss", "direction": "minimize"}
STEPS = {"langevin.steps": ["int", 10, 50]}


def write(folder: Path, text: str) -> Path:
    path = folder / "search.yaml"
    path.write_text(text)
    return path


def test_a_file_gives_optunas_distributions(tmp_path: Path) -> None:
    text = """
    space:
      langevin.step_size: [loguniform, 5e-2, 1]
      energy.depth: [logint, 1, 8]
      energy.width: [int, 10, 100]
      train.ema_decay: [uniform, 0, 0.99]
      energy.spectral_norm: [choice, [true, false]]
      optimizer.energy.clip_norm: [choice, [null, 10]]
      model.latent_dims: [choice, [[2, 2, 10], [4, 4, 4]]]
    objective: {metric: evaluation/elbo, direction: maximize}
    trials: 16
    seed: 3
    scheduler: {asha: {grace_images: 4000}}
    max_concurrent: 2
    """
    search = load_search(write(tmp_path, text), SMOKE, trials=20)
    assert search.space == {
        "langevin.step_size": FloatDistribution(0.05, 1, log=True),
        "energy.depth": IntDistribution(1, 8, log=True),
        "energy.width": IntDistribution(10, 100),
        "train.ema_decay": FloatDistribution(0, 0.99),
        "energy.spectral_norm": CategoricalDistribution([True, False]),
        "optimizer.energy.clip_norm": CategoricalDistribution([None, 10]),
        "model.latent_dims": CategoricalDistribution(["[2, 2, 10]", "[4, 4, 4]"]),
    }
    assert search.objectives == (Objective("evaluation/elbo", "maximize"),)
    assert (search.trials, search.sampler, search.seed, search.max_concurrent) == (20, "tpe", 3, 2)
    assert search.scheduler == Halving(4000, 3)


def test_a_sample_becomes_a_config() -> None:
    config = override(
        SMOKE,
        {"model.latent_dims": "[3, 1, 4]", "langevin.step_size": 0.1 + 0.2, "run.seed": 7},
    )
    assert config.model.latent_dims == (3, 1, 4)
    assert config.langevin.step_size == 0.1 + 0.2
    assert config.run.seed == 7
    assert config.generator == SMOKE.generator


def test_a_grid_has_every_point_once() -> None:
    space = {"energy.width": ["choice", [0, 10]], "langevin.steps": ["int", 1, 3]}
    search = search_from_dict({"space": space, "objective": GOAL, "sampler": "grid"}, SMOKE)
    assert search.trials == 6
    assert [tuple(point.values()) for point in search.grid] == [(w, k) for w in (0, 10) for k in (1, 2, 3)]
    # What sweep.json keeps of it gives the same search again.
    assert search_from_dict(search.values, SMOKE) == search


def test_values_that_are_wrong_only_together_are_left_to_the_trial() -> None:
    space = {"train.batch_size": ["choice", [2, 100]], "train.accumulate": ["choice", [50, 1]]}
    found = search_from_dict({"space": space, "objective": GOAL, "trials": 1}, SMOKE)
    with pytest.raises(ConfigError, match=r"train\.batch_size: 2 must be at least"):
        override(SMOKE, {"train.batch_size": 2, "train.accumulate": 50})
    assert len(found.space) == 2


def search(**changes: object) -> dict[str, object]:
    values = {"space": STEPS, "objective": GOAL, "trials": 4} | changes
    return {key: value for key, value in values.items() if value is not None}


def space(**entries: object) -> dict[str, object]:
    return search(space={key.replace("__", "."): entry for key, entry in entries.items()})


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (space(energy__widht=["int", 1, 2]), r"unknown key energy\.widht; did you mean energy\.width"),
        (space(), r"space: needs at least one key"),
        (search(space=["energy.width"]), r"space: needs at least one key"),
        (space(energy__width=50), r"space: energy\.width: must be a list such as"),
        (space(energy__width=["range", 1, 2]), r"space: energy\.width: must be one of uniform.*not range"),
        (space(energy__width=["int", 1]), r"space: energy\.width: needs two bounds, \[int, low, high\]"),
        (space(energy__width=["int", 1, 2.5]), r"space: energy\.width: needs a whole number, not 2\.5"),
        (space(energy__width=["int", 9, 3]), r"the low bound 9 must lie below the high bound 3"),
        (space(energy__width=["uniform", 1, 9]), r"width = 3\.5\d*: energy\.width: needs an integer"),
        (space(energy__width=["uniform", True, 9]), r"energy\.width: needs a number, not True"),
        (space(energy__width=["choice", [10, "wide"]]), r"width = wide: .*needs an integer, not 'wide'"),
        (space(energy__width=["choice", [10, None]]), r"energy\.width: needs a value, not null"),
        (space(energy__width=["choice", [10, 10]]), r"energy\.width: a choice stands twice"),
        (space(energy__width=["choice", 10]), r"energy\.width: needs one list of values"),
        (space(langevin__step_size=["uniform", 0.1, 2.5]), r"= 2\.5: langevin\.step_size: must lie between"),
        (space(langevin__step_size=["loguniform", 0, 1]), r"loguniform needs a low bound above 0"),
        (space(langevin__step_size=["loguniform", "a", 1]), r"step_size: needs a number, not 'a'"),
        (space(run__name=["choice", ["a", "b"]]), r"run\.name cannot be searched"),
        (space(evaluation__samples=["int", 100, 200]), r"evaluation\.samples cannot be searched"),
        (space(energy=["choice", [1, 2]]), r"space: energy = 1: energy: needs keys below it"),
        (search(objective=None), r"objective: is missing"),
        (search(objective="elbo"), r"objective: needs \{metric: .*not elbo"),
        (search(objective={"metric": "elbo"}), r"objective\.direction: is missing for elbo"),
        (search(objective=GOAL | {"direction": "minimise"}), r"did you mean minimize\?"),
        (search(objective=GOAL | {"mode": "min"}), r"objective\.mode; there are metric, direction"),
        (search(objective=[GOAL, GOAL]), r"objective: a metric stands twice"),
        (search(trials=None), r"trials: is missing"),
        (search(trials=0), r"trials: must be at least 1, not 0"),
        (search(trials="ten"), r"trials: needs a whole number, not 'ten'"),
        (search(trails=3), r"unknown key trails; did you mean trials\?"),
        (search(sampler="tep"), r"sampler: must be one of .*did you mean tpe\?"),
        (search(seed=-1), r"seed: must be at least 0"),
        (search(max_concurrent=0), r"max_concurrent: must be at least 1"),
        (search(scheduler="asha"), r"scheduler: must be none or"),
        (search(scheduler={"asha": {}}), r"scheduler\.asha\.grace_images: is missing"),
        (search(scheduler={"asha": {"grace_images": 9, "reduction": 1}}), r"reduction: must be above 1"),
        (search(scheduler={"asha": {"grace": 9}}), r"asha\.grace; there are grace_images, reduction"),
        (
            search(objective=[GOAL, LOSS], scheduler={"asha": {"grace_images": 9}}),
            r"asha needs one objective",
        ),
        (space(langevin__step_size=["uniform", 0.1, 1]) | {"sampler": "grid"}, r"a grid needs choice or int"),
        (space(energy__width=["logint", 1, 9]) | {"sampler": "grid"}, r"needs choice or int, not logint"),
        (
            space(energy__width=["int", 1, 10**18]) | {"sampler": "grid"},
            r"space: a grid of 1,000,000,000,000,000,000 points, and 10,000 are the most; list fewer",
        ),
        (search(sampler="grid", trials=42), r"trials: 42 are more than the 41 points of the grid"),
        (
            space(train__batch_size=["choice", [100, 10]], train__accumulate=["choice", [1, 25]])
            | {"sampler": "grid"},
            r"space: the point train\.batch_size 10, train\.accumulate 25 is no config: train\.batch_size",
        ),
    ],
)  # fmt: skip
def test_wrong_searches_are_refused_in_one_line(values: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as refused:
        search_from_dict(values, SMOKE)
    assert "\n" not in str(refused.value)


def test_what_is_not_measured_is_no_objective() -> None:
    with pytest.raises(
        ConfigError, match=r"frechet_long is measured only where evaluation\.every_steps is above 0"
    ):
        search_from_dict(search(), Config())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("space: {a: 1, a: 2}", r"space\.a: stands twice \(line 1 and line 1\)"),
        ("space: {a: 1}\ntrials: 3\nspace: {b: 1}", r"space: stands twice \(line 1 and line 3\)"),
        ("space: [", r"search\.yaml: line 1: invalid YAML"),
        ("just words", r"holds no keys"),
        ("1: {}", r"unknown key 1"),
        ("? [a]\n: 1", r"line 1: a key must be a word"),
        ("space: {energy.width: [choice, [!!binary aGk=]]}", r"line 1: the tag !!binary is not read"),
        ("space: &a [*a]", r"holds itself by an alias"),
        ("train: {epochs: 3}", r"that is a config; give it as --config"),
    ],
)
def test_a_wrong_file_is_named(text: str, line: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: .*") as refused:
        load_search(path, SMOKE)
    assert re.search(line, str(refused.value))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs/searches").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_ready_searches_fit_their_config(path: Path) -> None:
    base = load_config(ROOT / "jobs/configs/fashion_mnist.yaml", {"evaluation.every_steps": 200})
    search = load_search(path, base)
    quick = path.stem == "first"  # of minutes: too short for a distance of long chains
    goal = ("evaluation/elbo", "maximize") if quick else ("evaluation/frechet_long", "minimize")
    assert search.objectives[0] == Objective(*goal)
    if path.stem == "ablation_width":
        assert [point["energy.width"] for point in search.grid] == [0, 10, 20, 50, 100]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: there is no such file"):
        load_search(tmp_path / "nowhere.yaml", SMOKE)
