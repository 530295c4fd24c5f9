"""From `run.track` to the feeds of a run."""

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence

from jebm.config import Config, config_to_dict, leaves
from jebm.errors import ConfigError
from jebm.store.manifest import Manifest
from jebm.store.storage import Store
from jebm.train.mlflow_tracker import MlflowTracker
from jebm.train.trackers import About, Reference, Tracker
from jebm.train.tracking import Feed
from jebm.train.wandb_tracker import WandbTracker

__all__ = ["check_trackers", "feeds_of", "references_to"]

_TRACKERS: Mapping[str, Callable[[], Tracker]] = {"mlflow": MlflowTracker, "wandb": WandbTracker}
"""Trackers outside the storage; TensorBoard's files are part of the journal."""


def check_trackers(config: Config) -> list[Tracker]:
    """Return the trackers of `run.track`, connected to nothing yet.

    Raises:
        ConfigError: a package or an address is missing.
    """
    for name in config.run.track:
        if name in _TRACKERS and importlib.util.find_spec(name) is None:
            raise ConfigError(f"run.track: {name} is not installed; install jebm[{name}]")
    return [_TRACKERS[name]() for name in config.run.track if name in _TRACKERS]


def feeds_of(config: Config, run: Store, from_step: int) -> list[Feed]:
    """Return a feed of each tracker, begun, for the run whose store is `run`; raises as `check_trackers`."""
    about = About(config.run.name, run.uri, dict(leaves(config_to_dict(config))))
    return [Feed(tracker, run, about, from_step) for tracker in check_trackers(config)]


def references_to(run: Store, manifests: Sequence[Manifest]) -> list[Reference]:
    """Return references to checkpoints of the run whose store is `run`."""
    return [
        Reference(
            name=manifest.name,
            step=manifest.step,
            uri=run.child(f"checkpoints/{manifest.name}").uri,
            manifest_sha256=hashlib.sha256(manifest.encode()).hexdigest(),
            metrics=manifest.metrics,
        )
        for manifest in manifests
    ]
