"""Features of sets of images, computed by all workers together.

Shapes: N images of a set, B batch, C channels, H height, W width, F features.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jebm.data.loader import to_float, to_uint8
from jebm.errors import ConfigError
from jebm.evaluate.distances import Distances, real_floor
from jebm.evaluate.features import FeatureNet
from jebm.evaluate.share import ALONE, Share

__all__ = ["RealImages", "features_of", "real_images"]


@dataclass(frozen=True)
class RealImages:
    """Real images and their features, which samples are compared with."""

    images_NHWC: npt.NDArray[np.uint8]
    net: FeatureNet
    features_NF: Tensor
    """float32, on the CPU of every worker."""

    @cached_property
    def floor(self) -> Distances:
        """Distances of one half of the images to the other; ConfigError for too few images."""
        return real_floor(self.features_NF)

    def batches(self, device: torch.device | str, share: Share) -> Iterator[Tensor]:
        """Yield this worker's batches (B, C, H, W), in [-1, 1]."""
        for _, rows in share.batches(len(self.images_NHWC)):
            yield to_float(self.images_NHWC[rows].copy(), device)  # torch warns about read-only memory


def real_images(images_NHWC: npt.NDArray[np.uint8], net: FeatureNet, *, share: Share = ALONE) -> RealImages:
    """Return the images with their features; raises ConfigError if nodes have different nets."""
    bare = RealImages(images_NHWC, net, torch.empty(0))
    features_NF = features_of(bare.batches("cpu", share), len(images_NHWC), net, share)
    return RealImages(images_NHWC, net, features_NF)


@torch.no_grad()
def features_of(parts: Iterable[Tensor], count: int, net: FeatureNet, share: Share) -> Tensor:
    """Return the features (N, F) of all `count` images, from this worker's batches and the others'.

    Images are rounded to 8 bits first, like real ones. If one is not finite, its features are NaN. Raises
    ConfigError if nodes have different nets.
    """
    mark = float(int(net.sha256[:4], 16))
    if float(share.total(torch.tensor([mark]))) != mark * share.world_size:
        raise ConfigError(
            f"evaluation.features: {net.name} is not the same net on all nodes; a classifier, which their"
            " processors round in other ways, needs JEBM_CACHE on a folder that they share, inceptionv3 the"
            " same file of weights on each"
        )
    features_NF = torch.zeros(count, net.dimension)
    for (_, rows), x_BCHW in zip(share.batches(count), parts, strict=True):
        finite_B = x_BCHW.isfinite().flatten(1).all(1)
        rounded_BCHW = to_uint8(x_BCHW.nan_to_num()).to(torch.float32).div_(127.5).sub_(1)
        features_NF[rows] = torch.where(finite_B[:, None], net(rounded_BCHW), torch.nan).cpu()
    # The others' rows are zero here, so adding is exact.
    return share.total(features_NF)
