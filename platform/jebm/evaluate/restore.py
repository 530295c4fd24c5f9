"""Restore a model from a checkpoint, for evaluation."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from jebm.config import Config
from jebm.core.by_class import changed_origins
from jebm.core.model import JointModel, build_model
from jebm.errors import CheckpointError, ConfigError
from jebm.parser import config_from_dict
from jebm.store.layout import TensorEntry
from jebm.store.manifest import Manifest
from jebm.store.retrieve import open_checkpoint, read_tensors, tensor_table

__all__ = ["Restored", "check_fit", "config_of", "planned", "restored", "stored_config"]

_LOG = logging.getLogger("jebm.evaluate")

_KEYS = {
    "inference": "inference.channels, inference.width, model.latent_dims or model.image_size",
    "generator": "generator.channels, generator.width, generator.join, model.latent_dims or model.image_size",
    "energy": "prior.kind, energy.width, energy.depth, energy.spectral_norm or model.latent_dims",
}
"""For each net, the keys that determine the shapes of its tensors."""

Kind: TypeAlias = tuple[tuple[int, ...], torch.dtype]
"""What a tensor is before it has memory: its shape and type."""


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
    plan = planned(config, trusted, place)
    if changed := changed_origins(config, trusted, manifest.provenance):
        _LOG.warning("%s: made with another source of %s", place, ", ".join(changed))
    # Compare the stored tensors with those of the config before reading or building any.
    stored = tensor_table(run.folder(manifest.name), manifest)
    weights: Literal["ema", "model"] = "ema" if any(name.startswith("ema.") for name in stored) else "model"
    own = {
        name.removeprefix(f"{weights}."): entry
        for name, entry in stored.items()
        if name.startswith(f"{weights}.")
    }
    check_fit(plan, config, own, place)
    model = build_model(config, trusted)
    tensors = read_tensors(run, manifest, [f"{weights}.{name}" for name in plan])
    model.load_state_dict({name.partition(".")[2]: tensor for name, tensor in tensors.items()})
    model = model.to(device).eval().requires_grad_(requires_grad=False)
    return Restored(model, config, manifest, run.uri, weights)


def planned(config: Config, trusted: Collection[str], place: str) -> dict[str, Kind]:
    """Return what the tensors of the config's model are, by name: jebm's own parts take no memory.

    Raises ConfigError as `build_model`; CheckpointError if no memory could hold the nets.
    """
    try:
        with torch.device("meta"):
            model = build_model(config, trusted)
    except (RuntimeError, OverflowError, TypeError) as error:  # how torch refuses sizes
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{place}: the nets of its config cannot be built ({reason})") from error
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}


def check_fit(
    plan: Mapping[str, Kind], config: Config, stored: Mapping[str, Tensor | TensorEntry], place: str
) -> None:
    """Raise CheckpointError unless tensors of these names, shapes and types are those `planned`."""
    for name, (shape, dtype) in plan.items():
        if name not in stored:
            raise _misfit(config, place, name, f"is missing, and its config has it with shape {list(shape)}")
        found = stored[name]
        if tuple(found.shape) != shape:
            raise _misfit(
                config, place, name, f"has shape {list(found.shape)}, and by its config {list(shape)}"
            )
        if found.dtype != dtype:
            raise CheckpointError(f"{place}: tensor {name} is {found.dtype}, and in the model {dtype}")
    if extra := sorted(stored.keys() - plan.keys()):
        raise _misfit(config, place, extra[0], "is not in the nets of its config")


def _misfit(config: Config, place: str, name: str, what: str) -> CheckpointError:
    part = name.partition(".")[0]
    keys = _KEYS.get(part, "the nets")
    if getattr(getattr(config, part, None), "class_path", None) is not None:
        keys = f"{part}.init_args, or the class in {part}.class_path is another one now"
    return CheckpointError(f"{place}: tensor {name} {what}; the config is another one in {keys}")
