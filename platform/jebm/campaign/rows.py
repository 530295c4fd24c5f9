"""The measures of each run, stored with what they depend on, so that nothing is measured twice."""

import json
import math
import sys
from typing import Any, Generic, Protocol, TypeVar

from jebm.campaign.trials import Trial
from jebm.cli import tell
from jebm.config import Config, config_to_dict
from jebm.core.by_class import named_modules
from jebm.data.dataset import load_images
from jebm.evaluate.features import feature_net
from jebm.evaluate.measures import long_factor, measure_model
from jebm.evaluate.restore import restored
from jebm.report.write import finite
from jebm.store.records import DamagedRecordError, read_object, set_aside, understood
from jebm.store.storage import ObjectMissingError, Store, open_store
from jebm.train.runtime import device_here
from jebm.untrusted import JsonObject, typed

__all__ = ["Instrument", "PriorMeasures", "Row", "Rows"]

Row = dict[str, Any]
"""The measures of one run; empty if its training diverged."""

T = TypeVar("T", bound=Trial)
T_contra = TypeVar("T_contra", bound=Trial, contravariant=True)


class Instrument(Protocol[T_contra]):
    """What a campaign measures of a finished run."""

    def identity(self, trial: T_contra) -> JsonObject:
        """Return what a run's row depends on besides the run's newest checkpoint, as JSON values."""

    def measure(self, trial: T_contra) -> Row:
        """Return the row of a finished run: numbers by name, or nested mappings of them."""


class Rows(Generic[T]):
    """Measured rows, stored as rows/KEY.json with what they depend on."""

    def __init__(self, store: Store, instrument: Instrument[T]) -> None:
        self._store, self._instrument = store, instrument

    def kept(self, trial: T) -> Row | None:
        """Return a run's row if it is still valid; an empty one if the run diverged.

        A damaged row is set aside with a message.
        """
        key = f"rows/{trial.key}.json"
        try:
            found = read_object(self._store, key)
            with understood(self._store, key):
                identity, row = typed(found, "identity", dict), _numbers(typed(found, "row", dict))
        except ObjectMissingError:
            return None
        except DamagedRecordError as error:
            tell(f"{error}; it is kept as {set_aside(self._store, key)}, and the model is measured again")
            return None
        return row if identity == self._identity(trial) else None

    def keep(self, trial: T, row: Row) -> None:
        """Write the row of a run; an empty one means that training diverged."""
        content = {"identity": self._identity(trial), "row": finite(row)}
        self._store.put(f"rows/{trial.key}.json", json.dumps(content, indent=1).encode())

    def measure(self, trial: T) -> Row:
        """Measure the finished run, write the row and return it."""
        tell(f"measuring {trial.name}")
        row = self._instrument.measure(trial)
        self.keep(trial, row)
        return row

    def _identity(self, trial: T) -> JsonObject:
        manifest = trial.latest()
        return {
            "format": "jebm-comparison-row",
            "version": 3,
            "run": trial.name,
            "steps": trial.total_steps,
            "checkpoint": None if manifest is None else manifest.name,
            "created": None if manifest is None else manifest.created.isoformat(),
            **self._instrument.identity(trial),
        }


def _numbers(content: JsonObject) -> Row:
    """Return a row from its JSON, in which NaN is null; raises ValueError."""
    row: Row = {}
    for name, value in content.items():
        if isinstance(value, dict):
            row[name] = _numbers(value)
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} is no number")
        elif isinstance(value, int) and abs(value) > sys.float_info.max:
            raise ValueError(f"{name} is too large")
        else:
            row[name] = math.nan if value is None else value
    return row


class PriorMeasures:
    """An `Instrument` of the measures in `jebm.evaluate.measures` by which priors are compared."""

    def __init__(self, config: Config) -> None:
        """Read the images of the config that all arms share, and build the feature net."""
        self._device = device_here(config)
        train = load_images(open_store(config.data.train))
        self.held_out = load_images(open_store(config.data.held_out)) if config.data.held_out else train
        self.net = feature_net(config, train, named_modules(config), device=self._device)
        self._train = train.manifest.sha256

    def identity(self, trial: Trial) -> JsonObject:
        """Return what a row depends on: images, features, samples and chains."""
        return {
            "held_out": self.held_out.manifest.sha256,
            "train": self._train,
            "features": self.net.sha256,
            "samples": trial.config.evaluation.samples,
            "langevin": config_to_dict(trial.config)["langevin"],
            "long_steps": long_factor(trial.config) * trial.config.langevin.steps,
        }

    def measure(self, trial: Trial) -> Row:
        """Return measure -> value."""
        model = restored(trial.uri, device=self._device, trusted=named_modules(trial.config)).model
        return measure_model(model, trial.config, self.held_out, self.net)
