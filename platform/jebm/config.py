"""The configuration: one tree of frozen dataclasses, on the standard library alone.

Sections check themselves; `Config` checks what concerns two sections. A value that cannot work raises
`ConfigError`, naming the dotted key (`energy.width`). Values come in through `jebm.parser`, nowhere else.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from jebm.errors import ConfigError

__all__ = [
    "INCEPTION_FILE",
    "PLACES",
    "Checkpoint",
    "Cluster",
    "Config",
    "Data",
    "Energy",
    "Evaluation",
    "Features",
    "Generator",
    "Inference",
    "Langevin",
    "Model",
    "Optimizer",
    "Optimizers",
    "Prior",
    "Run",
    "Train",
    "config_to_dict",
    "differing_keys",
    "leaves",
]

Features: TypeAlias = Literal["classifier", "effnetlite0", "inceptionv3"]
"""Nets in which distances between images are taken."""

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The weights of inceptionv3 that published FIDs were taken with."""

PLACES = (
    *("run.storage", "run.init_from"),
    *("data.train", "data.held_out"),
    "evaluation.inception_weights",
)
"""Keys whose values are paths, and all but the last one perhaps URIs."""


def _require(condition: bool, key: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: {message}")


@dataclass(frozen=True)
class Run:
    """What the run is called, where it keeps its results, and what makes it repeatable.

    Args:
        name: Name of the run. The same name goes on where the run stopped; a new name starts anew.
        storage: Where results and checkpoints go: a folder, or s3://bucket/prefix (credentials come from
            the environment, the AWS profile or the instance role, never from here).
        seed: Seed of everything random: initial weights, data order, noise.
        deterministic: Ask torch for deterministic algorithms (some GPU kernels get slower).
        accept_changes: Resume even though the configuration differs from the checkpoint's.
        init_from: A new run begins with the tensors (nets, optimizers, averages) of another run's newest
            checkpoint, storage/name, or of a certain one, storage/name/checkpoints/step-00001200-a0001.

    """

    name: str = "run"
    storage: str = "runs"
    seed: int = 0
    deterministic: bool = True
    accept_changes: bool = False
    init_from: str | None = None

    def __post_init__(self) -> None:
        _require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name) is not None,
            "run.name",
            f"{self.name!r} must be letters, digits, '.', '_' or '-' (at most 100)",
        )
        _require(bool(self.storage), "run.storage", "must be a folder or s3://bucket/prefix")
        _require(self.seed >= 0, "run.seed", "must not be negative")


@dataclass(frozen=True)
class Data:
    """The images: data sets made by jobs/ingest.py.

    Args:
        train: Data set to train on: a folder or s3://bucket/prefix that holds dataset.json.
        held_out: Data set whose first images are reconstructed in the pictures; the training set without.

    """

    train: str = "jobs/data/fashion_mnist_2000/train"
    held_out: str | None = None


@dataclass(frozen=True)
class Model:
    """What the three nets share.

    Args:
        image_size: Height and width of the images in pixels.
        image_channels: 1 (grey) or 3 (colour).
        latent_dims: Width of each latent layer, bottom (next to the image) first, top last.
        likelihood_std: Standard deviation sigma of p(x|z) = N(decoder mean, sigma^2 I), pixels in [-1, 1].

    """

    image_size: int = 28
    image_channels: int = 1
    latent_dims: tuple[int, ...] = (2, 2, 10)
    likelihood_std: float = math.sqrt(1 / 6)

    def __post_init__(self) -> None:
        _require(self.image_size >= 2, "model.image_size", "must be at least 2")
        _require(self.image_channels in (1, 3), "model.image_channels", "must be 1 or 3")
        _require(len(self.latent_dims) >= 1, "model.latent_dims", "needs at least one layer")
        _require(min(self.latent_dims) >= 1, "model.latent_dims", "every layer needs a width of at least 1")
        _require(self.likelihood_std > 0, "model.likelihood_std", "must be positive")


@dataclass(frozen=True)
class Inference:
    """The inference net q(z|x).

    Args:
        channels: Channels of the trunk after each halving of the image; one fewer than latent layers.
        width: Width of the two fully connected layers below the top latent layer.

    """

    channels: tuple[int, ...] = (32, 64)
    width: int = 256

    def __post_init__(self) -> None:
        _require(all(c >= 1 for c in self.channels), "inference.channels", "must be positive")
        _require(self.width >= 1, "inference.width", "must be at least 1")


