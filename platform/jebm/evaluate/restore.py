"""Restore a model from a checkpoint, for evaluation."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from jebm.config import Config
from jebm.core.by_class import changed_origins
from jebm.core.model import JointModel, build_model
from jebm.errors import CheckpointError, ConfigError
from jebm.parser import config_from_dict
from jebm.store.manifest import Manifest
from jebm.store.retrieve import open_checkpoint, read_tensors, tensor_table

__all__ = ["Restored", "check_fit", "config_of", "restored", "stored_config"]

_LOG = logging.getLogger("jebm.evaluate")

_KEYS = {
    "inference": "inference.channels, inference.width, model.latent_dims or model.image_size",
    "generator": "generator.channels, generator.width, generator.join, model.latent_dims or model.image_size",
    "energy": "prior.kind, energy.width, energy.depth, energy.spectral_norm or model.latent_dims",
}
"""For each net, the keys that determine the shapes of its tensors."""


@dataclass(frozen=True)
class Restored:
    """A trained model and where it comes from."""

    model: JointModel
    """In evaluation mode; no parameter requires a gradient."""
    config: Config
    manifest: Manifest
    run: str
    """URI of the run."""
    weights: Literal["ema", "model"]
    """The averaged weights, or the last ones if no averages were kept."""

    @property
    def uri(self) -> str:
        """URI of the checkpoint."""
        return f"{self.run}/checkpoints/{self.manifest.name}"


def stored_config(manifest: Manifest, place: str) -> Config:
    """Return the config that a checkpoint was made with; raises as `config_of`."""
    return config_of(manifest.config, manifest.provenance, place)


def config_of(values: Mapping[str, Any], provenance: Mapping[str, str], place: str) -> Config:
    """Return the config that a model was made with, by this provenance.

    Raises CheckpointError, naming the `place` and the key, if the config is not valid in this version.
    """
    try:
        return config_from_dict(values)
    except ConfigError as error:
        made_by = provenance.get("jebm", "another version")
        raise CheckpointError(
            f"{place}: its config is not one of this version ({error}); it was made by jebm {made_by}"
        ) from error


def restored(uri: str, *, device: torch.device | str = "cpu", trusted: Collection[str] = ()) -> Restored:
    """Return the model of a checkpoint, …/checkpoints/<name>, or of a run's newest, on the device.

    Reads only the nets' tensors, not the optimizers'. Classes that its config names are imported only from
    `trusted` top-level modules.

    Raises:
        ConfigError: a class of its config is not of a trusted module, or cannot be built.
        StoreError: the URI names no run, or its storage cannot be read.
        CheckpointError: there is no such complete checkpoint, its config is of another version, or its
            tensors do not fit its config.
    """
    run, manifest = open_checkpoint(uri)
    place = f"{run.uri}/checkpoints/{manifest.name}"
    config = stored_config(manifest, place)
    model = build_model(config, trusted)
    if changed := changed_origins(config, trusted, manifest.provenance):
        _LOG.warning("%s: made with another source of %s", place, ", ".join(changed))
    # Compare the stored tensors with those of the config before reading any.
    stored = {name: entry.shape for name, entry in tensor_table(run.folder(manifest.name), manifest).items()}
    weights: Literal["ema", "model"] = "ema" if any(name.startswith("ema.") for name in stored) else "model"
    expected = [f"{weights}.{name}" for name in model.state_dict()]
    own = {
        name.removeprefix(f"{weights}."): shape
        for name, shape in stored.items()
        if name.startswith(f"{weights}.")
    }
    check_fit(model, config, own, place)
    tensors = read_tensors(run, manifest, expected)
    model.load_state_dict({name.partition(".")[2]: tensor for name, tensor in tensors.items()})
    model = model.to(device).eval().requires_grad_(requires_grad=False)
    return Restored(model, config, manifest, run.uri, weights)


def check_fit(model: JointModel, config: Config, stored: Mapping[str, tuple[int, ...]], place: str) -> None:
    """Raise CheckpointError unless tensors of these names and shapes are those of the config's model."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in stored:
            raise _misfit(config, place, name, f"is missing, and its config has it with shape {list(shape)}")
        if stored[name] != shape:
            raise _misfit(
                config, place, name, f"has shape {list(stored[name])}, and by its config {list(shape)}"
            )
    if extra := sorted(stored.keys() - expected.keys()):
        raise _misfit(config, place, extra[0], "is not in the nets of its config")


def _misfit(config: Config, place: str, name: str, what: str) -> CheckpointError:
    part = name.partition(".")[0]
    keys = _KEYS.get(part, "the nets")
    if getattr(getattr(config, part, None), "class_path", None) is not None:
        keys = f"{part}.init_args, or the class in {part}.class_path is another one now"
    return CheckpointError(f"{place}: tensor {name} {what}; the config is another one in {keys}")
