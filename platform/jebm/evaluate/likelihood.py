"""How likely a model finds images: log Z of its prior, the ELBO with it, and importance-weighted bounds.

The prior is p(z) = exp(f(z)) N(z; 0, I) / Z. Training needs no Z; every number in nats for one image does:

    ELBO(x) = E_q[log p(x|z)] - KL(q(z|x) || N(0, I)) + E_q[f(z)] - log Z.

E_q[f] - log Z is what the tilt adds (the *gain*): a log Z that is too low makes a model look too good.

The estimators of Z are unbiased for Z, not for log Z: since log is concave, log of an average of weights is
below log Z in expectation, by about var / 2N where it is good and by nats where a few weights decide. So
importance sampling and annealed importance sampling bound log Z from below and the ELBO gain from above, both
stochastically; the effective share says how much to trust them. `log_partition_reverse` bounds log Z from
above (bidirectional Monte Carlo: Grosse, Ghahramani and Adams 2015): log Z lies between the two.

Statistics are sums in float64. They add over batches (`add`) and over objects (`merge`); over ranks, an
all-reduce of `sums` does what `merge` does (see `LogWeights.rebase` for the one that needs more).

Shapes: B batch or chains, C columns (C channels in x_BCHW), H height, W width, D latent width of all layers
together, bottom layer first, K importance samples.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from jebm.core.distributions import DiagGaussian, standard_log_density
from jebm.core.model import JointModel
from jebm.core.objective import distortion
from jebm.evaluate.chains import Estimate, log_uniform, value_and_gradient
from jebm.rng import Noise, Normal

__all__ = [
    "AnnealedLogPartition",
    "Likelihood",
    "LikelihoodSums",
    "LogPartition",
    "LogWeights",
    "Means",
    "importance_weighted_bound",
    "likelihood",
    "log_partition_annealed",
    "log_partition_importance",
    "log_partition_reverse",
]


class Means:
    """Means of columns over images, their variances and standard errors."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        """Start with no images; `sums` holds counts, sums and sums of squares, (3, C), float64."""
        self.sums = torch.zeros(3, columns, dtype=torch.float64, device=device)

    def add(self, values_BC: Tensor) -> None:
        """Add a batch of images."""
        values_BC = values_BC.double()
        self.sums += torch.stack(
            [torch.full_like(values_BC[0], len(values_BC)), values_BC.sum(0), values_BC.square().sum(0)]
        )

    def merge(self, other: "Means") -> None:
        """Add what another object has seen."""
        self.sums += other.sums

    def variances(self) -> Tensor:
        """Return the variance of each column over images, (C,), float64; NaN for fewer than two images."""
        count_C, sum_C, squares_C = self.sums
        variance_C: Tensor = (squares_C - sum_C.square() / count_C) / (count_C - 1)
        return variance_C.clamp(min=0)  # rounding can leave a constant below zero

    def result(self) -> list[Estimate]:
        """Return the mean of each column over images, and its standard error."""
        mean_C = self.sums[1] / self.sums[0]
        error_C = (self.variances() / self.sums[0]).sqrt()
        return [Estimate(*pair) for pair in zip(mean_C.tolist(), error_C.tolist(), strict=True)]


class LogPartition(NamedTuple):
    """log Z with its standard error, in nats."""

    log_z: Estimate
    effective_share: float
    """(sum w)^2 / (N sum w^2) of the weights w: effective sample size over sample size, in (0, 1]."""


class LogWeights:
    """The log of a mean of weights that are given by their logarithms, whatever their size."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Start with no weights.

        `peak` is the largest logarithm so far, (); `sums` holds the count and, relative to it, the sums of
        the weights and of their squares, (3,); all float64.
        """
        self.peak = torch.full((), -math.inf, dtype=torch.float64, device=device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, log_weight_B: Tensor) -> None:
        """Add a batch of logarithms of weights, (B,)."""
        log_weight_B = log_weight_B.double()
        self.rebase(torch.maximum(self.peak, log_weight_B.max()))
        weight_B = (log_weight_B - self.peak).exp()
        self.sums += torch.stack(
            [torch.full_like(self.peak, len(weight_B)), weight_B.sum(), weight_B.square().sum()]
        )

    def rebase(self, peak: Tensor) -> None:
        """Express the sums relative to another peak, (), float64.

        To add over ranks: all-reduce `peak` with MAX, `rebase` to it, all-reduce `sums`.
        """
        self.sums = self._relative_to(peak)
        self.peak = peak

    def _relative_to(self, peak: Tensor) -> Tensor:
        factor = torch.where(self.peak == -math.inf, 0.0, (self.peak - peak).exp())
        return self.sums * torch.stack([torch.ones_like(factor), factor, factor.square()])

    def merge(self, other: "LogWeights") -> None:
        """Add what another object has seen."""
        self.rebase(torch.maximum(self.peak, other.peak))
        self.sums += other._relative_to(self.peak)

    def result(self, *, reverse: bool = False) -> LogPartition:
        """Return log E[w], or -log E[w] with `reverse`; the standard error is by the delta method.

        The standard error is itself an estimate, too small where the effective share is; NaN for one weight.
        """
        count, total, squares = self.sums.tolist()
        log_mean = float(self.peak) + math.log(total / count)
        share = total**2 / (count * squares)
        error = math.sqrt(max(1 / share - 1, 0) / (count - 1)) if count > 1 else math.nan
        return LogPartition(Estimate(-log_mean if reverse else log_mean, error), share)


@torch.no_grad()
def log_partition_importance(
    f: Callable[[Tensor], Tensor], dim: int, normal: Normal, samples: int
) -> LogPartition:
    """Return log Z = log E_p0[exp f] from `samples` draws of p0 = N(0, I) in `dim` dimensions.

    A stochastic lower bound. Good for a flat f or few dimensions; see the effective share.
    """
    counts = [min(_SAMPLES_AT_ONCE, samples - first) for first in range(0, samples, _SAMPLES_AT_ONCE)]
    return _weights(torch.cat([f(normal(count, dim)) for count in counts])).result()


_SAMPLES_AT_ONCE = 10_000


def _weights(log_weight_B: Tensor) -> LogWeights:
    weights = LogWeights(log_weight_B.device)
    weights.add(log_weight_B)
    return weights


class AnnealedLogPartition(NamedTuple):
    """log Z with its standard error over chains, in nats, and how well the chains moved."""

    log_z: Estimate
    effective_share: float
    """As in `LogPartition`, of the chains' weights."""
    acceptance: float
    """Of the Hamiltonian proposals, mean over chains and temperatures."""
    lowest_acceptance: float
    """The mean over chains at the temperature where it is lowest."""
    end_BD: Tensor
    """Where the chains ended. After forward annealing resampled by their weights, so approximately samples of
    the prior, some of them more than once: the less so the larger the effective share."""


