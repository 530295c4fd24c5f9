"""The catalogue: each measure's name, unit, direction and meaning.

Each measure is defined here once. The quick look, the sections of a report and a comparison look it up by
name; scripts/write-docs generates docs/evaluation.md's tables from it. It is in this package because every
package that shows a number may import it.

Titles and meanings have fields, such as {short}, for the values of one evaluation; `Measure.filled` sets
them.
"""

from typing import Literal

from jebm.report.chain_measures import CHAINS
from jebm.report.factor_measures import FACTORS
from jebm.report.findings import Figure
from jebm.report.measure import Measure

__all__ = ["GROUPS", "MEASURES", "figure", "measure", "of_metric"]


def _after_chains(
    name: str, title: str, what: str, unit: str, better: Literal["lower", "higher"], digits: int
) -> tuple[Measure, Measure]:
    """Return a measure of prior samples after long chains, and after the short ones of training."""
    return (
        Measure(
            f"{name}_long", f"{title}, long chains", f"{what} after the long chains.", unit, better, digits
        ),
        Measure(name, f"{title}, short chains", f"{what} after the short chains.", unit, better, digits),
    )


_LIKELIHOOD = (
    Measure(
        "elbo",
        "ELBO",
        "Lower bound of log p(x) for one image, with the normalised prior and all constants; a little too "
        "high where log Z is taken from below and its effective share is small.",
        "nats",
        "higher",
    ),
    Measure(
        "elbo_gain",
        "gain of the tilt",
        "E_q[f] - log Z: what the EBM prior adds to the ELBO; 0 for the Gaussian prior.",
        "nats",
        "higher",
    ),
    Measure(
        "elbo_gain_above",
        "gain of the tilt with log Z from above",
        "E_q[f] - log Z, with log Z annealed down from the prior: the truth lies between the two.",
        "nats",
        "higher",
    ),
    Measure(
        "oracle_gain",
        "gain of the oracle",
        "E_q[log q(z) - log N(z; 0, I)], with the smoothed aggregate posterior q(z) of training images as "
        "prior: a lower bound, in expectation, of what a prior has to gain for this q(z|x).",
        "nats",
    ),
    Measure(
        "oracle_share",
        "share of the oracle's gain",
        "Gain of the tilt over that of the oracle, on the same codes; may exceed 1, since the oracle's is a "
        "lower bound.",
        "share",
        "higher",
    ),
    Measure(
        "bits_per_dim",
        "bits per dimension",
        "The ELBO for one of the pixel values, as for 8-bit images.",
        "bits/dim",
        "lower",
    ),
    Measure(
        "distortion",
        "distortion",
        "-E_q[log p(x|z)], with its constant: what the code leaves to say.",
        "nats",
        "lower",
    ),
    Measure(
        "rate",
        "rate",
        "KL(q(z|x) || N(0, I)) of all layers together: what the code costs without the tilt.",
        "nats",
    ),
    Measure("rate_layer", "rate, {layer}", "KL(q({layer}|x) || N(0, I)).", "nats"),
    Measure(
        "mse_sampled",
        "reconstruction MSE",
        "Mean squared error of a pixel in [-1, 1], decoded from z ~ q(z|x).",
        better="lower",
        digits=4,
    ),
    Measure(
        "mse",
        "MSE",
        "Mean squared error of a pixel in [-1, 1], decoded from the mean of q(z|x).",
        better="lower",
        digits=4,
    ),
    Measure("active_units", "active units", "Latents whose posterior mean varies over images.", digits=1),
    Measure("f_posterior", "E_q[f]", "Mean f of posterior samples.", "nats"),
    Measure("log_z_below", "log Z from below", "By annealing from N(0, I) to the prior.", "nats"),
    Measure(
        "log_z_above",
        "log Z from above",
        "By annealing back, from where the chains have ended: log Z lies between the two.",
        "nats",
    ),
    Measure(
        "log_z_inside",
        "log Z from inside",
        "By annealing back, from corrected chains that start at posterior samples, where training raises f: "
        "above log Z from below where chains from N(0, I) miss a part of the prior.",
        "nats",
    ),
    Measure(
        "log_z_gap",
        "gap of log Z",
        "Log Z from inside less that from below: 0, but for errors, where both have seen the same prior; if "
        "positive, the ELBO may be too high by as much.",
        "nats",
    ),
    Measure("elbo_above", "ELBO with log Z from above", "The cautious one of the two.", "nats", "higher"),
    Measure(
        "log_z_share",
        "effective share of log Z",
        "Effective sample size of the annealing chains over their number; below 0.2, do not trust log Z.",
        "share",
        "higher",
    ),
    Measure(
        "log_z_importance",
        "log Z by importance sampling",
        "From {draws} draws of N(0, I), a check; its effective share is {share}.",
        "nats",
    ),
    Measure(
        "elbo_weighted",
        "importance-weighted bound, K = {draws}",
        "Of the first {images} images: nearer to log p(x) than the ELBO, which is K = 1.",
        "nats",
        "higher",
    ),
    Measure("elbo_of_weighted", "ELBO of the same images", "K = 1, for comparison.", "nats"),
)

