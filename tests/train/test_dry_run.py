"""A dry run exits with 0 if and only if the start reaches a step, or is finished: over random configs.

Each case is a command line of jobs/train.py, run twice in this process: with --dry-run, and without. The runs
are of one or two steps of tiny nets, in storages where other runs already are.
"""

import json
import os
import random
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from jebm.data.readers import open_source
from jebm.data.shards import write_dataset
from jebm.store.storage import open_store
from jebm.train.lease import Lease

CASES = int(os.environ.get("JEBM_DRY_RUN_CASES", "40"))
TINY = {
    "cluster.engine": "process",
    "cluster.workers": 1,
    "inference.channels": [2, 3],
    "inference.width": 8,
    "generator.channels": [2, 3],
    "generator.width": 8,
    "energy.width": 8,
    "langevin.steps": 2,
    "train.epochs": 0.1,
    "train.batch_size": 64,
    "evaluation.samples": 100,
    "evaluation.chain_factor": 1,
}

Job = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Job:
    """jobs/train.py in this process: its exit code, its lines, its line on stderr."""
    monkeypatch.setenv("JEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "jobs/train.py"), run_name="__main__")
        written = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, written.out, written.err

    return run


def words(values: dict[str, object]) -> list[str]:
    lines = [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items()]
    return ["--config", str(ROOT / "jobs/configs/smoke.yaml"), *lines]


@dataclass(frozen=True)
class World:
    """Data sets and finished, stopped, damaged runs that random configs meet."""

    folder: Path
    sets: tuple[str, ...]
    runs: tuple[str, ...]


def make_set(folder: Path, images: int, *, labels: int = 0, size: int = 28) -> str:
    """Write a data set of random images, with so many classes; return where it is."""
    stream = np.random.default_rng(images)
    source = folder / f"{images}-{labels}-{size}"
    source.mkdir(parents=True)
    np.save(source / "x.npy", stream.integers(0, 255, (images, size, size), np.uint8))
    options = {}
    if labels:
        np.save(source / "y.npy", np.arange(images) % labels)
        options = {"labels": str(source / "y.npy")}
    write_dataset(open_source(str(source / "x.npy"), **options), open_store(str(source / "set")))
    return str(source / "set")


@pytest.fixture
def world(job: Job, tmp_path: Path) -> World:
    folder = tmp_path / "made"
    train = make_set(folder, 200, labels=3)
    sets = [train, *(make_set(folder, images) for images in (39, 40, 200))]
    sets += [make_set(folder, 201, labels=1), make_set(folder, 100, labels=2), make_set(folder, 80, size=16)]
    broken, flipped = (Path(make_set(folder, images)) for images in (91, 92))
    next(broken.glob("part-*")).unlink()
    flip(next(flipped.glob("part-*")))
    sets += [str(broken), str(flipped), str(folder / "nowhere")]
    shapes: dict[str, dict[str, object]] = {
        "plain": {},
        "gaussian": {"prior.kind": "gaussian"},
        "averaged": {"train.ema_decay": 0.5},
        "wide": {"energy.width": 9},
        "damaged": {},
        "older-whole": {"checkpoint.every_steps": 1, "train.epochs": 0.7},
    }
    for name, changes in shapes.items():
        data = {"data.train": train, "data.held_out": None}
        given = words(TINY | data | {"run.storage": str(folder / "runs"), "run.name": name} | changes)
        assert job(*given)[0] == 0
    for name in ("damaged", "older-whole"):
        newest = max((folder / "runs" / name / "checkpoints").iterdir())
        flip(next((newest / "data").iterdir()))
    return World(folder, tuple(sets), tuple(shapes))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, and not its time: as a disk does it."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def random_changes(draw: random.Random, world: World) -> dict[str, object]:
    """Return what a case changes of the tiny config: of two to six kinds, some of them wrong."""
    runs = str(world.folder / "runs")
    origins = [f"{runs}/{name}" for name in (*world.runs, "nobody")]
    origins += [f"{runs}/older-whole/checkpoints/step-0000000{step}-a0001" for step in (1, 2, 7)]
    resumed = draw.random() < 0.4
    choices: dict[str, list[object]] = {
        "train.batch_size": [1, 39, 64, 128, 200, 201],
        "train.accumulate": [1, 2, 3, 64],
        "train.precision": ["fp32", "bf16", "fp16"],
        "train.regime": ["joint", "two_stage"],
        "train.gaussian_share": [0.0, 0.5, 0.99, 1.0],
        "train.ema_decay": [0.0, 0.5, 1.0],
        "train.energy_updates": [1, 2, 0],
        "train.epochs": [0.01, 1e-9, 0, 0.7],
        "run.init_from": [None, *origins],
        "run.accept_changes": [True, False],
        "run.seed": [0, 1, 2**70, -1],
        "run.deterministic": [True, False],
        "cluster.workers": [1, 1, 1, 2],
        "cluster.gpus_per_worker": [0, 0, 1],
        "cluster.cpus_per_worker": [1, 2, 64, 10**7],
        "prior.kind": ["joint", "top", "gaussian"],
        "energy.width": [0, 8, 9, 10**9],
        "energy.depth": [1, 2, 0],
        "energy.spectral_norm": [True, False],
        "generator.join": ["add", "concat"],
        "generator.channels": [[2, 3], [2, 3, 4], [1, 1], []],
        "model.latent_dims": [[2, 2, 10], [1, 1, 1], [3], [2, 2]],
        "model.image_size": [28, 16, 3],
        "langevin.kernel": ["auto", "torch", "autograd"],
        "langevin.noise": ["torch", "philox"],
        "langevin.steps": [1, 2],
        "evaluation.every_steps": [0, 1, 1],
        "evaluation.features": ["classifier", "classifier", "inceptionv3"],
        "evaluation.inception_weights": [None, str(ROOT / "README.md"), "nowhere.pth"],
        "evaluation.samples": [99, 100],
        "data.train": [*world.sets],
        "data.held_out": [None, *world.sets],
        "checkpoint.keep_last": [1, 0],
        "checkpoint.sharded": [False, True],
    }
    changed = draw.sample(sorted(choices), draw.randint(1, 5))
    changes = {key: draw.choice(choices[key]) for key in changed}
    if resumed:
        changes |= {"run.storage": runs, "run.name": draw.choice(world.runs)}
        changes.setdefault("train.epochs", draw.choice([0.1, 1.0]))
    return changes


def files(folder: Path) -> list[Path]:
    """Return all files but those of the cache of images."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts)


def test_a_dry_run_says_what_the_start_does(job: Job, world: World, tmp_path: Path) -> None:
    draw = random.Random(20)
    verdicts, wrong = [], []
    data = {"data.train": world.sets[0], "data.held_out": world.sets[2]}
    for case in range(CASES):
        changes = random_changes(draw, world)
        storage = tmp_path / f"case{case}"
        if "run.storage" in changes:
            shutil.copytree(str(changes["run.storage"]), storage)  # with the times, which are etags
        values = TINY | data | {"run.name": "new"} | changes | {"run.storage": str(storage)}
        before = files(tmp_path)
        code, shown, line = job(*words(values), "--dry-run")
        assert files(tmp_path) == before
        ended, told, error = job(*words(values))
        started = "finished" in told
        verdicts.append(started)
        same = (code, "already finished" in shown) == (ended, "already finished" in told)
        if not same or started != (code == 0) or error.count("\n") != (ended != 0):
            wrong.append(f"{changes}: {(code, line)} {(ended, error, started)}")
        shutil.rmtree(storage, ignore_errors=True)
    assert not wrong, "\n".join(wrong)
    assert 0.25 < sum(verdicts) / len(verdicts) < 0.75  # both kinds are drawn


def test_a_run_that_is_in_training_is_refused_with_its_holder(job: Job, tmp_path: Path) -> None:
    data = {"data.train": make_set(tmp_path, 64), "run.storage": str(tmp_path), "run.name": "busy"}
    given = words(TINY | data | {"data.held_out": None})
    with Lease(open_store(str(tmp_path / "busy")), beat_seconds=0.2):
        for line in (job(*given, "--dry-run"), job(*given)):
            assert line[0] == 2
            assert f"is in training by process {os.getpid()} on host" in line[2]
    assert [job(*given, "--dry-run")[0], job(*given)[0]] == [0, 0]


@pytest.mark.parametrize(
    ("share", "epochs", "line"),
    [
        (0.0, 10, ""),
        (0.5, 10, "energy   joins at step 5 (train.gaussian_share 0.5); the prior is N(0, I) until then"),
        (0.9, 1, "energy   never joins: train.gaussian_share 0.9 of 1 steps leaves none for it"),
    ],
)
def test_the_plan_says_when_the_energy_joins(
    job: Job, tmp_path: Path, share: float, epochs: float, line: str
) -> None:
    data = {"data.train": make_set(tmp_path, 64), "data.held_out": None, "run.storage": str(tmp_path)}
    values = TINY | data | {"train.gaussian_share": share, "train.epochs": epochs}
    shown = job(*words(values), "--dry-run")[1]
    assert [text for text in shown.splitlines() if text.startswith("energy")] == ([line] if line else [])
