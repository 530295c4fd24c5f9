"""A quick look at a model while it trains: seconds for 2,000 samples, for TensorBoard, sweeps and `--best`.

The loss says nothing of this: it falls when f runs away. Neither do short-run samples alone: a chain that has
not mixed can look as good as one that has, while the prior that it claims to sample is another one
(docs/sweeps.md has the figures). So the same distance is taken after long chains as well, and the ELBO counts
the normalised prior.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jebm.config import Config
from jebm.core.model import JointModel
from jebm.data.dataset import ImageSet, load_images
from jebm.data.loader import to_float
from jebm.data.manifest import DatasetManifest
from jebm.errors import ConfigError
from jebm.evaluate.distances import Distances, real_floor
from jebm.evaluate.estimates import Estimate
from jebm.evaluate.features import FeatureNet, check_feature_net, feature_net
from jebm.evaluate.hierarchy import tilt_of
from jebm.evaluate.likelihood import likelihood
from jebm.evaluate.partition import log_partition_annealed
from jebm.evaluate.samples import BATCH, image_features, sample_quality
from jebm.rng import Noise, gaussian_noise
from jebm.store.storage import open_store

__all__ = ["QuickLook", "check_distances", "check_quick_look", "quick_look"]

_AIS_CHAINS = 500
_AIS_TEMPERATURES = 100
_FEWEST_IMAGES = 40
"""Half of them against the other half, for the floor: a kernel distance needs 20 on each side."""


class QuickLook:
    """The measures of a model on the first `evaluation.samples` held-out images, always with the same noise.

    The feature net and the real images' features are made at the first call, so that a run that ends before
    it does not wait for them.
    """

    def __init__(self, config: Config) -> None:
        """Take the config of the run; reads nothing yet."""
        self._config = config
        self._net: FeatureNet | None = None
        self._real_NF: Tensor | None = None
        self._floor: Distances | None = None
        self._images_NHWC = np.empty((0, 1, 1, 1), np.uint8)

    def __call__(self, model: JointModel, step: int) -> dict[str, float]:
        """Return the measures, by name; NaN where samples are not finite.

            frechet         distance between prior samples (chains of langevin.steps) and held-out images
            frechet_long    the same after chains evaluation.chain_factor times as long
            frechet_reconstructions, frechet_floor
                            of reconstructions, and of one half of the held-out images against the other
            frechet_posterior
                            between prior samples after the long chains and decoded posterior samples
            kid_long, precision_long, recall_long
                            kernel distance, precision and recall after the long chains
            elbo            in nats for one image, with the normalised prior and all constants
            elbo_gain       E_q[f] - log Z: what the tilt adds to it
            log_z_share     effective sample size of log Z (annealed importance sampling) over its chains

        Raises:
            ConfigError: the data do not fit the feature net, or it is not there.
        """
        config = self._config
        if self._net is None or self._real_NF is None:
            images = load_images(open_store(config.data.held_out or config.data.train))
            self._images_NHWC = images.images_NHWC[: config.evaluation.samples]
            self._net = feature_net(config.evaluation, load_images(open_store(config.data.train)))
            self._real_NF = image_features(self._images_NHWC, self._net)
            self._floor = real_floor(self._real_NF)
        noise = gaussian_noise(config.run.seed, 0, next(model.parameters()).device)
        quality = sample_quality(
            model,
            config.langevin,
            self._images_NHWC,
            self._real_NF,
            self._net,
            noise,
            count=config.evaluation.samples,
            chain_factor=config.evaluation.chain_factor,
            floor=self._floor,
        )
        long = quality["samples_long"]
        values = {
            "frechet": quality["samples"]["frechet"],
            "frechet_long": long["frechet"],
            "frechet_reconstructions": quality["reconstructions"]["frechet"],
            "frechet_posterior": quality["samples_long_to_posterior"]["frechet"],
            "frechet_floor": quality["real_floor"]["frechet"],
            "kid_long": long["kid"],
            "precision_long": long["precision"],
            "recall_long": long["recall"],
            **_bound(model, self._images_NHWC, noise),
        }
        return {name: math.nan if value is None else float(value) for name, value in values.items()}


def quick_look(config: Config) -> Callable[[JointModel, int], dict[str, float]] | None:
    """Return what `fit` calls as `measure`: a `QuickLook`, or None where `evaluation.every_steps` is 0."""
    return QuickLook(config) if config.evaluation.every_steps else None


def check_quick_look(
    config: Config, train: DatasetManifest, held_out: DatasetManifest, images: ImageSet | None
) -> None:
    """Check that what `quick_look` returns can measure; `images` are the training images, if they are read.

    Raises:
        ConfigError: as `check_distances`.
    """
    if config.evaluation.every_steps:
        check_distances(config, train, held_out, images)


def check_distances(
    config: Config, train: DatasetManifest, held_out: DatasetManifest, images: ImageSet | None
) -> None:
    """Check that distances between samples and held-out images can be taken.

    Raises:
        ConfigError: there are too few held-out images, no labels for a classifier, or no such feature net.
    """
    if held_out.images < _FEWEST_IMAGES:
        key = "data.held_out" if config.data.held_out else "data.train"
        raise ConfigError(
            f"{key}: distances need at least {_FEWEST_IMAGES} held-out images, and there are "
            f"{held_out.images}; give a larger set, or set evaluation.every_steps to 0"
        )
    check_feature_net(config.evaluation, train, images)


@torch.no_grad()
def _bound(model: JointModel, images_NHWC: np.typing.NDArray[np.uint8], noise: Noise) -> dict[str, Any]:
    device = next(model.parameters()).device
    log_z, share = Estimate(0.0, 0.0), 1.0
    tilt = tilt_of(model)
    if tilt is not None:
        annealed = log_partition_annealed(
            tilt,
            model.latent_dim,
            noise(0, "quick log Z"),
            chains=_AIS_CHAINS,
            temperatures=_AIS_TEMPERATURES,
        )
        log_z, share = annealed.log_z, annealed.effective_share
    batches = (
        to_float(images_NHWC[first : first + BATCH].copy(), device)
        for first in range(0, len(images_NHWC), BATCH)
    )
    found = likelihood(model, batches, noise, log_z)
    return {"elbo": found.elbo.value, "elbo_gain": found.gain.value, "log_z_share": share}
