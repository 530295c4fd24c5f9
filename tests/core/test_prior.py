"""Samples of the EBM prior against quadrature, and against the two priors known in closed form."""

import copy
import math

import pytest
import torch

from jebm.config import Energy, Langevin
from jebm.core.energy import EnergyNet
from jebm.core.langevin import langevin, score_of
from jebm.core.model import JointModel
from jebm.core.prior import log_density, sample_prior
from jebm.rng import gaussian_noise

NOISE = gaussian_noise(seed=0, rank=0)
EDGES = torch.linspace(-4, 4, 13)
"""Cells of the histograms: 12 x 12 over the square, the outer ones open."""


def identity(z):
    return z


def set_linear_f(energy: EnergyNet, a: torch.Tensor, constant: float = 0.0) -> None:
    """Make f(z) = a.z + constant exactly: leaky(t) - leaky(-t) = 1.2 t with slope 0.2. Needs depth 1."""
    first, last = energy.linears
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.zero_()
        first.weight[0], first.weight[1] = a, -a
        last.weight[0, :2] = torch.tensor([1.0, -1.0]) / (1.2 * energy.output_scale)
        last.bias.fill_(constant / energy.output_scale)


def linear_model(tiny_model, a, constant=0.0) -> JointModel:
    model = tiny_model((2, 1), spectral_norm=False, depth=1, output_scale=2.0)
    set_linear_f(model.energy, a, constant)
    return model


def test_a_linear_energy_net_shifts_the_prior_and_has_the_known_log_z(tiny_model):
    a = torch.tensor([0.5, -0.8, 0.3])
    model = linear_model(tiny_model, a)
    z, _ = sample_prior(model, Langevin(60, 0.4), 100_000, NOISE(0, "chain"))
    variance = 1 / (1 - 0.4**2 / 4)
    torch.testing.assert_close(z.mean(0), a, rtol=0, atol=5 * math.sqrt(variance / 100_000))
    torch.testing.assert_close(z.var(0), torch.full((3,), variance), rtol=5 * math.sqrt(2e-5), atol=0)
    with torch.no_grad():
        f = model.energy(NOISE(0, "importance")(400_000, 3)).double()
    exact = a.square().sum().item() / 2
    error = math.sqrt((math.exp(2 * exact) - 1) / 400_000)  # of the mean of exp f, relative
    assert f.exp().mean().log().item() == pytest.approx(exact, abs=5 * error)


def test_the_prior_goes_where_f_is_high(tiny_model):
    """p is proportional to exp(+f): the sign that other codes turn."""
    model = tiny_model((1, 1), output_scale=8.0, seed=1)
    z, _ = sample_prior(model, Langevin(60, 0.3), 2000, NOISE(0, "chain"))
    with torch.no_grad():
        above = model.energy(z) - model.energy(NOISE(0, "p0")(2000, 2)).mean()
    assert above.mean() > 10 * above.std() / math.sqrt(2000)


