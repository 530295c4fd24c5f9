"""A checkpoint whose config names classes: built only where the command trusts their module."""

import importlib
import json
import logging
import pkgutil
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from jebm import commands
from jebm.config import Config, config_to_dict
from jebm.core.model import build_model
from jebm.data.shards import write_dataset
from jebm.data.source import source_from_arrays
from jebm.errors import CheckpointError, ConfigError
from jebm.evaluate.restore import restored
from jebm.parser import config_from_dict, override
from jebm.store.checkpoint import Facts
from jebm.store.retrieve import open_run
from jebm.store.storage import open_store
from jebm.train.provenance import provenance


def config() -> Config:
    return config_from_dict(
        {
            "model": {"image_size": 8, "latent_dims": [2, 3]},
            "inference": {"channels": [4], "width": 8},
            "generator": {"class_path": "mylab.Flat", "init_args": {"width": 8}},
            "energy": {"class_path": "mylab.SumEnergy", "init_args": {"width": 4}},
        }
    )


def save(uri: str, plain: dict[str, object], made_with: Config) -> None:
    """Save an untrained model as a run's checkpoint whose manifest has this config."""
    tensors = {f"model.{k}": v for k, v in build_model(made_with, ["mylab"]).state_dict().items()}
    facts = Facts(
        step=3,
        attempt=1,
        state={},
        config=plain,
        metrics={},
        provenance=provenance(made_with),
        world_size=1,
        parent=None,
    )
    open_run(uri).checkpoints.save(tensors, facts)


