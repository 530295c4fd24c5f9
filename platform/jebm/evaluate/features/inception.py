"""InceptionV3 as a feature net, with weights from the user's file.

Shapes: B batch, C channels, H height, W width.
"""

import hashlib
import importlib
import importlib.util
import io
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from jebm.config import INCEPTION_FILE
from jebm.data.loader import to_uint8
from jebm.errors import ConfigError

__all__ = ["PUBLISHED_SHA256", "InceptionFeatures", "inception_features"]

PUBLISHED_SHA256 = "6726825d"
"""Beginning of the sha256 of the weights behind published FIDs, as in their file names."""


class InceptionFeatures:
    """torch-fidelity's InceptionV3, a copy of TensorFlow's of 2015: its last block, averaged over the plane.

    Images are rounded to 8 bits, grey expanded to three equal channels; the package does the rest: resize to
    299 x 299 as TensorFlow 1 does (bilinear, no antialiasing), pixels 0 ... 255 to (pixel - 128) / 128.
    """

    name = "inceptionv3"
    dimension = 2048

    def __init__(self, net: nn.Module, sha256: str, device: torch.device | str) -> None:
        """Take the package's net, the sha256 of its weights file, and the device."""
        self.sha256 = sha256
        self._device = torch.device(device)
        self._net = net.to(self._device)

    @torch.no_grad()
    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Return features (B, 2048)."""
        # Larger batches are no faster on a CPU and take 20 MB of memory per image.
        at_once = 8 if self._device.type == "cpu" else 32
        pixels_BCHW = to_uint8(x_BCHW.to(self._device)).expand(-1, 3, -1, -1)
        return torch.cat([self._net(pixels)[0] for pixels in torch.split(pixels_BCHW, at_once)])


def inception_features(weights: str | Path, *, device: torch.device | str = "cpu") -> InceptionFeatures:
    """Return the features of InceptionV3 with weights from a file: a state dict of torch-fidelity's net.

    The net's code comes from torch-fidelity, the extra `fid`; nothing is downloaded. Weights other than the
    known ones work too, but the distance is then no FID (`is_fid`).

    Raises ConfigError if the package is not installed, or the file is missing or holds something else.
    """
    key, path = "evaluation.inception_weights", Path(weights)
    package = _inception_module()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{key}: {weights or 'no path'} cannot be read ({error.strerror}); give the path of your copy of"
            f" {INCEPTION_FILE}"
        ) from error
    # The reader of pickles and zips may get any bytes here, and can fail in any way.
    try:
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:
        raise ConfigError(
            f"{key}: {path} does not hold plain tensors, as written by torch.save; give {INCEPTION_FILE}"
        ) from error
    # The package reads with weights_only=False, so give it a fresh copy of what was found safe.
    found_safe = io.BytesIO()
    torch.save(tensors, found_safe)
    found_safe.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # the constructor draws random weights first
            net = package.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=found_safe
            )
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = textwrap.shorten(str(error).partition(":\n")[2] or str(error), 120, placeholder=" …")
        raise ConfigError(
            f"{key}: {path} does not hold the weights of InceptionV3 ({reason}); give {INCEPTION_FILE}"
        ) from error
    return InceptionFeatures(net, hashlib.sha256(data).hexdigest(), device)


def _inception_module() -> ModuleType:
    """Return the module of torch-fidelity with the net; ConfigError if it is not installed.

    Skips the package's `__init__`, which imports torchvision for nets not needed here, and fails if
    torchvision is missing or was built for another torch.
    """
    front, module = "torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"
    try:
        if front in sys.modules:
            return importlib.import_module(module)
        spec = importlib.util.find_spec(front)
        if spec is None:
            raise ModuleNotFoundError(front)
        sys.modules[front] = importlib.util.module_from_spec(spec)
        try:
            return importlib.import_module(module)
        finally:
            del sys.modules[front]
    except ImportError as error:
        raise ConfigError(
            "evaluation.features: inceptionv3 needs a package; pip install --no-deps torch-fidelity, or, with"
            " torchvision, in the clone: pip install -e '.[fid]'"
        ) from error
