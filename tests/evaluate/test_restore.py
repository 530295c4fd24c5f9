"""What comes back from a checkpoint is what was saved; what does not fit is named in one line."""

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jebm.config import Config, Energy, Generator, Inference, Prior, Train, config_to_dict
from jebm.core.model import build_model
from jebm.errors import CheckpointError, JebmError
from jebm.evaluate.restore import restored
from jebm.store.checkpoint import Checkpoints, Facts
from jebm.store.retrieve import open_checkpoint, read_tensors
from jebm.store.storage import open_store

SMALL = Config(
    inference=Inference((2, 2), 4),
    generator=Generator((2, 2), 4),
    energy=Energy(5),
    train=Train(ema_decay=0.9),
)


@pytest.fixture
def storage() -> str:
    return f"memory://{uuid.uuid4().hex}/runs"


def tensors_of(config: Config, *, shift: float = 0.0) -> dict[str, Tensor]:
    """Return what a run saves; averaged weights, where kept, are `shift` apart from the others."""
    weights = build_model(config).state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    if config.train.ema_decay:
        tensors |= {f"ema.{name}": tensor + shift for name, tensor in weights.items()}
    return tensors | {f"optimizer.energy.{i}.exp_avg_sq": torch.full((3, i + 1), float(i)) for i in range(3)}


def save(
    storage: str, tensors: dict[str, Tensor], config: Config | dict[str, Any], step: int = 8, attempt: int = 1
) -> None:
    facts = Facts(
        step=step,
        attempt=attempt,
        world_size=1,
        config=config if isinstance(config, dict) else config_to_dict(config),
        provenance={"jebm": "0.1.2"},
        metrics={},
        state={"data_sha256": "0"},
        parent=None,
    )
    Checkpoints(open_store(storage), "mine").save(tensors, facts)


def refusal(uri: str) -> str:
    with pytest.raises(JebmError) as raised:
        restored(uri)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_averaged_weights_come_back_bit_for_bit_and_ask_for_no_gradient(storage: str) -> None:
    tensors = tensors_of(SMALL, shift=0.25)
    save(storage, tensors, SMALL)
    found = restored(f"{storage}/mine")
    assert found.weights == "ema"
    assert found.config == SMALL
    assert found.uri.endswith("runs/mine/checkpoints/step-00000008-a0001")
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, tensors[f"ema.{name}"])
    assert not found.model.training
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_the_last_weights_where_no_averages_were_kept(storage: str) -> None:
    config = replace(SMALL, train=Train())
    save(storage, tensors_of(config), config)
    found = restored(f"{storage}/mine")
    assert found.weights == "model"
    for name, tensor in build_model(config).state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor)


def test_a_run_gives_its_newest_checkpoint_and_a_name_its_own(storage: str) -> None:
    for step, shift in ((8, 0.0), (16, 1.0)):
        save(storage, tensors_of(SMALL, shift=shift), SMALL, step)
    assert restored(f"{storage}/mine/").manifest.step == 16
    named = restored(f"{storage}/mine/checkpoints/step-00000008-a0001")
    assert named.manifest.step == 8
    difference = restored(f"{storage}/mine").model.generator.top[0].bias - named.model.generator.top[0].bias
    torch.testing.assert_close(difference, torch.ones_like(difference))


def test_only_what_is_asked_for_is_read(storage: str) -> None:
    tensors = tensors_of(SMALL)
    save(storage, tensors, SMALL)
    run, manifest = open_checkpoint(f"{storage}/mine")
    names = [*(name for name in tensors if "exp_avg_sq" in name), "model.energy.linears.1.weight"]
    found = read_tensors(run, manifest, names)
    assert found.keys() == set(names)
    assert all(torch.equal(found[name], tensors[name]) for name in names)
    with pytest.raises(CheckpointError, match=r"no tensor model\.nobody"):
        read_tensors(run, manifest, ["model.nobody"])


def test_what_is_not_there_is_said(storage: str, tmp_path: Path) -> None:
    assert "no such run" in refusal(f"{storage}/mine")
    assert "no such run" in refusal(str(tmp_path / "nothing"))
    save(storage, tensors_of(SMALL), SMALL)
    for name in ("step-00000009-a0001", "latest"):
        message = refusal(f"{storage}/mine/checkpoints/{name}")
        assert f"checkpoints/{name}: no whole checkpoint" in message
        assert "jebm checkpoints list" in message


def test_a_config_of_another_version_is_named_with_its_key(storage: str) -> None:
    config = config_to_dict(SMALL)
    config["energy"]["temperature"] = 2.0
    save(storage, tensors_of(SMALL), config)
    message = refusal(f"{storage}/mine")
    assert "its config is not one of this version" in message
    assert "energy.temperature" in message
    assert "jebm 0.1.2" in message


def test_a_missing_layer_is_named(storage: str) -> None:
    tensors = tensors_of(SMALL)
    del tensors["ema.energy.linears.1.weight"]
    save(storage, tensors, SMALL)
    message = refusal(f"{storage}/mine")
    assert "tensor energy.linears.1.weight is missing, and its config has it with shape [5, 5]" in message
    assert "energy.depth" in message


def test_tensors_of_another_config_are_named_with_both_shapes_and_the_keys(storage: str) -> None:
    save(storage, tensors_of(SMALL), replace(SMALL, energy=Energy(7)))
    message = refusal(f"{storage}/mine")
    assert "tensor energy.linears.0.weight has shape [5, 14], and by its config [7, 14]" in message
    assert "energy.width" in message


def test_a_net_too_many_is_named(storage: str) -> None:
    save(storage, tensors_of(SMALL), replace(SMALL, prior=Prior("gaussian")))
    message = refusal(f"{storage}/mine")
    assert "tensor energy.linears.0.bias is not in the nets of its config" in message
    assert "prior.kind" in message
