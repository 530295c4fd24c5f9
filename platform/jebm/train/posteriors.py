"""The posteriors of all images of a set, computed once: for training the energy alone.

Shapes: N images of the set, B batch, D latent width.
"""

import numpy as np
import numpy.typing as npt
import torch

from jebm.core.distributions import DiagGaussian
from jebm.core.model import JointModel
from jebm.data.loader import to_float
from jebm.train.runtime import Runtime

__all__ = ["posteriors"]

_BATCH = 500


@torch.no_grad()
def posteriors(model: JointModel, images_NHWC: npt.NDArray[np.uint8], runtime: Runtime) -> DiagGaussian:
    """Return q(z|x) of every image, (N, D), on the device of every rank; each computes its share."""
    moments = torch.zeros(2, len(images_NHWC), model.latent_dim, device=runtime.device)
    for position in range(runtime.rank, -(-len(images_NHWC) // _BATCH), runtime.world_size):
        rows = slice(position * _BATCH, (position + 1) * _BATCH)
        x_BCHW = to_float(images_NHWC[rows].copy(), runtime.device)  # torch warns of memory that is read-only
        moments[:, rows] = torch.stack(tuple(model.inference(x_BCHW)))
    # The rows of the others are zero here, so that adding rounds nothing.
    return DiagGaussian(*runtime.total(moments))
