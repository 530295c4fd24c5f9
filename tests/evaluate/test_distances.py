"""Distances: closed forms on Gaussians and uniform squares, references in numpy and scipy, sums that add.

Shapes: N real, M generated, F features.
"""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from jebm.errors import ConfigError, DivergedError
from jebm.evaluate.distances import (
    Moments,
    density_coverage,
    distances,
    frechet_distance,
    kernel_distance,
    precision_recall,
    real_floor,
)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean_F: torch.Tensor, covariance_FF: torch.Tensor, count: int = 50) -> Moments:
    """Return the moments of features whose sample mean and covariance are exactly these."""
    features = len(mean_F)
    white_NF = normal(9, count, features)
    white_NF = white_NF - white_NF.mean(0)
    scale_FF = torch.linalg.cholesky(white_NF.T @ white_NF / (count - 1))
    white_NF = torch.linalg.solve_triangular(scale_FF, white_NF.T, upper=False).T
    return Moments.of(white_NF @ torch.linalg.cholesky(covariance_FF).T + mean_F)


def covariance(seed: int, features: int) -> torch.Tensor:
    factor_FF = normal(seed, features, features)
    return factor_FF @ factor_FF.T + 0.1 * torch.eye(features)


# --- moments


def test_moments_are_mean_and_covariance():
    x_NF = 3 + 2 * normal(0, 40, 5)
    moments = Moments.of(x_NF)
    assert moments.images == 40
    torch.testing.assert_close(moments.mean(), x_NF.mean(0))
    torch.testing.assert_close(moments.covariance(), torch.cov(x_NF.T))


def test_moments_add_over_batches_and_ranks():
    x_NF = normal(0, 1000, 6).float()
    whole = Moments.of(x_NF)
    first, second = Moments(6), Moments(6)
    for i, batch in enumerate(x_NF.split(130)):
        (first, second)[i % 2].add(batch)
    summed = Moments(6)
    summed.sums_GG = first.sums_GG + second.sums_GG  # what an all-reduce does
    assert summed.images == 1000
    torch.testing.assert_close(summed.sums_GG, whole.sums_GG, rtol=1e-13, atol=1e-12)
    assert summed.sums_GG.dtype == torch.float64


def test_moments_bear_a_mean_far_from_zero():
    x_NF = 1e4 + normal(0, 500, 3)
    torch.testing.assert_close(Moments.of(x_NF).covariance(), torch.cov(x_NF.T), rtol=1e-6, atol=1e-6)


# --- Fréchet


def test_frechet_between_gaussians_with_commuting_covariances():
    basis_FF = torch.linalg.qr(normal(1, 4, 4)).Q
    std1_F, std2_F = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 2.0, 1.5, 0.1]).double()
    mean1_F, mean2_F = normal(2, 4), normal(3, 4)
    one = with_moments(mean1_F, basis_FF @ (std1_F**2).diag() @ basis_FF.T)
    two = with_moments(mean2_F, basis_FF @ (std2_F**2).diag() @ basis_FF.T, count=70)
    found = frechet_distance(one, two)
    expected = float((mean1_F - mean2_F).square().sum() + (std1_F - std2_F).square().sum())
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", [0, 1])
def test_frechet_is_that_of_scipys_matrix_root(seed):
    covariance1_FF, covariance2_FF = covariance(seed, 6), covariance(seed + 10, 6)
    mean1_F, mean2_F = normal(seed + 20, 6), normal(seed + 30, 6)
    root_FF = scipy.linalg.sqrtm((covariance1_FF @ covariance2_FF).numpy())
    expected = float((mean1_F - mean2_F).square().sum()) + float(
        np.trace(covariance1_FF.numpy() + covariance2_FF.numpy() - 2 * root_FF.real)
    )
    one, two = with_moments(mean1_F, covariance1_FF), with_moments(mean2_F, covariance2_FF)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(two, one) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("images", "features"), [(200, 8), (5, 40)])  # also of less than full rank
def test_frechet_to_itself_is_zero_and_never_less(images, features):
    for seed in range(5):  # in some of them rounding leads below zero
        x_NF = 5 + 100 * normal(seed, images, features)
        other_order = Moments(features)
        for batch in x_NF.flip(0).split(3):
            other_order.add(batch)
        same = frechet_distance(Moments.of(x_NF), other_order)
        assert 0 <= same < 1e-12 * float(x_NF.var(0).sum())


def test_frechet_of_singular_covariances():
    """Two Gaussians on orthogonal planes: nothing of one is in the other, so all variances count whole."""
    basis_FF = torch.linalg.qr(normal(3, 6, 6)).Q
    one, two = normal(0, 100, 2) @ basis_FF[:2], 2 * normal(1, 100, 2) @ basis_FF[4:]
    difference_F = one.mean(0) - two.mean(0)
    expected = float(difference_F.square().sum() + one.var(0).sum() + two.var(0).sum())
    # To twelve digits: what rounding leaves of a zero variance must not come in with its square root.
    assert frechet_distance(Moments.of(one), Moments.of(two)) == pytest.approx(expected, rel=1e-12)


