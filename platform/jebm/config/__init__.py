"""The configuration: one tree of frozen dataclasses, using only the standard library.

Sections validate themselves; `Config` validates across sections. An invalid value raises `ConfigError`,
naming the dotted key (`energy.width`). Values come in only through `jebm.parser`.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jebm.config.cluster import Cluster
from jebm.config.nets import (
    LEAST_STD,
    Energy,
    Generator,
    Hierarchy,
    Inference,
    Langevin,
    Likelihood,
    Model,
    Part,
    Prior,
)
from jebm.config.roles import RESUME_MAY_CHANGE, SHAPES_RESULT, Role, require, require_seed
from jebm.config.run import (
    INCEPTION_FILE,
    Checkpoint,
    Data,
    EarlyStopping,
    Evaluation,
    Features,
    Optimizer,
    Optimizers,
    Run,
    Train,
)

__all__ = [
    "INCEPTION_FILE",
    "LEAST_STD",
    "PLACES",
    "RESUME_MAY_CHANGE",
    "SHAPES_RESULT",
    "Checkpoint",
    "Cluster",
    "Config",
    "Data",
    "EarlyStopping",
    "Energy",
    "Evaluation",
    "Features",
    "Generator",
    "Hierarchy",
    "Inference",
    "Langevin",
    "Likelihood",
    "Model",
    "Optimizer",
    "Optimizers",
    "Part",
    "Prior",
    "Role",
    "Run",
    "Train",
    "config_to_dict",
    "current_name",
    "differing_keys",
    "fields",
    "leaves",
    "present_leaves",
    "require_seed",
    "role_of",
]


_OF_THE_ENERGY = (
    "prior.",
    "energy.",
    "langevin.",
    "optimizer.energy.",
    "train.gaussian_share",
    "train.energy_updates",
)


@dataclass(frozen=True)
class Config:
    """Everything that a training run depends on."""

    run: Run = field(default_factory=Run, metadata={"role": "where"})
    data: Data = field(default_factory=Data, metadata={"role": "where"})
    model: Model = field(default_factory=Model, metadata={"role": "shape"})
    inference: Inference = field(default_factory=Inference, metadata={"role": "shape"})
    generator: Generator = field(default_factory=Generator, metadata={"role": "shape"})
    likelihood: Likelihood = field(default_factory=Likelihood, metadata={"role": "shape"})
    hierarchy: Hierarchy = field(default_factory=Hierarchy, metadata={"role": "result"})
    prior: Prior = field(default_factory=Prior, metadata={"role": "result"})
    energy: Energy = field(default_factory=Energy, metadata={"role": "result"})
    langevin: Langevin = field(default_factory=Langevin, metadata={"role": "result"})
    optimizer: Optimizers = field(default_factory=Optimizers, metadata={"role": "result"})
    train: Train = field(default_factory=Train, metadata={"role": "result"})
    checkpoint: Checkpoint = field(default_factory=Checkpoint, metadata={"role": "where"})
    evaluation: Evaluation = field(default_factory=Evaluation, metadata={"role": "judge"})
    cluster: Cluster = field(default_factory=Cluster, metadata={"role": "where"})

    def __post_init__(self) -> None:
        # Our own trunks halve the image once between adjacent latent layers; below a single one, at will.
        layers = len(self.model.latent_dims)
        halvings = layers - 1
        expected = {
            "inference.channels": (len(self.inference.channels), halvings),
            "generator.channels": (
                len(self.generator.channels),
                halvings + (self.generator.join == "concat"),
            ),
        }
        own = [name for name in ("inference", "generator") if getattr(self, name).class_path is None]
        expected = {key: counts for key, counts in expected.items() if key.partition(".")[0] in own}
        if layers == 1:
            halvings = max((given for given, _ in expected.values()), default=0)
        for key, (given, needed) in expected.items():
            require(
                given == needed or layers == 1,
                key,
                f"has {given} numbers, but {layers} latent layers (model.latent_dims) need {needed}"
                + (f" with generator.join {self.generator.join}" if key.startswith("gen") else ""),
            )
        reachable = self.model.image_size.bit_length() - 1
        halving = f"{layers} latent layers" if layers > 1 else "the channels of a trunk"
        require(
            halvings <= reachable or not own,
            "model.image_size",
            f"{halving} halve the image {halvings} times, but {self.model.image_size} pixels can be halved "
            f"only {reachable}; use larger images, or fewer latent_dims and channels",
        )
        self._check_course()
        pieces = self.cluster.workers * self.train.accumulate
        require(
            self.train.batch_size >= pieces,
            "train.batch_size",
            f"{self.train.batch_size} must be at least cluster.workers x train.accumulate = {pieces}",
        )

    def _check_course(self) -> None:
        """Check what training begins with, and what may end it."""
        # Training only the energy requires trained nets and an energy.
        if self.train.regime == "two_stage":
            require(
                self.run.init_from is not None,
                "run.init_from",
                "train.regime two_stage needs the run whose generator and inference net it keeps",
            )
            require(
                self.has_energy, "prior.kind", "train.regime two_stage trains an energy, and there is none"
            )
            require(
                self.train.gaussian_share == 0,
                "train.gaussian_share",
                "train.regime two_stage trains the energy from the start",
            )
        require(
            self.train.early_stopping.metric is None or self.evaluation.every_steps > 0,
            "train.early_stopping.metric",
            "needs evaluations to watch; set evaluation.every_steps",
        )
        require(
            self.data.cache_gb is None or self.evaluation.every_steps == 0,
            "evaluation.every_steps",
            "evaluations need all of the training set on the disk; set it to 0, or data.cache_gb to null",
        )

    @property
    def has_energy(self) -> bool:
        """Whether the prior has an energy net; N(0, I) otherwise."""
        return self.prior.kind != "gaussian" and self.energy.width > 0

    def is_idle(self, key: str) -> bool:
        """Return whether a dotted key changes nothing in this config: the energy's, if there is no energy."""
        return not self.has_energy and key.startswith(_OF_THE_ENERGY)

    def energy_joins_at(self, total_steps: int) -> int | None:
        """Return the first step with the energy; `total_steps` if it never joins, None if there is none."""
        return round(self.train.gaussian_share * total_steps) if self.has_energy else None


