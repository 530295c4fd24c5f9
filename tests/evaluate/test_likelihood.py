"""log Z, the ELBO and its importance-weighted relatives against closed forms and quadrature."""

import copy
import math
from collections.abc import Iterable

import pytest
import torch
from torch.distributions import Normal as NormalLaw

from jebm.config import Config, Energy, Generator, Inference, Model
from jebm.config import Likelihood as LikelihoodSection
from jebm.core.energy import EnergyNet
from jebm.core.model import JointModel
from jebm.evaluate.chains import Tilt
from jebm.evaluate.estimates import Estimate, Means
from jebm.evaluate.likelihood import Likelihood, LikelihoodSums, importance_weighted_bound
from jebm.evaluate.partition import (
    PILOT_CHAINS,
    disagreement,
    log_mean_weight,
    log_partition_annealed,
    log_partition_importance,
    log_partition_inside,
    log_partition_reverse,
)
from jebm.rng import gaussian_noise, generator

NOISE = gaussian_noise(seed=0, rank=0)
EXACT = Estimate(0.0, 0.0)


def identity(z):
    return z


def likelihood(
    model: JointModel, batches: Iterable[torch.Tensor], log_z: Estimate, *, importance_samples: int = 0
) -> Likelihood:
    sums = LikelihoodSums(model, importance_samples=importance_samples)
    for position, x_BCHW in enumerate(batches):
        sums.add(x_BCHW, NOISE(position, "likelihood"))
    return sums.result(log_z)


def within(estimate: Estimate, truth: float, errors: float = 5) -> bool:
    return abs(estimate.value - truth) < errors * estimate.standard_error


# --- sums ---


def test_means_are_those_of_all_images_however_they_came():
    values = 1000 + torch.tensor([0.1, 30.0, 1.0]) * NOISE(0, "values")(90, 3).double()
    batches = values.split([50, 1, 39])
    whole, parts, ranks = Means(3), Means(3), Means(3)
    whole.add(values)
    for batch in batches:
        one = Means(3)
        for means in (one, parts):
            means.add(batch)
        ranks.sums += one.sums  # what an all-reduce does
    for means in (whole, parts, ranks):
        torch.testing.assert_close(means.variances(), values.var(0), rtol=1e-6, atol=0)
        for estimate, column in zip(means.result(), values.T, strict=True):
            assert estimate.value == pytest.approx(column.mean().item(), rel=1e-12)
            assert estimate.standard_error == pytest.approx(column.std().item() / math.sqrt(90), rel=1e-6)


def test_means_of_float32_are_summed_in_float64():
    means = Means(1)
    for _ in range(10):
        means.add(torch.full((1000, 1), 16_777.217))
    assert means.result()[0].value == pytest.approx(torch.tensor(16_777.217).item(), rel=1e-12)
    assert means.result()[0].standard_error < 1e-3


@pytest.mark.parametrize("size", [0.0, 1e5, -1e5])
def test_log_weights_of_any_size(size):
    log_weights = size + 2 * NOISE(0, "weights")(600).double()
    direct = log_weights.logsumexp(0).item() - math.log(600)
    weights = (log_weights - log_weights.max()).exp()
    error = (weights.std() / weights.mean()).item() / math.sqrt(600)
    share = (weights.sum().square() / weights.square().sum()).item() / 600
    log_z, effective_share = log_mean_weight(log_weights)
    assert log_z.value == pytest.approx(direct, abs=1e-9)
    assert log_z.standard_error == pytest.approx(error, rel=1e-9)
    assert effective_share == pytest.approx(share, rel=1e-9)
    assert log_mean_weight(log_weights, reverse=True).log_z.value == pytest.approx(-direct, abs=1e-9)


def test_what_is_not_a_number_stays_so():
    assert math.isnan(log_mean_weight(torch.tensor([0.0, math.nan, 1.0])).log_z.value)


