"""Langevin dynamics on densities whose behaviour is known in closed form.

With score(z) = -c z the chain is the linear recursion z <- (1 - c s^2/2) z + s noise, so that everything
about it is exact: no tolerance below allows for discretisation, only for the number of chains.
"""

import math

import numpy as np
import pytest
import torch

from jebm.core.langevin import langevin, score_of
from jebm.rng import gaussian_noise

CHAINS = 200_000
NOISE = gaussian_noise(seed=0, rank=0)


def zeros(*shape):
    return torch.zeros(shape)


def standard_score(z):
    return -z


def five_errors_of_a_variance(variance: float, count: int) -> float:
    return 5 * variance * math.sqrt(2 / count)


@pytest.mark.parametrize(("step_size", "variance"), [(0.4, 1.0417), (0.8, 1.1905)])
def test_stationary_variance_on_the_standard_normal(step_size, variance):
    assert variance == pytest.approx(1 / (1 - step_size**2 / 4), abs=5e-5)
    start = NOISE(0, "start")(CHAINS, 2)
    z, _ = langevin(standard_score, start, NOISE(0, "chain"), steps=60, step_size=step_size)
    allowed = five_errors_of_a_variance(variance, 2 * CHAINS)
    assert z.var().item() == pytest.approx(variance, abs=allowed)
    assert allowed < 0.4 * (variance - 1)  # N(0, 1) itself would fail
    assert abs(z.mean().item()) < 5 * math.sqrt(variance / (2 * CHAINS))


@pytest.mark.parametrize(("step_size", "memory"), [(0.1, 0.740), (0.3, 0.063), (0.4, 0.0067)])
def test_memory_of_the_start_after_60_steps(step_size, memory):
    exact = (1 - step_size**2 / 2) ** 60
    assert memory == pytest.approx(exact, rel=0.01)
    start = NOISE(1, "start")(CHAINS, 1)
    z, _ = langevin(standard_score, start, NOISE(1, "chain"), steps=60, step_size=step_size)
    measured = (start * z).mean() / start.square().mean()
    assert measured.item() == pytest.approx(exact, abs=5 * 1.02 / math.sqrt(CHAINS))
    silent, _ = langevin(standard_score, start, zeros, steps=60, step_size=step_size)
    torch.testing.assert_close(silent, exact * start, rtol=1e-4, atol=1e-6)


def test_a_linear_f_shifts_the_standard_normal():
    a, step_size = torch.tensor([0.5, -1.5, 0.0]), 0.4

    def log_density(z):
        return z @ a - 0.5 * z.square().sum(1)

    z, _ = langevin(
        score_of(log_density), NOISE(2, "start")(CHAINS, 3), NOISE(2, "chain"), steps=80, step_size=step_size
    )
    variance = 1 / (1 - step_size**2 / 4)
    torch.testing.assert_close(z.mean(0), a, rtol=0, atol=5 * math.sqrt(variance / CHAINS))
    allowed = five_errors_of_a_variance(variance, CHAINS)
    torch.testing.assert_close(torch.cov(z.T), variance * torch.eye(3), rtol=0, atol=allowed)


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_a_quadratic_f_narrows_the_standard_normal(strength):
    step_size = 0.3

    def log_density(z):
        return -0.5 * strength * z.square().sum(1) - 0.5 * z.square().sum(1)

    z, _ = langevin(
        score_of(log_density), NOISE(3, "start")(CHAINS, 1), NOISE(3, "chain"), steps=120, step_size=step_size
    )
    variance = 1 / ((1 + strength) * (1 - step_size**2 * (1 + strength) / 4))
    assert z.var().item() == pytest.approx(variance, abs=five_errors_of_a_variance(variance, CHAINS))


