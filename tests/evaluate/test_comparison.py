"""Gates and claims on rows made by hand, and jobs/compare.py on real runs, small as they are."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scipy import stats

from jebm.cli import run
from jebm.config import Config
from jebm.core.model import build_model
from jebm.errors import ConfigError
from jebm.evaluate.comparison import GATES, Comparison, compare, document
from jebm.evaluate.comparison_findings import comparison_findings
from jebm.evaluate.features.classifier import ClassifierFeatures
from jebm.evaluate.measures import LONG_STEPS, Row, measures
from jebm.parser import load_config
from jebm.report.markdown import markdown
from jebm.report.write import finite

ROOT = Path(__file__).resolve().parents[2]
FASHION = ROOT / "jobs/data/fashion_mnist_2000"
SEEDS = (5, 6, 7, 8, 9)


# ----------------------------------------------------------------------------------------- rows by hand


def page_of(comparison: Comparison) -> str:
    return markdown(comparison_findings(comparison, {"seeds": "5"}, Config()))


def row(**changes: float) -> Row:
    plain = {measure.name: 1.0 for measure in measures(2)}
    return plain | {"f_drift": 0.1, "frechet_long": 40.0, "mse": 0.02, "log_z_share": 0.9, **changes}


def rows(changes: dict[str, list[float]]) -> dict[int, Row]:
    """Return rows of all seeds; each measure has its own value at each seed."""
    return {
        seed: row(**{name: values[i] for name, values in changes.items()}) for i, seed in enumerate(SEEDS)
    }


GAUSSIAN = rows(
    {"frechet_long": [44.0, 40.0, 47.0, 39.0, 52.0], "elbo": [-200.0, -190.0, -204.0, -187.0, -215.0]}
)
BETTER = rows(
    {"frechet_long": [20.0, 18.0, 21.0, 16.0, 25.0], "elbo": [-198.0, -193.0, -203.0, -190.0, -212.0]}
)


@pytest.mark.parametrize(
    ("gate", "passing", "failing"),
    [
        (0, {"f_drift": -0.49}, {"f_drift": -0.5}),
        (1, {"frechet_long": 43.9}, {"frechet_long": 44.0}),
        (2, {"norm_ratio": 1.49}, {"norm_ratio": 1.5}),
        (3, {"mse": 0.0219}, {"mse": 0.0221}),
        (3, {"mse": 0.001}, {"mse": math.nan}),
        (4, {"log_z_share": 0.2}, {"log_z_share": 0.19}),
        (4, {"log_z_share": 0.2}, {"log_z_share": math.nan}),
    ],
)
def test_a_gate_counts_the_seeds_that_pass_it(gate, passing, failing):
    reference = {seed: row(frechet_long=44.0) for seed in SEEDS}
    arm = {seed: row(**{"frechet_long": 20.0, **(failing if seed == 7 else passing)}) for seed in SEEDS}
    found = compare({"gaussian": reference, "joint": arm}, 2).gates["joint"]
    assert found == {each.title: 5 - (each is GATES[gate]) for each in GATES}


def test_differences_are_paired_by_seed():
    found = compare({"gaussian": GAUSSIAN, "joint": BETTER}, 2).contrasts["joint"]["frechet_long"]
    ours, theirs = ([of[seed]["frechet_long"] for seed in SEEDS] for of in (BETTER, GAUSSIAN))
    expected = stats.ttest_rel(ours, theirs)
    assert found.test.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(stats.gmean(ours) / stats.gmean(theirs))
    # The order in which an arm's seeds were measured is of no account.
    turned = dict(reversed(BETTER.items()))
    assert compare({"gaussian": GAUSSIAN, "joint": turned}, 2).contrasts["joint"]["frechet_long"] == found


def test_a_claim_holds_where_the_interval_excludes_zero_on_the_right_side():
    found = compare({"gaussian": GAUSSIAN, "joint": BETTER, "top": GAUSSIAN}, 2)
    verdicts = {(claim.arm, claim.against, claim.measure): claim for claim in found.claims}
    assert verdicts["joint", "gaussian", "frechet_long"].verdict == "holds"
    assert verdicts["joint", "gaussian", "elbo"].verdict == "open"
    assert verdicts["joint", "top", "frechet_long"].verdict == "holds"
    assert verdicts["top", "gaussian", "frechet_long"].verdict == "open"
    turned = compare({"gaussian": BETTER, "joint": GAUSSIAN}, 2)
    (worse,) = (claim for claim in turned.claims if claim.measure == "frechet_long")
    assert worse.verdict == "contradicted"
    # Higher is better here, lower there.
    good = {seed: {**row_, "elbo": GAUSSIAN[seed]["elbo"] + 3 + seed / 10} for seed, row_ in BETTER.items()}
    (elbo,) = (c for c in compare({"gaussian": GAUSSIAN, "joint": good}, 2).claims if c.measure == "elbo")
    assert elbo.verdict == "holds"


def test_a_claim_of_an_arm_that_fails_a_gate_says_so():
    drifting = {seed: {**row_, "f_drift": 2.0 if seed == 6 else 0.0} for seed, row_ in BETTER.items()}
    found = compare({"gaussian": GAUSSIAN, "joint": drifting}, 2)
    (claim,) = (claim for claim in found.claims if claim.measure == "frechet_long")
    assert claim.verdict == "holds"
    assert f"fails a gate: {GATES[0].title} (4 of 5 seeds)" in claim.sentence


@pytest.mark.parametrize("lost", [{}, row(frechet_long=math.nan)])
def test_a_seed_that_was_lost_takes_the_claim_with_it(lost):
    """Else the seeds that did not blow up would speak for all."""
    found = compare({"gaussian": GAUSSIAN, "joint": {**BETTER, 8: lost}}, 2)
    (claim,) = (claim for claim in found.claims if claim.measure == "frechet_long")
    assert claim.verdict == "open"
    assert "4 seeds; not every seed of joint has the figure" in claim.sentence
    assert found.gates["joint"][GATES[1].title] == 4
    assert found.diverged["joint"] == (() if lost else (8,))
    page = page_of(found)
    assert ("diverged with seed 8" in page) == (not lost)
    assert json.loads(json.dumps(finite(document(found)), allow_nan=False))["seeds"] == list(SEEDS)


def test_one_seed_claims_nothing():
    found = compare({"gaussian": {5: GAUSSIAN[5]}, "joint": {5: BETTER[5]}}, 2)
    assert {claim.verdict for claim in found.claims} == {"open"}
    assert "inf" not in page_of(found)
    json.dumps(finite(document(found)), allow_nan=False)


def test_the_table_has_a_cell_for_each_arm_and_each_difference():
    page = page_of(compare({"gaussian": GAUSSIAN, "joint": BETTER, "top": BETTER}, 2))
    table = [line for line in page.split("## Gates")[0].splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in table} == {1 + 1 + 3 + 2}
    (line,) = (line for line in table if line.startswith("| Fréchet distance, long chains"))
    assert "20.0 ± 4.2" in line
    assert "p &lt; 0.0001, ratio 0.45" in line


# ------------------------------------------------------------------------------------------------ the job


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("job_compare", ROOT / "jobs/compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


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
                run(loaded().main)
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


def test_a_comparison_goes_on_where_it_was_and_does_nothing_twice(
    job, tmp_path: Path, fashion_classifier: ClassifierFeatures
) -> None:
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
    found = json.loads((output / "numbers.json").read_text(encoding="utf-8"))
    assert found["facts"]["features"] == f"classifier, sha256 {fashion_classifier.sha256}"
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
        (["--seeds=[]"], "--seeds: [] must name at least one"),
        (["--seeds=[1, -1]"], "run.seed: must not be negative"),
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
    trials = loaded().trials_of(
        config, ["gaussian", "joint", "top", "two_stage", "deep=energy.depth:4"], [3, 4]
    )
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
    trials = {
        trial.arm: trial
        for trial in loaded().trials_of(config, ["joint", "top", "two_stage", "gaussian"], [3])
    }
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
        loaded().trials_of(config, ["joint"], [3])