def test_frechet_bias_is_the_one_that_is_told():
    """(F + 5)/4 tr(C) (1/N + 1/M) for isotropic Gaussians of equal law."""
    features, n, m = 20, 800, 400
    values = [
        frechet_distance(Moments.of(3 * normal(i, n, features)), Moments.of(3 * normal(100 + i, m, features)))
        for i in range(40)
    ]
    expected = (features + 5) / 4 * 9 * features * (1 / n + 1 / m)
    assert np.mean(values) == pytest.approx(expected, rel=0.03)


# --- kernel


def reference_kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate, pair by pair."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_is_that_of_its_subsets_pair_by_pair():
    """20 images make ten subsets of two: every pairing is enumerable, whatever the order."""
    x_NF = torch.cat([normal(0, 1, 3)] * 10 + [normal(1, 1, 3)] * 10)
    y_NF = normal(2, 1, 3).expand(20, 3)
    rows = {(a, b): [x_NF[10 * a].numpy(), x_NF[10 * b].numpy()] for a in (0, 1) for b in (0, 1)}
    possible = {pair: reference_kernel_distance(np.stack(x), y_NF[:2].numpy()) for pair, x in rows.items()}
    found = kernel_distance(x_NF, y_NF)
    # k pairs of different kind, and as many of the one as of the other.
    mixed, pure = possible[0, 1], (possible[0, 0] + possible[1, 1]) / 2
    assert any(found.value == pytest.approx((k * mixed + (10 - k) * pure) / 10) for k in range(11))


def test_kernel_distance_of_one_dimension_is_that_of_three_raw_moments():
    """(xy + 1)^3 sees E x, E x^2 and E x^3: MMD^2 = 3 d1^2 + 3 d2^2 + d3^2."""
    mean, std = 0.3, 1.2
    x_NF, y_MF = normal(0, 20_000, 1), mean + std * normal(1, 20_000, 1)
    d1, d2, d3 = mean, mean**2 + std**2 - 1, mean**3 + 3 * mean * std**2
    expected = 3 * d1**2 + 3 * d2**2 + d3**2
    found = kernel_distance(x_NF, y_MF)
    assert found.standard_error < 0.2 * expected
    assert abs(found.value - expected) < 4 * found.standard_error


def test_kernel_distance_between_equal_laws_has_no_bias_and_an_honest_error():
    found = [kernel_distance(normal(i, 200, 8), normal(100 + i, 200, 8)) for i in range(60)]
    values = np.array([estimate.value for estimate in found])
    errors = np.array([estimate.standard_error for estimate in found])
    assert abs(values.mean()) < 3.5 * values.std() / math.sqrt(60)
    assert (values < 0).any()  # unbiased, hence at times below zero
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.25)


def test_kernel_distance_depends_on_the_seed_alone():
    x_NF, y_MF = normal(0, 100, 4), normal(1, 120, 4)
    assert kernel_distance(x_NF, y_MF, seed=3) == kernel_distance(x_NF, y_MF, seed=3)
    assert kernel_distance(x_NF, y_MF, seed=3) != kernel_distance(x_NF, y_MF, seed=4)


# --- precision, recall, density, coverage