def test_the_standard_error_covers_the_truth_as_often_as_it_says():
    """Weights exp(n), n ~ N(0, 1): log of their mean is 1/2; 95 % of 2,000 intervals of two errors."""
    hits = 0
    for draws in NOISE(0, "cover")(2000, 1000):
        hits += within(log_mean_weight(draws).log_z, 0.5, errors=1.96)
    assert 0.92 < hits / 2000 < 0.965


# --- log Z ---

SHIFT = torch.tensor([0.8, -0.3, 0.5, 0.0])


def shift(z):
    return z @ SHIFT


def steep_shift(z):
    return 3 * shift(z)


def quadratic(strength):
    return lambda z: -0.5 * strength * z.square().sum(1)


def test_importance_sampling_of_a_shift():
    """f = a.z: log Z = |a|^2 / 2; the weights' second moment over their squared first is exp |a|^2."""
    square = SHIFT.square().sum().item()
    partition = log_partition_importance(shift, 4, NOISE(0, "importance"), 14_000)
    assert within(partition.log_z, square / 2)
    assert partition.log_z.standard_error == pytest.approx(math.sqrt(math.expm1(square) / 14_000), rel=0.1)
    assert partition.effective_share == pytest.approx(math.exp(-square), rel=0.1)


def test_importance_sampling_of_a_quadratic():
    partition = log_partition_importance(quadratic(0.8), 3, NOISE(1, "importance"), 30_000)
    assert within(partition.log_z, -1.5 * math.log(1.8))
    assert partition.log_z.standard_error < 0.01


@pytest.mark.parametrize(
    ("f", "dim", "truth"),
    [
        (lambda z: 3 * shift(z) - 100, 4, 9 * 0.98 / 2 - 100),
        (quadratic(4.0), 6, -3 * math.log(5)),
        (quadratic(-0.6), 5, -2.5 * math.log(0.4)),
    ],
)
def test_annealing_is_exact_where_importance_sampling_is_poor(f, dim, truth):
    partition = log_partition_annealed(f, dim, NOISE(0, "annealing"), chains=400, temperatures=200)
    assert within(partition.log_z, truth)
    assert partition.log_z.standard_error < 0.05
    assert partition.effective_share > 0.8
    assert partition.acceptance > partition.lowest_acceptance > 0.6
    plain = log_partition_importance(f, dim, NOISE(0, "importance"), 400 * 200)
    assert plain.effective_share < 0.1


def test_chains_go_on_from_where_a_refused_proposal_left_them():
    """Many are refused here. With the gradient of the refused point the lowest acceptance would be 0.12."""
    partition = log_partition_annealed(quadratic(20.0), 1, NOISE(3, "annealing"), chains=5000, temperatures=8)
    assert within(partition.log_z, -0.5 * math.log(21))
    assert 0.3 < partition.lowest_acceptance < 0.5


def test_annealing_of_a_flat_f_knows_log_z_without_error():
    partition = log_partition_annealed(
        lambda z: 0 * z.sum(1) + 3, 2, NOISE(0, "annealing"), chains=50, temperatures=10
    )
    assert partition.log_z.value == pytest.approx(3, abs=1e-6)
    assert partition.log_z.standard_error < 1e-6
    assert partition.effective_share == pytest.approx(1)
    assert partition.lowest_acceptance > 0.999


def test_a_broken_f_gives_no_number():
    partition = log_partition_annealed(
        lambda z: z.sum(1) * math.nan, 2, NOISE(0, "annealing"), chains=10, temperatures=3
    )
    assert math.isnan(partition.log_z.value)


