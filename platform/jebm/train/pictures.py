"""Pictures of a model: reconstructions, prior samples, and hierarchical samples.

Shapes: N images, C channels, H height, W width, D latent width.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jebm.config import Config, Langevin
from jebm.core.model import JointModel
from jebm.core.objective import reconstruct
from jebm.core.prior import sample_prior
from jebm.data.dataset import ImageSet
from jebm.data.loader import to_float
from jebm.rng import Normal, gaussian_noise
from jebm.train.state import TrainState

__all__ = ["PICTURED_IMAGES", "Painter", "grid", "hierarchical_samples", "pictures", "sheet"]

_COLUMNS = 10
PICTURED_IMAGES = 2 * _COLUMNS
"""How many images are shown with their reconstruction."""


@torch.no_grad()
def hierarchical_samples(
    model: JointModel, config: Langevin, layer: int, normal: Normal, *, rows: int = 3
) -> Tensor:
    """Return (rows * 10, C, H, W): each row is a prior sample in which only `layer` (0 = bottom) varies.

    The varied values come from other samples of the joint prior (paper, hierarchical sampling).
    """
    z_BD, _ = sample_prior(model, config, rows + _COLUMNS, normal)
    anchors, others = z_BD[:rows], z_BD[rows:]
    z_NL = [part.repeat_interleave(_COLUMNS, 0) for part in torch.split(anchors, model.latent_dims, 1)]
    z_NL[layer] = torch.split(others, model.latent_dims, 1)[layer].repeat(rows, 1)
    return model.decode(torch.cat(z_NL, 1))


@torch.no_grad()
def pictures(model: JointModel, config: Langevin, x_NCHW: Tensor, normal: Normal) -> dict[str, Tensor]:
    """Return caption -> grid (C, height, width) in [0, 1], for `PICTURED_IMAGES` images in [-1, 1]."""
    pairs = torch.stack([x_NCHW, reconstruct(model, x_NCHW)])  # data, reconstruction
    # Alternate a row of data with a row of reconstructions.
    rows = pairs.view(2, 2, _COLUMNS, *x_NCHW.shape[1:]).transpose(0, 1)
    z_BD, _ = sample_prior(model, config, 5 * _COLUMNS, normal)
    sheets = {
        "data (odd rows) and reconstructions (even rows)": grid(rows.flatten(0, 2)),
        "samples of the prior": grid(model.decode(z_BD)),
    }
    layers = len(model.latent_dims)
    for layer in reversed(range(layers)):
        place = {0: "bottom", layers - 1: "top"}.get(layer, "middle")
        caption = f"hierarchical samples: z{layer + 1} ({place}) varies along a row"
        sheets[caption] = grid(hierarchical_samples(model, config, layer, normal))
    return sheets


class Painter:
    """Draws pictures of the state's current model, always from the same images and noise."""

    def __init__(self, config: Config, state: TrainState, images: ImageSet, device: torch.device) -> None:
        self._langevin, self._state = config.langevin, state
        self._noise = gaussian_noise(config.run.seed, 0, device)
        first = np.arange(PICTURED_IMAGES) % len(images.images_NHWC)
        self._x_NCHW = to_float(images.images_NHWC[first], device)

    def __call__(self) -> dict[str, Tensor]:
        """Return what `pictures` returns."""
        normal = self._noise(0, "pictures")
        return pictures(self._state.picture_model, self._langevin, self._x_NCHW, normal)


def grid(x_NCHW: Tensor) -> Tensor:
    """Return images in [-1, 1] as one CPU picture, 10 per row, (C, rows (H+1), 10 (W+1)) in [0, 1]."""
    x = (x_NCHW.float().cpu().clamp(-1, 1) + 1) / 2
    x = torch.nn.functional.pad(x, (0, 1, 0, 1), value=1.0)
    rows = x.view(-1, _COLUMNS, *x.shape[1:])
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)


def sheet(grids: dict[str, Tensor], *, scale: int = 2) -> Image.Image:
    """Return all grids stacked vertically with captions, each pixel `scale` wide."""
    font = ImageFont.load_default(size=13)
    panels = []
    for caption, picture in grids.items():
        array = (picture.expand(3, -1, -1).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        image = Image.fromarray(array)
        panels.append(
            (caption, image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST))
        )
    margin, title = 8, 20
    width = max(image.width for _, image in panels) + 2 * margin
    height = sum(image.height + title + margin for _, image in panels) + margin
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    y = margin
    for caption, image in panels:
        draw.text((margin, y), caption, fill="black", font=font)
        page.paste(image, (margin, y + title))
        y += title + image.height + margin
    return page