def test_a_constant_added_to_f_leaves_the_samples_bit_for_bit(tiny_model):
    a = torch.tensor([0.5, -0.8, 0.3])
    one, other = (
        sample_prior(linear_model(tiny_model, a, c), Langevin(20, 0.4), 50, NOISE(0, "chain"))[0]
        for c in (0.0, 1000.0)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("spectral_norm", [True, False])
def test_log_density_is_f_of_the_latents_and_the_noise_own_normal(tiny_model, spectral_norm):
    model = tiny_model((2, 1), output_scale=4.0, spectral_norm=spectral_norm)
    noise = 2 * NOISE(0, "noise")(40, 3)
    for latents in (identity, lambda e: 2 * e + 1):
        expected = model.energy(latents(noise)).detach() - 0.5 * (noise**2).sum(1)
        torch.testing.assert_close(log_density(model.energy, latents)(noise), expected)


def test_chains_in_noise_space_sample_the_density_of_the_latents():
    """z = T(e) = 1 + 2e: p(z) ~ exp(a.z) N(z; 1, 4 I) is N(1 + 4a, 4 I), by the Gaussian integral."""
    torch.manual_seed(0)
    energy = EnergyNet(2, Energy(width=4, depth=1, spectral_norm=False))
    a, step_size, count = torch.tensor([0.3, -0.4]), 0.3, 50_000
    set_linear_f(energy, a)

    def latents(e):
        return 1 + 2 * e

    score = score_of(log_density(energy, latents))
    e, _ = langevin(score, NOISE(0, "start")(count, 2), NOISE(0, "chain"), steps=100, step_size=step_size)
    z, variance = latents(e), 4 / (1 - step_size**2 / 4)
    torch.testing.assert_close(z.mean(0), 1 + 4 * a, rtol=0, atol=5 * math.sqrt(variance / count))
    torch.testing.assert_close(z.var(0), torch.full((2,), variance), rtol=5 * math.sqrt(2 / count), atol=0)


class Quadrature:
    """Moments and cell masses of p(z) ~ exp f(z) N(z; 0, I) on the plane, f in double precision."""

    def __init__(self, energy: EnergyNet) -> None:
        axis = torch.linspace(-9, 9, 541, dtype=torch.float64)
        self.points = torch.cartesian_prod(axis, axis)
        with torch.no_grad():
            f = copy.deepcopy(energy).double()(self.points)
        self.mass = torch.softmax(f - 0.5 * self.points.square().sum(1), 0)
        self.mean = self.mass @ self.points
        centred = self.points - self.mean
        self.covariance = (self.mass[:, None] * centred).T @ centred

    def distance(self, z: torch.Tensor) -> float:
        """Total variation between the cell frequencies of samples and the cell masses of p."""
        return 0.5 * (cells(z, torch.ones(len(z))) - cells(self.points, self.mass)).abs().sum().item()


def cells(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    inner = EDGES[1:-1].to(z.dtype)
    index = torch.bucketize(z[:, 0].contiguous(), inner) * 12 + torch.bucketize(z[:, 1].contiguous(), inner)
    mass = torch.zeros(144, dtype=torch.float64).index_add_(0, index, weight.double())
    return mass / mass.sum()


def sharpen(energy: EnergyNet) -> None:
    """Train f by maximum likelihood on samples of two Gaussians, so that p is far from N(0, I)."""
    optimizer = torch.optim.Adam(energy.parameters(), lr=3e-3)
    grid = torch.cartesian_prod(*[torch.linspace(-5, 5, 61)] * 2)
    for step in range(150):
        normal = NOISE(step, "target")
        target = 0.4 * normal(256, 2) + torch.tensor([[0.9, 1.0], [-0.9, 0.5]]).repeat(128, 1)
        log_z = (energy(grid) - 0.5 * grid.square().sum(1)).logsumexp(0)
        optimizer.zero_grad()
        (log_z - energy(target).mean()).backward()
        optimizer.step()
        energy.settle()


@pytest.fixture(params=["drawn", "trained"])
def planar_model(request, tiny_model):
    if request.param == "drawn":  # as it is at the start of a run, with slope up to 12
        return tiny_model((1, 1), width=32, output_scale=12.0, seed=8)
    model = tiny_model((1, 1), width=32, output_scale=6.0)
    sharpen(model.energy)
    return model


def test_long_chains_with_small_steps_match_quadrature(planar_model):
    count, step_size = 8000, 0.1
    p = Quadrature(planar_model.energy)
    z, _ = sample_prior(planar_model, Langevin(1000, step_size), count, NOISE(0, "chain"))

    def mean_error(z):
        return ((z.double().mean(0) - p.mean).abs() / p.covariance.diagonal().sqrt()).max().item()

    def covariance_error(z):
        return (torch.cov(z.double().T) - p.covariance).abs().max().item()

    plain = NOISE(0, "p0")(count, 2)
    # Allowed: the chains' Monte Carlo error (1 / sqrt(8000) = 0.011) and s^2 / 4 = 0.25 % per unit of
    # curvature of log p. The same statistics of N(0, I) lie far outside.
    for statistic, allowed in [(mean_error, 0.05), (covariance_error, 0.07), (p.distance, 0.06)]:
        assert statistic(z) < allowed, statistic.__name__
        assert statistic(plain) > 2 * allowed, statistic.__name__


def test_short_chains_stop_short(planar_model):
    """The statistic sees mixing: 5 such steps from N(0, I) have not reached p."""
    p = Quadrature(planar_model.energy)
    z, _ = sample_prior(planar_model, Langevin(5, 0.1), 8000, NOISE(0, "chain"))
    assert p.distance(z) > 0.12


def test_the_gaussian_prior_is_the_noise_itself(tiny_model):
    model = tiny_model((2, 1), width=0)
    z, info = sample_prior(model, Langevin(40, 0.4), 20, NOISE(3, "chain"))
    assert torch.equal(z, NOISE(3, "chain")(20, 3))
    assert info is None


def test_sampling_leaves_no_trace_in_the_model(tiny_model):
    model = tiny_model((2, 1))
    before = copy.deepcopy(model.state_dict())
    z, _ = sample_prior(model, Langevin(5, 0.4), 1, NOISE(0, "chain"))
    assert z.shape == (1, 3)
    assert not z.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():  # later updates of the weights do not reach into samples already drawn
        drawn = z.clone()
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(z, drawn)


def test_the_start_of_the_chain_and_its_steps_are_independent(tiny_model):
    """With f = 0 and one step, z = (1 - s^2/2) e + s n: its variance shows a start used twice."""
    model = linear_model(tiny_model, torch.zeros(3))
    z, _ = sample_prior(model, Langevin(1, 1.0), 100_000, NOISE(0, "chain"))
    assert z.var().item() == pytest.approx(0.5**2 + 1, rel=5 * math.sqrt(2 / 300_000))


def test_an_energy_of_the_top_layer_leaves_the_others_as_they_are(tiny_model):
    model = tiny_model((2, 3), kind="top", output_scale=8.0, seed=1)
    below = (sum(model.latent_dims[:-1]), model.latent_dims[-1])
    assert below == (2, 3)
    normal = NOISE(0, "top")
    start = NOISE(0, "top")(20_000, 5)
    z, info = sample_prior(model, Langevin(60, 0.3), 20_000, normal)
    assert info is not None
    assert torch.equal(z[:, :2], start[:, :2])  # exact, as drawn
    with torch.no_grad():
        f = model.f(z)
        assert torch.equal(model.f(torch.cat([torch.randn(20_000, 2), z[:, 2:]], 1)), f)
        torch.testing.assert_close(model.energy.frozen().f(z[:, 2:]), f)
        assert f.mean() > model.f(start).mean() + 0.05
    # Chains over all columns, by the definition, have the same law on top.
    score = score_of(log_density(model.energy, model.seen))
    reference, _ = langevin(score, start, NOISE(1, "reference"), steps=60, step_size=0.3)
    for one, other in (
        (z[:, 2:].mean(0), reference[:, 2:].mean(0)),
        (z[:, 2:].var(0), reference[:, 2:].var(0)),
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0.06)