def reference_supports(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density, coverage, ball by ball."""

    def radius(x: np.ndarray, i: int) -> float:
        return float(np.sort(np.linalg.norm(np.delete(x, i, 0) - x[i], axis=1))[k - 1])

    radii_real = [radius(real, i) for i in range(len(real))]
    radii_generated = [radius(generated, j) for j in range(len(generated))]
    inside = np.array(
        [[np.linalg.norm(x - y) <= r for x, r in zip(real, radii_real, strict=True)] for y in generated]
    )
    recalled = [
        any(np.linalg.norm(x - y) <= r for y, r in zip(generated, radii_generated, strict=True)) for x in real
    ]
    return (
        inside.any(1).mean(),
        float(np.mean(recalled)),
        inside.sum() / (k * len(generated)),
        inside.any(0).mean(),
    )


def test_supports_are_those_of_the_definition(monkeypatch):
    real_NF, generated_MF = normal(0, 60, 3), 0.4 + normal(1, 45, 3)
    expected = reference_supports(real_NF.numpy(), generated_MF.numpy(), 4)
    for pairs in (1 << 24, 500):  # whole, and in chunks of a few rows
        monkeypatch.setattr("jebm.evaluate.distances._PAIRS", pairs)
        supports = precision_recall(real_NF, generated_MF, neighbours=4)
        counts = density_coverage(real_NF, generated_MF, neighbours=4)
        assert (*supports, *counts) == pytest.approx(expected, abs=1e-12)


def test_supports_that_do_not_meet():
    far = precision_recall(uniform(0, 300, 2), uniform(1, 300, 2) + 5)
    assert (far.precision, far.recall) == (0, 0)
    assert density_coverage(uniform(0, 300, 2), uniform(1, 300, 2) + 5)[:2] == (0, 0)


def test_supports_of_the_same_images():
    x_NF = uniform(0, 300, 2).float()
    same = precision_recall(x_NF, x_NF)
    assert (same.precision, same.recall) == (1, 1)
    assert density_coverage(x_NF, x_NF).coverage == 1


def test_supports_that_overlap_by_half():
    real_NF, generated_MF = uniform(0, 1000, 2), uniform(1, 1000, 2) + torch.tensor([0.5, 0.0])
    found = precision_recall(real_NF, generated_MF)
    # Balls reach beyond the edge by about sqrt(3 / (pi 1000)) = 0.03 of the unit square.
    assert found.precision == pytest.approx(0.5, abs=0.06)
    assert found.recall == pytest.approx(0.5, abs=0.06)


def test_a_generator_of_one_mode_has_precision_but_no_recall():
    real_NF = uniform(0, 500, 2)
    one_mode_MF = 0.5 + 0.05 * uniform(1, 500, 2)
    assert precision_recall(real_NF, one_mode_MF).precision > 0.95
    assert precision_recall(real_NF, one_mode_MF).recall < 0.05
    assert density_coverage(real_NF, one_mode_MF).coverage < 0.05


def test_density_and_coverage_of_equal_laws_have_the_expectations_of_the_paper():
    n, m, k = 300, 200, 5
    found = [density_coverage(uniform(i, n, 2), uniform(100 + i, m, 2)) for i in range(30)]
    expected = 1 - math.prod((n - i) / (n + m - i) for i in range(1, k + 1))
    coverage = np.array([value.coverage for value in found])
    density = np.array([value.density for value in found])
    assert abs(coverage.mean() - expected) < 4 * coverage.std() / math.sqrt(30)
    assert abs(density.mean() - 1) < 4 * density.std() / math.sqrt(30)
    assert coverage.std() / math.sqrt(30) < 0.01


def test_single_precision_far_from_the_origin_finds_the_same_neighbours():
    real_NF, generated_MF = normal(0, 500, 8), normal(1, 500, 8)
    exact = precision_recall(real_NF, generated_MF)
    rounded = precision_recall((real_NF + 3000).float(), (generated_MF + 3000).float())
    assert rounded[:2] == pytest.approx(exact[:2], abs=0.01)


# --- all together


def test_all_distances_at_once_are_those_one_by_one():
    real_NF, generated_MF = normal(0, 300, 4), 0.5 + normal(1, 250, 4)
    found = distances(real_NF, generated_MF, seed=2)
    kid = kernel_distance(real_NF, generated_MF, seed=2)
    assert (found.n, found.n_real) == (250, 300)
    assert found.frechet == frechet_distance(Moments.of(real_NF), Moments.of(generated_MF))
    assert (found.kid, found.kid_standard_error) == kid
    assert (found.precision, found.recall) == precision_recall(real_NF, generated_MF)[:2]
    assert (found.density, found.coverage) == density_coverage(real_NF, generated_MF)[:2]


def test_the_floor_is_that_of_two_disjoint_halves_cut_by_chance():
    real_NF = normal(0, 1000, 20)
    by_size_NF = real_NF[real_NF[:, 0].argsort()]
    for rows_NF in (real_NF, by_size_NF):
        floors = [real_floor(rows_NF, seed=seed) for seed in range(5)]
        assert {(floor.n, floor.n_real) for floor in floors} == {(500, 500)}
        # The bias of two independent sets; halves that share images would have less.
        expected = (20 + 5) / 4 * 20 * (1 / 500 + 1 / 500)
        assert np.mean([floor.frechet for floor in floors]) == pytest.approx(expected, rel=0.1)
    assert real_floor(real_NF, seed=1) == real_floor(real_NF, seed=1) != real_floor(real_NF, seed=2)


def test_what_cannot_be_measured_is_said():
    x_NF = normal(0, 19, 3)
    with pytest.raises(ConfigError, match="at least 20 images, not 19"):
        kernel_distance(x_NF, x_NF)
    with pytest.raises(ConfigError, match="at least 2 images, not 1"):
        frechet_distance(Moments.of(x_NF[:1]), Moments.of(x_NF))
    with pytest.raises(ConfigError, match="3 nearest of 3 images"):
        precision_recall(x_NF[:3], x_NF)
    broken_NF = normal(0, 30, 3)
    broken_NF[7, 1] = math.nan
    for distance in (kernel_distance, precision_recall, density_coverage):
        with pytest.raises(DivergedError, match="not finite"):
            distance(normal(1, 30, 3), broken_NF)
    with pytest.raises(DivergedError, match="not finite"):
        frechet_distance(Moments.of(broken_NF), Moments.of(x_NF))
