"""When latent layers join: lower layers late, so that the top one takes what it can first.

Progressive learning of hierarchical representations: while the rate of a layer costs several times its
value, the posterior keeps the layer at the prior, and the layers above it learn to carry the image.
"""

from jebm.config import Hierarchy

__all__ = ["rate_weights"]

_PAUSE = 1 / 7
"""Share of a layer's window in which it has joined and the next has not begun to."""


def rate_weights(config: Hierarchy, layers: int, progress: float) -> list[float] | None:
    """Return the weight of each layer's rate, bottom first, at a share `progress` of the run, in [0, 1].

    The top layer's is 1. A lower layer's falls geometrically from `rate_factor` to 1 in its window of
    [begin, end]: windows are equal, the layer below the top comes first, the bottom layer last. None if all
    weights are 1.
    """
    late = layers - 1
    if config.rate_factor == 1 or late == 0 or progress >= config.end:
        return None
    window = (config.end - config.begin) / late
    weights = []
    for layer in range(late):  # the bottom layer is the last to join
        start = config.begin + (late - 1 - layer) * window
        joined = (progress - start) / (window * (1 - _PAUSE))
        weights.append(config.rate_factor ** (1 - min(max(joined, 0.0), 1.0)))
    return [*weights, 1.0]