def fields(kind: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield (dotted key, field) for all sections and values in a section, parents first."""
    for entry in dataclasses.fields(kind):
        yield f"{prefix}{entry.name}", entry
        if isinstance(entry.type, type) and dataclasses.is_dataclass(entry.type):
            yield from fields(entry.type, f"{prefix}{entry.name}.")


_ROLES: Mapping[str, Role] = {
    key: entry.metadata["role"] for key, entry in fields(Config) if "role" in entry.metadata
}

PLACES = tuple(key for key, entry in fields(Config) if entry.metadata.get("place"))
"""Keys whose values are paths, or URIs if data and results may be in a store."""


_RENAMED = {
    "model.likelihood_std": "likelihood.std",
    "evaluation.features": "evaluation.features.kind",
    "cluster.gpu": "cluster.gpus_per_worker",
}


def current_name(key: str) -> str:
    """Return the present name of a dotted key that an earlier version may have called otherwise."""
    return _RENAMED.get(key, key)


def role_of(key: str) -> Role:
    """Return the role of a dotted key: its own, or its section's, even if this version lacks the key."""
    while key not in _ROLES and key:
        key = key.rpartition(".")[0]
    return _ROLES.get(key, "result")


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the config as nested dicts, lists and plain values: for JSON, YAML, `config_from_dict`."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def present_leaves(other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a stored config's dict under the present names of their keys.

    Keys that an earlier version did not have count as their defaults, which do what that version did.
    """
    named = {current_name(key): value for key, value in leaves(other)}
    return dict(leaves(config_to_dict(Config()))) | named


def differing_keys(config: Config, other: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys that differ from another config's dict and may not change at a resume."""
    mine, theirs = dict(leaves(config_to_dict(config))), present_leaves(other)
    differing = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    return [key for key in differing if role_of(key) not in RESUME_MAY_CHANGE]
