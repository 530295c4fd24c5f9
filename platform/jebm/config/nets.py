"""The model's sections: nets, prior and the chains that sample it."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jebm.config.roles import key, require

__all__ = [
    "LEAST_STD",
    "Energy",
    "Generator",
    "Hierarchy",
    "Inference",
    "Langevin",
    "Likelihood",
    "Model",
    "Part",
    "Prior",
]

_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_LONGEST_PATH = 200

LEAST_STD = 1 / 255
"""Half a grey level: a smaller sigma that is learned would say more than 8-bit images hold."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the model: jebm's own with its keys, or a class of yours.

    Args:
        class_path: A class of yours instead of jebm's own part, such as mylab.nets.Mine (docs/own-model.md),
            or the short name that an installed package gives it.
        init_args: Its arguments, each by its name.

    """

    SECTION: ClassVar[str] = ""
    """Its dotted key, if that is not the name of the dataclass."""

    class_path: str | None = None
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = self.SECTION or type(self).__name__.lower()
        if self.class_path is None:
            require(
                not self.init_args, f"{name}.init_args", f"belong to a class; name it in {name}.class_path"
            )
            return
        fits = len(self.class_path) <= _LONGEST_PATH and _CLASS_PATH.fullmatch(self.class_path)
        require(bool(fits), f"{name}.class_path", "must be a path, such as mylab.nets.Mine, or a short name")
        mine = {entry.name for entry in dataclasses.fields(Part)} | {"penalty"}  # a term of the objective
        for entry in dataclasses.fields(self):
            require(
                entry.name in mine or getattr(self, entry.name) == entry.default,
                f"{name}.{entry.name}",
                f"is a key of jebm's own part, and {self.class_path} takes its place; "
                f"remove the key, or name an argument of the class: {name}.init_args.{entry.name}",
            )


@dataclass(frozen=True)
class Model:
    """Settings shared by the three nets.

    Args:
        image_size: Height and width of the images in pixels.
        image_channels: 1 (grey) or 3 (colour).
        latent_dims: Width of each latent layer, bottom (next to the image) first, top last.

    """

    image_size: int = 28
    image_channels: int = 1
    latent_dims: tuple[int, ...] = (2, 2, 10)

    def __post_init__(self) -> None:
        require(self.image_size >= 2, "model.image_size", "must be at least 2")
        require(self.image_channels in (1, 3), "model.image_channels", "must be 1 or 3")
        require(len(self.latent_dims) >= 1, "model.latent_dims", "needs at least one layer")
        require(min(self.latent_dims) >= 1, "model.latent_dims", "every layer needs a width of at least 1")


@dataclass(frozen=True)
class Likelihood(Part):
    """The likelihood p(x|z), pixels in [-1, 1].

    Args:
        kind: gaussian (a density), discretised_logistic (a probability of the 256 levels, a mixture, for bits
            per dimension that compare with published ones) or bernoulli (for black-and-white images).
        std: Standard deviation sigma of gaussian; the initial one if it is learned.
        learn_std: no; shared (one sigma for all pixels); per_channel. optimizer.likelihood sets its rate.
        components: Logistics of each pixel's mixture.

    """

    kind: Literal["gaussian", "discretised_logistic", "bernoulli"] = "gaussian"
    std: float = key(math.sqrt(1 / 6), "result")
    learn_std: Literal["no", "shared", "per_channel"] = "no"
    components: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 0 if self.learn_std == "no" else LEAST_STD
        require(self.std > least, "likelihood.std", f"must be above {least:.2g}")
        require(
            self.learn_std == "no" or self.kind == "gaussian",
            "likelihood.learn_std",
            f"only the gaussian likelihood has a sigma; {self.kind} has none",
        )
        require(1 <= self.components <= 100, "likelihood.components", "must lie between 1 and 100")


@dataclass(frozen=True)
class Hierarchy:
    """Lower latent layers join late, so that the top one learns first what it can carry.

    Args:
        rate_factor: Weight of a lower layer's rate before it joins (30 holds it at the prior); it falls
            geometrically to 1 while the layer joins. 1 lets all layers join at once.
        begin: Share of the run after which the layer below the top begins to join.
        end: Share of the run at which the bottom layer, the last, has joined.

    """

    rate_factor: float = 1.0
    begin: float = 0.15
    end: float = 0.5

    def __post_init__(self) -> None:
        require(1 <= self.rate_factor <= 1e6, "hierarchy.rate_factor", "must lie between 1 and 1e6")
        require(0 <= self.begin < 1, "hierarchy.begin", "must lie in [0, 1)")
        require(self.begin < self.end <= 1, "hierarchy.end", "must lie above hierarchy.begin, up to 1")


@dataclass(frozen=True)
class Inference(Part):
    """The inference net q(z|x).

    Args:
        channels: Channels of the trunk after each halving of the image: one fewer than latent layers, or any
            number of them below a single latent layer.
        width: Width of the two fully connected layers below the top latent layer.

    """

    channels: tuple[int, ...] = (32, 64)
    width: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        require(all(c >= 1 for c in self.channels), "inference.channels", "must be positive")
        require(self.width >= 1, "inference.width", "must be at least 1")


@dataclass(frozen=True)
class Generator(Part):
    """The generator p(x|z).

    Args:
        channels: Channels of the trunk, bottom first: at each halving of the image (join: add), or at the
            full size and at each halving (join: concat, one more number). Below a single latent layer, at any
            number of halvings: a trunk of transposed convolutions, as in LEBM.
        width: Width of the fully connected layers above the top of the trunk.
        join: How a latent layer enters the trunk: add (a linear map is added) or concat (a LeakyReLU map is
            concatenated, with one more convolution on each level).

    """

    channels: tuple[int, ...] = (32, 64)
    width: int = 256
    join: Literal["add", "concat"] = "add"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(all(c >= 1 for c in self.channels), "generator.channels", "must be positive")
        require(self.width >= 1, "generator.width", "must be at least 1")


@dataclass(frozen=True)
class Prior:
    """The prior of the latents.

    Args:
        kind: joint (one energy over all latent layers, as in the paper), top (over only the top layer of the
            same ladder; the others are N(0, I)) or gaussian (N(0, I), no energy).

    """

    kind: Literal["joint", "top", "gaussian"] = "joint"


@dataclass(frozen=True)
class Energy(Part):
    """The energy net f(z) of the prior p(z) proportional to exp(f(z)) N(z; 0, I), an MLP.

    Args:
        width: Units of each hidden layer; 0 disables the energy, as prior.kind gaussian.
        depth: Number of hidden layers.
        spectral_norm: Divide every weight matrix by its largest singular value (bounds the slope of f).
        output_scale: Factor on f; with spectral norm it bounds the slope of f.
        activation: Between the layers: leaky_relu (slope 0.2 below zero, the paper's), silu or softplus (both
            smooth; slopes up to 1.1 and 1).
        penalty: Weight of mean f^2, of posterior and of prior samples, in the energy's loss: keeps the level
            of f, which its data leave free, and its size from drifting. 0: none.

    """

    width: int = 100
    depth: int = 2
    spectral_norm: bool = True
    output_scale: float = 1.0
    activation: Literal["leaky_relu", "silu", "softplus"] = "leaky_relu"
    penalty: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.width >= 0, "energy.width", "must not be negative (0 is the Gaussian prior)")
        require(1 <= self.depth <= 1_000, "energy.depth", "must lie between 1 and 1,000")
        require(self.output_scale > 0, "energy.output_scale", "must be positive")
        require(self.penalty >= 0, "energy.penalty", "must not be negative")


@dataclass(frozen=True)
class Langevin:
    """Short-run Langevin sampling of the prior: z <- z + s^2/2 * grad log p(z) + s * noise.

    Args:
        steps: Number of steps K of a chain, from fresh N(0, I).
        step_size: s, the standard deviation of the noise of a step (other code uses this name for s^2 or
            s^2/2). Below 2: at 2 and above the chain diverges even on N(0, I). K steps forget the start when
            (1 - s^2/2)^K is small: s = 0.4, K = 40 leaves 0.035; s = 0.1, K = 40 leaves 0.82.
        kernel: What computes the chain: auto (compiled, with C on a CPU or Triton on a GPU if available; else
            torch), torch (closed-form gradient) or autograd (the reference). They differ only by rounding;
            autograd is always used if the generator maps noise to latents, or if an energy by class has no
            gradient of its own.
        noise: What draws the noise of start and steps: torch (its generators, each device's own numbers) or
            philox (counter-based: drawn in the compiled kernel; the same with every kernel and device).

    """

    steps: int = 40
    step_size: float = 0.4
    kernel: Literal["auto", "torch", "autograd"] = key("auto", "where")
    noise: Literal["torch", "philox"] = "torch"

    def __post_init__(self) -> None:
        require(self.steps >= 1, "langevin.steps", "must be at least 1")
        require(0 < self.step_size < 2, "langevin.step_size", "must lie between 0 and 2")