@dataclass(frozen=True)
class Generator:
    """The generator p(x|z).

    Args:
        channels: Channels of the trunk, bottom first: at each halving of the image (join: add), or at the
            full size and at each halving (join: concat, one more number).
        width: Width of the fully connected layers above the top of the trunk.
        join: How a latent layer enters the trunk: add (a linear map is added) or concat (a LeakyReLU map is
            concatenated, with one more convolution on each level).

    """

    channels: tuple[int, ...] = (32, 64)
    width: int = 256
    join: Literal["add", "concat"] = "add"

    def __post_init__(self) -> None:
        _require(all(c >= 1 for c in self.channels), "generator.channels", "must be positive")
        _require(self.width >= 1, "generator.width", "must be at least 1")


@dataclass(frozen=True)
class Prior:
    """Which prior the latents have.

    Args:
        kind: joint (an energy over all latent layers together: the paper's), top (over the top layer alone,
            as LEBM; the others are N(0, I)) or gaussian (N(0, I), no energy).

    """

    kind: Literal["joint", "top", "gaussian"] = "joint"


@dataclass(frozen=True)
class Energy:
    """The energy net f(z) of the prior p(z) proportional to exp(f(z)) N(z; 0, I), an MLP.

    Args:
        width: Units of each hidden layer; 0 switches the energy off, as prior.kind gaussian.
        depth: Number of hidden layers.
        spectral_norm: Divide every weight matrix by its largest singular value (bounds the slope of f).
        output_scale: Factor on f; with spectral norm it is the bound on the slope of f.

    """

    width: int = 100
    depth: int = 2
    spectral_norm: bool = True
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        _require(self.width >= 0, "energy.width", "must not be negative (0 is the Gaussian prior)")
        _require(1 <= self.depth <= 1_000, "energy.depth", "must lie between 1 and 1,000")
        _require(self.output_scale > 0, "energy.output_scale", "must be positive")


@dataclass(frozen=True)
class Langevin:
    """Short-run Langevin sampling of the prior: z <- z + s^2/2 * grad log p(z) + s * noise.

    Args:
        steps: Number of steps K of a chain, from fresh N(0, I).
        step_size: s, the standard deviation of the noise of a step (other codes name s^2 or s^2/2 so).
            Below 2: at 2 and above the chain diverges even on N(0, I). K steps forget the start when
            (1 - s^2/2)^K is small: s = 0.4, K = 40 leaves 0.035; s = 0.1, K = 40 leaves 0.82.
        kernel: What computes the chain: auto (compiled: C on a CPU where a C compiler is found, Triton on a
            GPU where triton is; else torch), torch (gradient in closed form) or autograd (the reference).
            They differ by rounding only, and autograd is used in any case where the generator maps noise to
            latents.
        noise: What draws the noise of the steps: torch (its generators) or philox (counter-based: drawn in
            the compiled kernel, and the same with every kernel and on every device).

    """

    steps: int = 40
    step_size: float = 0.4
    kernel: Literal["auto", "torch", "autograd"] = "auto"
    noise: Literal["torch", "philox"] = "torch"

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "langevin.steps", "must be at least 1")
        _require(0 < self.step_size < 2, "langevin.step_size", "must lie between 0 and 2")


@dataclass(frozen=True)
class Optimizer:
    """Adam and the schedule of its learning rate.

    Args:
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        weight_decay: Coupled L2 penalty (added to the gradient, as the paper's code does).
        schedule: constant; exponential (times decay_per_epoch each epoch); cosine (to 0 at the end).
        decay_per_epoch: Factor of the exponential schedule.
        warmup_steps: Steps of linear warm-up from 0.
        clip_norm: Largest norm of this player's gradient; null for no clipping.

    """

    lr: float = 3e-4
    beta1: float = 0.0
    beta2: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "exponential", "cosine"] = "constant"
    decay_per_epoch: float = 0.998
    warmup_steps: int = 0
    clip_norm: float | None = None

    def check(self, key: str) -> None:
        """Raise `ConfigError` under the name of the player (`key`) whose optimizer this is."""
        _require(0 < self.lr < math.inf, f"{key}.lr", "must be positive")
        _require(0 <= self.beta1 < 1, f"{key}.beta1", "must lie in [0, 1)")
        _require(0 <= self.beta2 < 1, f"{key}.beta2", "must lie in [0, 1)")
        _require(self.weight_decay >= 0, f"{key}.weight_decay", "must not be negative")
        _require(0 < self.decay_per_epoch <= 1, f"{key}.decay_per_epoch", "must lie in (0, 1]")
        _require(self.warmup_steps >= 0, f"{key}.warmup_steps", "must not be negative")
        _require(self.clip_norm is None or self.clip_norm > 0, f"{key}.clip_norm", "must be positive")


