"""Is the sampler valid? Run Langevin chains on p(z) proportional to exp(f(z)) N(z; 0, I) and watch them.

Two things can be wrong with z <- z + s^2/2 grad log p(z) + s noise without a Metropolis step. Its stationary
distribution is not p, and is farther from p the larger s is: the acceptance rate of a Metropolis step shows
how far. And K steps from fresh noise may not have converged, the less the smaller s is: then the chain length
is part of the model, and continuing the same chains gives other samples.

Shapes: B chains, D latent width, T recorded times, C scalar functionals.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from jebm.config import Langevin
from jebm.core.parts import Energy, by_autograd
from jebm.evaluate.estimates import Estimate
from jebm.evaluate.mixing import bulk_effective_sample_size, rank_normalised_split_r_hat
from jebm.rng import Normal

__all__ = [
    "MOST_DRIFT_NATS",
    "MOST_R_HAT",
    "ChainReport",
    "Tilt",
    "Trace",
    "TracePoint",
    "chain_report",
    "log_uniform",
    "long_chains",
    "run_chains",
    "value_and_gradient",
    "warnings_of",
]

_LEAST_ACCEPTANCE = 0.8
_MOST_STATIONARY_VARIANCE = 1.1
_MOST_START_LEFT = 0.1
MOST_DRIFT_NATS = 0.5
_MOST_NORM = 1.5
MOST_R_HAT = 1.1
"""R-hat is about sqrt(1 + 1/n) if half a chain is worth n draws. The usual 1.01 asks for n = 50, which suits
a few long chains; with hundreds, n = 5 each is enough to show that they forget their start."""
_LEAST_EFFECTIVE_SAMPLES = 400
"""What Vehtari et al. 2021 require before R-hat and the sample size itself can be trusted."""


class Tilt:
    """u -> f(T(u)), the tilt of the prior on codes: p(u) is proportional to exp(f(T(u))) N(u; 0, I)."""

    def __init__(self, energy: Energy, latents: Callable[[Tensor], Tensor], *, unseen: int = 0) -> None:
        """Take the energy, with its present weights, T, and how many columns of z f does not depend on."""
        self._energy = energy.frozen()
        self._latents, self._unseen = latents, unseen

    def __call__(self, code_BD: Tensor) -> Tensor:
        """Return the values, (B,), in nats; differentiable in the code."""
        return self._energy.f(self._latents(code_BD)[:, self._unseen :])

    def value_and_gradient(self, code_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values (B,) and their gradient in the code (B, D), detached."""
        if self._latents(code_BD) is not code_BD:
            return by_autograd(self, code_BD)
        # T is the identity: the energy's closed form, if it has one; zero for columns that f does not see.
        f_B, gradient_BS = self._energy.value_and_gradient(code_BD[:, self._unseen :])
        return f_B, F.pad(gradient_BS, (self._unseen, 0)) if self._unseen else gradient_BS