def test_reaches_the_gaussian_it_was_given():
    mean, std, step_size = torch.tensor([3.0, -2.0]), torch.tensor([0.5, 1.5]), 0.3
    z, _ = langevin(
        score_of(torch.distributions.Independent(torch.distributions.Normal(mean, std), 1).log_prob),
        NOISE(4, "start")(10_000, 2),
        NOISE(4, "chain"),
        steps=500,
        step_size=step_size,
    )
    exact_std = std / (1 - step_size**2 / (4 * std**2)).sqrt()
    assert ((z.mean(0) - mean).abs() < 5 * exact_std / math.sqrt(10_000)).all()
    torch.testing.assert_close(z.std(0), exact_std, rtol=5 / math.sqrt(20_000), atol=0)


def wavy(z):
    return (torch.sin(2 * z).sum(1)) - 0.25 * z.square().sum(1).square()


def test_a_constant_added_to_f_changes_nothing():
    start = NOISE(5, "start")(64, 3)
    chains = [
        langevin(score_of(f), start, NOISE(5, "chain"), steps=30, step_size=0.3)[0]
        for f in (wavy, lambda z: wavy(z) + 1e4)
    ]
    assert torch.equal(*chains)


def test_equals_an_independent_loop_in_double_precision():
    start, recorded = NOISE(6, "start")(16, 3), NOISE(6, "chain")(25, 16, 3)

    def reference(noise):
        z = start.numpy().astype(np.float64)
        for k in range(25):
            radius = (z**2).sum(1, keepdims=True)
            gradient = 2 * np.cos(2 * z) - radius * z
            z = z + 0.3**2 / 2 * gradient + 0.3 * noise[k].numpy().astype(np.float64)
        return torch.from_numpy(z)

    for noise in (torch.zeros_like(recorded), recorded):
        draws = iter(noise)
        z, _ = langevin(score_of(wavy), start, lambda *_: next(draws), steps=25, step_size=0.3)  # noqa: B023
        assert next(draws, None) is None  # one draw a step
        torch.testing.assert_close(z.double(), reference(noise), rtol=1e-4, atol=1e-4)


def test_leaves_the_start_and_the_graph_alone():
    start = NOISE(7, "start")(4, 2)
    before = start.clone()
    weight = torch.ones(2, requires_grad=True)
    z, info = langevin(
        score_of(lambda z: (z * weight).sum(1)), start, NOISE(7, "chain"), steps=3, step_size=0.3
    )
    assert torch.equal(start, before)
    assert not torch.equal(z, before)
    assert not z.requires_grad
    assert not info.gradient_norm.requires_grad
    assert weight.grad is None


def test_the_chain_is_a_function_of_seed_rank_position_and_purpose():
    start = NOISE(8, "start")(4, 2)

    def chain(seed, rank, position, purpose):
        normal = gaussian_noise(seed, rank)(position, purpose)
        return langevin(standard_score, start, normal, steps=3, step_size=0.3)[0]

    here = chain(0, 0, 0, "chain")
    assert torch.equal(here, chain(0, 0, 0, "chain"))
    for other in [(1, 0, 0, "chain"), (0, 1, 0, "chain"), (0, 0, 1, "chain"), (0, 0, 0, "chain 2")]:
        assert not torch.equal(here, chain(*other))


def test_score_of_is_the_gradient_even_where_gradients_are_off():
    z = NOISE(9, "z")(5, 3)
    with torch.no_grad():
        score = score_of(wavy)(z)
    radius = z.square().sum(1, keepdim=True)
    torch.testing.assert_close(score, 2 * torch.cos(2 * z) - radius * z)
    assert not z.requires_grad


def test_info_is_the_gradient_norm_and_the_way_gone():
    pull = torch.tensor([3.0, 4.0])
    start = NOISE(10, "start")(6, 2)
    _, info = langevin(pull.expand_as, start, zeros, steps=4, step_size=0.5)
    assert info.gradient_norm.item() == pytest.approx(5)
    assert info.displacement.item() == pytest.approx(4 * 0.5**2 / 2 * 5)