@torch.no_grad()
def log_partition_annealed(
    f: Callable[[Tensor], Tensor], dim: int, normal: Normal, *, chains: int = 1000, temperatures: int = 300
) -> AnnealedLogPartition:
    """Return log Z by annealed importance sampling up from p0: a stochastic lower bound (Neal 2001).

    Along p_b proportional to exp(b f(z)) p0(z), b from 0 to 1 in `temperatures` equal steps, each followed by
    one Hamiltonian transition with a Metropolis step, which leaves p_b exactly as it is. So the mean weight
    is Z in expectation for any number of chains and temperatures, and its log below log Z in expectation.
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
    # Systematic resampling: chain i is taken N w_i / sum w times on average, rounded up or down.
    edges_B = log_weight_B.softmax(0).cumsum(0)
    uniform = log_uniform(normal, 1).double().exp()
    places_B = (torch.arange(chains, device=edges_B.device) + uniform) / chains
    chosen_B = torch.searchsorted(edges_B, places_B).clamp(max=chains - 1)
    return _annealed(_weights(log_weight_B).result(), accepted, state.z_BD[chosen_B])


@torch.no_grad()
def log_partition_reverse(
    f: Callable[[Tensor], Tensor], start_BD: Tensor, normal: Normal, *, temperatures: int = 300
) -> AnnealedLogPartition:
    """Return log Z by annealing from the prior down to p0: a stochastic upper bound.

    The weights' mean is 1/Z in expectation if `start_BD` are exact samples of the prior. Rejection from p0
    gives such, at an acceptance of Z / exp(max f). Approximately that, and then an approximate bound, are
    `end_BD` of `log_partition_annealed` with a large effective share, or the end of long chains that have
    the prior as their stationary law (`run_chains(..., corrected=True)`). Starts that miss a mode of the
    prior bound nothing: an upper bound that is clearly below the lower one says so.
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
    return _annealed(_weights(log_weight_B).result(reverse=True), accepted, state.z_BD)


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


_LEAPFROGS = 2
_LARGEST_ANGLE = math.pi / (2 * _LEAPFROGS)
"""Without f a transition by this angle ends at the fresh momentum: nothing is left of the start."""