def value_and_gradient(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return z -> (f(z), grad f(z)), (B,) and (B, D), detached; by autograd if f is not a `Tilt`."""
    return f.value_and_gradient if isinstance(f, Tilt) else lambda z_BD: by_autograd(f, z_BD)


class Trace(NamedTuple):
    """Chains at every n-th step, including the start, in the chains' precision and on their device."""

    steps: list[int]
    """Steps done at each recorded time."""
    z_TBD: Tensor
    f_TB: Tensor
    gradient_norm_TB: Tensor
    """Euclidean norm of grad log p(z) = grad f(z) - z."""
    acceptance: float
    """Mean over chains and steps of min(1, p(z') q(z|z') / p(z) q(z'|z)) of the proposals z'."""


@torch.no_grad()
def run_chains(
    f: Callable[[Tensor], Tensor],
    start_BD: Tensor,
    normal: Normal,
    *,
    steps: int,
    step_size: float,
    every: int,
    corrected: bool = False,
) -> Trace:
    """Run Langevin chains on exp(f(z)) N(z; 0, I) from `start_BD` and record them at every `every`-th step.

    Proposals are those of `jebm.core.langevin` (s = `step_size` is the noise's standard deviation). All are
    accepted, as in training, and the acceptance is what a Metropolis step would have given; with `corrected`
    that step is applied (MALA; Roberts and Tweedie 1996), and p itself is stationary for every s.
    """
    evaluate = value_and_gradient(f)
    z_BD = start_BD.clone()
    f_B, gradient_BD = evaluate(z_BD)
    recorded: list[tuple[Tensor, Tensor, Tensor]] = []
    accepted = torch.zeros((), dtype=torch.float64, device=z_BD.device)
    for step in range(steps + 1):
        if step % every == 0:
            recorded.append((z_BD, f_B, (gradient_BD - z_BD).norm(dim=1)))
        if step == steps:
            break
        noise_BD = normal(*z_BD.shape)
        new_z_BD = z_BD + 0.5 * step_size**2 * (gradient_BD - z_BD) + step_size * noise_BD
        new_f_B, new_gradient_BD = evaluate(new_z_BD)
        # The noise that would lead back: log q(z|z') - log q(z'|z) = (|noise|^2 - |back|^2) / 2.
        back_BD = (z_BD - new_z_BD) / step_size - 0.5 * step_size * (new_gradient_BD - new_z_BD)
        squares_B = (z_BD.square() - new_z_BD.square() + noise_BD.square() - back_BD.square()).sum(1)
        log_ratio_B = new_f_B - f_B + 0.5 * squares_B
        accepted += log_ratio_B.clamp(max=0).exp().double().mean()
        if corrected:
            taken_B = log_uniform(normal, len(z_BD)) < log_ratio_B
            new_z_BD = torch.where(taken_B[:, None], new_z_BD, z_BD)
            new_f_B = torch.where(taken_B, new_f_B, f_B)
            new_gradient_BD = torch.where(taken_B[:, None], new_gradient_BD, gradient_BD)
        z_BD, f_B, gradient_BD = new_z_BD, new_f_B, new_gradient_BD
    z_TBD, f_TB, gradient_norm_TB = (torch.stack(values) for values in zip(*recorded, strict=True))
    return Trace(
        list(range(0, steps + 1, every)), z_TBD, f_TB, gradient_norm_TB, float(accepted / max(steps, 1))
    )


def log_uniform(normal: Normal, count: int) -> Tensor:
    """Return the logarithms of independent uniform numbers in (0, 1), (B,): log Phi of normal draws."""
    log_uniform_B: Tensor = torch.special.log_ndtr(normal(count))
    return log_uniform_B


class TracePoint(NamedTuple):
    """Means over the chains after a number of steps."""

    step: int
    f: float
    norm: float
    """|z|."""
    gradient_norm: float
    """|grad log p(z)|."""


class ChainReport(NamedTuple):
    """What the chains of a configuration do in their K steps, and when continued to N K."""

    steps: int
    """K."""
    long_steps: int
    """N K."""
    step_size: float
    chains: int
    start_left: float
    """(1 - s^2/2)^K: the share of the start that remains if f is flat."""
    stationary_variance: float
    """1 / (1 - s^2/4): the variance that the chain gives instead of 1 if f is flat."""
    gaussian_norm: float
    """Mean of |z| under N(0, I), the Gaussian prior."""
    acceptance: float
    """Acceptance of a Metropolis check of the proposals, mean over all N K steps."""
    trace: list[TracePoint]
    f_drift: Estimate
    """Mean f after N K steps minus that after K, in the same chains, in nats."""
    norm_drift: Estimate
    """The same for |z|."""
    f_r_hat: float
    """Rank-normalised split R-hat of f, over the draws after K steps."""
    z_r_hat: float
    """The largest over the coordinates of z."""
    f_effective_samples: float
    """Bulk effective sample size of f, of all chains together, over the draws after K steps."""
    z_effective_samples: float
    """The smallest over the coordinates of z."""


def long_chains(
    f: Callable[[Tensor], Tensor], start_BD: Tensor, normal: Normal, config: Langevin, *, factor: int
) -> Trace:
    """Return Langevin chains on exp(f(z)) N(z; 0, I) of `factor` times `config.steps` steps.

    Recorded at every n-th step, n the largest divisor of `config.steps` up to 10.
    """
    every = max(n for n in range(1, 11) if config.steps % n == 0)
    steps = factor * config.steps
    return run_chains(f, start_BD, normal, steps=steps, step_size=config.step_size, every=every)


def chain_report(trace: Trace, config: Langevin) -> ChainReport:
    """Return what the `long_chains` of a config do in their K = `config.steps` steps, and beyond.

    They have started from fresh N(0, I) noise, as in training and sampling, or from posterior samples:
    `jebm.evaluate.starts` compares the two. At least two chains. R-hat and sample sizes are NaN if there are
    too few draws.
    """
    # Convergence is judged on the draws after the K steps of training.
    first, width = trace.steps.index(config.steps), trace.z_TBD.shape[2]
    norm_TB = trace.z_TBD.norm(dim=2)
    draws_TBC = torch.cat([trace.f_TB[:, :, None], trace.z_TBD], 2)[first:]
    r_hat_C = rank_normalised_split_r_hat(draws_TBC)
    effective_C = bulk_effective_sample_size(draws_TBC)
    means = [values.double().mean(1).tolist() for values in (trace.f_TB, norm_TB, trace.gradient_norm_TB)]
    return ChainReport(
        steps=config.steps,
        long_steps=trace.steps[-1],
        step_size=config.step_size,
        chains=trace.z_TBD.shape[1],
        start_left=(1 - config.step_size**2 / 2) ** config.steps,
        stationary_variance=1 / (1 - config.step_size**2 / 4),
        gaussian_norm=math.sqrt(2) * math.exp(math.lgamma((width + 1) / 2) - math.lgamma(width / 2)),
        acceptance=trace.acceptance,
        trace=[TracePoint(*point) for point in zip(trace.steps, *means, strict=True)],
        f_drift=_drift(trace.f_TB, first),
        norm_drift=_drift(norm_TB, first),
        f_r_hat=float(r_hat_C[0]),
        z_r_hat=float(r_hat_C[1:].max()),
        f_effective_samples=float(effective_C[0]),
        z_effective_samples=float(effective_C[1:].min()),
    )


def _drift(values_TB: Tensor, first: int) -> Estimate:
    difference_B = (values_TB[-1] - values_TB[first]).double()
    return Estimate(float(difference_B.mean()), float(difference_B.std() / math.sqrt(len(difference_B))))


def warnings_of(report: ChainReport) -> list[str]:
    """Return a line for each way in which the sampler, as configured, is not valid; none if it is."""
    s, k, n = report.step_size, report.steps, report.long_steps
    last = report.trace[-1]
    if not all(map(math.isfinite, last)):
        return [f"the chains diverged within {n} steps at langevin.step_size {s:g}: reduce it"]
    lines = []
    # The step size, and the number of steps.
    if report.acceptance < _LEAST_ACCEPTANCE:
        lines.append(
            f"a Metropolis check would take only {report.acceptance:.0%} of the steps at langevin.step_size "
            f"{s:g} (asked for: {_LEAST_ACCEPTANCE:.0%}): samples do not follow the prior; reduce it"
        )
    if report.stationary_variance > _MOST_STATIONARY_VARIANCE:
        lines.append(
            f"langevin.step_size {s:g} widens a unit variance to {report.stationary_variance:.2f} even "
            f"without f (asked for: at most {_MOST_STATIONARY_VARIANCE:g}): reduce it"
        )
    if report.start_left > _MOST_START_LEFT:
        lines.append(
            f"{k} steps of langevin.step_size {s:g} leave {report.start_left:.2f} of the start (asked for: "
            f"at most {_MOST_START_LEFT:g}): the chains have not mixed; raise langevin.steps or the step size"
        )
    # What longer chains do.
    if abs(report.f_drift.value) >= MOST_DRIFT_NATS:
        lines.append(
            f"mean f goes from {last.f - report.f_drift.value:.2f} after {k} steps to {last.f:.2f} after {n} "
            f"(allowed: {MOST_DRIFT_NATS:g}; standard error {report.f_drift.standard_error:.2f}): longer "
            "chains give other samples"
        )
    if last.norm > _MOST_NORM * report.gaussian_norm:
        lines.append(
            f"mean |z| is {last.norm:.2f} after {n} steps, and {report.gaussian_norm:.2f} under the Gaussian "
            f"prior (allowed: {_MOST_NORM:g} times that): f carries the chains away"
        )
    # Whether the draws after K steps agree, and how many there effectively are.
    r_hat = max(report.f_r_hat, report.z_r_hat)
    if r_hat > MOST_R_HAT:
        lines.append(
            f"R-hat is {r_hat:.3f} between steps {k} and {n} (asked for: at most {MOST_R_HAT:g}): the "
            "chains do not agree on one law"
        )
    effective = min(report.f_effective_samples, report.z_effective_samples)
    if effective < _LEAST_EFFECTIVE_SAMPLES:
        lines.append(
            f"the chains are worth only {effective:.0f} independent samples between steps {k} and {n} (asked "
            f"for: {_LEAST_EFFECTIVE_SAMPLES}): what this report says of them is uncertain"
        )
    return lines
