"""log Z of a tilted prior p(z) = exp(f(z)) N(z; 0, I) / Z, in nats: from below and from above.

The estimators of Z are unbiased for Z, not for log Z: since log is concave, log of an average of weights is
below log Z in expectation, by about var / 2N if the estimate is good and by nats if a few weights dominate.
So importance sampling and annealed importance sampling bound log Z from below, stochastically; the effective
share tells how far to trust them. `log_partition_reverse` bounds log Z from above (bidirectional Monte Carlo:
Grosse, Ghahramani and Adams 2015): log Z lies between the two.

Shapes: B batch or chains, D latent width of all layers together, bottom layer first.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from jebm.evaluate.chains import log_uniform, value_and_gradient
from jebm.evaluate.estimates import Estimate
from jebm.rng import Normal

__all__ = [
    "AnnealedLogPartition",
    "LogPartition",
    "log_mean_weight",
    "log_partition_annealed",
    "log_partition_importance",
    "log_partition_reverse",
]


_SAMPLES_AT_ONCE = 10_000

_LEAPFROGS = 2
_LARGEST_ANGLE = math.pi / (2 * _LEAPFROGS)
"""Without f, a transition by this angle ends at the fresh momentum, and nothing of the start remains."""
_PILOT_CHAINS = 100
_TARGET_ACCEPTANCE = 0.8


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
    angles = _tuned_angles(evaluate, dim, normal, inverses)
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
    angles = _tuned_angles(evaluate, start_BD.shape[1], normal, inverses)
    state = _State.at(evaluate, start_BD)
    log_weight_B = torch.zeros_like(state.f_B, dtype=torch.float64)
    accepted = []
    for after, inverse, angle in zip(inverses[-2::-1], inverses[:0:-1], reversed(angles), strict=True):
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
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], dim: int, normal: Normal, inverses: list[float]
) -> list[float]:
    """Return an angle for each temperature but the first, from pilot chains that are then discarded.

    Angles adapted to the weighted chains themselves would depend on their past and bias the weights.
    """
    state = _State.at(evaluate, normal(_PILOT_CHAINS, dim))
    angle, angles = _LARGEST_ANGLE, []
    for inverse in inverses[1:]:
        angles.append(angle)
        state, acceptance = _transition(evaluate, state, normal, inverse, angle)
        angle = min(_LARGEST_ANGLE, angle * math.exp(0.3 * (float(acceptance) - _TARGET_ACCEPTANCE)))
    return angles
