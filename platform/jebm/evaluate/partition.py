"""log Z of a tilted prior p(z) = exp(f(z)) N(z; 0, I) / Z, in nats: from below and from above.

The estimators of Z are unbiased for Z, not for log Z: since log is concave, log of an average of weights is
below log Z in expectation, by about var / 2N if the estimate is good and by nats if a few weights dominate.
So importance sampling and annealed importance sampling bound log Z from below, stochastically; the effective
share tells how far to trust them. `log_partition_reverse` bounds log Z from above (bidirectional Monte Carlo:
Grosse, Ghahramani and Adams 2015): log Z lies between the two, if its starts follow the prior. Starts that
come from the chains from below cannot show a mode that those have missed; `log_partition_inside` has others.

Shapes: B batch or chains, D latent width of all layers together, bottom layer first.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from jebm.evaluate.chains import log_uniform, value_and_gradient
from jebm.evaluate.estimates import Estimate, less
from jebm.rng import Normal

__all__ = [
    "PILOT_CHAINS",
    "AnnealedLogPartition",
    "LogPartition",
    "disagreement",
    "log_mean_weight",
    "log_partition_annealed",
    "log_partition_importance",
    "log_partition_inside",
    "log_partition_reverse",
]


_SAMPLES_AT_ONCE = 10_000

_LEAPFROGS = 2
_LARGEST_ANGLE = math.pi / (2 * _LEAPFROGS)
"""Without f, a transition by this angle ends at the fresh momentum, and nothing of the start remains."""
PILOT_CHAINS = 100
"""Chains that only tune the angles of the others."""
_TARGET_ACCEPTANCE = 0.8
_MOST_GAP_NATS = 0.2
_MOST_GAP_ERRORS = 3
"""Two estimates of log Z disagree if they differ by more than both. In 14 latents, those of random nets with
log Z up to 3 nats differ by up to 0.03 nats. With a planted mode at a distance of 7, all estimates are right
to 0.2 nats; at 8 that from inside is 0.8 nats and 3.5 errors above that from below, and at 10 six nats."""
_TRANSITIONS = 200
"""Of the chains from inside, before they are annealed; the first half adapts the angle."""


class LogPartition(NamedTuple):
    """log Z with its standard error, in nats."""

    log_z: Estimate
    effective_share: float
    """(sum w)^2 / (N sum w^2) of the weights w: effective sample size over sample size, in (0, 1]."""


def log_mean_weight(log_weight_B: Tensor, *, reverse: bool = False) -> LogPartition:
    """Return log E[w] for weights given as logarithms of any size; -log E[w] with `reverse`.

    The standard error comes from the delta method: itself an estimate, too small if the effective share is
    small; NaN for one weight.
    """
    log_weight_B = log_weight_B.double()
    peak, count = log_weight_B.max(), len(log_weight_B)
    weight_B = (log_weight_B - peak).exp()
    total, squares = float(weight_B.sum()), float(weight_B.square().sum())
    log_mean = float(peak) + math.log(total / count)
    share = total**2 / (count * squares)
    error = math.sqrt(max(1 / share - 1, 0) / (count - 1)) if count > 1 else math.nan
    return LogPartition(Estimate(-log_mean if reverse else log_mean, error), share)


def disagreement(log_z: Mapping[str, Estimate]) -> str | None:
    """Return a line if two estimates of log Z, by name, differ by more than 0.2 nats and three errors.

    None if all agree; an estimate that is not a number does not.
    """
    unknown = [name for name, estimate in log_z.items() if math.isnan(estimate.value)]
    if unknown:
        return f"log Z {unknown[0]} is not a number: f or its gradient is not finite where the chains were"
    gaps = {pair: less(log_z[pair[1]], log_z[pair[0]]) for pair in itertools.permutations(log_z, 2)}
    apart = [
        (gap.value, pair)
        for pair, gap in gaps.items()
        if gap.value > max(_MOST_GAP_NATS, _MOST_GAP_ERRORS * gap.standard_error)
    ]
    if not apart:
        return None
    _, (lower, higher) = max(apart)
    (low, low_error), (high, high_error) = log_z[lower], log_z[higher]
    return (
        f"log Z is {low:.2f} ± {low_error:.2f} {lower} but {high:.2f} ± {high_error:.2f} {higher} (allowed: "
        f"{_MOST_GAP_NATS:g} nats or {_MOST_GAP_ERRORS} errors): chains from N(0, I) and from posterior "
        "samples see different parts of the prior, or annealing is too short; ELBO and gain are uncertain by "
        "as much"
    )


@torch.no_grad()
def log_partition_importance(
    f: Callable[[Tensor], Tensor], dim: int, normal: Normal, samples: int
) -> LogPartition:
    """Return log Z = log E_p0[exp f] from `samples` draws of p0 = N(0, I) in `dim` dimensions.

    A stochastic lower bound. Good for a flat f or few dimensions; check the effective share.
    """
    counts = [min(_SAMPLES_AT_ONCE, samples - first) for first in range(0, samples, _SAMPLES_AT_ONCE)]
    return log_mean_weight(torch.cat([f(normal(count, dim)) for count in counts]))


class AnnealedLogPartition(NamedTuple):
    """log Z with its standard error over chains, in nats, and how well the chains moved."""

    log_z: Estimate
    effective_share: float
    """As in `LogPartition`, for the chains' weights."""
    acceptance: float
    """Of the Hamiltonian proposals, mean over chains and temperatures."""
    lowest_acceptance: float
    """The mean over chains at the temperature with the lowest mean."""
    end_BD: Tensor
    """The chains' final states. Forward annealing resamples them by their weights, so they are approximate
    samples of the prior, with repeats: the fewer the larger the effective share."""


