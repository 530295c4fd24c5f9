"""The ladder inference net q(z|x) (paper eq. 8; VLAE).

Shapes: B batch, C channels, H height, W width, D latent width of all layers together, bottom layer first.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from jebm.config import Inference as InferenceConfig
from jebm.core.distributions import DiagGaussian
from jebm.core.layers import (
    FromPlane,
    channels_last,
    down_block,
    halved_sizes,
    initialise,
    multilayer_perceptron,
)
from jebm.core.parts import Inference, Shapes

__all__ = ["InferenceNet"]


class InferenceNet(Inference):
    """q(z|x) = prod_i N(z_i; mu_i(x), diag V_i(x)): the layers are independent given x.

    A trunk r_i = h_i(r_{i-1}) of down blocks, r_0 = x; layer i < L reads r_{i-1} through its own down block,
    the top layer reads r_{L-1} through two fully connected layers. A single layer may have a trunk of any
    length below it.
    """

    def __init__(self, shapes: Shapes, config: InferenceConfig) -> None:
        super().__init__(shapes)
        dims, (image_channels, image_size, _) = shapes.dims, shapes.image
        channels = (image_channels, *config.channels)
        sizes = halved_sizes(image_size, len(config.channels))
        self.trunk = nn.ModuleList()
        self.heads = nn.ModuleList()
        self.moments = nn.ModuleList()
        for level, (channels_in, channels_out) in enumerate(pairwise(channels)):
            self.trunk.append(down_block(channels_in, channels_out))
            if level < len(dims) - 1:
                self.heads.append(nn.Sequential(down_block(channels_in, channels_out)))
                self.moments.append(FromPlane(channels_out * sizes[level + 1] ** 2, 2 * dims[level]))
        features = channels[-1] * sizes[-1] ** 2
        self.heads.append(
            nn.Sequential(
                nn.Flatten(),
                multilayer_perceptron(features, config.width, config.width, slope=0.01),
                nn.LeakyReLU(0.01),
            )
        )
        self.moments.append(nn.Linear(config.width, 2 * dims[-1]))
        initialise(self)

    def forward(self, x_BCHW: Tensor) -> DiagGaussian:
        """Return the posterior over all layers for images in [-1, 1]."""
        means, log_variances = [], []
        r_BCHW = channels_last(x_BCHW)
        if len(self.heads) == 1:
            for block in self.trunk:
                r_BCHW = block(r_BCHW)
        for level, (head, moments) in enumerate(zip(self.heads, self.moments, strict=True)):
            mean, log_variance = moments(head(r_BCHW)).chunk(2, dim=1)
            means.append(mean)
            log_variances.append(log_variance)
            if level < len(self.heads) - 1:
                r_BCHW = self.trunk[level](r_BCHW)
        return DiagGaussian(torch.cat(means, 1), torch.cat(log_variances, 1))