def test_a_checkpoint_needs_trust_and_warns_of_another_source(
    mylab: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"file://{tmp_path}/run"
    save(uri, config_to_dict(config()), config())
    made_by = open_run(uri).checkpoints.latest().provenance
    assert made_by["energy.class"] == "mylab.SumEnergy"
    assert len(made_by["generator.source_sha256"]) == 64
    with pytest.raises(ConfigError, match=r"generator.class_path: mylab.Flat .* add --trust mylab$"):
        restored(uri)
    with caplog.at_level(logging.WARNING, "jebm"):
        found = restored(uri, trusted=["mylab"])
        assert type(found.model.generator).__name__ == "Flat"
        assert caplog.messages == []
        with (mylab / "mylab.py").open("a") as file:
            file.write("# changed\n")
        restored(uri, trusted=["mylab"])
    (message,) = caplog.messages
    assert message.endswith("made with another source of generator (mylab.Flat), energy (mylab.SumEnergy)")


def test_tensors_of_another_class_are_named_with_its_keys(mylab: Path, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/run"
    other = config_to_dict(config())
    other["energy"]["init_args"]["width"] = 5
    save(uri, other, config())
    with pytest.raises(CheckpointError, match=r"energy.init_args, or the class in energy.class_path"):
        restored(uri, trusted=["mylab"])


READS = {
    "status": "status {run}",
    "runs": "runs {runs}",
    "fetch": "fetch {run} got",
    "compare-runs": "compare-runs {run} {runs}/again --output page",
    "tune report": "tune report {sweep} --output swept",
    "checkpoints list": "checkpoints list {run}",
    "checkpoints show": "checkpoints show {run}",
    "checkpoints verify": "checkpoints verify {run}",
    "checkpoints get": "checkpoints get {run} --output files",
    "checkpoints prune": "checkpoints prune {run} --keep-last 1",
}
"""Commands that read what a store says of a run, and need no trust: they build nothing."""

BUILDS = {
    "encode": "encode {run} {data} --output codes.npz",
    "export": "export {run} --output exported",
    "sample": "sample --checkpoint {run} --count 4",
    "evaluate": "evaluate --checkpoint {run} --suite chains --data {data} --train {data}",
}
"""Commands that build a run's model, or the feature net of its config, and so need --trust."""

OTHERS = {"compare", "doctor", "ingest", "push", "new", "submit", "train", "track", "tune"}
"""Commands whose classes their own command line names; doctor, push, submit and track, which read none."""


@pytest.fixture
def foreign(mylab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Places of a run, a sweep and a data set; the first two name classes of mylab, which nobody trusts."""
    monkeypatch.setenv("JEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "sweep"))
    made_sweeps = importlib.import_module("made_sweeps")
    runs, data = tmp_path / "runs", tmp_path / "data"
    named = override(
        config(), {"evaluation.features": {"class_path": "mylab.Means"}, "data.train": str(data)}
    )
    plain = config_to_dict(named)
    save(f"file://{runs}/run", plain, named)
    attempt = {"started": "2026-11-29T00:00:00Z", "from_step": 0, "total_steps": 3, "world_size": 1}
    record = {"run": "run", "config": plain, "attempts": [attempt | {"provenance": {}}]}
    (runs / "run/run.json").write_text(json.dumps(record))
    (runs / "run/metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    shutil.copytree(runs / "run", runs / "again")
    made_sweeps.make_sweep(runs / "sweep", [made_sweeps.trial({}, 1.0)], config=plain)
    pixels_NHWC = np.zeros((100, 8, 8, 1), np.uint8)
    write_dataset(source_from_arrays(pixels_NHWC, name="black"), open_store(str(data)))
    (mylab / "imported.txt").unlink()
    sys.modules.pop("mylab")
    return {"runs": str(runs), "run": f"{runs}/run", "sweep": f"{runs}/sweep", "data": str(data)}


def test_the_tables_name_every_command() -> None:
    named = {name.partition(" ")[0] for name in {**READS, **BUILDS}}
    assert named | OTHERS == {each.name.replace("_", "-") for each in pkgutil.iter_modules(commands.__path__)}


def test_no_command_imports_what_only_a_store_names(
    mylab: Path,
    foreign: dict[str, str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, line in {**READS, **BUILDS}.items():
        words = line.format(**foreign).split()
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as caught:
            commands.run_command(words[0])
        errors = capfd.readouterr().err
        assert not (mylab / "imported.txt").exists(), name
        assert "mylab" not in sys.modules, name
        assert caught.value.code == (2 if name in BUILDS else 0), (name, errors)
        assert errors.endswith("if you know that code, add --trust mylab\n") == (name in BUILDS), errors


def test_a_builtin_model_needs_no_trust_for_a_feature_net_that_it_does_not_use(
    mylab: Path, tmp_path: Path
) -> None:
    uri = f"file://{tmp_path}/run"
    ours = override(Config(), {"evaluation.features.class_path": "mylab.Means"})
    save(uri, config_to_dict(ours), ours)
    assert open_run(uri).checkpoints.latest().provenance["evaluation.features.class"] == "mylab.Means"
    (mylab / "imported.txt").unlink()
    sys.modules.pop("mylab")
    assert type(restored(uri).model.energy).__name__ == "EnergyNet"
    assert not (mylab / "imported.txt").exists()


def test_a_command_imports_only_what_trust_names(
    mylab: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"file://{tmp_path}/run"
    save(uri, config_to_dict(config()), config())
    (mylab / "imported.txt").unlink()
    sys.modules.pop("mylab")

    def sample(*words: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["sample", "--checkpoint", uri, "--count", "4", *words])
        with pytest.raises(SystemExit) as caught:
            commands.run_command("sample")
        return caught.value.code, capfd.readouterr().err

    code, error = sample()
    assert code == 2
    assert error.endswith("which is not trusted here; if you know that code, add --trust mylab\n")
    assert not (mylab / "imported.txt").exists()
    code, error = sample("--trust", "mylab.nets")
    assert code == 2
    assert "--trust mylab.nets: needs the name of a top-level module, such as mylab" in error
    code, error = sample("--trust", "mylab")
    assert code == 0, error
    assert (mylab / "samples" / "samples.json").exists()
