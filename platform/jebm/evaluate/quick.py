"""A quick look at a model while it trains, for TensorBoard, sweeps and `--best`: seconds for 2,000 samples.

The loss does not show sample quality: it falls when f runs away. Short-run samples are not enough either: a
chain that has not mixed can look as good as one that has, while the prior it claims to sample is a different
one (docs/sweeps.md has the figures). So the same distance is also measured after long chains, and the ELBO
uses the normalised prior.
"""

from collections.abc import Callable

import torch

from jebm.config import Config
from jebm.core.by_class import named_modules
from jebm.core.model import JointModel
from jebm.core.precision import true_fp32
from jebm.data.dataset import ImageSet, load_images
from jebm.data.honesty import check_honest
from jebm.data.manifest import DatasetManifest
from jebm.errors import ConfigError
from jebm.evaluate.features import FeatureNet, check_feature_net, feature_net
from jebm.evaluate.features.classifier import ClassifierFeatures
from jebm.evaluate.features.of_images import RealImages, real_images
from jebm.evaluate.latents import latent_samples
from jebm.evaluate.measures import common_measures
from jebm.evaluate.share import Ranks, share_of
from jebm.evaluate.subject import QUICK, Subject
from jebm.plain import hint_at
from jebm.store.storage import open_store

__all__ = [
    "NAMES",
    "QuickLook",
    "check_distances",
    "check_enough",
    "check_measured",
    "check_quick_look",
    "quick_look",
]

NAMES = (
    *("frechet", "frechet_long", "frechet_reconstructions", "frechet_posterior_long", "frechet_floor"),
    *("kid_long", "precision_long", "recall_long", "elbo", "elbo_gain", "log_z_share"),
    *("log_z_gap", "auc_long"),
)
"""The measures of the catalogue that a quick look takes."""

_FEWEST_IMAGES = 40
"""The floor compares two halves, and a kernel distance needs 20 images on each side."""


class QuickLook:
    """The measures of a model on the first `evaluation.samples` validation images, with the same noise.

    Without a validation set they are the held-out ones: `Data.judging`. All workers of the run take part,
    each with its share of the batches, on its device; their number does not change the measures.

    The feature net and the real images' features are built at the first call, so that a run that ends before
    it need not wait for them.
    """

    def __init__(self, config: Config) -> None:
        """Take the config of the run; nothing is read yet."""
        self._config = config
        self._known: tuple[ImageSet, RealImages] | None = None

    @true_fp32()
    def __call__(self, model: JointModel, step: int, ranks: Ranks) -> dict[str, float]:
        """Return `NAMES` -> values; NaN if samples are not finite. All workers call this.

        Raises:
            ConfigError: the data do not fit the feature net, or the net is missing.
        """
        config, samples, share = self._config, self._config.evaluation.samples, share_of(ranks)
        if self._known is None:
            device = next(model.parameters()).device
            with ranks.together():
                images = load_images(open_store(config.data.judging[1]))
            net = _common_net(config, ranks, device)
            self._known = images, real_images(images.images_NHWC[:samples], net, share=share)
        images, known = self._known
        subject = Subject(
            *(model, config, images),
            samples=samples,
            seed=config.run.seed,
            share=share,
            sizes=QUICK,
            known=known,
        )
        found = subject.likelihood(subject.images_NHWC)
        factor = config.evaluation.chain_factor
        row = common_measures(subject, found, latent_samples(subject, factor=factor), factor=factor)
        return {name: row[name] for name in NAMES}


def _common_net(config: Config, ranks: Ranks, device: torch.device) -> FeatureNet:
    """Return the feature net, the same on every worker: rank 0 trains a classifier and sends it.

    Each node would train another one: processors round in other ways.
    """
    net: FeatureNet | None = None
    trained = config.evaluation.features.name == "classifier"
    with ranks.together():
        train = load_images(open_store(config.data.train))
        if ranks.rank == 0 or not trained:
            where = "cpu" if trained else device
            net = feature_net(config, train, named_modules(config), device=where)
    if trained:
        net = ranks.from_main(net)
    if net is None:
        raise RuntimeError("rank 0 sent no feature net")
    return net.on(device) if isinstance(net, ClassifierFeatures) else net


def quick_look(config: Config) -> Callable[[JointModel, int, Ranks], dict[str, float]] | None:
    """Return what `fit` calls as `measure`: a `QuickLook`, or None if `evaluation.every_steps` is 0."""
    return QuickLook(config) if config.evaluation.every_steps else None


def check_quick_look(
    config: Config, train: DatasetManifest, judging: DatasetManifest, images: ImageSet | None
) -> None:
    """Check that a quick look can measure; `images` are the training images, if already read.

    Raises:
        ConfigError: as `check_distances`; or `train.early_stopping` watches what is not measured, or would
            see test images.
        DataError, StoreError: as `check_honest`.
    """
    watched = config.train.early_stopping.metric
    if watched is not None:
        check_measured(watched, "train.early_stopping.metric")
        check_honest(watched, config, judging)
    if config.evaluation.every_steps:
        check_distances(config, train, judging, images, key=config.data.judging[0])


def check_measured(metric: str, key: str) -> None:
    """Check that an evaluation/… given under `key` is one of a quick look; raises `ConfigError`."""
    known = [f"evaluation/{name}" for name in NAMES]
    if metric not in known:
        raise ConfigError(f"{key}: {metric} is not measured while training; {hint_at(metric, known)}")


def check_distances(
    config: Config, train: DatasetManifest, unseen: DatasetManifest, images: ImageSet | None, *, key: str
) -> None:
    """Check that distances between samples and the unseen images, named by `key`, can be taken.

    Raises:
        ConfigError: too few unseen images, no labels for a classifier, or no such feature net.
    """
    check_enough(unseen, key=key, otherwise="set evaluation.every_steps to 0")
    check_feature_net(config, train, images)


def check_enough(unseen: DatasetManifest, *, key: str, otherwise: str) -> None:
    """Raise `ConfigError` if the unseen images, named by `key`, are too few to take distances to."""
    if unseen.images < _FEWEST_IMAGES:
        raise ConfigError(
            f"{key}: distances need at least {_FEWEST_IMAGES} held-out images, and there are "
            f"{unseen.images}; give a larger set, or {otherwise}"
        )
