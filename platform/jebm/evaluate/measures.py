"""The measures of a model as one row of numbers, for the quick look while it trains and for a comparison.

Both take the measures of the catalogue (`jebm.report.catalogue`) from the same estimators as a report,
each with its own sizes and noise (`jebm.evaluate.subject.Sizes`).

Shapes: N images, B batch, C channels, H rows, W columns, D latent width, T recorded times of chains.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from jebm.config import Config
from jebm.core.model import JointModel
from jebm.core.objective import reconstruct
from jebm.core.prior import sample_prior
from jebm.data.dataset import ImageSet
from jebm.evaluate.aggregate import oracle
from jebm.evaluate.chains import run_chains
from jebm.evaluate.features import FeatureNet
from jebm.evaluate.features.of_images import real_images
from jebm.evaluate.likelihood import Likelihood
from jebm.evaluate.samples import sample_measures, sample_quality
from jebm.evaluate.share import BATCH
from jebm.evaluate.subject import COMPARED, Subject
from jebm.evaluate.two_sample import two_sample_auc
from jebm.report.catalogue import measure
from jebm.report.measure import Measure

__all__ = ["LONG_STEPS", "Row", "common_measures", "long_factor", "measure_model", "measures"]

LONG_STEPS = 2_000
"""The least number of steps of long chains in a comparison."""

Row = dict[str, float]
"""The measures of one model by name; NaN if undefined. Empty for a run that diverged."""

_CHAINS = 1_000
_BEFORE_RATES = ("distortion", "mse")
_AFTER_RATES = (
    *("active_units", "elbo_gain", "elbo_gain_above", "oracle_gain", "oracle_share", "elbo", "log_z_share"),
    *("acceptance", "f_drift", "norm_ratio", "auc", "auc_long", "frechet", "frechet_long"),
    *(
        "frechet_posterior",
        "frechet_posterior_long",
        "kid",
        "kid_long",
        "precision",
        "precision_long",
        "recall",
        "recall_long",
    ),
    *("frechet_reconstructions", "frechet_floor"),
)


def measures(layers: int) -> tuple[Measure, ...]:
    """Return the measures in a comparison's rows for this many latent layers, in the order of its table."""
    rates = (
        replace(measure("rate_layer", layer=f"z{layer}"), name=f"rate_{layer}")
        for layer in range(1, layers + 1)
    )
    return (*map(measure, _BEFORE_RATES), *rates, *map(measure, _AFTER_RATES))


def long_factor(config: Config) -> int:
    """Return the length of the long chains in multiples of `langevin.steps`: the first to reach `LONG_STEPS`.

    At least 2. `evaluation.chain_factor` is ignored, so that all comparisons use the same length.
    """
    return max(2, -(-LONG_STEPS // config.langevin.steps))


@torch.no_grad()
def common_measures(subject: Subject, found: Likelihood, *, factor: int) -> Row:
    """Return what the quick look and a comparison both measure: of samples, and of the likelihood `found`.

    Long chains are `factor` times as long as short ones. Raises ConfigError for too few images.
    """
    values = sample_measures(sample_quality(subject, factor=factor)) | {
        "elbo": found.elbo.value,
        "elbo_gain": found.gain.value,
        "log_z_share": 1.0 if subject.annealed is None else subject.annealed.effective_share,
    }
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


@torch.no_grad()
def measure_model(model: JointModel, config: Config, held_out: ImageSet, net: FeatureNet) -> Row:
    """Return all `measures` of a model on held-out images, by name.

    Distances use the first `evaluation.samples` images. Noise depends only on `run.seed`, so that all models
    of one seed see the same noise.

    Raises:
        ConfigError: too few held-out images for a distance.
    """
    samples, images_NHWC = config.evaluation.samples, held_out.images_NHWC
    # Passing the real images' features makes the subject use this net.
    known = real_images(images_NHWC[:samples], net)
    subject = Subject(
        model, config, held_out, samples=samples, seed=config.run.seed, sizes=COMPARED, known=known
    )
    found = subject.likelihood(images_NHWC)
    to_gain = oracle(subject, images_NHWC)
    row = {
        **common_measures(subject, found, factor=long_factor(config)),
        "distortion": found.distortion.value,
        "mse": _squared_error(subject) / images_NHWC.size,
        **{f"rate_{i}": rate.value for i, rate in enumerate(found.rate_L, 1)},
        "active_units": float(sum(found.active_units)),
        "elbo_gain_above": found.f_posterior.value - subject.log_z_above.value,
        "oracle_gain": math.nan if to_gain is None else to_gain.gain.value,
        "oracle_share": math.nan if to_gain is None else to_gain.share.value,
        **_sampler(subject),
        **_two_samples(subject),
    }
    return {each.name: row[each.name] for each in measures(len(model.latent_dims))}


def _squared_error(subject: Subject) -> float:
    """Return the total squared error of all pixels of all images, decoded from the mean of q(z|x)."""
    images_NHWC = subject.images.images_NHWC

    def squares(_position: int, rows: slice) -> Tensor:
        x_BCHW = subject.batch(rows, images_NHWC)
        return (reconstruct(subject.model, x_BCHW) - x_BCHW).double().square().sum().cpu()

    return float(subject.added(len(images_NHWC), (), squares))


def _sampler(subject: Subject) -> Row:
    """Return the measures of the prior's chains; for the Gaussian prior, the values of a perfect sampler."""
    if subject.tilt is None:
        return {"acceptance": 1.0, "f_drift": 0.0, "norm_ratio": 1.0}
    langevin = subject.config.langevin
    trace = run_chains(
        subject.tilt,
        subject.noise(0, "chain start")(_CHAINS, subject.model.latent_dim),
        subject.noise(0, "chain"),
        steps=long_factor(subject.config) * langevin.steps,
        step_size=langevin.step_size,
        every=langevin.steps,
    )
    mean_f_T, mean_norm_T = trace.f_TB.double().mean(1), trace.z_TBD.double().norm(dim=2).mean(1)
    return {
        "acceptance": trace.acceptance,
        "f_drift": float(mean_f_T[-1] - mean_f_T[1]),
        "norm_ratio": float(mean_norm_T[-1] / mean_norm_T[0]),  # chains start in N(0, I)
    }


def _two_samples(subject: Subject) -> Row:
    """Return how well a classifier tells prior latents from the same number of posterior latents."""
    model, config, count = subject.model, subject.config, len(subject.images_NHWC)
    images_NHWC = subject.images.images_NHWC
    parts: list[Tensor] = []
    for position in range(-(-count // BATCH)):
        rows = slice(position * BATCH, (position + 1) * BATCH)
        x_BCHW = subject.batch(rows, images_NHWC)
        normal = subject.noise(position, "two-sample posterior")
        parts.append(model.posterior(x_BCHW, normal(len(x_BCHW), model.latent_dim)).code_BD)
    posterior_ND = torch.cat(parts)[:count]

    def auc(factor: int) -> float:
        langevin = replace(config.langevin, steps=factor * config.langevin.steps)
        prior_ND, _ = sample_prior(model, langevin, count, subject.noise(0, "two-sample prior"))
        return two_sample_auc(prior_ND, posterior_ND, seed=config.run.seed)

    short = auc(1)
    # Samples of the Gaussian prior are exact and need no chain.
    return {"auc": short, "auc_long": short if model.energy is None else auc(long_factor(config))}