class Planar:
    """A steep energy net on the plane, and its prior by quadrature."""

    def __init__(self) -> None:
        torch.manual_seed(8)
        energy = EnergyNet(2, Energy(width=32, output_scale=30.0)).requires_grad_(requires_grad=False)
        self.f = Tilt(energy, identity)
        axis = torch.linspace(-9, 9, 541, dtype=torch.float64)
        self.points = torch.cartesian_prod(axis, axis)
        log_density = copy.deepcopy(energy).double()(self.points) - 0.5 * self.points.square().sum(1)
        area = ((axis[1] - axis[0]) ** 2).item()
        self.log_z = log_density.logsumexp(0).item() + math.log(area / (2 * math.pi))
        self.mass = log_density.softmax(0)
        self.mean = self.mass @ self.points
        self.samples = self.exact_samples()
        self.covariance = (self.points - self.mean).T @ (self.mass[:, None] * (self.points - self.mean))

    def exact_samples(self) -> torch.Tensor:
        """4,000, by rejection from N(0, I); f has its largest value on the grid where p0 has mass."""
        normal, uniform = NOISE(0, "proposals"), generator(0, 0, 0, "rejection")
        bound = self.f(self.points.float()[self.points.norm(dim=1) < 6]).max()
        accepted = []
        while sum(map(len, accepted)) < 4000:
            z = normal(100_000, 2)
            accepted.append(z[torch.rand(len(z), generator=uniform).log() < self.f(z) - bound])
        return torch.cat(accepted)[:4000]


@pytest.fixture(scope="module")
def planar():
    return Planar()


def test_all_estimators_meet_quadrature(planar):
    importance = log_partition_importance(planar.f, 2, NOISE(1, "importance"), 200_000)
    forward = log_partition_annealed(planar.f, 2, NOISE(1, "annealing"), chains=1000, temperatures=150)
    reverse = log_partition_reverse(planar.f, planar.samples[:1000], NOISE(1, "reverse"), temperatures=150)
    for partition in (importance, forward, reverse):
        assert within(partition.log_z, planar.log_z), partition
        assert partition.log_z.standard_error < 0.02
    assert importance.effective_share < 0.1
    assert min(forward.effective_share, reverse.effective_share) > 0.8


def test_the_mean_weight_is_exact_for_any_number_of_temperatures(planar):
    """It is, if and only if the transitions leave their densities as they are."""
    forward = log_partition_annealed(planar.f, 2, NOISE(2, "annealing"), chains=20_000, temperatures=3)
    reverse = log_partition_reverse(planar.f, planar.samples, NOISE(2, "reverse"), temperatures=3)
    for partition in (forward, reverse):
        assert within(partition.log_z, planar.log_z), partition
        assert 0.1 < partition.effective_share < 0.5
        assert partition.lowest_acceptance < 0.9
    # Where forward annealing ends is the prior, once resampled by the weights: to 20,000 x share samples.
    error = planar.covariance.diagonal().sqrt() / math.sqrt(20_000 * forward.effective_share)
    assert ((forward.end_BD.double().mean(0) - planar.mean).abs() < 5 * error).all()
    assert (torch.cov(forward.end_BD.double().T) - planar.covariance).abs().max() < 0.1


def test_forward_is_a_lower_bound_and_reverse_an_upper_one(planar):
    """Two temperatures and two chains: in expectation the log of the mean is far off, the mean is not."""
    runs, starts = 200, planar.samples[:400].view(200, 2, 2)
    forward = [
        log_partition_annealed(planar.f, 2, NOISE(i, "bound"), chains=2, temperatures=2).log_z.value
        for i in range(runs)
    ]
    reverse = [
        log_partition_reverse(planar.f, start, NOISE(i, "bound"), temperatures=2).log_z.value
        for i, start in enumerate(starts)
    ]
    for log_z, sign in ((torch.tensor(forward), -1), (torch.tensor(reverse), 1)):
        error = log_z.std() / math.sqrt(runs)
        assert sign * (log_z.mean() - planar.log_z) > 5 * error
        relative = (-sign * (log_z - planar.log_z)).exp()
        assert abs(relative.mean() - 1) < 5 * relative.std() / math.sqrt(runs)