_SAMPLES = (
    Measure(
        "frechet_long",
        "{distance}, long chains",
        "Between {samples} prior samples and {images} real images, after {long} Langevin steps: the prior "
        "itself, where the chains have mixed.",
        better="lower",
        ratio=True,
    ),
    Measure(
        "frechet_posterior_long",
        "Fréchet distance to the posterior, long chains",
        "Between images decoded from the prior and from q(z|x): what the prior alone has wrong.",
        better="lower",
        ratio=True,
    ),
    Measure(
        "frechet",
        "{distance}, short chains",
        "After the {short} steps of training: a sampler of its own.",
        better="lower",
        ratio=True,
    ),
    Measure(
        "frechet_posterior",
        "Fréchet distance to the posterior, short chains",
        "Between images decoded from the prior and from q(z|x), after the {short} steps of training.",
        better="lower",
        ratio=True,
    ),
    Measure(
        "frechet_gaussian",
        "{distance}, N(0, I)",
        "Of the same generator without the tilt: the Gaussian prior's figure.",
    ),
    Measure(
        "frechet_posterior_gaussian",
        "Fréchet distance to the posterior, N(0, I)",
        "The same without the tilt.",
    ),
    Measure(
        "frechet_reconstructions",
        "{distance} of reconstructions",
        "Reconstructions against the images themselves: what the decoder alone can reach.",
        better="lower",
    ),
    Measure(
        "frechet_floor",
        "{distance} of real images",
        "One half of the real images against the other: the floor, at half the number of images.",
    ),
    *_after_chains("kid", "KID", "Kernel distance (unbiased)", "", "lower", 4),
    *_after_chains("precision", "precision", "Share of samples that could be real,", "share", "higher", 3),
    *_after_chains("recall", "recall", "Share of real images that could be samples,", "share", "higher", 3),
    *_after_chains(
        "auc",
        "two-sample AUC",
        "Of a classifier of prior against posterior latents (0.5: it cannot tell them apart),",
        "",
        "lower",
        3,
    ),
    Measure(
        "auc_layer",
        "two-sample AUC, {layer}, long chains",
        "The same of this layer by itself: where it fits, a higher AUC of all layers is one of how they go "
        "together.",
        better="lower",
        digits=3,
    ),
)

_HIERARCHY = (
    Measure(
        "accuracy_top",
        "classifier accuracy, {layer}",
        "Share of held-out images whose class the top layer's code tells (paper, table 1).",
        "share",
        "higher",
    ),
    Measure(
        "accuracy_bottom",
        "classifier accuracy, {layer}",
        "The same of the bottom layer, which is to hold detail, not the class.",
        "share",
    ),
    Measure(
        "class_changed",
        "class changed, {layer}",
        "Share of images whose class changes when this layer is drawn anew given the others.",
        "share",
    ),
)

_OUT_OF_DISTRIBUTION = (
    Measure(
        "auroc",
        "AUROC of {score}, {anomalies}",
        "Chance that a normal image scores higher than an anomaly; 0.5 for a random score.",
        "share",
        "higher",
    ),
)

GROUPS = {
    "Likelihood": _LIKELIHOOD,
    "Samples": _SAMPLES,
    "Hierarchy": _HIERARCHY,
    "Factors": FACTORS,
    "Out of distribution": _OUT_OF_DISTRIBUTION,
    "Chains": CHAINS,
}
"""All measures, by section of a report."""

MEASURES = {each.name: each for group in GROUPS.values() for each in group}
"""All measures, by name."""


def measure(name: str, **fields: object) -> Measure:
    """Return a measure of the catalogue; fields that are not set show their symbols.

    Raises:
        KeyError: there is no such measure.
    """
    return MEASURES[name].filled(**fields)


def of_metric(metric: str) -> Measure | None:
    """Return the measure behind a training metric, evaluation/NAME; None for any other metric."""
    _, evaluated, name = metric.rpartition("evaluation/")
    return measure(name) if evaluated and name in MEASURES else None


def figure(
    name: str, value: float | tuple[float, float] | None, *, error: float | None = None, **fields: object
) -> Figure:
    """Return a measure's figure, like `Measure.figure`; raises KeyError like `measure`."""
    return measure(name, **fields).figure(value, error)
