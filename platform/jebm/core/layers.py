"""Blocks and sizes that the nets share, and maps between vectors and planes.

Activations are channels-last in memory, which is fastest for convolutions (docs/performance.md). Weights are
not, so that checkpoints and DDP see plain tensors. A flattened plane is still in (C, H, W) order. Shapes: B
batch, C channels, H height, W width, D features of a vector.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Convolution",
    "FromPlane",
    "ToImage",
    "ToPlane",
    "TransposedConvolution",
    "channels_last",
    "down_block",
    "halved_sizes",
    "initialise",
    "multilayer_perceptron",
    "up_convolution",
]

_TINY_PLANE = 4
_MANY_WEIGHTS = 2_000_000
"""From here on, a CPU takes two to three times as long for a convolution as for a matrix product."""


def channels_last(x_BCHW: Tensor) -> Tensor:
    """Return the same values with the channels last in memory."""
    x_BHWC = x_BCHW.permute(0, 2, 3, 1).contiguous()
    _, height, width, channels = x_BHWC.shape
    # One channel fits both layouts; torch reads it as channels first unless the strides say otherwise.
    strides = (height * width * channels, 1, width * channels, channels)
    return x_BHWC.as_strided(x_BCHW.shape, strides) if channels == 1 else x_BHWC.permute(0, 3, 1, 2)


class ToPlane(nn.Linear):
    """A linear map from few features, (B, D), to a plane, (B, C, H, W) with the channels last in memory.

    The same as a linear map to C H W features and a view, but it permutes the weights instead of the plane,
    which is larger.
    """

    def __init__(self, features: int, plane: tuple[int, int, int]) -> None:
        channels, height, width = plane
        super().__init__(features, channels * height * width)
        self.plane = plane

    def forward(self, z_BD: Tensor) -> Tensor:
        """Return the planes."""
        channels, height, width = self.plane
        weight = self.weight.view(channels, height * width, -1).transpose(0, 1).flatten(0, 1)
        bias = self.bias.view(channels, height * width).t().flatten()
        return F.linear(z_BD, weight, bias).view(-1, height, width, channels).permute(0, 3, 1, 2)


class FromPlane(nn.Linear):
    """A linear map from a plane, (B, C, H, W) with the channels last in memory, to few features, (B, D).

    The reverse of `ToPlane`: a linear map of the flattened plane, without permuting the plane.
    """

    def forward(self, h_BCHW: Tensor) -> Tensor:
        """Return the features."""
        channels = h_BCHW.shape[1]
        weight = self.weight.view(self.out_features, channels, -1).transpose(1, 2).flatten(1)
        return F.linear(h_BCHW.permute(0, 2, 3, 1).flatten(1), weight, self.bias)


def halved_sizes(image_size: int, count: int) -> list[int]:
    """Return the image size and its `count` successive halvings, rounded down: [28, 14, 7, 3] for 28, 3."""
    return [image_size >> k for k in range(count + 1)]


class ToImage(nn.Conv2d):
    """The convolution 3/1/1 without bias to the image's few channels.

    Computed as a transposed convolution with the flipped kernel: the same function, but its weight gradient
    does not pad the few channels to a SIMD register's eight.
    """

    def __init__(self, channels_in: int, image_channels: int) -> None:
        super().__init__(channels_in, image_channels, 3, 1, 1, bias=False)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        """Return the image."""
        return F.conv_transpose2d(h_BCHW, self.weight.flip(2, 3).transpose(0, 1), padding=1)


def _as_product(h_BCHW: Tensor, weight: Tensor) -> bool:
    """Return whether this convolution is faster as a matrix product."""
    tiny = h_BCHW.shape[2] * h_BCHW.shape[3] <= _TINY_PLANE and weight.numel() >= _MANY_WEIGHTS
    return tiny and h_BCHW.is_cpu and not torch.is_autocast_enabled("cpu")


class Convolution(nn.Conv2d):
    """The convolution 3/1/1 without bias; a matrix product for many weights on a tiny plane."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, 1, 1, bias=False)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        """Return the planes."""
        if not _as_product(h_BCHW, self.weight):
            return super().forward(h_BCHW)
        batch, _, height, width = h_BCHW.shape
        windows_BCHWkl = F.pad(h_BCHW, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
        rows = windows_BCHWkl.permute(0, 2, 3, 1, 4, 5).reshape(batch * height * width, -1)
        return F.linear(rows, self.weight.flatten(1)).view(batch, height, width, -1).permute(0, 3, 1, 2)


class TransposedConvolution(nn.ConvTranspose2d):
    """The transposed convolution 4/2/1 without bias; a matrix product whenever `Convolution` is."""

    def __init__(self, channels_in: int, channels_out: int, *, output_padding: int) -> None:
        super().__init__(channels_in, channels_out, 4, 2, 1, output_padding=output_padding, bias=False)

    def forward(self, h_BCHW: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the planes."""
        if output_size is not None or not _as_product(h_BCHW, self.weight):
            return super().forward(h_BCHW, output_size)
        batch, channels, height, width = h_BCHW.shape
        columns = h_BCHW.permute(0, 2, 3, 1).reshape(-1, channels) @ self.weight.flatten(1)
        columns = columns.view(batch, height * width, -1).transpose(1, 2)
        odd = int(self.output_padding[0])
        size = (2 * height + odd, 2 * width + odd)
        return channels_last(F.fold(columns, size, kernel_size=4, padding=1, stride=2))


def down_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Return conv 4/2/1 and conv 3/1/1, each with LeakyReLU 0.01 and no bias, which halve the size."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.01, inplace=True),
        Convolution(channels_out, channels_out),
        nn.LeakyReLU(0.01, inplace=True),
    )


def up_convolution(channels_in: int, channels_out: int, size_in: int, size_out: int) -> TransposedConvolution:
    """Return the transposed conv 4/2/1 from `size_in` to `size_out`, which is twice `size_in` or one more."""
    return TransposedConvolution(channels_in, channels_out, output_padding=size_out - 2 * size_in)


def multilayer_perceptron(*widths: int, slope: float) -> nn.Sequential:
    """Return linear layers of the given widths with LeakyReLU(`slope`) between them and none at the end."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.LeakyReLU(slope)]
    return nn.Sequential(*layers[:-1])


def initialise(module: nn.Module) -> None:
    """Draw convolution weights Xavier-normal, in place; linear layers keep torch's default (paper's code)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_normal_(part.weight)
