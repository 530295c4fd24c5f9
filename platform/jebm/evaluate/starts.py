"""Whether chains from N(0, I) and chains from posterior samples end in the same distribution.

Training raises f at posterior samples. If f has a mode there that chains from N(0, I) do not find, those
chains agree with one another, in every diagnosis of theirs, on a part of the prior. Chains from both kinds of
start, judged together, show it (Gelman and Rubin 1992: start from overdispersed points).

Shapes: B chains, D latent width, T recorded times, C scalar functionals.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from jebm.config import Langevin
from jebm.evaluate.chains import MOST_DRIFT_NATS, MOST_R_HAT, ChainReport, Trace, chain_report, warnings_of
from jebm.evaluate.estimates import Estimate, less
from jebm.evaluate.mixing import rank_normalised_split_r_hat

__all__ = ["Starts", "compare_starts", "f_gap", "warnings_of_starts"]

_LEAST_ERRORS = 2
_NAMES = ("from N(0, I)", "from posterior samples")


class Starts(NamedTuple):
    """Chains from both kinds of start, by themselves and together."""

    from_prior: ChainReport
    """From fresh N(0, I) noise, as in training and sampling."""
    from_posterior: ChainReport
    f_gap: Estimate
    """As `f_gap`."""
    f_r_hat: float
    """Rank-normalised split R-hat of f over the chains of both kinds, over the draws after K steps."""
    z_r_hat: float
    """The largest over the coordinates of z."""


def f_gap(from_prior: Trace, from_posterior: Trace) -> Estimate:
    """Return mean f at the end of chains from posterior samples less that of chains from N(0, I), in nats.

    The end is the second half of the recorded draws: a mean over many draws of each chain has a smaller error
    than the last one.
    """
    means = [trace.f_TB[len(trace.f_TB) // 2 :].double().mean(0) for trace in (from_prior, from_posterior)]
    errors = [float(mean_B.std()) / math.sqrt(len(mean_B)) for mean_B in means]
    ends = [Estimate(float(mean_B.mean()), error) for mean_B, error in zip(means, errors, strict=True)]
    return less(ends[1], ends[0])


def compare_starts(from_prior: Trace, from_posterior: Trace, config: Langevin) -> Starts:
    """Return what `long_chains` from both kinds of start do, by themselves and together."""
    first = from_prior.steps.index(config.steps)
    draws_TBC = torch.cat([_draws(trace, first) for trace in (from_prior, from_posterior)], 1)
    r_hat_C = rank_normalised_split_r_hat(draws_TBC)
    return Starts(
        chain_report(from_prior, config),
        chain_report(from_posterior, config),
        f_gap(from_prior, from_posterior),
        float(r_hat_C[0]),
        float(r_hat_C[1:].max()),
    )


def _draws(trace: Trace, first: int) -> Tensor:
    """Return f and z after the first draws, (T, B, C)."""
    return torch.cat([trace.f_TB[:, :, None], trace.z_TBD], 2)[first:]


def warnings_of_starts(starts: Starts) -> list[str]:
    """Return a line for each fault of the chains from either start, and where the two do not agree."""
    lines: dict[str, str] = {}
    for name, report in zip(_NAMES, starts[:2], strict=True):
        for line in warnings_of(report):
            lines.setdefault(line, f"{name}: {line}")  # what depends on the config is said once
    gap, error = starts.f_gap
    if abs(gap) >= MOST_DRIFT_NATS and abs(gap) > _LEAST_ERRORS * error:
        lines["gap"] = (
            f"from both: chains from posterior samples end with f {abs(gap):.2f} ± {error:.2f} nats "
            f"{'above' if gap > 0 else 'below'} chains from N(0, I) (allowed: {MOST_DRIFT_NATS:g}): the "
            "start decides where they end; samples miss a part of the prior, and log Z may be too low"
        )
    r_hat = max(starts.f_r_hat, starts.z_r_hat)
    if r_hat > MOST_R_HAT:
        lines["R-hat"] = (
            f"from both: R-hat is {r_hat:.3f} over the chains from N(0, I) and from posterior samples (asked "
            f"for: at most {MOST_R_HAT:g}): they do not agree on one distribution"
        )
    return list(lines.values())
