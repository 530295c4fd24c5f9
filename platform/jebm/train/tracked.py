"""From `run.track` to the feeds of a run."""

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jebm.config import leaves
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


def check_trackers(names: Sequence[str]) -> list[Tracker]:
    """Return the trackers of `run.track`, connected to nothing yet; names of no tracker are passed over.

    Raises:
        ConfigError: a package or an address is missing.
    """
    known = [name for name in names if name in _TRACKERS]
    for name in known:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"run.track: {name} is not installed; pip install {name}")
    return [_TRACKERS[name]() for name in known]


def feeds_of(names: Sequence[str], config: Mapping[str, Any], run: Store, from_step: int) -> list[Feed]:
    """Return a feed of each tracker, begun, for the run whose store is `run`; raises as `check_trackers`.

    `config` is the run's, as nested plain values; what the journal has up to `from_step` is sent if missing.
    """
    about = About(run.uri.rpartition("/")[2], run.uri, dict(leaves(config)))
    return [Feed(tracker, run, about, from_step) for tracker in check_trackers(names)]


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
