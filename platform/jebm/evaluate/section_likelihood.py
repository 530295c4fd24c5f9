"""The section on likelihood: log Z of the tilt, estimated three times, the normalised ELBO, rates by layer.

Shapes: D latent width of all layers together, L layers.
"""

import math

import torch

from jebm.evaluate.aggregate import Oracle, oracle
from jebm.evaluate.estimates import Estimate, less
from jebm.evaluate.likelihood import Likelihood
from jebm.evaluate.partition import disagreement, log_partition_importance
from jebm.evaluate.subject import Subject
from jebm.report.catalogue import figure
from jebm.report.findings import Figure, Measured, Section, Table, shown

__all__ = ["likelihood_section"]

_LEAST_SHARE = 0.2
_IWAE_IMAGES = 1000
_IWAE_SAMPLES = 100
_IMPORTANCE_SAMPLES = 100_000


@torch.no_grad()
def likelihood_section(subject: Subject, *, full: bool = False) -> Section:
    """Return log Z estimated three times, the ELBO, rates by layer; in full, also a tighter bound."""
    found = subject.likelihood(subject.images_NHWC)
    to_gain = oracle(subject, subject.images_NHWC)
    figures = [
        figure("elbo", found.elbo),
        figure("elbo_gain", found.gain),
        *_oracle_figures(subject, to_gain),
        figure("bits_per_dim", found.bits_per_dim),
        figure("distortion", found.distortion),
        figure("rate", found.rate),
        figure("mse_sampled", found.squared_error),
        figure("f_posterior", found.f_posterior),
        *_log_z_figures(subject, found),
        *(_weighted_figures(subject) if full else []),
    ]
    return Section(
        "likelihood",
        "Likelihood",
        f"How likely the model finds {found.images:,} images, with the prior normalised: log Z of the tilt "
        "is estimated by annealed importance sampling: up from N(0, I), back from where those chains end, "
        "and back from chains that start at posterior samples.",
        figures=tuple(figures),
        tables=(_layers(subject, found),),
        notes=(_to_gain_in_words(found, to_gain), *_notes(subject)),
        warnings=tuple(_warnings(subject)),
    )


def _oracle_figures(subject: Subject, to_gain: Oracle | None) -> list[Figure]:
    """Return what a prior had to gain, and the tilt's share of it."""
    if to_gain is None:
        return []
    share = [] if subject.tilt is None else [figure("oracle_share", to_gain.share)]
    return [figure("oracle_gain", to_gain.gain), *share]


def _to_gain_in_words(found: Likelihood, to_gain: Oracle | None) -> str:
    """Return a sentence on the gain of the tilt beside what a prior had to gain."""
    if to_gain is None:
        return (
            "What a prior had to gain is not known: the run's data.train cannot be read here; give --train."
        )
    oracle_gain = (
        f"{shown(Measured(*to_gain.gain))} nats that the aggregate posterior of {to_gain.components:,} "
        f"training images (bandwidth {to_gain.bandwidth:g}) gains as prior on the same codes"
    )
    if found.gain == Estimate(0.0, 0.0):
        return f"The Gaussian prior gains nothing of the {oracle_gain}."
    return f"The tilt gains {shown(Measured(*found.gain))} of the {oracle_gain}."


def _log_z_figures(subject: Subject, found: Likelihood) -> list[Figure]:
    """Return log Z by all estimates; nothing for the Gaussian prior (log Z = 0)."""
    if subject.tilt is None or subject.annealed is None:
        return []
    below, above = subject.annealed, subject.log_z_above
    normal = subject.noise(0, "log Z by importance")
    plain = log_partition_importance(subject.tilt, subject.model.latent_dim, normal, _IMPORTANCE_SAMPLES)
    cautious = Estimate(
        found.elbo.value + below.log_z.value - above.value,
        math.hypot(found.elbo.standard_error, above.standard_error),
    )
    share = f"{plain.effective_share:.2g}"
    return [
        figure("log_z_below", below.log_z),
        figure("log_z_above", above),
        figure("log_z_inside", subject.log_z_inside),
        figure("elbo_above", cautious),
        figure("log_z_share", below.effective_share),
        figure("log_z_importance", plain.log_z, draws=_IMPORTANCE_SAMPLES, share=share),
    ]


def _warnings(subject: Subject) -> list[str]:
    """Return reasons not to trust log Z."""
    if subject.annealed is None:
        return []
    warnings, below, above = [], subject.annealed, subject.log_z_above
    if below.effective_share < _LEAST_SHARE:
        warnings.append(
            f"the annealing chains behind log Z are worth {below.effective_share:.0%} of their number (asked "
            f"for: {_LEAST_SHARE:.0%}): ELBO and gain are too high by an unknown amount"
        )
    line = disagreement({"from below": below.log_z, "from above": above, "from inside": subject.log_z_inside})
    return [*warnings, *([] if line is None else [line])]


def _notes(subject: Subject) -> list[str]:
    """Return what to make of bounds that stand the wrong way round."""
    if subject.annealed is None:
        return []
    over = less(subject.annealed.log_z, subject.log_z_above)
    if not 0 < over.value <= 4 * over.standard_error:
        return []
    return ["log Z from above is below that from below by less than their errors allow: they agree."]


def _weighted_figures(subject: Subject) -> list[Figure]:
    images_NHWC = subject.images_NHWC[:_IWAE_IMAGES]
    weighted = subject.likelihood(images_NHWC, "importance-weighted bound", importance_samples=_IWAE_SAMPLES)
    bound, images = weighted.importance_weighted, len(images_NHWC)
    return [
        figure("elbo_weighted", bound, draws=_IWAE_SAMPLES, images=images),
        figure("elbo_of_weighted", weighted.elbo),
    ]


def _layers(subject: Subject, found: Likelihood) -> Table:
    dims = subject.model.latent_dims
    rows = zip(subject.layers, dims, found.rate_L, found.active_units, strict=True)
    return Table(
        "Layers, bottom first",
        ("layer", "latents", "rate (nats)", "active units"),
        tuple((layer, dim, Measured(*rate), active) for layer, dim, rate, active in rows),
        "Rate: KL(q || N(0, I)) of the layer. Active: latents whose posterior mean has a variance over "
        "images above 0.01 (Burda et al. 2016). ± is a standard error.",
    )
