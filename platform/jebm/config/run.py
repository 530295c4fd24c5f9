"""The run's sections: names and storage, data, optimizers, training, evaluation, workers."""

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jebm.config.names import is_reserved
from jebm.config.nets import Part
from jebm.config.roles import key, require, require_seed

__all__ = [
    "INCEPTION_FILE",
    "Checkpoint",
    "Data",
    "EarlyStopping",
    "Evaluation",
    "Features",
    "Optimizer",
    "Optimizers",
    "Run",
    "Train",
]

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The inceptionv3 weights used for published FIDs."""


@dataclass(frozen=True)
class Run:
    """The run's name, where its results go, and what makes it reproducible.

    Args:
        name: Name of the run. The same name resumes the run; a new name starts a new one.
        storage: Where results and checkpoints go: a folder, or s3://bucket/prefix (credentials come from
            the environment, the AWS profile or the instance role, never from here).
        seed: Seed of everything random: initial weights, data order, noise.
        deterministic: Use deterministic algorithms in torch (some GPU kernels get slower).
        accept_changes: Resume even though the configuration differs from the checkpoint's.
        init_from: Start a new run from the tensors (nets, optimizers, averages) of another run's newest
            checkpoint, storage/name, or a given one, storage/name/checkpoints/step-00001200-a0001.
        track: Where reports and pictures go besides metrics.jsonl: tensorboard (files in the storage), wandb
            and mlflow (credentials come from their environment variables, never from here).

    """

    name: str = key("run", "start")
    storage: str = key("runs", "where", place=True)
    seed: int = key(0, "result")
    deterministic: bool = True
    accept_changes: bool = False
    init_from: str | None = key(None, "start", place=True)
    track: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = key(("tensorboard",), "where")

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name) is not None,
            "run.name",
            f"{self.name!r} must be letters, digits, '.', '_' or '-' (at most 100)",
        )
        require(
            not is_reserved(self.name),
            "run.name",
            f"{self.name!r} is the name of something within a run; choose another",
        )
        require(bool(self.storage), "run.storage", "must be a folder or s3://bucket/prefix")
        require_seed(self.seed, "run.seed")
        require(len({*self.track}) == len(self.track), "run.track", "names a tracker twice")


@dataclass(frozen=True)
class Data:
    """The images: data sets written by jebm ingest.

    Args:
        train: Data set to train on: a folder or s3://bucket/prefix that holds dataset.json.
        validation: Data set to make choices by: evaluations during training, and so sweeps, see only these
            images; jebm ingest --validation N holds them back from the training set.
        held_out: Test set, for final figures: jebm evaluate and jebm compare measure on it, and the pictures
            reconstruct its first images; by default the training set.
        cache_gb: GB (1e9 bytes) of each node's disk, for each run on it, for a training set that does not
            fit: windows of a few parts pass through them, and images are shuffled within a window. Needs
            data.held_out. null for all of the set at once.

    """

    train: str = key("jobs/data/fashion_mnist_2000/train", "where", place=True)
    held_out: str | None = key(None, "where", place=True)
    validation: str | None = key(None, "judge", place=True)
    cache_gb: float | None = key(None, "result")

    def __post_init__(self) -> None:
        require(self.cache_gb is None or 0 < self.cache_gb < math.inf, "data.cache_gb", "must be positive")
        require(
            self.cache_gb is None or self.held_out is not None,
            "data.held_out",
            "data.cache_gb needs another set for the pictures; give one that fits the disk",
        )

    @property
    def judging(self) -> tuple[str, str]:
        """The key and place of the images that evaluations during training see."""
        places = {"data.validation": self.validation, "data.held_out": self.held_out}
        return next(((key, place) for key, place in places.items() if place), ("data.train", self.train))


@dataclass(frozen=True)
class Optimizer:
    """Adam and its learning-rate schedule.

    Args:
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        weight_decay: Coupled L2 penalty (added to the gradient, as the paper's code does).
        schedule: constant; exponential (times decay_per_epoch each epoch); cosine (to 0 at the end).
        decay_per_epoch: Factor of the exponential schedule.
        warmup_steps: Steps of linear warm-up from 0.
        clip_norm: Maximum norm of this player's gradient; null for no clipping.

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
        """Raise `ConfigError` naming the player (`key`) that this optimizer belongs to."""
        require(0 < self.lr < math.inf, f"{key}.lr", "must be positive")
        require(0 <= self.beta1 < 1, f"{key}.beta1", "must lie in [0, 1)")
        require(0 <= self.beta2 < 1, f"{key}.beta2", "must lie in [0, 1)")
        require(self.weight_decay >= 0, f"{key}.weight_decay", "must not be negative")
        require(0 < self.decay_per_epoch <= 1, f"{key}.decay_per_epoch", "must lie in (0, 1]")
        require(self.warmup_steps >= 0, f"{key}.warmup_steps", "must not be negative")
        require(self.clip_norm is None or self.clip_norm > 0, f"{key}.clip_norm", "must be positive")


@dataclass(frozen=True)
class Optimizers:
    """One optimizer for each player.

    Args:
        generator: For the generator and the inference net together.
        energy: For the energy net.
        likelihood: For the likelihood's own parameters (likelihood.learn_std), if it has any.

    """

    generator: Optimizer = field(default_factory=Optimizer)
    energy: Optimizer = field(default_factory=Optimizer)
    likelihood: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-2, beta1=0.9, beta2=0.99))

    def __post_init__(self) -> None:
        self.generator.check("optimizer.generator")
        self.energy.check("optimizer.energy")
        self.likelihood.check("optimizer.likelihood")


