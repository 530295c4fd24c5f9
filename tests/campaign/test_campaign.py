"""`jebm compare` on real runs, small as they are, and the arms of its trials."""

import json
import sys
from pathlib import Path

import pytest
import torch

from jebm.campaign.trials import trials_of
from jebm.cli import run
from jebm.commands.compare import main
from jebm.config import Config
from jebm.core.model import build_model
from jebm.data.dataset import load_images
from jebm.errors import ConfigError
from jebm.evaluate.features.classifier import classifier_features
from jebm.evaluate.measures import LONG_STEPS, measures
from jebm.parser import load_config
from jebm.store.storage import open_store

ROOT = Path(__file__).resolve().parents[2]
FASHION = ROOT / "jobs/data/fashion_mnist_2000"


@pytest.fixture
def job(monkeypatch, capsys, tmp_path, cache):
    """Run the job in this process; return its exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        small = {
            "data.train": FASHION / "train",
            "data.held_out": FASHION / "test",
            "run.storage": tmp_path / "runs",
            "run.name": "tiny",
            "inference.channels": "[4, 8]",
            "inference.width": "32",
            "generator.channels": "[4, 8]",
            "generator.width": "32",
            "energy.width": "8",
            "train.batch_size": "64",
            "train.pictures_every_steps": "0",
            "evaluation.samples": "100",
        }
        values = [f"--{key}={value}" for key, value in small.items()]
        config = str(ROOT / "jobs/configs/smoke.yaml")
        monkeypatch.setattr(sys, "argv", ["compare.py", "--config", config, *values, *arguments])
        monkeypatch.setenv("JEBM_CACHE", str(cache))
        capsys.readouterr()
        threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        try:
            with pytest.raises(SystemExit) as ended:
                run(main)
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)
        written = capsys.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return call


def files_of(folder: Path) -> dict[str, bytes]:
    """Return all files but the page, which tells of the source, and that may change beside us."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.stem != "comparison"
    }


