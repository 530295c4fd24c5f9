"""What parts by class must promise: generator, inference net, energy net, likelihood; and feature nets.

A part is a torch module that derives from one of the classes here; ours do, and so do a user's own. A model
has L latent layers, each with a shape: (D,) for a vector, (C, H, W) for a plane. Together they are one flat
*code* u per image: all layers flattened, bottom first. The code is noise: the prior on codes is
p(u) proportional to exp(f(T(u))) N(u; 0, I), and the generator knows the map T from codes to latents,
z = T(u): the identity unless its layers are conditional, p(z_i | z_{i+1}). Chains, rates and bounds all live
on codes.

Shapes: B batch, C channels, H height, W width, P channels of the likelihood's parameters, D width of a code,
S width of the latents that f sees.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from jebm.core.distributions import DiagGaussian

__all__ = [
    "Energy",
    "Features",
    "FrozenEnergy",
    "Generator",
    "Inference",
    "Likelihood",
    "Posterior",
    "Shapes",
    "by_autograd",
]


class Shapes(NamedTuple):
    """What a part is built for."""

    image: tuple[int, int, int]
    """Channels, height and width of the images."""
    layers: tuple[tuple[int, ...], ...]
    """Shape of each latent layer, bottom first. A generator may set its own; the others get those."""
    outputs: int
    """Channels of a generator's output: the parameters that the likelihood takes for each pixel."""

    @property
    def dims(self) -> list[int]:
        """Width of each layer in a code, bottom first."""
        return [math.prod(shape) for shape in self.layers]


class Posterior(NamedTuple):
    """A sample of q(u|x) with the moments it was drawn from: tensors (B, D), so that DDP can handle them.

    Coordinate d is N(mean, exp(log_variance)) given x and, if layers are conditional, given the layers above.
    """

    code_BD: Tensor
    mean_BD: Tensor
    log_variance_BD: Tensor

    def rate(self) -> Tensor:
        """Return KL(q || N(0, 1)) of each coordinate along this sample, (B, D), in nats, never negative."""
        return DiagGaussian(self.mean_BD, self.log_variance_BD).rate()

    def log_density(self) -> Tensor:
        """Return log q of the sample's own coordinates, (B, D), in nats."""
        return DiagGaussian(self.mean_BD, self.log_variance_BD).log_density(self.code_BD)


class Generator(nn.Module, ABC):
    """p(x|u): maps codes to the likelihood's parameters, and codes to the latents that f sees."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layers = shapes.layers
        """Shapes of the latent layers, bottom first; a generator with other layers sets its own."""

    @abstractmethod
    def forward(self, code_BD: Tensor) -> Tensor:
        """Return the parameters of p(x|u), (B, P, H, W), unconstrained: the likelihood maps them.

        A function of the code alone: no noise, no state that a call changes, each image by itself.
        """

    def latents(self, code_BD: Tensor) -> Tensor:
        """Return z = T(u), (B, D). The default is the identity, and returns its argument itself."""
        return code_BD


class Inference(nn.Module, ABC):
    """q(u|x), given as features of the images and a way to draw a sample from them."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.shapes = shapes

    @abstractmethod
    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Return features of images in [-1, 1]: tensors with the batch first, each image by itself.

        For a diagonal Gaussian over the whole code: (mean, log-variance), (B, D) each.
        """

    def along(self, features: Sequence[Tensor], noise_BD: Tensor, generator: Generator) -> Posterior:
        """Return the sample of q(u|x) that standard normal noise draws; noise 0 gives the mean code.

        By default the features are (mean, log-variance), and layers are independent given x. A posterior
        whose lower layers depend on the sampled upper ones overrides this; it may use the generator's state.
        """
        mean_BD, log_variance_BD = features
        code_BD = DiagGaussian(mean_BD, log_variance_BD).rsample(noise_BD)
        return Posterior(code_BD, mean_BD, log_variance_BD)


class FrozenEnergy(Protocol):
    """f with constant weights."""

    def f(self, z_BS: Tensor) -> Tensor:
        """Return f, (B,), in nats; differentiable in z."""

    def gradient(self, z_BS: Tensor) -> Tensor:
        """Return the gradient of f in z, (B, S), detached."""

    def value_and_gradient(self, z_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return f (B,) and its gradient (B, S), detached."""


