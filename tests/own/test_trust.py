"""A checkpoint whose config names classes: built only where the command trusts their module."""

import logging
import sys
from pathlib import Path

import pytest

from jebm.commands import run_command
from jebm.config import Config, config_to_dict
from jebm.core.model import build_model
from jebm.errors import CheckpointError, ConfigError
from jebm.evaluate.restore import restored
from jebm.parser import config_from_dict
from jebm.store.checkpoint import Facts
from jebm.store.retrieve import open_run
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
            run_command("sample")
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