@torch.no_grad()
def log_partition_annealed(
    f: Callable[[Tensor], Tensor], dim: int, normal: Normal, *, chains: int = 1000, temperatures: int = 300
) -> AnnealedLogPartition:
    """Return log Z by annealed importance sampling up from p0: a stochastic lower bound (Neal 2001).

    Along p_b proportional to exp(b f(z)) p0(z), b from 0 to 1 in `temperatures` equal steps, each followed by
    one Hamiltonian transition with a Metropolis step, which leaves p_b exactly invariant. So the mean weight
    is Z in expectation for any number of chains and temperatures, and its log is below log Z in expectation.
    """
    evaluate = value_and_gradient(f)
    inverses = _inverse_temperatures(temperatures)
    angles = _tuned_angles(evaluate, normal(PILOT_CHAINS, dim), normal, inverses[1:])
    state = _State.at(evaluate, normal(chains, dim))
    log_weight_B = torch.zeros_like(state.f_B, dtype=torch.float64)
    accepted = []
    for before, inverse, angle in zip(inverses, inverses[1:], angles, strict=False):
        log_weight_B += (inverse - before) * state.f_B.double()
        state, acceptance = _transition(evaluate, state, normal, inverse, angle)
        accepted.append(acceptance)
    # Systematic resampling: chain i is drawn N w_i / sum w times, rounded up or down.
    edges_B = log_weight_B.softmax(0).cumsum(0)
    uniform = log_uniform(normal, 1).double().exp()
    places_B = (torch.arange(chains, device=edges_B.device) + uniform) / chains
    chosen_B = torch.searchsorted(edges_B, places_B).clamp(max=chains - 1)
    return _annealed(log_mean_weight(log_weight_B), accepted, state.z_BD[chosen_B])


@torch.no_grad()
def log_partition_reverse(
    f: Callable[[Tensor], Tensor], start_BD: Tensor, normal: Normal, *, temperatures: int = 300
) -> AnnealedLogPartition:
    """Return log Z by annealing from the prior down to p0: a stochastic upper bound.

    The weights' mean is 1/Z in expectation if `start_BD` are exact samples of the prior. Rejection sampling
    from p0 gives these, with an acceptance of Z / exp(max f). Approximate samples give an approximate bound:
    `end_BD` of `log_partition_annealed` with a large effective share, or the end of long chains whose
    stationary distribution is the prior (`run_chains(..., corrected=True)`). Starts that miss a mode of the
    prior give no bound: an upper bound clearly below the lower one shows this.
    """
    evaluate = value_and_gradient(f)
    inverses = _inverse_temperatures(temperatures)
    pilot_BD = normal(PILOT_CHAINS, start_BD.shape[1])
    angles = _tuned_angles(evaluate, pilot_BD, normal, inverses[1:])
    return _annealed_down(evaluate, start_BD, normal, inverses, angles[::-1])


@torch.no_grad()
def log_partition_inside(
    f: Callable[[Tensor], Tensor], start_BD: Tensor, normal: Normal, *, temperatures: int = 300
) -> AnnealedLogPartition:
    """Return log Z by annealing down from long chains that start at `start_BD`: samples of the posterior.

    Training raises f at posterior samples, so a mode that no chain from N(0, I) finds is where they are. The
    chains have a Metropolis step, and the prior is stationary for them. If they reach all of it, this is a
    stochastic upper bound; if they stay in a part that has probability w, a bound of log Z + log w. Either
    way, log Z is known only if this agrees with `log_partition_annealed`. The last `PILOT_CHAINS` of the
    chains, of which there are more, only tune the annealing.
    """
    evaluate = value_and_gradient(f)
    inverses = _inverse_temperatures(temperatures)
    # Hamiltonian chains on the prior itself; their angle is fixed in the second half, so that p is invariant.
    state, angle = _State.at(evaluate, start_BD), _LARGEST_ANGLE
    for done in range(_TRANSITIONS):
        state, acceptance = _transition(evaluate, state, normal, 1.0, angle)
        if done < _TRANSITIONS // 2:
            angle = _adapted(angle, acceptance)
    # Pilots from inside: those from N(0, I) do not know how rough f is there.
    chains_BD, pilot_BD = state.z_BD[:-PILOT_CHAINS], state.z_BD[-PILOT_CHAINS:]
    angles = _tuned_angles(evaluate, pilot_BD, normal, inverses[:0:-1])
    return _annealed_down(evaluate, chains_BD, normal, inverses, angles)


