"""Feature nets: maps from images to vectors in which distances mean something.

    classifier    a small classifier trained on the run's own labelled data; 64 features, for its classes
    effnetlite0   EfficientNet-Lite0 trained on ImageNet, from two small packages; 320 features, for any data
    inceptionv3   InceptionV3 with weights from the user's file; 2,048 features, for any data
    a class       the user's own (`jebm.parts.Features`)

Two distances are comparable only if both used the same net: the same `sha256`. A Fréchet distance is an FID
only in InceptionV3 with the known weights (`is_fid`).

Shapes: N images of a set, B batch, C channels, H height, W width, F features, K classes.
"""

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from jebm.config import Config
from jebm.core.by_class import named_modules
from jebm.data.dataset import ImageSet
from jebm.data.manifest import DatasetManifest
from jebm.errors import ConfigError
from jebm.evaluate.features.classifier import check_classes, classifier_features
from jebm.evaluate.features.efficientnet import efficientnet_features
from jebm.evaluate.features.inception import PUBLISHED_SHA256, InceptionFeatures, inception_features
from jebm.evaluate.features.own import own_features

__all__ = ["FeatureNet", "check_feature_net", "feature_net", "is_fid"]


class FeatureNet(Protocol):
    """A fixed map from images to features."""

    @property
    def name(self) -> str:
        """The name of the net, as it appears in names of distances."""

    @property
    def dimension(self) -> int:
        """F."""

    @property
    def sha256(self) -> str:
        """Digest of the weights: distances are comparable only if it is the same."""

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Return features (B, F), float32, without gradient, for images in [-1, 1] on any device."""


def feature_net(
    config: Config, train: ImageSet, trusted: Collection[str] = (), *, device: torch.device | str = "cpu"
) -> FeatureNet:
    """Return the net that `evaluation.features` names; raises as the function that builds it.

    A class of the user's own must be of a `trusted` module.
    """
    if (own := own_features(config, _image(train.manifest), trusted, device=device)) is not None:
        return own
    if config.evaluation.features.name == "effnetlite0":
        return efficientnet_features(device=device)
    if config.evaluation.features.name == "inceptionv3":
        return inception_features(config.evaluation.inception_weights or "", device=device)
    return classifier_features(train, device=device)


def check_feature_net(config: Config, train: DatasetManifest, images: ImageSet | None) -> None:
    """Check that `feature_net` can build its net, without training one; pass `images` if already read.

    The config is the user's own, so the modules of its classes are trusted. Raises ConfigError as
    `feature_net`.
    """
    if own_features(config, _image(train), named_modules(config)) is not None:
        return
    if config.evaluation.features.name == "effnetlite0":
        efficientnet_features()
    elif config.evaluation.features.name == "inceptionv3":
        inception_features(config.evaluation.inception_weights or "")
    elif train.labels_sha256 is None:
        raise ConfigError(
            "evaluation.features: a classifier needs labels, and data.train has none; "
            "set it to effnetlite0, or ingest again with --labels"
        )
    elif images is not None:
        check_classes(images)


def is_fid(net: FeatureNet) -> bool:
    """Return whether a Fréchet distance in this net is the FID: InceptionV3 with the known weights."""
    return net.name == InceptionFeatures.name and net.sha256.startswith(PUBLISHED_SHA256)


def _image(manifest: DatasetManifest) -> tuple[int, int, int]:
    return manifest.channels, manifest.height, manifest.width