@dataclass(frozen=True)
class EarlyStopping:
    """End a run when its evaluations no longer improve.

    Args:
        metric: The measure to watch at every evaluation.every_steps, such as evaluation/elbo; null for never.
        patience: Evaluations in a row without an improvement after which the run ends.
        min_improvement: By how much an evaluation must beat the best one to count as an improvement.

    """

    metric: str | None = None
    patience: int = 5
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        key = "train.early_stopping"
        require(
            self.metric is None or self.metric.startswith("evaluation/"),
            f"{key}.metric",
            "must be a measure on held-out images, such as evaluation/elbo: the training loss falls anyway",
        )
        require(self.patience >= 1, f"{key}.patience", "must be at least 1")
        require(0 <= self.min_improvement < math.inf, f"{key}.min_improvement", "must not be negative")


@dataclass(frozen=True)
class Train:
    """Length, batches and precision of training.

    Args:
        epochs: Passes over the data; a fraction is allowed.
        batch_size: Images per update, over all workers together.
        accumulate: Split a worker's share of the batch into this many pieces, to save memory.
        precision: fp32; tf32 (on GPUs, products of factors with 10 bits of mantissa); or bf16 (autocast of
            generator and inference net; energy and chain stay fp32). Evaluation is always fp32.
        compile: Let torch compile losses and gradients before the first step, which takes a minute or more.
            It leaves 60 % of a GPU's launches, counted on a CPU; CPUs get no faster (docs/performance.md).
        regime: joint (all nets together) or two_stage (only the energy, on the posteriors of frozen nets from
            run.init_from, usually a run with prior.kind gaussian).
        gaussian_share: Share of the run, from its start, trained with the Gaussian prior; the energy joins
            afterwards, when posteriors have settled.
        energy_updates: Energy updates per update of generator and inference net, each with its own chains and
            posterior samples.
        ema_decay: Decay per step of the averaged weights used for pictures; 0 for none.
        report_every_steps: Steps between log lines.
        pictures_every_steps: Steps between sheets of pictures; 0 for only one at the end.
        early_stopping: When to end before that.

    """

    epochs: float = key(1.0, "length")
    batch_size: int = 128
    accumulate: int = 1
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    compile: bool = key(False, "where")
    regime: Literal["joint", "two_stage"] = "joint"
    gaussian_share: float = 0.0
    energy_updates: int = 1
    ema_decay: float = 0.0
    report_every_steps: int = key(50, "where")
    pictures_every_steps: int = key(500, "where")
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping, metadata={"role": "length"})

    def __post_init__(self) -> None:
        require(0 < self.epochs <= 1e9, "train.epochs", "must be positive, and no more than 1e9")
        require(self.batch_size >= 1, "train.batch_size", "must be at least 1")
        require(self.accumulate >= 1, "train.accumulate", "must be at least 1")
        require(
            0 <= self.gaussian_share < 1,
            "train.gaussian_share",
            "must lie in [0, 1); prior.kind gaussian trains without an energy",
        )
        require(self.energy_updates >= 1, "train.energy_updates", "must be at least 1")
        require(0 <= self.ema_decay < 1, "train.ema_decay", "must lie in [0, 1)")
        require(self.report_every_steps >= 1, "train.report_every_steps", "must be at least 1")
        require(self.pictures_every_steps >= 0, "train.pictures_every_steps", "must not be negative")


@dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are written and how many are kept.

    Args:
        every_steps: Steps between checkpoints; one more is written at the end.
        keep_last: Checkpoints to keep; older ones are deleted, except pinned ones and the one resumed from.
        sharded: Each worker writes its share of the tensors: for large models, or a storage that one writer
            cannot fill.

    """

    every_steps: int = 500
    keep_last: int = 3
    sharded: bool = False

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "checkpoint.every_steps", "must be at least 1")
        require(self.keep_last >= 1, "checkpoint.keep_last", "must be at least 1")


@dataclass(frozen=True)
class Features(Part):
    """The net whose features define distances between images: `evaluation.features: KIND`, or a class.

    Args:
        kind: classifier (a small one, trained once on the labels of data.train), effnetlite0 (needs
            `pip install -e '.[features]'`) or inceptionv3 (needs `pip install --no-deps torch-fidelity` and
            evaluation.inception_weights).

    """

    SECTION: ClassVar[str] = "evaluation.features"

    kind: Literal["classifier", "effnetlite0", "inceptionv3"] = "classifier"

    @property
    def name(self) -> str:
        """The kind, or the path of the class that takes its place."""
        return self.class_path or self.kind


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of samples and prior during training, on the validation images (docs/evaluation.md).

    Args:
        every_steps: Steps between evaluations, with one more at the end; 0 for none.
        features: Net whose features define distances between images.
        inception_weights: File with the weights of inceptionv3, on each node;
            weights-inception-2015-12-05-6726825d.pth makes its Fréchet distance the FID.
        samples: Prior samples per evaluation, compared with the same number of real images.
        chain_factor: Length of the long chains in multiples of langevin.steps; they reveal short-run chains
            that look good without having mixed.

    """

    every_steps: int = 0
    features: Features = field(default_factory=Features)
    inception_weights: str | None = key(None, "judge", place=True)
    samples: int = 2000
    chain_factor: int = 20

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, "evaluation.every_steps", "must not be negative (0 is never)")
        require(
            self.features.name != "inceptionv3" or bool(self.inception_weights),
            "evaluation.inception_weights",
            "evaluation.features inceptionv3 needs a file with its weights; give the path of your copy of "
            f"{INCEPTION_FILE} (jebm evaluate: --inception-weights)",
        )
        require(self.samples >= 100, "evaluation.samples", "must be at least 100")
        require(self.chain_factor >= 1, "evaluation.chain_factor", "must be at least 1")