def _annealed_down(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    start_BD: Tensor,
    normal: Normal,
    inverses: list[float],
    angles: list[float],
) -> AnnealedLogPartition:
    """Return log Z by annealing from the prior down to p0; `angles` in the order in which they are used."""
    state = _State.at(evaluate, start_BD)
    log_weight_B = torch.zeros_like(state.f_B, dtype=torch.float64)
    accepted = []
    for after, inverse, angle in zip(inverses[-2::-1], inverses[:0:-1], angles, strict=True):
        state, acceptance = _transition(evaluate, state, normal, inverse, angle)
        accepted.append(acceptance)
        log_weight_B -= (inverse - after) * state.f_B.double()
    return _annealed(log_mean_weight(log_weight_B, reverse=True), accepted, state.z_BD)


def _annealed(partition: LogPartition, accepted: list[Tensor], end_BD: Tensor) -> AnnealedLogPartition:
    acceptance = torch.stack(accepted)
    return AnnealedLogPartition(*partition, float(acceptance.mean()), float(acceptance.min()), end_BD)


def _inverse_temperatures(count: int) -> list[float]:
    """Return 0 = b_0 < … < b_count = 1."""
    return [k / count for k in range(count + 1)]


class _State(NamedTuple):
    z_BD: Tensor
    f_B: Tensor
    gradient_BD: Tensor

    @classmethod
    def at(cls, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], z_BD: Tensor) -> Self:
        return cls(z_BD, *evaluate(z_BD))


def _transition(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    state: _State,
    normal: Normal,
    inverse: float,
    angle: float,
) -> tuple[_State, Tensor]:
    """Return chains after a transition that leaves exp(inverse * f) N(0, I) invariant, and their acceptance.

    Hamiltonian Monte Carlo, split so that the Gaussian part is solved exactly, as a rotation by `angle` of
    position and momentum between half kicks from f (Shahbaba, Lan, Johnson and Neal 2014): only the curvature
    of f costs acceptance, in any dimension. Each chain draws its own angle, half to one and a half times
    `angle`: with a fixed angle, orbits of a quadratic f would return to their start.
    """
    # Fresh momentum, and a random angle for each chain.
    momentum_BD = normal(*state.z_BD.shape)
    angle_B1 = angle * (0.5 + log_uniform(normal, len(momentum_BD)).exp()[:, None])
    kick = 0.5 * inverse * angle_B1
    cos, sin = angle_B1.cos(), angle_B1.sin()
    # Half kick, rotation, half kick.
    new, velocity_BD = state, momentum_BD
    for _ in range(_LEAPFROGS):
        velocity_BD = velocity_BD + kick * new.gradient_BD
        rotated_BD = cos * new.z_BD + sin * velocity_BD
        velocity_BD = cos * velocity_BD - sin * new.z_BD
        new = _State.at(evaluate, rotated_BD)
        velocity_BD = velocity_BD + kick * new.gradient_BD
    # Metropolis step on the change in total energy.
    squares_B = (state.z_BD.square() + momentum_BD.square() - new.z_BD.square() - velocity_BD.square()).sum(1)
    log_ratio_B = inverse * (new.f_B - state.f_B) + 0.5 * squares_B
    taken_B = log_uniform(normal, len(log_ratio_B)) < log_ratio_B
    kept = _State(
        torch.where(taken_B[:, None], new.z_BD, state.z_BD),
        torch.where(taken_B, new.f_B, state.f_B),
        torch.where(taken_B[:, None], new.gradient_BD, state.gradient_BD),
    )
    return kept, log_ratio_B.clamp(max=0).exp().mean()


def _tuned_angles(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    pilot_BD: Tensor,
    normal: Normal,
    inverses: list[float],
) -> list[float]:
    """Return an angle for each temperature, in this order, from pilot chains that are then discarded.

    Angles adapted to the weighted chains themselves would depend on their past and bias the weights.
    """
    state = _State.at(evaluate, pilot_BD)
    angle, angles = _LARGEST_ANGLE, []
    for inverse in inverses:
        angles.append(angle)
        state, acceptance = _transition(evaluate, state, normal, inverse, angle)
        angle = _adapted(angle, acceptance)
    return angles


def _adapted(angle: float, acceptance: Tensor) -> float:
    """Return the next angle: smaller if too few proposals are accepted."""
    return min(_LARGEST_ANGLE, angle * math.exp(0.3 * (float(acceptance) - _TARGET_ACCEPTANCE)))