def _transition(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    state: _State,
    normal: Normal,
    inverse: float,
    angle: float,
) -> tuple[_State, Tensor]:
    """Return chains after a transition that leaves exp(inverse * f) N(0, I) as it is, and their acceptance.

    Hamiltonian Monte Carlo, split so that the Gaussian part is solved exactly, as a rotation by `angle` of
    position and momentum between half kicks from f (Shahbaba, Lan, Johnson and Neal 2014): only the curvature
    of f costs acceptance, whatever the dimension. Each chain takes its own angle, half to one and a half of
    `angle`: with the same ones throughout, orbits of a quadratic f would return to where they began.
    """
    momentum_BD = normal(*state.z_BD.shape)
    angle_B1 = angle * (0.5 + log_uniform(normal, len(momentum_BD)).exp()[:, None])
    kick = 0.5 * inverse * angle_B1
    cos, sin = angle_B1.cos(), angle_B1.sin()
    new, velocity_BD = state, momentum_BD
    for _ in range(_LEAPFROGS):
        velocity_BD = velocity_BD + kick * new.gradient_BD
        rotated_BD = cos * new.z_BD + sin * velocity_BD
        velocity_BD = cos * velocity_BD - sin * new.z_BD
        new = _State.at(evaluate, rotated_BD)
        velocity_BD = velocity_BD + kick * new.gradient_BD
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
    """Return an angle for each temperature but the first, from a pilot of chains that are then thrown away.

    Angles that followed the weighted chains themselves would depend on their past, and bias the weights.
    """
    state = _State.at(evaluate, normal(_PILOT_CHAINS, dim))
    angle, angles = _LARGEST_ANGLE, []
    for inverse in inverses[1:]:
        angles.append(angle)
        state, acceptance = _transition(evaluate, state, normal, inverse, angle)
        angle = min(_LARGEST_ANGLE, angle * math.exp(0.3 * (float(acceptance) - _TARGET_ACCEPTANCE)))
    return angles


_PILOT_CHAINS = 100
_TARGET_ACCEPTANCE = 0.8