class Planted:
    """f whose prior is a mixture of N(0, I) and N(c, I), |c| = distance, in 14 dimensions: log Z is exact."""

    def __init__(self, distance: float, log_odds: float) -> None:
        """Take the mode's distance, also the slope of f there, and its log mass over that of N(0, I)."""
        self.distance, self.bias = distance, distance**2 / 2 - log_odds
        self.log_z = math.log1p(math.exp(log_odds))

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(self.distance * z[:, 0] - self.bias)

    def estimates(self, seed: int) -> dict[str, Estimate]:
        """Return log Z from below, above and inside; posterior samples are those of the mode."""
        below = log_partition_annealed(self, 14, NOISE(seed, "below"))
        above = log_partition_reverse(self, below.end_BD, NOISE(seed, "above"))
        posterior = NOISE(seed, "posterior")(1000 + PILOT_CHAINS, 14)
        posterior[:, 0] += self.distance
        inside = log_partition_inside(self, posterior, NOISE(seed, "inside"))
        return {"from below": below.log_z, "from above": above.log_z, "from inside": inside.log_z}


def test_a_mode_at_distance_10_with_slope_10_is_warned_of():
    planted = Planted(10, 7.0)
    found = planted.estimates(0)
    inside = found["from inside"]
    assert inside.value - found["from below"].value > 4
    assert inside.value > planted.log_z + 3 * inside.standard_error  # too short an annealing, but still above
    assert f"{inside.value:.2f} ± {inside.standard_error:.2f} from inside" in str(disagreement(found))


def test_a_mode_that_no_chain_from_below_finds_shows_from_inside_alone():
    """Both bounds say 0.000 ± 0.000, with an effective share of 1; the truth is 11.46."""
    found = Planted(14, 11.46).estimates(0)
    for side in ("from below", "from above"):
        assert abs(found[side].value) < 0.01
        assert found[side].standard_error < 0.01
    assert found["from inside"].value > 11
    assert "see different parts of the prior" in str(disagreement(found))


def test_estimates_of_a_mode_within_reach_agree():
    planted = Planted(5, 3.0)
    found = planted.estimates(0)
    assert all(within(estimate, planted.log_z) for estimate in found.values())
    assert disagreement(found) is None


def test_estimates_from_inside_meet_quadrature_from_samples_of_another_distribution(planar):
    """The chains forget a start that is too narrow; pilots tune the annealing, and are not counted."""
    start = planar.mean.float() + 0.1 * NOISE(4, "start")(600, 2)
    inside = log_partition_inside(planar.f, start, NOISE(4, "inside"), temperatures=150)
    assert within(inside.log_z, planar.log_z)
    assert inside.effective_share > 0.8
    assert inside.lowest_acceptance > 0.6
    assert len(inside.end_BD) == 600 - PILOT_CHAINS


@pytest.mark.parametrize(
    ("values", "disagree"),
    [
        ({"a": (1.0, 0.01), "b": (1.19, 0.01)}, False),
        ({"a": (1.0, 0.01), "b": (1.21, 0.01)}, True),
        ({"a": (1.0, 0.1), "b": (1.4, 0.1)}, False),
        ({"a": (1.0, 0.1), "b": (1.5, 0.1)}, True),
        ({"a": (1.0, 0.1), "b": (0.9, 2.0), "c": (1.5, 0.1)}, True),  # the lowest of all is only uncertain
        ({"a": (1.0, 0.1), "b": (math.nan, 0.1)}, True),
    ],
)
def test_estimates_disagree_beyond_nats_and_errors(values, disagree):
    assert (disagreement({name: Estimate(*value) for name, value in values.items()}) is not None) == disagree


# --- the ELBO and its relatives ---


def tiny_model(latent_dims=(1, 1), **energy) -> JointModel:
    levels = len(latent_dims) - 1
    config = Config(
        model=Model(4, 1, latent_dims),
        likelihood=LikelihoodSection(std=0.5),
        inference=Inference((2,) * levels, 4),
        generator=Generator((2,) * levels, 4),
        energy=Energy(**{"width": 16, "output_scale": 6.0, **energy}),
    )
    torch.manual_seed(5)
    model = JointModel(config).requires_grad_(requires_grad=False)
    for weight in model.generator.parameters():
        weight.mul_(2)  # so that the image depends on z, and the posterior is narrower than the prior
    return model


