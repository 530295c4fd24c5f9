"""A joint model whose every density is Gaussian: linear decoder, linear q, quadratic f. Images are 4 x 4."""

import numpy as np
import torch
from torch import Tensor, nn

from jebm import config as sections
from jebm.config import Config, Model
from jebm.core.distributions import DiagGaussian
from jebm.core.likelihood import Gaussian
from jebm.core.model import JointModel
from jebm.core.parts import Energy, Generator, Inference, Shapes
from jebm.data.dataset import ImageSet
from jebm.data.manifest import DatasetManifest
from jebm.data.source import SourceDescription

PIXELS = 16


class LinearGenerator(Generator):
    def __init__(self, loadings_PD: Tensor) -> None:
        super().__init__(Shapes((1, 4, 4), ((loadings_PD.shape[1],),), 1))
        self.loadings_PD = nn.Parameter(loadings_PD)

    def latents(self, noise_BD: Tensor) -> Tensor:
        return noise_BD.clone()  # not the noise itself: an f without closed form goes by autograd

    def forward(self, z_BD: Tensor) -> Tensor:
        return (z_BD @ self.loadings_PD.T).view(-1, 1, 4, 4)


class LinearGaussian(Gaussian):
    """The mean is what the generator returns."""

    def mean(self, parameters_BPHW: Tensor) -> Tensor:
        return parameters_BPHW


class LinearInference(Inference):
    """q(z|x) = N(weight x + bias, variance)."""

    def __init__(self, weight_DP: Tensor, bias_D: Tensor, variance_D: Tensor) -> None:
        super().__init__(Shapes((1, 4, 4), ((len(bias_D),),), 1))
        self.weight_DP, self.bias_D, self.variance_D = weight_DP, bias_D, variance_D

    def forward(self, x_BCHW: Tensor) -> DiagGaussian:
        mean_BD = x_BCHW.flatten(1) @ self.weight_DP.T + self.bias_D
        return DiagGaussian(mean_BD, self.variance_D.log().expand_as(mean_BD))


class QuadraticEnergy(Energy):
    """f(z) = -z M z / 2: the prior is N(0, (I + M)^-1), log Z = -log det(I + M) / 2."""

    def __init__(self, matrix_DD: Tensor) -> None:
        super().__init__(((len(matrix_DD),),))
        self.matrix_DD = nn.Parameter(matrix_DD, requires_grad=False)

    def forward(self, z_BD: Tensor) -> Tensor:
        return -0.5 * ((z_BD @ self.matrix_DD.to(z_BD.dtype)) * z_BD).sum(1)


def joint_model(latent_dims: tuple[int, ...], likelihood_std: float = 0.5, **energy) -> JointModel:
    """Return a model with nets as small as they come; by default without energy."""
    levels = len(latent_dims) - 1
    config = Config(
        model=Model(4, 1, latent_dims),
        likelihood=sections.Likelihood(std=likelihood_std),
        inference=sections.Inference((2,) * levels, 4),
        generator=sections.Generator((2,) * levels, 4),
        energy=sections.Energy(**{"width": 0, **energy}),
    )
    torch.manual_seed(0)
    return JointModel(config)


def make_linear(model: JointModel, loadings_PD: Tensor) -> None:
    """Let the decoder's mean be linear in z."""
    model.generator = LinearGenerator(loadings_PD)
    model.likelihood = LinearGaussian(sections.Likelihood(std=model.likelihood.std), 1)


def transparent_model(latent_dims: tuple[int, ...]) -> JointModel:
    """Return a model that writes z_i into pixel i and reads it there, without noise; N(0, I) prior."""
    model = joint_model(latent_dims)
    width = sum(latent_dims)
    make_linear(model, torch.eye(PIXELS, width))
    model.inference = LinearInference(
        torch.eye(width, PIXELS), torch.zeros(width), torch.full((width,), 1e-12)
    )
    return model


def image_set(images_NHWC: np.ndarray, labels_N: np.ndarray | None = None) -> ImageSet:
    """Return a set of images as `load_images` would."""
    n, height, width, channels = images_NHWC.shape
    source = SourceDescription((), "numpy", ())
    labels = None if labels_N is None else "0"
    manifest = DatasetManifest("toy", "test", height, width, channels, n, (), "0", labels, source, "")
    return ImageSet(images_NHWC, labels_N, manifest)
