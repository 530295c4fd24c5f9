"""The section on chains: whether the Langevin sampler is valid at its step size, and its chains long enough.

Shapes: B chains, D latent width of all layers together, T recorded times.
"""

import math

import torch

from jebm.evaluate.chains import Tilt, chain_report, run_chains, warnings_of
from jebm.evaluate.hierarchy import pictured
from jebm.evaluate.subject import Subject, figure, picture
from jebm.report.findings import Curve, Picture, Section

__all__ = ["chains_section"]


@torch.no_grad()
def chains_section(subject: Subject, *, full: bool = False) -> Section:
    """Return whether the sampler is valid; in full, a long chain in pictures and 2,000 steps more."""
    config = subject.config.langevin
    if subject.tilt is None:
        exact = "The prior is Gaussian: its samples are exact, and need no chain."
        return Section("chains", "Chains", exact, 0.0)
    factor = subject.config.evaluation.chain_factor
    if full:
        factor = max(factor, 1 + math.ceil(_DRIFT_STEPS / config.steps))
    normal = subject.noise(0, "chains from the prior")
    from_prior = chain_report(
        subject.tilt, normal(_CHAINS, subject.model.latent_dim), normal, config, factor=factor
    )
    normal = subject.noise(0, "chains from the posterior")
    posterior = subject.model.inference(subject.batch(slice(0, _CHAINS)))
    start_BD = posterior.rsample(normal(*posterior.mean_BD.shape))
    from_posterior = chain_report(subject.tilt, start_BD, normal, config, factor=factor)
    k, n = from_prior.steps, from_prior.long_steps
    figures = (
        figure(
            "acceptance",
            from_prior.acceptance,
            "Share of the steps that a Metropolis check would take; below 0.8 the step size biases the "
            "samples.",
            unit="share",
            better="higher",
        ),
        figure(
            "drift of f",
            from_prior.f_drift,
            f"Mean f after {n:,} steps less that after {k}: 0 where {k} steps are enough.",
            unit="nats",
        ),
        figure("drift of |z|", from_prior.norm_drift, f"The same for |z|, from {k} to {n:,} steps."),
        figure(
            "split R-hat of f",
            from_prior.f_r_hat,
            "1 where chains agree with one another and over time; above 1.1 they do not.",
            better="lower",
        ),
        figure("largest split R-hat of z", from_prior.z_r_hat, "The same over the latents.", better="lower"),
        figure(
            "effective samples of f",
            from_prior.f_effective_samples,
            f"Independent draws that tell as much of f as {_CHAINS} chains of {n - k:,} steps.",
            unit="samples",
            better="higher",
        ),
        figure(
            "effective samples of z",
            from_prior.z_effective_samples,
            "The fewest over the latents.",
            unit="samples",
            better="higher",
        ),
        figure(
            "what is left of the start",
            from_prior.start_left,
            f"(1 - s²/2)^{k}: of the noise that a chain begins with, where f is flat.",
            unit="share",
            better="lower",
        ),
        figure(
            "stationary variance",
            from_prior.stationary_variance,
            "What the chain makes of a variance of 1 where f is flat.",
        ),
        figure(
            "f of posterior samples",
            from_posterior.trace[0].f,
            f"Mean over {len(start_BD)} images; chains from N(0, I) end at {from_prior.trace[-1].f:.3f}.",
            unit="nats",
        ),
    )
    curves = []
    for name, what in (("f", "f"), ("norm", "|z|"), ("gradient_norm", "|grad log p(z)|")):
        lines = {
            label: tuple(float(getattr(point, name)) for point in report.trace)
            for label, report in (("from N(0, I)", from_prior), ("from posterior samples", from_posterior))
        }
        x = tuple(float(point.step) for point in from_prior.trace)
        meaning_ = "Means over the chains. Where both lines end together, neither start matters."
        curves.append(Curve(f"{what} along the chains", "Langevin steps", what, x, lines, meaning_))
    warnings = [f"from N(0, I): {line}" for line in warnings_of(from_prior)]
    pictures: list[Picture] = []
    if full:
        curve, rows = _long_chain(subject, subject.tilt)
        curves.append(curve)
        pictures.append(rows)
    return Section(
        "chains",
        "Chains",
        "Whether the Langevin sampler is valid at its step size, and its chains long enough: "
        f"{_CHAINS} chains of {n:,} steps, with langevin.steps {k} and langevin.step_size "
        f"{config.step_size:g}.",
        0.0,
        figures,
        curves=tuple(curves),
        pictures=tuple(pictures),
        warnings=tuple(warnings),
    )


_CHAINS = 200
_DRIFT_STEPS = 2000
_LONG_STEPS = 2500
_PICTURED_EVERY = 100
_PICTURED_CHAINS = 8


def _long_chain(subject: Subject, tilt: Tilt) -> tuple[Curve, Picture]:
    """Return the paper's long chain: its f, and a picture each 100 steps."""
    normal = subject.noise(0, "long chains")
    start_BD = normal(_PICTURED_CHAINS, subject.model.latent_dim)
    size = subject.config.langevin.step_size
    trace = run_chains(tilt, start_BD, normal, steps=_LONG_STEPS, step_size=size, every=_PICTURED_EVERY)
    curve = Curve(
        f"f along {_LONG_STEPS:,} steps",
        "Langevin steps",
        "f",
        tuple(map(float, trace.steps)),
        {f"chain {i + 1}": tuple(values) for i, values in enumerate(trace.f_TB.T.double().tolist())},
        "Each chain by itself: one that has settled goes up and down about the same value.",
    )
    rows = picture(
        f"Chains of {_LONG_STEPS:,} steps",
        "chains-long.png",
        pictured(subject.model, trace.z_TBD.transpose(0, 1)),
        f"Each row a chain from N(0, I), decoded after each {_PICTURED_EVERY} steps. Images that stay good, "
        "and change, are those of a sampler that stays in the prior and moves in it.",
    )
    return curve, rows
