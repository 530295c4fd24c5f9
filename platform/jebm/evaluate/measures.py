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
from jebm.core.precision import true_fp32
from jebm.data.dataset import ImageSet
from jebm.evaluate.aggregate import oracle
from jebm.evaluate.chains import Trace, run_chains
from jebm.evaluate.features import FeatureNet
from jebm.evaluate.features.of_images import real_images
from jebm.evaluate.latents import LatentSamples, latent_samples
from jebm.evaluate.likelihood import Likelihood
from jebm.evaluate.samples import sample_measures, sample_quality
from jebm.evaluate.starts import f_gap
from jebm.evaluate.subject import COMPARED, Subject
from jebm.report.catalogue import measure
from jebm.report.measure import Measure

__all__ = ["LONG_STEPS", "Row", "common_measures", "long_factor", "measure_model", "measures"]

LONG_STEPS = 2_000
"""The least number of steps of long chains in a comparison."""

Row = dict[str, float]
"""The measures of one model by name; NaN if undefined. Empty for a run that diverged."""

_CHAINS = 1_000
_BEFORE_RATES = ("distortion", "mse")
_BEFORE_AUCS = (
    *("active_units", "elbo_gain", "elbo_gain_above", "oracle_gain", "oracle_share", "elbo", "log_z_share"),
    *("log_z_gap", "acceptance", "f_drift", "f_gap", "norm_ratio", "auc", "auc_long"),
)
_AFTER_AUCS = (
    *("frechet", "frechet_long", "frechet_posterior", "frechet_posterior_long", "kid", "kid_long"),
    *("precision", "precision_long", "recall", "recall_long"),
    *("frechet_reconstructions", "frechet_floor"),
)


def measures(layers: int) -> tuple[Measure, ...]:
    """Return the measures in a comparison's rows for this many latent layers, in the order of its table."""

    def of_layers(name: str, row: str) -> tuple[Measure, ...]:
        each = range(1, layers + 1)
        return tuple(replace(measure(name, layer=f"z{i}"), name=f"{row}_{i}") for i in each)

    return (
        *map(measure, _BEFORE_RATES),
        *of_layers("rate_layer", "rate"),
        *map(measure, _BEFORE_AUCS),
        *of_layers("auc_layer", "auc"),
        *map(measure, _AFTER_AUCS),
    )


def long_factor(config: Config) -> int:
    """Return the length of the long chains in multiples of `langevin.steps`: the first to reach `LONG_STEPS`.

    At least 2. `evaluation.chain_factor` is ignored, so that all comparisons use the same length.
    """
    return max(2, -(-LONG_STEPS // config.langevin.steps))


@torch.no_grad()
def common_measures(subject: Subject, found: Likelihood, latents: LatentSamples, *, factor: int) -> Row:
    """Return what the quick look and a comparison both measure: of samples, and of the likelihood `found`.

    Long chains are `factor` times as long as short ones; `latents` are theirs. Raises ConfigError for too
    few images.
    """
    values = sample_measures(sample_quality(subject, factor=factor)) | {
        "auc_long": latents.auc(),
        "elbo": found.elbo.value,
        "elbo_gain": found.gain.value,
        "log_z_gap": subject.log_z_inside.value - subject.log_z.value,
        "log_z_share": 1.0 if subject.annealed is None else subject.annealed.effective_share,
    }
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


@torch.no_grad()
@true_fp32()
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
    long = latent_samples(subject, factor=long_factor(config))
    row = {
        **common_measures(subject, found, long, factor=long_factor(config)),
        "distortion": found.distortion.value,
        "mse": _squared_error(subject) / images_NHWC.size,
        **{f"rate_{i}": rate.value for i, rate in enumerate(found.rate_L, 1)},
        "active_units": float(sum(found.active_units)),
        "elbo_gain_above": found.f_posterior.value - subject.log_z_above.value,
        "oracle_gain": math.nan if to_gain is None else to_gain.gain.value,
        "oracle_share": math.nan if to_gain is None else to_gain.share.value,
        **_sampler(subject),
        "auc": (long if subject.tilt is None else latent_samples(subject, factor=1)).auc(),
        **{f"auc_{i}": long.auc(columns) for i, columns in enumerate(subject.layer_columns, 1)},
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
        return {"acceptance": 1.0, "f_drift": 0.0, "f_gap": 0.0, "norm_ratio": 1.0}
    langevin, tilt = subject.config.langevin, subject.tilt

    def chains(start_BD: Tensor, purpose: str) -> Trace:
        return run_chains(
            tilt,
            start_BD,
            subject.noise(0, purpose),
            steps=long_factor(subject.config) * langevin.steps,
            step_size=langevin.step_size,
            every=langevin.steps,
        )

    trace = chains(subject.noise(0, "chain start")(_CHAINS, subject.model.latent_dim), "chain")
    posterior_BD = subject.posterior_codes(_CHAINS, subject.noise(0, "posterior chain start"))
    mean_f_T, mean_norm_T = trace.f_TB.double().mean(1), trace.z_TBD.double().norm(dim=2).mean(1)
    return {
        "acceptance": trace.acceptance,
        "f_drift": float(mean_f_T[-1] - mean_f_T[1]),
        "f_gap": f_gap(trace, chains(posterior_BD, "posterior chain")).value,
        "norm_ratio": float(mean_norm_T[-1] / mean_norm_T[0]),  # chains start in N(0, I)
    }
