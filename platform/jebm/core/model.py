"""The parts of a model together: generator, inference net, energy net and likelihood.

Shapes: B batch, C channels, H height, W width, D width of a code: all latent layers together, bottom first.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from jebm.config import Config
from jebm.core.by_class import own_part
from jebm.core.energy import EnergyNet
from jebm.core.generator import GeneratorNet
from jebm.core.inference import InferenceNet
from jebm.core.likelihood import build_likelihood
from jebm.core.parts import Energy, Generator, Inference, Likelihood, Posterior, Shapes
from jebm.errors import ConfigError
from jebm.rng import generator

__all__ = ["JointModel", "build_model"]


class JointModel(nn.Module):
    """Generator p(x|u), inference net q(u|x) and energy net f; `energy` is None for the Gaussian prior."""

    def __init__(self, config: Config, trusted: Collection[str] = ()) -> None:
        """Take the config, and the modules that its classes may come from."""
        super().__init__()
        model = config.model
        likelihood: Likelihood | None = own_part(config, "likelihood", (model.image_channels,), trusted)
        if likelihood is None:
            likelihood = build_likelihood(config.likelihood, model.image_channels)
        self.likelihood = likelihood
        shapes = Shapes(
            image=(model.image_channels, model.image_size, model.image_size),
            layers=tuple((width,) for width in model.latent_dims),
            outputs=self.likelihood.outputs,
        )
        # A class of the user's own comes first, since it may set shapes; ours keep their order, so that they
        # have the same initial weights as ever.
        generator: Generator | None = own_part(config, "generator", (shapes,), trusted)
        if generator is not None:
            shapes = _with_layers(shapes, generator)
        inference: Inference | None = own_part(config, "inference", (shapes,), trusted)
        self.inference: Inference = InferenceNet(shapes, config.inference) if inference is None else inference
        self.generator: Generator = GeneratorNet(shapes, config.generator) if generator is None else generator
        self.shapes = shapes
        self.latent_dims = self.shapes.dims
        self.latent_dim = sum(self.latent_dims)
        self.unseen = sum(self.latent_dims[:-1]) if config.prior.kind == "top" else 0
        """Columns of z, from the first, on which f does not depend: all but the top layer's, or none."""
        # Last, so that generator and inference net have the same initial weights with and without it.
        self.energy: Energy | None = None
        if config.has_energy:
            seen = shapes.layers[-1:] if self.unseen else shapes.layers
            energy: Energy | None = own_part(config, "energy", (seen,), trusted)
            self.energy = EnergyNet(sum(map(math.prod, seen)), config.energy) if energy is None else energy

    def posterior(self, x_BCHW: Tensor, noise_BD: Tensor) -> Posterior:
        """Return the sample of q(u|x) that standard normal noise (B, D) draws, for images in [-1, 1]."""
        return self.along(self.inference(x_BCHW), noise_BD)

    def along(self, features: Sequence[Tensor], noise_BD: Tensor) -> Posterior:
        """Return the same from the inference net's features of the images, to draw several samples."""
        return self.inference.along(features, noise_BD, self.generator)

    def mean_code(self, x_BCHW: Tensor) -> Tensor:
        """Return the mean of q(u|x), (B, D): each layer's mean given the means above it."""
        noise_BD = x_BCHW.new_zeros(len(x_BCHW), self.latent_dim)
        return self.posterior(x_BCHW, noise_BD).code_BD

    def decode(self, code_BD: Tensor) -> Tensor:
        """Return the mean of p(x|u), (B, C, H, W), in [-1, 1]."""
        return self.likelihood.mean(self.generator(code_BD))

    def distortion(self, x_BCHW: Tensor, code_BD: Tensor) -> Tensor:
        """Return -log p(x|u) of each image without the likelihood's constant, (B,), in nats."""
        return self.likelihood.distortion(x_BCHW, self.generator(code_BD))

    def seen(self, code_BD: Tensor) -> Tensor:
        """Return the latents T(u) that f depends on, (B, S)."""
        z_BD = self.generator.latents(code_BD)
        return z_BD[:, self.unseen :] if self.unseen else z_BD

    def f(self, code_BD: Tensor) -> Tensor:
        """Return the tilt of codes, (B,), in nats: zero for the Gaussian prior."""
        if self.energy is None:
            return code_BD.new_zeros(len(code_BD))
        f_B: Tensor = self.energy(self.seen(code_BD))
        return f_B


def build_model(config: Config, trusted: Collection[str] = ()) -> JointModel:
    """Return the model on the CPU with initial weights that depend only on `config.run.seed`.

    Raises ConfigError if a class of the config is not of a `trusted` module (`jebm.classes`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.run.seed, 0, 0, "initial weights").initial_seed())
        return JointModel(config, trusted)


def _with_layers(shapes: Shapes, generator: Generator) -> Shapes:
    """Return the shapes with a generator's own layers; raises `ConfigError` unless the widths agree."""
    shapes_now = shapes._replace(layers=generator.layers)
    if shapes_now.dims != shapes.dims:
        raise ConfigError(
            f"model.latent_dims: {type(generator).__name__} has layers {list(map(list, generator.layers))}; "
            f"set it to their widths, {shapes_now.dims}"
        )
    return shapes_now
