"""What is measured of each model that a comparison holds against others.

Shapes: N images, B batch, C channels, H rows, W columns, D latent width, T recorded times of chains.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from jebm.config import Config
from jebm.core.model import JointModel
from jebm.core.objective import reconstruct
from jebm.core.prior import sample_prior
from jebm.data.dataset import ImageSet
from jebm.data.loader import to_float
from jebm.evaluate.chains import run_chains
from jebm.evaluate.estimates import Estimate
from jebm.evaluate.features import FeatureNet
from jebm.evaluate.hierarchy import tilt_of
from jebm.evaluate.likelihood import likelihood
from jebm.evaluate.partition import log_partition_annealed, log_partition_reverse
from jebm.evaluate.samples import BATCH, image_features, sample_quality
from jebm.evaluate.two_sample import two_sample_auc
from jebm.rng import Noise, gaussian_noise

__all__ = ["LONG_STEPS", "Measure", "Row", "long_factor", "measure_model", "measures"]

LONG_STEPS = 2_000
"""Steps that long chains have at least, by the gates of a comparison."""

Row = dict[str, float]
"""The measures of one model by name; NaN if one does not exist. Empty for a run that diverged."""


@dataclass(frozen=True)
class Measure:
    """A number that is taken of every model."""

    name: str
    title: str
    better: Literal["lower", "higher"] | None
    digits: int
    """Shown after the point."""
    meaning: str
    ratio: bool = False
    """Whether the arms' ratio says more than their difference."""


def measures(layers: int) -> tuple[Measure, ...]:
    """Return the measures of a model with so many latent layers, in the order of the table."""
    nats = "nats for one image"
    rates = (
        Measure(f"rate_{i}", f"rate, layer {i}", None, 2, f"KL(q(z{i}|x) ‖ N(0, I)), {nats}")
        for i in range(1, layers + 1)
    )
    return (
        Measure("distortion", "distortion", "lower", 2, f"-E_q[log p(x|z)] with all constants, {nats}"),
        Measure("mse", "MSE", "lower", 4, "of reconstructions at the mean of q(z|x), pixels in [-1, 1]"),
        *rates,
        Measure("active_units", "active units", None, 1, "latents whose posterior mean moves"),
        Measure("gain", "ELBO gain", "higher", 2, f"E_q[f] - log Z, log Z annealed up from N(0, I), {nats}"),
        Measure(
            "gain_reverse",
            "ELBO gain, other side",
            "higher",
            2,
            "the same with log Z annealed down from the prior: the truth lies between the two",
        ),
        Measure("elbo", "ELBO", "higher", 2, f"gain - distortion - rates, {nats}"),
        Measure("ais_share", "AIS effective share", None, 2, "of annealed chains: how far to trust log Z"),
        Measure("acceptance", "acceptance", None, 3, "of a Metropolis check of the Langevin steps"),
        Measure("f_drift", "drift of f", None, 2, "mean f after the long chains less after the short, nats"),
        Measure(
            "norm_ratio", "norm of z", None, 3, "mean of it after the long chains, over that under N(0, I)"
        ),
        Measure(
            "auc",
            "two-sample AUC",
            "lower",
            3,
            "of a classifier of prior against posterior latents; 0.5: it cannot tell",
        ),
        Measure("auc_long", "two-sample AUC, long chains", "lower", 3, "the same after the long chains"),
        Measure("frechet", "Fréchet", "lower", 2, "prior samples against held-out images", ratio=True),
        Measure("frechet_long", "Fréchet, long chains", "lower", 2, "after the long chains", ratio=True),
        Measure(
            "frechet_posterior",
            "Fréchet to posterior",
            "lower",
            2,
            "images of prior samples against images of posterior samples: the prior's part alone",
            ratio=True,
        ),
        Measure(
            "frechet_posterior_long",
            "Fréchet to posterior, long chains",
            "lower",
            2,
            "after the long chains",
            ratio=True,
        ),
        Measure("kid", "100 KID", "lower", 2, "kernel distance of prior samples to held-out images"),
        Measure("kid_long", "100 KID, long chains", "lower", 2, "after the long chains"),
        Measure("precision", "precision", "higher", 3, "share of samples that could be real"),
        Measure("precision_long", "precision, long chains", "higher", 3, "after the long chains"),
        Measure("recall", "recall", "higher", 3, "share of real images that could be samples"),
        Measure("recall_long", "recall, long chains", "higher", 3, "after the long chains"),
        Measure(
            "frechet_reconstructions",
            "Fréchet of reconstructions",
            "lower",
            2,
            "what the decoder alone can do",
        ),
        Measure("frechet_floor", "Fréchet of real images", None, 2, "one half against the other: the floor"),
    )