@dataclass(frozen=True)
class Optimizers:
    """One optimizer for each player.

    Args:
        generator: Of the generator and the inference net together.
        energy: Of the energy net.

    """

    generator: Optimizer = field(default_factory=Optimizer)
    energy: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self) -> None:
        self.generator.check("optimizer.generator")
        self.energy.check("optimizer.energy")


@dataclass(frozen=True)
class Train:
    """Length, batch and arithmetic of the training.

    Args:
        epochs: Passes over the data; a fraction is allowed.
        batch_size: Images of one update, over all workers together.
        accumulate: Split a worker's share of the batch into this many pieces, to save memory.
        precision: fp32, or bf16 (autocast of generator and inference net; energy and chain stay fp32).
        regime: joint (all nets together) or two_stage (the energy alone, on the posteriors of the nets that
            run.init_from names, which stay as they are: mostly a run with prior.kind gaussian).
        gaussian_share: Share of the run, from its start, that is trained with the Gaussian prior; the energy
            joins then, when posteriors have settled.
        energy_updates: Updates of the energy for each one of generator and inference net, with chains and
            posterior samples of their own.
        ema_decay: Decay per step of the averaged weights that pictures use; 0 for none.
        report_every_steps: Steps between two lines of the log.
        pictures_every_steps: Steps between two sheets of pictures; 0 for one at the end only.

    """

    epochs: float = 1.0
    batch_size: int = 128
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    regime: Literal["joint", "two_stage"] = "joint"
    gaussian_share: float = 0.0
    energy_updates: int = 1
    ema_decay: float = 0.0
    report_every_steps: int = 50
    pictures_every_steps: int = 500

    def __post_init__(self) -> None:
        _require(0 < self.epochs <= 1e9, "train.epochs", "must be positive, and no more than 1e9")
        _require(self.batch_size >= 1, "train.batch_size", "must be at least 1")
        _require(self.accumulate >= 1, "train.accumulate", "must be at least 1")
        _require(
            0 <= self.gaussian_share < 1,
            "train.gaussian_share",
            "must lie in [0, 1); prior.kind gaussian trains without an energy",
        )
        _require(self.energy_updates >= 1, "train.energy_updates", "must be at least 1")
        _require(0 <= self.ema_decay < 1, "train.ema_decay", "must lie in [0, 1)")
        _require(self.report_every_steps >= 1, "train.report_every_steps", "must be at least 1")
        _require(self.pictures_every_steps >= 0, "train.pictures_every_steps", "must not be negative")


@dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are written and how many stay.

    Args:
        every_steps: Steps between two checkpoints; one more is written at the end.
        keep_last: Checkpoints that stay; older ones are deleted, unless pinned or what this start resumed.
        sharded: Each worker writes its share of the tensors: for large models, or a storage that one writer
            cannot fill.

    """

    every_steps: int = 500
    keep_last: int = 3
    sharded: bool = False

    def __post_init__(self) -> None:
        _require(self.every_steps >= 1, "checkpoint.every_steps", "must be at least 1")
        _require(self.keep_last >= 1, "checkpoint.keep_last", "must be at least 1")


@dataclass(frozen=True)
class Evaluation:
    """Measures of samples and of the prior while training, on the held-out images (docs/evaluation.md).

    Args:
        every_steps: Steps between two evaluations, one more at the end; 0 for none.
        features: Where distances between images are taken: classifier (a small one, trained once on each
            node on the labels of data.train), effnetlite0 (needs `pip install -e '.[features]'`) or
            inceptionv3 (needs `pip install --no-deps torch-fidelity` and inception_weights).
        inception_weights: File with the weights of inceptionv3, on each node that evaluates;
            weights-inception-2015-12-05-6726825d.pth makes its Fréchet distance the FID.
        samples: Prior samples of each evaluation, compared with as many held-out images.
        chain_factor: Length of the long chains in multiples of langevin.steps: short-run chains can look good
            without having mixed, and these show it.

    """

    every_steps: int = 0
    features: Features = "classifier"
    inception_weights: str | None = None
    samples: int = 2000
    chain_factor: int = 20

    def __post_init__(self) -> None:
        _require(self.every_steps >= 0, "evaluation.every_steps", "must not be negative (0 is never)")
        _require(
            self.features != "inceptionv3" or bool(self.inception_weights),
            "evaluation.inception_weights",
            "evaluation.features inceptionv3 needs a file with its weights; give the path of your copy of "
            f"{INCEPTION_FILE} (jobs/evaluate.py: --inception-weights)",
        )
        _require(self.samples >= 100, "evaluation.samples", "must be at least 100")
        _require(self.chain_factor >= 1, "evaluation.chain_factor", "must be at least 1")


@dataclass(frozen=True)
class Cluster:
    """What the run takes of the cluster.

    Args:
        engine: ray (Ray Train; starts a local Ray where none runs) or process (this process alone, or the
            processes that torchrun started).
        workers: Number of data-parallel workers.
        min_workers: Go on with as few as this when nodes are lost, and grow again when they return (Ray only;
            the order of the images stays, the noise does not); null for a fixed number.
        cpus_per_worker: CPUs (and torch threads) of each worker.
        gpu: Give each worker one GPU.
        max_failures: How often Ray may restart the workers after a crash.
        autoscales: The cluster adds nodes on demand, so do not refuse what it has not got yet.

    """

    engine: Literal["ray", "process"] = "ray"
    workers: int = 1
    min_workers: int | None = None
    cpus_per_worker: int = 1
    gpu: bool = False
    max_failures: int = 3
    autoscales: bool = False

    def __post_init__(self) -> None:
        _require(self.workers >= 1, "cluster.workers", "must be at least 1")
        _require(
            self.min_workers is None or 1 <= self.min_workers <= self.workers,
            "cluster.min_workers",
            f"must lie between 1 and cluster.workers = {self.workers}",
        )
        _require(
            1 <= self.cpus_per_worker <= 1_024, "cluster.cpus_per_worker", "must lie between 1 and 1,024"
        )
        _require(self.max_failures >= 0, "cluster.max_failures", "must not be negative")


@dataclass(frozen=True)
class Config:
    """Everything that a training run depends on."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    inference: Inference = field(default_factory=Inference)
    generator: Generator = field(default_factory=Generator)
    prior: Prior = field(default_factory=Prior)
    energy: Energy = field(default_factory=Energy)
    langevin: Langevin = field(default_factory=Langevin)
    optimizer: Optimizers = field(default_factory=Optimizers)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluation: Evaluation = field(default_factory=Evaluation)
    cluster: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        layers = len(self.model.latent_dims)
        halvings = layers - 1
        expected = {
            "inference.channels": (len(self.inference.channels), halvings),
            "generator.channels": (
                len(self.generator.channels),
                halvings + (self.generator.join == "concat" and layers > 1),
            ),
        }
        for key, (given, needed) in expected.items():
            _require(
                given == needed,
                key,
                f"has {given} numbers, but {layers} latent layers (model.latent_dims) need {needed}"
                + (f" with generator.join {self.generator.join}" if key.startswith("gen") else ""),
            )
        reachable = self.model.image_size.bit_length() - 1
        _require(
            halvings <= reachable,
            "model.image_size",
            f"{layers} latent layers halve the image {halvings} times, but {self.model.image_size} pixels "
            f"can be halved only {reachable}; use larger images, or fewer latent_dims and channels",
        )
        if self.train.regime == "two_stage":
            _require(
                self.run.init_from is not None,
                "run.init_from",
                "train.regime two_stage needs the run whose generator and inference net it keeps",
            )
            _require(
                self.has_energy, "prior.kind", "train.regime two_stage trains an energy, and there is none"
            )
            _require(
                self.train.gaussian_share == 0,
                "train.gaussian_share",
                "train.regime two_stage trains the energy from the start",
            )
        fewest = self.cluster.min_workers or self.cluster.workers
        for workers in range(fewest, self.cluster.workers + 1):
            share = workers * self.train.accumulate
            _require(
                self.train.batch_size % share == 0,
                "train.batch_size",
                f"{self.train.batch_size} must divide by cluster.workers x train.accumulate = {share}",
            )

    @property
    def has_energy(self) -> bool:
        """Whether the prior has an energy net; N(0, I) otherwise."""
        return self.prior.kind != "gaussian" and self.energy.width > 0


_KEYS_FREE_TO_CHANGE = (
    "run.",
    "data.",
    "cluster.",
    "checkpoint.",
    "evaluation.",
    "langevin.kernel",
    "train.epochs",
    "train.report_",
    "train.pictures_",
)
"""A resumed run may differ in these: where it runs and reads, how long, how often it reports.

But run.seed may not; and the content of the data, whose hash a checkpoint holds, is compared in `fit`."""


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


def differing_keys(config: Config, other: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys in which `config` and another config's dict differ and a resume may not."""
    mine, theirs = dict(leaves(config_to_dict(config))), dict(leaves(other))
    differing = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    return [key for key in differing if key == "run.seed" or not key.startswith(_KEYS_FREE_TO_CHANGE)]