class Energy(nn.Module, ABC):
    """f(z), the tilt of the prior: p(z) is proportional to exp(+f(z)) N(z; 0, I)."""

    def __init__(self, layers: tuple[tuple[int, ...], ...]) -> None:
        """Take the shapes of the latent layers that f sees, bottom first."""
        super().__init__()
        self.widths = [math.prod(shape) for shape in layers]
        """Width of each layer in z, bottom first: S in all."""

    @abstractmethod
    def forward(self, z_BS: Tensor) -> Tensor:
        """Return f, (B,), in nats; each row by itself, differentiable in z and in the parameters."""

    def gradient(self, z_BS: Tensor) -> Tensor | None:
        """Return the gradient of f in z, (B, S), in closed form without a graph; None: autograd finds it.

        Chains call it at every step: with it they run in place, without autograd.
        """
        del z_BS
        return None

    def frozen(self) -> FrozenEnergy:
        """Return f with its present weights, to be used before the next update.

        A chain asks once: a class that derives constants from its weights may return them with it. One that
        is a perceptron may return a `jebm.core.energy.ResolvedEnergy`, which the compiled kernels take.
        """
        return _Frozen(self)

    def settle(self) -> None:
        """Update what depends on the weights (spectral norm), after each of their updates; here nothing."""


class _Frozen:
    """An energy of which nothing but `forward` and perhaps `gradient` is known."""

    def __init__(self, energy: Energy) -> None:
        self._energy = energy

    def f(self, z_BS: Tensor) -> Tensor:
        f_B: Tensor = self._energy(z_BS)
        return f_B

    def gradient(self, z_BS: Tensor) -> Tensor:
        with torch.no_grad():
            gradient_BS = self._energy.gradient(z_BS)
        return by_autograd(self.f, z_BS)[1] if gradient_BS is None else gradient_BS

    def value_and_gradient(self, z_BS: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            gradient_BS = self._energy.gradient(z_BS)
            if gradient_BS is not None:
                return self.f(z_BS), gradient_BS
        return by_autograd(self.f, z_BS)


def by_autograd(f: Callable[[Tensor], Tensor], z_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return f(z), (B,), and its gradient in z, (B, S), both detached."""
    with torch.enable_grad():
        z_BS = z_BS.detach().requires_grad_()
        f_B = f(z_BS)
        (gradient_BS,) = torch.autograd.grad(f_B.sum(), z_BS)
    return f_B.detach(), gradient_BS


class Likelihood(nn.Module, ABC):
    """p(x|u) for images in [-1, 1], given the parameters that the generator makes of a code."""

    levels_offset: float = math.log2(127.5)
    """Bits per dimension from -log p(x|u) to 256 grey levels: log2(127.5) for a density on [-1, 1], 0 for a
    probability of the levels themselves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.outputs = channels
        """Number P of parameters per pixel for this many channels; a likelihood with more sets it."""

    @abstractmethod
    def distortion(self, x_BCHW: Tensor, parameters_BPHW: Tensor) -> Tensor:
        """Return -log p(x|u) of each image without `constant`, (B,), in nats."""

    @abstractmethod
    def mean(self, parameters_BPHW: Tensor) -> Tensor:
        """Return the mean of p(x|u), (B, C, H, W), in [-1, 1]."""

    def metrics(self) -> dict[str, Tensor]:
        """Return what to log of the likelihood's own parameters, () each; by default nothing."""
        return {}

    def constant(self, pixels: int) -> float:
        """Return the part of -log p(x|u) that depends on no parameter, for C H W `pixels`, in nats."""
        del pixels
        return 0.0


class Features(nn.Module, ABC):
    """A fixed map from images to vectors in which distances between images mean something.

    It is used in evaluation mode, without gradients, on images in float32.
    """

    def __init__(self, image: tuple[int, int, int]) -> None:
        """Take the channels, height and width of the images."""
        super().__init__()
        self.image = image

    @abstractmethod
    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return features, (B, F), of images in [-1, 1], each image by itself."""