@torch.no_grad()
def importance_weighted_bound(
    model: JointModel, x_BCHW: Tensor, normal: Normal, log_z: float, *, samples: int
) -> Tensor:
    """Return log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), z_k ~ q, of each image, (B,), float64, in nats.

    A lower bound of log p(x) in expectation that grows with K = `samples` towards it; K = 1 is the ELBO
    (Burda, Grosse and Salakhutdinov 2016, eq. 8). Here p(z) is the normalised prior. A thousand images or so
    are decoded at once.
    """
    posterior = model.inference(x_BCHW)
    total_B = torch.full((len(x_BCHW),), -math.inf, dtype=torch.float64, device=x_BCHW.device)
    at_once = max(1, _DECODED_AT_ONCE // len(x_BCHW))
    for first in range(0, samples, at_once):
        count = min(at_once, samples - first)
        repeated = DiagGaussian(*(moment.repeat(count, 1) for moment in posterior))
        z_BD = repeated.rsample(normal(*repeated.mean_BD.shape))
        log_weight_B = (
            -distortion(model, x_BCHW.repeat(count, 1, 1, 1), model.generator(z_BD))
            + _f(model, z_BD)
            + standard_log_density(z_BD)
            - repeated.log_density(z_BD).sum(1)
        )
        total_B = torch.logaddexp(total_B, log_weight_B.double().view(count, -1).logsumexp(0))
    return total_B - math.log(samples) - _constant(model, x_BCHW) - log_z


_DECODED_AT_ONCE = 1000


def _f(model: JointModel, z_BD: Tensor) -> Tensor:
    """Return f(z), (B,): zero for the Gaussian prior."""
    f_B: Tensor = z_BD.new_zeros(len(z_BD)) if model.energy is None else model.energy(z_BD)
    return f_B


def _constant(model: JointModel, x_BCHW: Tensor) -> float:
    """Return C H W log(2 pi sigma^2) / 2, in nats: what `distortion` leaves out of -log p(x|z)."""
    return x_BCHW[0].numel() * 0.5 * math.log(2 * math.pi * model.likelihood_std**2)


class Likelihood(NamedTuple):
    """Means over images with standard errors, in nats for one image unless another unit is named.

    elbo = -distortion - rate + gain, gain = f_posterior - log_z. The standard errors of what contains log Z
    count its error as well as the spread over images, which for a comparison of two models on the same
    images is not the error of their difference.
    """

    images: int
    elbo: Estimate
    bits_per_dim: Estimate
    """-elbo / (C H W log 2) + log2(127.5): for 8-bit data, in the usual unit of 256 levels a channel.

    It is a density of continuous pixels taken at the levels, without dequantisation noise, so not a bound on
    the log-probability of discrete images; for sigma well above 1/127.5 the two hardly differ.
    """
    distortion: Estimate
    """-E_q[log p(x|z)], with the constant; training reports it without."""
    constant: float
    """C H W log(2 pi sigma^2) / 2, the part of the distortion that no net changes."""
    rate: Estimate
    """KL(q(z|x) || N(0, I)) of all layers."""
    rate_L: list[Estimate]
    """The same of each layer, bottom first."""
    f_posterior: Estimate
    """E_q[f(z)]; zero for the Gaussian prior."""
    log_z: Estimate
    gain: Estimate
    """E_q[f] - log Z: what the tilt adds to the ELBO, too large where log Z is a lower bound."""
    active_units: list[int]
    """Latents of each layer whose posterior mean varies over images: Var_x E[z|x] > 0.01 (Burda et al.)."""
    importance_weighted: Estimate | None
    """The importance-weighted bound, where it was asked for."""


_ACTIVE_VARIANCE = 0.01


class LikelihoodSums:
    """The sums over images of what `Likelihood` tells; log Z enters in `result` alone."""

    def __init__(self, model: JointModel, *, importance_samples: int = 0) -> None:
        """Take the model and K of the importance-weighted bound, 0 for none.

        `means.sums` is all there is to add over ranks.
        """
        self.model = model
        self.importance_samples = importance_samples
        columns = _FIGURES + len(model.latent_dims) + model.latent_dim
        self.means = Means(columns, next(model.parameters()).device)

    @torch.no_grad()
    def add(self, x_BCHW: Tensor, normal: Normal) -> None:
        """Add a batch of images in [-1, 1], one posterior sample each."""
        model = self.model
        posterior = model.inference(x_BCHW)
        z_BD = posterior.rsample(normal(*posterior.mean_BD.shape))
        constant = _constant(model, x_BCHW)
        distortion_B = distortion(model, x_BCHW, model.generator(z_BD)).double() + constant
        f_B = _f(model, z_BD).double()
        rates = torch.split(posterior.rate().double(), model.latent_dims, dim=1)
        rate_BL = torch.stack([rate.sum(1) for rate in rates], 1)
        rate_B = rate_BL.sum(1)
        weighted_B = torch.zeros_like(f_B)
        if self.importance_samples:
            weighted_B = importance_weighted_bound(
                model, x_BCHW, normal, 0.0, samples=self.importance_samples
            )
        figures = [
            torch.full_like(f_B, x_BCHW[0].numel()),
            torch.full_like(f_B, constant),
            f_B - distortion_B - rate_B,
            distortion_B,
            rate_B,
            f_B,
            weighted_B,
        ]
        self.means.add(torch.cat([torch.stack(figures, 1), rate_BL, posterior.mean_BD.double()], 1))

    def merge(self, other: "LikelihoodSums") -> None:
        """Add what another object has seen."""
        self.means.merge(other.means)

    def result(self, log_z: Estimate) -> Likelihood:
        """Return the figures, given log Z (of the Gaussian prior: `Estimate(0.0, 0.0)`)."""
        estimates = self.means.result()
        pixels, constant, unnormalised, distortion_, rate, f_posterior, weighted = estimates[:_FIGURES]
        layers = len(self.model.latent_dims)
        elbo = _less(unnormalised, log_z)
        per_bit = pixels.value * math.log(2)
        variances = torch.split(self.means.variances()[_FIGURES + layers :], self.model.latent_dims)
        return Likelihood(
            images=int(self.means.sums[0, 0]),
            elbo=elbo,
            bits_per_dim=Estimate(-elbo.value / per_bit + math.log2(127.5), elbo.standard_error / per_bit),
            distortion=distortion_,
            constant=constant.value,
            rate=rate,
            rate_L=estimates[_FIGURES : _FIGURES + layers],
            f_posterior=f_posterior,
            log_z=log_z,
            gain=_less(f_posterior, log_z),
            active_units=[int((variance > _ACTIVE_VARIANCE).sum()) for variance in variances],
            importance_weighted=_less(weighted, log_z) if self.importance_samples else None,
        )


_FIGURES = 7
"""Columns of `LikelihoodSums` before those of the layers' rates and the posterior means."""


def _less(one: Estimate, other: Estimate) -> Estimate:
    """Return the difference of two independent estimates."""
    return Estimate(one.value - other.value, math.hypot(one.standard_error, other.standard_error))


def likelihood(
    model: JointModel,
    batches: Iterable[Tensor],
    noise: Noise,
    log_z: Estimate,
    *,
    importance_samples: int = 0,
) -> Likelihood:
    """Return the figures of a model on batches of images in [-1, 1], given log Z of its prior.

    Batch i takes its noise from (i, "likelihood"): models that are given the same batches see the same
    noise. `importance_samples` is K of the importance-weighted bound, 0 for none.
    """
    sums = LikelihoodSums(model, importance_samples=importance_samples)
    for position, x_BCHW in enumerate(batches):
        sums.add(x_BCHW, noise(position, "likelihood"))
    return sums.result(log_z)
