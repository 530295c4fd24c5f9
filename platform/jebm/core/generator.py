"""The multi-layer generator p(x|z) (paper eq. 7).

Shapes: B batch, P parameters of a pixel, H height, W width, D width of all layers together, bottom first.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jebm.config import Generator as GeneratorConfig
from jebm.core.layers import (
    Convolution,
    ToImage,
    ToPlane,
    channels_last,
    halved_sizes,
    initialise,
    multilayer_perceptron,
    up_convolution,
)
from jebm.core.parts import Generator, Shapes

__all__ = ["GeneratorNet"]

_SLOPE = 0.2


class _Planes(nn.Unflatten):
    """Reshape vectors in (C, H, W) order to planes in channels-last memory."""

    def forward(self, h: Tensor) -> Tensor:
        return channels_last(super().forward(h))


class _AddLevel(nn.Module):
    """h_i = g_i(h_{i+1} + A z_i): one level of the trunk with additive joins (`svhn_hierarchical`)."""

    def __init__(
        self, latent: int, channels: tuple[int, int], sizes: tuple[int, int], *, top: bool, bottom: bool
    ) -> None:
        super().__init__()
        (channels_in, channels_out), (size_in, size_out) = channels, sizes
        volume = channels_in * size_in**2
        shape = (channels_in, size_in, size_in)
        if top:  # the top level joins as a vector, before it becomes a plane
            self.join: nn.Module = nn.Linear(latent, channels_in)
            spread: nn.Module = nn.Sequential(
                nn.Linear(channels_in, volume), nn.LeakyReLU(_SLOPE, inplace=True), _Planes(1, shape)
            )
        else:
            self.join = nn.Sequential(ToPlane(latent, shape))
            spread = nn.Identity()
        self.body = nn.Sequential(
            spread,
            up_convolution(channels_in, channels_in, size_in, size_out),
            nn.LeakyReLU(_SLOPE, inplace=True),
            ToImage(channels_in, channels_out) if bottom else Convolution(channels_in, channels_out),
        )

    def forward(self, h: Tensor, z_BD: Tensor) -> Tensor:
        out: Tensor = self.body(h + self.join(z_BD))
        return out


class _ConcatLevel(nn.Module):
    """h_i = g_i([h_{i+1}, LeakyReLU(A z_i)]): one level with concatenating joins (`svhn_fid`)."""

    def __init__(self, latent: int, channels: tuple[int, int], sizes: tuple[int, int]) -> None:
        super().__init__()
        (channels_in, channels_out), (size_in, size_out) = channels, sizes
        self.join = nn.Sequential(
            ToPlane(latent, (channels_in, size_in, size_in)),
            nn.LeakyReLU(_SLOPE),
        )
        self.body = nn.Sequential(
            Convolution(2 * channels_in, channels_in),
            nn.LeakyReLU(_SLOPE, inplace=True),
            up_convolution(channels_in, channels_out, size_in, size_out),
            nn.LeakyReLU(_SLOPE, inplace=True),
            Convolution(channels_out, channels_out),
            nn.LeakyReLU(_SLOPE, inplace=True),
        )

    def forward(self, h: Tensor, z_BD: Tensor) -> Tensor:
        out: Tensor = self.body(torch.cat([h, self.join(z_BD)], 1))
        return out


def _single_trunk(shapes: Shapes, channels: Sequence[int]) -> tuple[int, list[nn.Module]]:
    """Return the trunk below a single latent layer, with the width of the vector that it takes.

    One transposed convolution for each number of channels, as in LEBM; without channels, only the image.
    """
    channels = (shapes.outputs, *channels)
    sizes = halved_sizes(shapes.image[1], len(channels) - 1)
    plane = (channels[-1], sizes[-1], sizes[-1])
    trunk: list[nn.Module] = [_Planes(1, plane) if len(channels) > 1 else nn.Unflatten(1, plane)]
    for i in range(len(channels) - 1, 0, -1):
        trunk.append(nn.LeakyReLU(_SLOPE, inplace=True))
        trunk.append(up_convolution(channels[i], channels[i - 1], sizes[i], sizes[i - 1]))
    return math.prod(plane), trunk


class GeneratorNet(Generator):
    """The ladder: h_L = g_L(z_L), h_i = g_i([z_i, h_{i+1}]), parameters of p(x|z) from h_1.

    Its prior p0 is N(0, I) on every layer, so T is the identity.
    """

    def __init__(self, shapes: Shapes, config: GeneratorConfig) -> None:
        super().__init__(shapes)
        # The trunk, top first, in the order of computation.
        self.latent_dims = dims = shapes.dims
        levels = len(dims) - 1
        sizes = halved_sizes(shapes.image[1], levels)
        self.levels = nn.ModuleList()
        final: list[nn.Module] = []
        if levels == 0:
            top_out, final = _single_trunk(shapes, config.channels)
        elif config.join == "add":
            channels = (shapes.outputs, *config.channels)
            top_out = channels[levels]
            for i in range(levels, 0, -1):
                pair, plane = (channels[i], channels[i - 1]), (sizes[i], sizes[i - 1])
                self.levels.append(_AddLevel(dims[i - 1], pair, plane, top=i == levels, bottom=i == 1))
        else:
            channels = config.channels
            top_out = channels[levels] * sizes[levels] ** 2
            for i in range(levels, 0, -1):
                pair, plane = (channels[i], channels[i - 1]), (sizes[i], sizes[i - 1])
                self.levels.append(_ConcatLevel(dims[i - 1], pair, plane))
            final.append(ToImage(channels[0], shapes.outputs))
        # The map of the top latent layer, above the trunk.
        self.top = multilayer_perceptron(dims[-1], config.width, config.width, top_out, slope=_SLOPE)
        if levels and config.join == "concat":
            plane_shape = (config.channels[levels], sizes[levels], sizes[levels])
            self.top.extend([nn.LeakyReLU(_SLOPE, inplace=True), _Planes(1, plane_shape)])
        self.final = nn.Sequential(*final)
        initialise(self)

    def forward(self, code_BD: Tensor) -> Tensor:
        """Return the parameters of p(x|z), (B, P, H, W)."""
        z_L = torch.split(code_BD, self.latent_dims, dim=1)
        h = self.top(z_L[-1])
        for level, z in zip(self.levels, reversed(z_L[:-1]), strict=True):
            h = level(h, z)
        parameters_BPHW: Tensor = self.final(h)
        return parameters_BPHW
