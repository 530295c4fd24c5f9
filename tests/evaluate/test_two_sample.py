"""A classifier between two samples, against laws whose best possible AUC is known in closed form."""

import math

import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression

from jebm.evaluate.two_sample import _Penalty, _Sides, _slope, two_sample_auc


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_between_two_gaussians_it_comes_near_the_bound_of_bayes(shift):
    """N(m, I) against N(0, I): the best score is m z, its AUC Phi(|m| / sqrt 2)."""
    one, other = normal(0, 3000, 3), normal(1, 3000, 3)
    one[:, 1] += shift
    best = stats.norm.cdf(shift / math.sqrt(2))
    error = 2 * math.sqrt(best * (1 - best) / 3000)
    assert best - 0.02 - error < two_sample_auc(one, other) < best + error


def test_it_sees_a_spread_that_a_line_cannot_see():
    """Of N(0, 4 I) and N(0, I) in two dimensions |z|^2 / 2 is exponential: P(4 E > E') = 4/5."""
    assert two_sample_auc(2 * normal(0, 3000, 2), normal(1, 3000, 2)) == pytest.approx(0.8, abs=0.02)


def test_it_sees_how_coordinates_hang_together():
    """Each coordinate is N(0, 1) in both; the best score is rho z1 z2 - rho^2 (z1^2 + z2^2) / 2."""
    rho = 0.9
    one, other = normal(0, 3000, 2), normal(1, 3000, 2)
    one[:, 1] = rho * one[:, 0] + math.sqrt(1 - rho**2) * one[:, 1]

    def score(z: torch.Tensor) -> torch.Tensor:
        return rho * z[:, 0] * z[:, 1] - 0.5 * rho**2 * z.square().sum(1)

    best = (score(one)[:, None] > score(other)).double().mean().item()
    assert best - 0.04 < two_sample_auc(one, other) < best + 0.02


def test_units_and_the_number_of_samples_do_not_matter():
    one, other = normal(0, 1500, 2) + torch.tensor([1.0, 0.0]), normal(1, 1500, 2)
    units = torch.tensor([1e-3, 1e4])
    plain = two_sample_auc(one, other)
    assert two_sample_auc(one * units + 7, other * units + 7) == pytest.approx(plain, abs=0.01)
    assert two_sample_auc(one[:500], other) == pytest.approx(plain, abs=0.04)


def test_samples_that_are_not_finite_have_none():
    broken = normal(0, 100, 2)
    broken[3, 1] = math.inf
    assert math.isnan(two_sample_auc(broken, normal(1, 100, 2)))
    assert math.isnan(two_sample_auc(normal(0, 3, 2), normal(1, 100, 2)))


def test_ten_of_304_coordinates_that_differ_are_found_among_a_thousand_samples():
    """The best AUC is Phi(1.0685 / sqrt 2) = .775."""
    areas = []
    for seed in range(3):
        one, other = normal(2 * seed, 1000, 304), normal(2 * seed + 1, 1000, 304)
        one[:, :10] += 1.0685 / math.sqrt(10)
        areas.append(two_sample_auc(one, other))
    assert 0.75 < sum(areas) / 3 < 0.79


def test_where_nothing_differs_in_304_coordinates_it_stays_at_a_half():
    """The AUC of a score that knows nothing spreads by .013 at 1,000 samples."""
    assert two_sample_auc(normal(0, 1000, 304), normal(1, 1000, 304)) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("lasso", "ridge"), [(0.02, 0.0), (0.0, 0.05)])
def test_the_linear_part_is_that_of_scikit_learn(lasso, ridge):
    """Its loss is summed over samples, ours is a mean: C = 1 / (B strength)."""
    sides = _Sides.of(normal(0, 200, 30) + 0.2, normal(1, 200, 30))
    slope = _slope(sides, sides.curvature(), torch.zeros(30), _Penalty(lasso, ridge))
    reference = LogisticRegression(
        C=1 / (400 * (lasso + ridge)),
        l1_ratio=float(lasso > 0),
        solver="saga",
        fit_intercept=False,
        tol=1e-6,
        max_iter=5000,
    ).fit(sides.h_BW.numpy(), sides.target_B.numpy())
    assert slope.numpy() == pytest.approx(reference.coef_[0], abs=2e-3)
    assert (slope == 0).any() == (lasso > 0)


def test_a_side_with_fewer_samples_weighs_as_much():
    sides = _Sides.of(normal(0, 30, 4) + 1, normal(1, 3000, 4))
    assert float(sides.weight_B[:30].sum()) == pytest.approx(0.5)
    assert float(sides.loss(torch.zeros(3030))) == pytest.approx(math.log(2))


def test_samples_that_have_run_away_are_told_apart_whatever_their_size():
    one = normal(0, 200, 2)
    one[:, 0] *= 1e30
    assert two_sample_auc(one, normal(1, 200, 2)) > 0.95
