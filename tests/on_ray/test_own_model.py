"""A user's own generator and energy, from an empty folder and the wheel: everywhere that jebm's own work."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from wheel_environment import environment_with_wheel, jebm

MYLAB = '''
import torch
from torch import Tensor, nn

from jebm.parts import Energy, Generator, Shapes


class SumEnergy(Energy):
    """f(z) = sum over layers of a net of each."""

    def __init__(self, layers: tuple[tuple[int, ...], ...], width: int = 20) -> None:
        super().__init__(layers)
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(layer, width), nn.SiLU(), nn.Linear(width, 1)) for layer in self.widths
        )

    def forward(self, z: Tensor) -> Tensor:
        parts = zip(self.nets, torch.split(z, self.widths, dim=1), strict=True)
        return torch.stack([net(part) for net, part in parts]).sum(0).squeeze(1)


class ConvGenerator(Generator):
    """All layers together into one stack of transposed convolutions."""

    def __init__(self, shapes: Shapes, channels: int = 8) -> None:
        super().__init__(shapes)
        size = shapes.image[1] // 4
        self.body = nn.Sequential(
            nn.Linear(sum(shapes.dims), channels * size * size),
            nn.Unflatten(1, (channels, size, size)),
            nn.GELU(),
            nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(channels, shapes.outputs, 4, stride=2, padding=1),
        )

    def forward(self, code: Tensor) -> Tensor:
        return self.body(code)
'''
CONFIG = """
generator: {class_path: mylab.ConvGenerator}
energy: {class_path: mylab.SumEnergy, init_args: {width: 12}}
inference: {channels: [4, 8], width: 32}
langevin: {steps: 5}
train: {batch_size: 100, epochs: 0.5, pictures_every_steps: 0, report_every_steps: 4}
checkpoint: {every_steps: 2}
evaluation: {every_steps: 0, samples: 100, chain_factor: 2}
"""
SEARCH = """
space: {energy.init_args.width: [int, 4, 16]}
objective: {metric: loss, direction: minimize}
trials: 2
sampler: random
"""
TRUSTED = """
import jebm, safetensors.torch
found = jebm.from_pretrained("exported", trust=["mylab"])
weights = safetensors.torch.load_file("exported/model.safetensors")
print(type(found.model.energy).__name__, type(found.model.generator).__name__, found.config.energy.init_args)
own = found.model.state_dict()
print("equal", own.keys() == weights.keys() and all(own[name].equal(weights[name]) for name in own))
"""


def tensors(run: Path) -> list[bytes]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return [path.read_bytes() for path in sorted((newest / "data").iterdir())]


MINE = ("--config", "smoke", "--config", "mine.yaml")
HERE = (*MINE, "--cluster.engine", "process", "--cluster.workers", "1")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with_wheel(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: nothing but a module, a config and a search."""
    place = tmp_path_factory.mktemp("mine")
    for name, text in {"mylab.py": MYLAB, "mine.yaml": CONFIG, "search.yaml": SEARCH}.items():
        (place / name).write_text(text)
    return place


@pytest.fixture
def run(environment: Path, folder: Path) -> Callable[..., str]:
    def run_command(*words: str, code: int = 0) -> str:
        done = jebm(environment, folder, *words)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run_command


def clean() -> dict[str, str]:
    """This process's variables but for those that would lead to another jebm."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JEBM"))}


@pytest.mark.long
def test_killed_it_resumes_bit_for_bit_and_is_built_only_where_trusted(
    environment: Path, folder: Path, run: Callable[..., str]
) -> None:
    output = run("train", *HERE, "--run.name", "unbroken")
    assert "prior joint EBM by mylab.SumEnergy, 5 Langevin steps" in output
    assert "classes  generator mylab.ConvGenerator" in output
    assert "finished: step 8 of 8" in output
    command = [environment / "bin/jebm", "train", *HERE, "--run.name", "killed"]
    with subprocess.Popen(command, cwd=folder, env=clean(), stdout=subprocess.DEVNULL) as process:
        while not any((folder / "runs/killed/checkpoints").glob("*/MANIFEST.json")):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    resumed = run("train", *HERE, "--run.name", "killed")
    assert re.search(r"resumes at step [2468]", resumed) or "already finished" in resumed
    assert tensors(folder / "runs/killed") == tensors(folder / "runs/unbroken")

    # Evaluated, sampled and exported where it is trusted, refused where it is not.
    refused = run("evaluate", "--checkpoint", "runs/unbroken", "--suite", "chains", code=2)
    assert refused.endswith("which is not trusted here; if you know that code, add --trust mylab\n")
    trusted = ("--trust", "mylab")
    run("evaluate", "--checkpoint", "runs/unbroken", "--suite", "chains", "--samples", "100", *trusted)
    assert "add --trust mylab" in run("sample", "--checkpoint", "runs/unbroken", "--count", "4", code=2)
    run("sample", "--checkpoint", "runs/unbroken", "--count", "4", *trusted)
    assert "add --trust mylab" in run("export", "runs/unbroken", "--output", "exported", code=2)
    run("export", "runs/unbroken", "--output", "exported", *trusted)
    script = [environment / "bin/python", "-c", TRUSTED]
    loaded = subprocess.run(script, cwd=folder, env=clean(), capture_output=True, text=True, check=False)
    assert loaded.stdout == "SumEnergy ConvGenerator {'width': 12}\nequal True\n", loaded.stderr
    script = [environment / "bin/python", "-c", 'import jebm; jebm.from_pretrained("exported")']
    refused_load = subprocess.run(
        script, cwd=folder, env=clean(), capture_output=True, text=True, check=False
    )
    assert "generator.class_path: mylab.ConvGenerator would run code of mylab" in refused_load.stderr


@pytest.mark.long
def test_on_a_local_ray_two_workers_train_it_and_a_sweep_searches_its_arguments(
    folder: Path, run: Callable[..., str]
) -> None:
    assert "finished: step 8 of 8" in run("train", *MINE, "--run.name", "local")
    (newest,) = sorted((folder / "runs/local/checkpoints").glob("step-00000008-*"))
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    assert manifest["world_size"] == 2
    assert manifest["provenance"]["energy.class"] == "mylab.SumEnergy"
    assert len(manifest["provenance"]["generator.source_sha256"]) == 64
    sweep = ("--search", "search.yaml", "--run.name", "sweep", "--cluster.workers", "1")
    output = run("tune", *MINE, *sweep)
    assert "energy.init_args.width int 4 to 16" in output
    assert "2 finished" in output


@pytest.mark.long
def test_a_job_takes_it_to_a_cluster_without_jebm(  # type: ignore[no-untyped-def]
    cluster, s3_uri: str, environment: Path, folder: Path
) -> None:
    (package,) = environment.glob("lib/python*/site-packages/jebm")
    (folder / ".rayignore").write_text("runs\ncache\nsamples\n")
    options = ["--working-dir", str(folder), "--runtime-env-json", json.dumps({"py_modules": [str(package)]})]
    entry = ["python", "-m", "jebm", "train", *MINE, "--run.name", "job", "--run.storage", s3_uri]
    job = cluster.ray("job", "submit", *options, "--", *entry)
    done = subprocess.run(
        job, env=cluster.environment, capture_output=True, text=True, timeout=300, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished: step 8 of 8" in done.stdout