class Exact:
    """Everything about one image under a model with two latents, by quadrature in double precision."""

    def __init__(self, model: JointModel, x: torch.Tensor) -> None:
        model = copy.deepcopy(model).double()
        x = x.double()
        axis = torch.linspace(-7, 7, 281, dtype=torch.float64)
        z = torch.cartesian_prod(axis, axis)
        area = ((axis[1] - axis[0]) ** 2).item()
        mean = model.decode(z)
        self.pixels = NormalLaw(mean, model.likelihood.std)
        log_likelihood = self.pixels.log_prob(x).sum((1, 2, 3))
        f = model.energy(z)
        log_p0 = NormalLaw(0, 1).log_prob(z).sum(1)
        self.log_z = (f + log_p0).logsumexp(0).item() + math.log(area)
        posterior = model.inference(x)
        marginals = NormalLaw(posterior.mean_BD, (0.5 * posterior.log_variance_BD).exp()).log_prob(z)
        self.q = marginals.sum(1).exp() * area
        assert self.q.sum().item() == pytest.approx(1, abs=1e-4)
        self.distortion = -(self.q @ log_likelihood).item()
        self.f = (self.q @ f).item()
        self.rates = [(self.q @ (marginals - NormalLaw(0, 1).log_prob(z))[:, i]).item() for i in (0, 1)]
        self.elbo = -self.distortion - sum(self.rates) + self.f - self.log_z
        self.log_p = (log_likelihood + f + log_p0).logsumexp(0).item() + math.log(area) - self.log_z
        # The probability of the 8-bit image: of pixels within half a level, 1/255, of those given.
        half = 1 / 255
        cells = self.pixels.cdf(x + half) - self.pixels.cdf(x - half)
        self.log_mass = (self.q @ cells.log().sum((1, 2, 3))).item()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def image():
    """An 8-bit image in [-1, 1]."""
    levels = torch.randint(0, 256, (1, 1, 4, 4), generator=generator(0, 0, 0, "image"))
    return levels.float() / 127.5 - 1


@pytest.fixture(scope="module")
def exact(model, image):
    return Exact(model, image)


def test_the_elbo_and_its_parts_meet_quadrature(model, image, exact):
    batches = [image.expand(5000, -1, -1, -1)] * 4
    figures = likelihood(model, batches, Estimate(exact.log_z, 0.0))
    assert figures.images == 20_000
    for estimate, truth in [
        (figures.elbo, exact.elbo),
        (figures.distortion, exact.distortion),
        (figures.f_posterior, exact.f),
        (figures.gain, exact.f - exact.log_z),
    ]:
        assert within(estimate, truth)
        assert estimate.standard_error < 0.1
    rates = [estimate.value for estimate in figures.rate_L]
    assert rates == pytest.approx(exact.rates, abs=1e-3)
    assert figures.rate.value == pytest.approx(sum(exact.rates), abs=1e-3)
    assert figures.constant == pytest.approx(16 * math.log(0.5 * math.sqrt(2 * math.pi)))
    assert figures.elbo.value == pytest.approx(
        figures.gain.value - figures.distortion.value - figures.rate.value, abs=1e-9
    )
    assert figures.importance_weighted is None


def test_bits_per_dim_are_those_of_the_8_bit_image(model, image, exact):
    """The probability of the image's levels, E_q[log P(levels|z)], in place of the density of its values."""
    figures = likelihood(model, [image.expand(100, -1, -1, -1)], Estimate(exact.log_z, 0.0))
    per_bit = 16 * math.log(2)
    discrete = -(exact.elbo + exact.distortion + exact.log_mass) / per_bit
    assert figures.bits_per_dim.value - discrete == pytest.approx(
        -(figures.elbo.value - exact.elbo) / per_bit, abs=1e-4
    )
    assert figures.bits_per_dim.standard_error == pytest.approx(figures.elbo.standard_error / per_bit)