@pytest.mark.long
def test_a_comparison_goes_on_where_it_was_and_does_nothing_twice(job, tmp_path: Path, cache: Path) -> None:
    arms = "--arms=[gaussian, 'boom=optimizer.generator.lr:1e30']"
    code, out, _ = job(arms, "--seeds=[0]", "--train.epochs=0.2")
    assert code == 0, out
    assert "tiny-boom-0 diverged" in out
    begun = "tiny-gaussian-0  10 steps, resumes at step 5"
    assert begun in job(arms, "--seeds=[0, 1]", "--train.epochs=0.4", "--dry-run")[1]

    code, out, _ = job("--arms=[gaussian, joint]", "--seeds=[0, 1]", "--train.epochs=0.4")
    assert code == 0, out
    assert [line for line in out.splitlines() if line.startswith(("training", "measuring"))] == [
        f"{what} tiny-{arm}-{seed}{': 10 steps' if what == 'training' else ''}"
        for seed in (0, 1)
        for arm in ("gaussian", "joint")
        for what in ("training", "measuring")
    ]
    output = tmp_path / "runs/tiny-comparison"
    page = (output / "comparison.md").read_text(encoding="utf-8")
    assert "joint against gaussian: “prior samples are nearer to held-out images”" in out
    assert "Fréchet distance, long chains" in page
    classifier = classifier_features(
        load_images(open_store(str(FASHION / "train")), cache), cache_directory=cache
    )
    found = json.loads((output / "numbers.json").read_text(encoding="utf-8"))
    assert found["facts"]["features"] == f"classifier, sha256 {classifier.sha256}"
    assert found["facts"]["budget of each run"] == "10 updates of 64 images"
    assert set(found["rows"]["joint"]["1"]) == {measure.name for measure in measures(3)}
    assert f"{LONG_STEPS:,}" in found["facts"]["chains"]

    before = files_of(tmp_path / "runs")
    code, out, _ = job("--arms=[gaussian, joint]", "--seeds=[0, 1]", "--train.epochs=0.4")
    assert code == 0
    assert "training" not in out
    assert "measuring" not in out
    assert files_of(tmp_path / "runs") == before

    # A row that is lost or damaged is measured again from the finished run, to the same numbers.
    (output / "rows/tiny-joint-1.json").unlink()
    row = json.loads((output / "rows/tiny-gaussian-0.json").read_text())
    damaged = {
        "rows/tiny-gaussian-0.json": json.dumps(row | {"row": {"elbo": "high"}}),
        "rows/tiny-gaussian-1.json": json.dumps(row | {"row": {"elbo": 10**400}}),
        "rows/tiny-joint-0.json": "[" * 100_000 + "]" * 100_000,
    }
    for name, content in damaged.items():
        (output / name).write_text(content)
    code, out, _ = job("--arms=[gaussian, joint]", "--seeds=[0, 1]", "--train.epochs=0.4")
    assert "measuring tiny-joint-1" in out
    assert "training tiny" not in out
    for name, content in damaged.items():
        (line,) = [line for line in out.splitlines() if f"{name}: is damaged (" in line]
        assert f"kept as {name}.damaged-1" in line
        assert (output / f"{name}.damaged-1").read_text() == content
        (output / f"{name}.damaged-1").unlink()
    assert files_of(tmp_path / "runs") == before

    changed = ["--arms=[gaussian, joint]", "--seeds=[0]", "--energy.depth=3"]
    code, _, err = job(*changed)
    assert code == 2
    assert job(*changed, "--dry-run") == (2, "", err)
    assert (
        "run tiny-gaussian-0 has a checkpoint (step 10) made with another energy.depth; choose a new run.name"
        in err
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--arms=[joint, top]"], "--arms: needs gaussian"),
        (["--arms=[gaussian]"], "--arms: needs gaussian"),
        (["--arms=[gaussian, jiont]"], "--arms: 'jiont' is none of gaussian, joint, top, two_stage"),
        (["--arms=[gaussian, joint, joint]"], "none twice"),
        (["--arms=[gaussian, 'joint=energy.width:9']"], "--arms: joint is taken"),
        (["--arms=[gaussian, 'a=energy.width']"], "--arms: 'energy.width' of a is not KEY:VALUE"),
        (["--arms=[gaussian, 'a=energy.widht:9']"], "energy.widht"),
        (["--arms=[gaussian, 'a=run.seed:3']"], "--arms: a sets run.seed, which all arms share"),
        (["--arms=[gaussian, 'a=run.name:b']"], "--arms: a sets run.name"),
        (["--arms=[gaussian, 'a=run:{storage: b}']"], "--arms: a sets run.storage"),
        (["--arms=[gaussian, 'a=run.init_from:b']"], "--arms: a sets run.init_from"),
        (["--arms=[gaussian, 'a=data.train:b']"], "--arms: a sets data.train"),
        (["--arms=[gaussian, 'a=cluster.engine:ray']"], "--arms: a sets cluster.engine"),
        (["--seeds=[]"], "--seeds: [] must name at least one"),
        (["--seeds=[1, -1]"], "run.seed: -1 must lie between 0"),
        (["--parallel=0"], "--parallel: must be at least 1"),
        (["--parallel=2", "--cluster.engine=ray"], "--parallel: is for cluster.engine process"),
        (["--data.train=no/such/set"], "no/such/set"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(job, tmp_path, arguments, line):
    code, _, err = job(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert line in err
    assert not list(tmp_path.glob("runs/*-comparison"))


def test_arms_of_a_seed_begin_with_the_same_generator_and_inference_net():
    config = load_config(ROOT / "jobs/configs/smoke.yaml", {"data.train": str(FASHION / "train")})
    trials = trials_of(config, ["gaussian", "joint", "top", "two_stage", "deep=energy.depth:4"], [3, 4])
    weights = {
        (trial.arm, trial.seed): {
            name: tensor
            for name, tensor in build_model(trial.config).state_dict().items()
            if not name.startswith("energy.")
        }
        for trial in trials
    }
    for (arm, seed), of_arm in weights.items():
        assert of_arm.keys() == weights["gaussian", seed].keys()
        assert all(torch.equal(tensor, weights["gaussian", seed][name]) for name, tensor in of_arm.items()), (
            arm
        )
    assert not torch.equal(*(next(iter(weights["gaussian", seed].values())) for seed in (3, 4)))


def test_arms_differ_in_what_they_are_and_in_nothing_else():
    config = load_config(ROOT / "jobs/configs/smoke.yaml", {"data.train": str(FASHION / "train")})
    trials = {trial.arm: trial for trial in trials_of(config, ["joint", "top", "two_stage", "gaussian"], [3])}
    assert next(iter(trials)) == "gaussian"  # others begin with it

    def differing(one: Config, other: Config) -> set[str]:
        return {
            f"{section}.{key}"
            for section in ("run", "data", "model", "prior", "energy", "langevin", "train", "optimizer")
            for key, value in vars(getattr(one, section)).items()
            if value != vars(getattr(other, section))[key]
        }

    gaussian = trials["gaussian"].config
    assert differing(gaussian, trials["joint"].config) == {"run.name", "prior.kind"}
    assert differing(gaussian, trials["top"].config) == {"run.name", "prior.kind"}
    assert differing(trials["joint"].config, trials["two_stage"].config) == {
        "run.name",
        "run.init_from",
        "train.regime",
    }
    assert trials["two_stage"].config.run.init_from == trials["gaussian"].uri
    with pytest.raises(ConfigError, match="needs gaussian"):
        trials_of(config, ["joint"], [3])
