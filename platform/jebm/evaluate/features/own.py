"""A feature net of the user's own: `evaluation.features` with a `class_path`.

Shapes: B batch, C channels, H height, W width, F features.
"""

import hashlib
import json
from collections.abc import Collection

import torch
from torch import Tensor

from jebm.classes import origin_of
from jebm.config import Config
from jebm.core.by_class import FEATURES, own_part
from jebm.core.parts import Features
from jebm.errors import ConfigError
from jebm.evaluate.features.classifier import digest_of

__all__ = ["OwnFeatures", "own_features"]

_TRIED = 2
"""Images of a first call, which tells the number of features."""


class OwnFeatures:
    """A `jebm.parts.Features` as feature net: a name, a digest, and float32 features without gradient."""

    def __init__(
        self, net: Features, name: str, sha256: str, dimension: int, device: torch.device | str
    ) -> None:
        """Take the net, its class path, the digest of all that defines it, F, and the device."""
        self.name, self.sha256, self.dimension = name, sha256, dimension
        self._device, self._net = torch.device(device), net.to(device)

    @torch.no_grad()
    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Return features (B, F)."""
        h_BF: Tensor = self._net(x_BCHW.to(self._device, torch.float32))
        return h_BF.float()


def own_features(
    config: Config,
    image: tuple[int, int, int],
    trusted: Collection[str],
    *,
    device: torch.device | str = "cpu",
) -> OwnFeatures | None:
    """Return the net of the class in `evaluation.features`, for images (C, H, W); None for jebm's own.

    Its random initial weights, if it has any, are the same in each process. Its digest is of the class's
    file, its arguments and its weights.

    Raises:
        ConfigError: its module is not `trusted`, it cannot be built, or it does not return (B, F).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net: Features | None = own_part(config, FEATURES, (image,), trusted)
    if net is None:
        return None
    net = net.eval().requires_grad_(requires_grad=False)
    # One call, so that a wrong shape is found before anything is measured.
    name = type(net).__name__
    try:
        with torch.no_grad():
            h_BF = net(torch.zeros(_TRIED, *image))
    except Exception as error:
        raise ConfigError(f"{FEATURES}: {name} fails on images of {image}: {error}") from error
    if not isinstance(h_BF, Tensor) or h_BF.ndim != 2 or len(h_BF) != _TRIED:
        shape = list(h_BF.shape) if isinstance(h_BF, Tensor) else type(h_BF).__name__
        raise ConfigError(f"{FEATURES}: {name} makes {shape} of {_TRIED} images, not [{_TRIED}, F]")
    origin, arguments = origin_of(type(net)), json.dumps(config.evaluation.features.init_args, sort_keys=True)
    parts = (origin["class"], origin["source_sha256"], arguments, digest_of(net.state_dict()))
    sha256 = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return OwnFeatures(net, origin["class"], sha256, h_BF.shape[1], device)