def test_importance_weighted_bounds_rise_to_the_log_likelihood(model, image, exact):
    assert exact.log_p - exact.elbo > 1
    before = exact.elbo - 1e-6
    for samples in (1, 4, 16, 64):
        images = image.expand(20_000 // samples, -1, -1, -1)
        bounds = importance_weighted_bound(
            model, images, NOISE(samples, "bound"), exact.log_z, samples=samples
        )
        estimate = Estimate(bounds.mean().item(), bounds.std().item() / math.sqrt(len(bounds)))
        assert within(estimate, exact.elbo) == (samples == 1)
        assert before < estimate.value + 5 * estimate.standard_error
        assert estimate.value < exact.log_p + 5 * estimate.standard_error
        before = estimate.value
    # With many samples the log of the mean is that of log p(x), less half the weights' relative variance.
    (last,) = importance_weighted_bound(model, image, NOISE(0, "many"), exact.log_z, samples=50_003)
    assert last.item() == pytest.approx(exact.log_p, abs=0.1)


def test_each_image_has_its_own_bound(model):
    """Without noise all z_k are the posterior mean, and a bound in a batch is that of the image alone."""
    images = NOISE(0, "images")(3, 1, 4, 4)
    together, *alone = (
        importance_weighted_bound(model, x, lambda *shape: torch.zeros(shape), 0.5, samples=4)
        for x in (images, *images.split(1))
    )
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=0)
    assert together.unique().numel() == 3


def test_the_importance_weighted_bound_is_among_the_figures(model, image, exact):
    log_z = Estimate(exact.log_z, 0.25)
    figures = likelihood(model, [image.expand(1000, -1, -1, -1)], log_z, importance_samples=20)
    assert figures.elbo.value + 1 < figures.importance_weighted.value < exact.log_p + 0.3
    assert figures.distortion.standard_error > 0.1
    for estimate in (figures.importance_weighted, figures.elbo, figures.gain):
        assert 0.25 < estimate.standard_error < 0.5  # that of log Z is counted
    assert figures.log_z == log_z


def test_sums_add_over_batches_and_ranks():
    model = tiny_model((2, 1))
    batches = NOISE(0, "images")(30, 1, 4, 4).clamp(-1, 1).split([10, 15, 5])
    reduced = LikelihoodSums(model, importance_samples=2)
    for position, x in enumerate(batches):
        rank = LikelihoodSums(model, importance_samples=2)
        rank.add(x, NOISE(position, "likelihood"))
        reduced.means.sums += rank.means.sums
    expected = likelihood(model, batches, EXACT, importance_samples=2)
    figures = reduced.result(EXACT)
    assert figures.images == 30
    for one, other in zip(figures, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_the_gaussian_prior_has_no_gain():
    figures = likelihood(tiny_model(width=0), [NOISE(0, "images")(20, 1, 4, 4)], EXACT)
    assert figures.gain == figures.f_posterior == EXACT
    assert figures.elbo.value == pytest.approx(-figures.distortion.value - figures.rate.value)


def test_active_units_are_those_whose_mean_moves():
    model = tiny_model((2, 3))
    bottom, top = model.inference.moments
    for linear in (bottom, top):
        linear.weight.mul_(100)
        linear.weight[len(linear.weight) // 2 :] = 0  # log-variances
        linear.bias.zero_()
    bottom.weight[0] = 0  # a mean that never moves
    top.weight[2], top.bias[2] = 0, 5.0
    x = NOISE(0, "images")(200, 1, 4, 4)
    top.weight[1] *= 0.09 / model.inference(x).mean_BD[:, 3].std()  # one that hardly does
    variances = model.inference(x).mean_BD.var(0)
    assert 0.008 < variances[3] < 0.01 < min(variances[1], variances[2])
    assert likelihood(model, x.split(70), EXACT).active_units == [1, 1]
