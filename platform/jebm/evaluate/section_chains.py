"""The section on chains: whether the Langevin sampler is valid at its step size, and its chains long enough.

Shapes: B chains, D latent width of all layers together, T recorded times.
"""

import math
from collections.abc import Iterator

import torch

from jebm.evaluate.chains import Tilt, long_chains, run_chains
from jebm.evaluate.hierarchy import pictured
from jebm.evaluate.starts import Starts, compare_starts, warnings_of_starts
from jebm.evaluate.subject import Subject, picture
from jebm.report.catalogue import figure
from jebm.report.findings import Curve, Figure, Picture, Section

__all__ = ["chains_section"]


_CHAINS = 200
_DRIFT_STEPS = 2000
_LONG_STEPS = 2500
_PICTURED_EVERY = 100
_PICTURED_CHAINS = 8


@torch.no_grad()
def chains_section(subject: Subject, *, full: bool = False) -> Section:
    """Return whether the sampler is valid; in full, also picture a long chain and run 2,000 more steps."""
    config = subject.config.langevin
    if subject.tilt is None:
        exact = "The prior is Gaussian: its samples are exact, and need no chain."
        return Section("chains", "Chains", exact)
    factor = subject.config.evaluation.chain_factor
    if full:
        factor = max(factor, 1 + math.ceil(_DRIFT_STEPS / config.steps))
    # Start from N(0, I), and from where chains would end if the prior were the aggregate posterior.
    normal = subject.noise(0, "chains from the prior")
    start_BD = normal(_CHAINS, subject.model.latent_dim)
    from_prior = long_chains(subject.tilt, start_BD, normal, config, factor=factor)
    normal = subject.noise(0, "chains from the posterior")
    start_BD = subject.posterior_codes(_CHAINS, normal)
    from_posterior = long_chains(subject.tilt, start_BD, normal, config, factor=factor)
    starts = compare_starts(from_prior, from_posterior, config)
    long_chain = [_long_chain(subject, subject.tilt)] if full else []
    return Section(
        "chains",
        "Chains",
        "Whether the Langevin sampler is valid at its step size, and its chains long enough: "
        f"{_CHAINS} chains of {starts.from_prior.long_steps:,} steps from N(0, I), with langevin.steps "
        f"{config.steps} and langevin.step_size {config.step_size:g}, and as many from posterior samples.",
        figures=_figures(starts),
        curves=(*_curves(starts), *(curve for curve, _ in long_chain)),
        pictures=tuple(rows for _, rows in long_chain),
        warnings=tuple(warnings_of_starts(starts)),
    )


def _figures(starts: Starts) -> tuple[Figure, ...]:
    from_prior, from_posterior = starts.from_prior, starts.from_posterior
    steps = {"short": from_prior.steps, "long": from_prior.long_steps}
    after = {"chains": from_prior.chains, "long": from_prior.long_steps - from_prior.steps}
    end = f"{from_prior.trace[-1].f:.3f}"
    return (
        figure("acceptance", from_prior.acceptance),
        figure("f_drift", from_prior.f_drift, **steps),
        figure("f_gap", starts.f_gap),
        figure("norm_drift", from_prior.norm_drift, **steps),
        figure("f_r_hat", from_prior.f_r_hat),
        figure("z_r_hat", from_prior.z_r_hat),
        figure("f_r_hat_both", starts.f_r_hat),
        figure("z_r_hat_both", starts.z_r_hat),
        figure("f_effective_samples", from_prior.f_effective_samples, **after),
        figure("z_effective_samples", from_prior.z_effective_samples),
        figure("start_left", from_prior.start_left, **steps),
        figure("stationary_variance", from_prior.stationary_variance),
        figure("f_start", from_posterior.trace[0].f, images=from_posterior.chains, other_end=end),
    )


def _curves(starts: Starts) -> Iterator[Curve]:
    """Yield f, the norm and the gradient along the chains, from both starts."""
    reports = {"from N(0, I)": starts.from_prior, "from posterior samples": starts.from_posterior}
    x = tuple(float(point.step) for point in starts.from_prior.trace)
    for name, what in (("f", "f"), ("norm", "|z|"), ("gradient_norm", "|grad log p(z)|")):
        lines = {
            start: tuple(float(getattr(point, name)) for point in report.trace)
            for start, report in reports.items()
        }
        meaning = "Means over the chains. Where both lines end together, neither start matters."
        yield Curve(f"{what} along the chains", "Langevin steps", what, x, lines, meaning)


def _long_chain(subject: Subject, tilt: Tilt) -> tuple[Curve, Picture]:
    """Return the paper's long chain: its f, and a picture every 100 steps."""
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