def long_factor(config: Config) -> int:
    """Return the length of the long chains in multiples of `langevin.steps`: the first to `LONG_STEPS`.

    At least 2; `evaluation.chain_factor` has no say, so that comparisons agree on what is long.
    """
    return max(2, -(-LONG_STEPS // config.langevin.steps))


@torch.no_grad()
def measure_model(model: JointModel, config: Config, held_out: ImageSet, net: FeatureNet) -> Row:
    """Return all `measures` of a model on held-out images, by name.

    Distances are taken with the first `evaluation.samples` images. Noise depends on `run.seed` alone, so that
    the models of one seed see the same.

    Raises:
        ConfigError: too few held-out images for a distance.
    """
    device = next(model.parameters()).device
    noise = gaussian_noise(config.run.seed, 0, device)
    images_NHWC = held_out.images_NHWC
    compared_NHWC = images_NHWC[: config.evaluation.samples]
    factor = long_factor(config)
    sampler, log_z = _sampler(model, config, noise)

    def batches() -> Iterator[Tensor]:
        for first in range(0, len(images_NHWC), BATCH):
            yield to_float(images_NHWC[first : first + BATCH].copy(), device)  # of read-only memory

    found = likelihood(model, batches(), noise, log_z)
    squares = sum(
        float((reconstruct(model, x_BCHW) - x_BCHW).double().square().sum()) for x_BCHW in batches()
    )
    quality = sample_quality(
        model,
        config.langevin,
        compared_NHWC,
        image_features(compared_NHWC, net),
        net,
        noise,
        count=config.evaluation.samples,
        chain_factor=factor,
    )
    short, long = quality["samples"], quality["samples_long"]
    values: dict[str, float | None] = {
        "distortion": found.distortion.value,
        "mse": squares / images_NHWC.size,
        **{f"rate_{i}": rate.value for i, rate in enumerate(found.rate_L, 1)},
        "active_units": float(sum(found.active_units)),
        "gain": found.gain.value,
        "elbo": found.elbo.value,
        **sampler,
        "gain_reverse": found.f_posterior.value - sampler["log_z_reverse"],
        **_two_samples(model, config, compared_NHWC.shape[0], batches(), noise),
        **{name: short[name] for name in ("frechet", "precision", "recall")},
        **{f"{name}_long": long[name] for name in ("frechet", "precision", "recall")},
        "frechet_posterior": quality["samples_to_posterior"]["frechet"],
        "frechet_posterior_long": quality["samples_long_to_posterior"]["frechet"],
        "kid": None if short["kid"] is None else 100 * short["kid"],
        "kid_long": None if long["kid"] is None else 100 * long["kid"],
        "frechet_reconstructions": quality["reconstructions"]["frechet"],
        "frechet_floor": quality["real_floor"]["frechet"],
    }
    numbers = {name: math.nan if value is None else float(value) for name, value in values.items()}
    return {measure.name: numbers[measure.name] for measure in measures(len(model.latent_dims))}


_CHAINS = 1_000


def _sampler(model: JointModel, config: Config, noise: Noise) -> tuple[dict[str, float], Estimate]:
    """Return what there is to say of the prior's chains, and log Z: of the Gaussian prior, exact."""
    tilt = tilt_of(model)
    if tilt is None:
        exact = {"log_z_reverse": 0.0, "ais_share": 1.0, "acceptance": 1.0, "f_drift": 0.0, "norm_ratio": 1.0}
        return exact, Estimate(0.0, 0.0)
    lower = log_partition_annealed(tilt, model.latent_dim, noise(0, "log Z"))
    upper = log_partition_reverse(tilt, lower.end_BD, noise(0, "log Z, reverse"))
    short, long = config.langevin.steps, long_factor(config) * config.langevin.steps
    trace = run_chains(
        tilt,
        noise(0, "chain start")(_CHAINS, model.latent_dim),
        noise(0, "chain"),
        steps=long,
        step_size=config.langevin.step_size,
        every=short,
    )
    mean_f_T, mean_norm_T = trace.f_TB.double().mean(1), trace.z_TBD.double().norm(dim=2).mean(1)
    figures = {
        "log_z_reverse": upper.log_z.value,
        "ais_share": lower.effective_share,
        "acceptance": trace.acceptance,
        "f_drift": float(mean_f_T[-1] - mean_f_T[1]),
        "norm_ratio": float(mean_norm_T[-1] / mean_norm_T[0]),  # chains start in N(0, I)
    }
    return figures, lower.log_z


def _two_samples(
    model: JointModel, config: Config, count: int, batches: Iterator[Tensor], noise: Noise
) -> dict[str, float]:
    """Return how well a classifier tells `count` latents of the prior from as many of posteriors."""
    parts: list[Tensor] = []
    for position, x_BCHW in enumerate(batches):
        if position * BATCH >= count:
            break
        posterior = model.inference(x_BCHW)
        parts.append(posterior.rsample(noise(position, "two-sample posterior")(*posterior.mean_BD.shape)))
    posterior_ND = torch.cat(parts)[:count]

    def auc(steps: int) -> float:
        langevin = replace(config.langevin, steps=steps)
        prior_ND, _ = sample_prior(model, langevin, count, noise(0, "two-sample prior"))
        return two_sample_auc(prior_ND, posterior_ND, seed=config.run.seed)

    short = auc(config.langevin.steps)
    # Samples of the Gaussian prior are exact, and need no chain.
    long = short if model.energy is None else auc(long_factor(config) * config.langevin.steps)
    return {"auc": short, "auc_long": long}
