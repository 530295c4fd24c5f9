"""Blocks and sizes that the nets share."""

from itertools import pairwise

from torch import nn

__all__ = ["down_block", "halved_sizes", "initialise", "multilayer_perceptron", "up_convolution"]


def halved_sizes(image_size: int, count: int) -> list[int]:
    """Return the image size and its `count` successive halvings, rounded down: [28, 14, 7, 3] for 28, 3."""
    return [image_size >> k for k in range(count + 1)]


def down_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Return conv 4/2/1 and conv 3/1/1, each with LeakyReLU 0.01 and no bias: halves the size."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.01),
        nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False),
        nn.LeakyReLU(0.01),
    )


def up_convolution(channels_in: int, channels_out: int, size_in: int, size_out: int) -> nn.ConvTranspose2d:
    """Return the transposed conv 4/2/1 from `size_in` to `size_out`, which is twice that or one more."""
    odd = size_out - 2 * size_in
    return nn.ConvTranspose2d(channels_in, channels_out, 4, 2, 1, output_padding=odd, bias=False)


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
