"""Load the checkpoint that a run starts from: its own newest, or the one in `run.init_from`."""

import logging
from typing import cast

from jebm.config import Config, differing_keys, role_of
from jebm.core.by_class import changed_origins, named_modules
from jebm.data.manifest import DatasetManifest
from jebm.errors import CheckpointError, ConfigError
from jebm.store.checkpoint import Checkpoints, Manifest
from jebm.store.retrieve import RunStore, open_checkpoint, read_tensors
from jebm.train.runtime import Runtime
from jebm.train.state import TrainState

__all__ = ["check_same", "newest", "origin_of", "resume"]

_LOG = logging.getLogger("jebm.train")
_SHOWN = 20  # keys named in an error: a manifest may hold any number


def resume(
    config: Config, runtime: Runtime, state: TrainState, checkpoints: Checkpoints, data: DatasetManifest
) -> Manifest | None:
    """Read the run's newest checkpoint into `state` on every rank; return its manifest, or None.

    A run without one starts from the tensors of `run.init_from`, at step 0. If the newest one cannot be read,
    or holds NaN or infinity, an older whole one is used, with a warning: that costs the steps in between,
    while stopping would leave the run idle until someone intervenes.

    Raises:
        CheckpointError: there are checkpoints but none is whole, or the model differs.
        ConfigError: the checkpoint has another model, objective or data set.
    """
    # Its own newest checkpoint; if that is damaged, the newest that is intact in every byte.
    damage: CheckpointError | None = None
    for deep in (False, True):
        with runtime.together():
            found = newest(checkpoints, deep=deep) if runtime.is_main else None
        manifest = runtime.from_main(found)
        if manifest is None:
            break
        try:
            with runtime.together():
                if not config.run.accept_changes:
                    check_same(config, manifest, data)
                checkpoints.load(manifest, state.tensors())
        except CheckpointError as error:
            if deep:
                raise
            damage = error
            _LOG.warning("%s; looking for an older checkpoint that is whole in every byte", error)
        else:
            state.step = manifest.step
            if runtime.is_main:
                _warn_of_other_source(config, manifest)
            return manifest
    if damage is not None:
        raise damage  # the checkpoint is damaged, and half loaded into the tensors
    # A new run: another run's tensors, or the initial ones.
    if config.run.init_from is not None:
        with runtime.together():
            chosen = origin_of(config) if runtime.is_main else ""
        uri = runtime.from_main(chosen)
        with runtime.together():
            run, origin = open_checkpoint(uri)
            if config.train.regime == "two_stage":
                _take_nets(config, run, origin, state)
            else:
                run.checkpoints.load(origin, state.tensors())
    return None


def newest(checkpoints: Checkpoints, *, deep: bool) -> Manifest | None:
    """Return the checkpoint to go on from, as `Checkpoints.latest`.

    Raises:
        CheckpointError: there are checkpoints but none is whole; it also says how to begin anew.
    """
    try:
        return checkpoints.latest(deep=deep)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; delete their folders to begin anew, or choose another run.name"
        ) from error


def _warn_of_other_source(config: Config, manifest: Manifest) -> None:
    if changed := changed_origins(config, named_modules(config), manifest.provenance):
        _LOG.warning("resumes with another source of %s than the checkpoint's", ", ".join(changed))


def origin_of(config: Config) -> str:
    """Return the URI of the checkpoint in `run.init_from`: a given one, or the run's newest.

    Raises:
        CheckpointError: there is no such run, or no such whole checkpoint.
        ConfigError: its nets are not those that two_stage needs.
    """
    uri = cast(str, config.run.init_from)
    try:
        run, manifest = open_checkpoint(uri)
    except CheckpointError as error:
        raise CheckpointError(f"run.init_from: {error}") from error
    if config.train.regime == "two_stage":
        _check_nets(config, manifest)
    return f"{run.uri}/checkpoints/{manifest.name}"


def _check_nets(config: Config, origin: Manifest) -> None:
    """Raise `ConfigError` if `run.init_from` has other nets than two_stage needs."""
    keys = [key for key in differing_keys(config, origin.config) if role_of(key) == "shape"]
    if keys:
        raise ConfigError(
            f"run.init_from: {config.run.init_from} was trained with another {_listed(keys)}; "
            "train.regime two_stage keeps its nets, so set them as they are there"
        )


def _take_nets(config: Config, run: RunStore, origin: Manifest, state: TrainState) -> None:
    """Copy only a checkpoint's generator, inference net and likelihood into the state.

    Raises CheckpointError if they are not those of its config.
    """
    parts = ("generator.", "inference.", "likelihood.")
    own = {name: tensor for name, tensor in state.model.state_dict().items() if name.startswith(parts)}
    stored = read_tensors(run, origin, [f"model.{name}" for name in own])
    weights = {name: stored[f"model.{name}"] for name in own}
    for name, tensor in weights.items():
        if (tensor.dtype, tensor.shape) != (own[name].dtype, own[name].shape):
            found = f"{tensor.dtype}{list(tensor.shape)} in the checkpoint"
            wanted = f"{own[name].dtype}{list(own[name].shape)} in the model"
            raise CheckpointError(f"run.init_from: {run.uri}: model.{name} is {found} and {wanted}")
    for model in filter(None, (state.model, state.ema)):
        model.load_state_dict(weights, strict=False)  # the energy keeps its weights


def check_same(config: Config, manifest: Manifest, data: DatasetManifest) -> None:
    """Raise `ConfigError` if the checkpoint has another model, objective or data set."""
    keys = differing_keys(config, manifest.config)
    if manifest.state.get("data_sha256") != data.sha256:
        keys.append("data.train (its content)")
    if keys:
        raise ConfigError(
            f"run.name: run {config.run.name} has a checkpoint (step {manifest.step}) made with another "
            f"{_listed(keys)}; choose a new run.name, or set run.accept_changes to true"
        )


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{', '.join(keys[:_SHOWN])}{more}"
