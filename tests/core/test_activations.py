"""Activations of the energy net: slopes by finite differences, chains against autograd, C against float64."""

import math

import pytest
import torch

from jebm.config import Energy, Langevin
from jebm.core.activations import ACTIVATIONS
from jebm.core.chain import closed_form_langevin
from jebm.core.energy import EnergyNet, ResolvedEnergy
from jebm.core.kernels import TORCH
from jebm.core.langevin import langevin, score_of
from jebm.core.parts import by_autograd
from jebm.core.philox import PhiloxNoise
from jebm.core.prior import PriorSampler
from jebm.native import chain as native
from jebm.native import triton_chain
from jebm.rng import gaussian_noise

NOISE = gaussian_noise(seed=0, rank=0)
EACH = pytest.mark.parametrize("activation", ACTIVATIONS)
SMOOTH = pytest.mark.parametrize("activation", ["silu", "softplus"])
needs_c = pytest.mark.skipif(not native.usable(torch.zeros(1)), reason="no C kernel")
FUNCTIONS = {
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.2 * x),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "softplus": lambda x: torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0),
}


def energy_net(activation: str, latent_dim: int = 6, **section) -> EnergyNet:
    torch.manual_seed(3)
    return EnergyNet(
        latent_dim, Energy(**{"width": 20, "depth": 3, "output_scale": 4.0, **section}, activation=activation)
    )


def in_double(energy: ResolvedEnergy) -> ResolvedEnergy:
    layers = tuple((weight.double(), bias.double()) for weight, bias in energy.layers)
    return ResolvedEnergy(layers, energy.activation)


@EACH
def test_f_is_the_perceptron_with_this_activation(activation):
    net, z = energy_net(activation), 2 * NOISE(0, "z")(50, 6)
    frozen = net.frozen()
    h = z.double()
    for weight, bias in in_double(frozen).layers[:-1]:
        h = FUNCTIONS[activation](h @ weight.T + bias)
    weight, bias = in_double(frozen).layers[-1]
    expected = (h @ weight.T + bias).squeeze(1)
    for f in (net(z), frozen.f(z), frozen.value_and_gradient(z)[0], 2 * frozen.scaled(0.5).f(z)):
        torch.testing.assert_close(f.double(), expected, rtol=0, atol=2e-6)


@EACH
def test_the_gradient_is_that_of_finite_differences(activation):
    energy, z = in_double(energy_net(activation).frozen()), 2 * NOISE(0, "z")(20, 6).double()
    step = 1e-6
    for d, direction in enumerate(torch.eye(6, dtype=torch.float64)):
        difference = (energy.f(z + step * direction) - energy.f(z - step * direction)) / (2 * step)
        torch.testing.assert_close(energy.gradient(z)[:, d], difference, rtol=0, atol=1e-8)
    torch.testing.assert_close(energy.value_and_gradient(z), by_autograd(energy.f, z), rtol=0, atol=1e-14)


@EACH
@pytest.mark.parametrize("kernel", [TORCH, pytest.param(None, marks=needs_c)], ids=["torch", "C"])
@pytest.mark.parametrize(("depth", "width", "dims"), [(4, 50, 16), (2, 100, 14), (1, 7, 3)])
def test_chains_equal_autograd_with_the_same_noise(activation, kernel, depth, width, dims):
    energy = energy_net(activation, dims, width=width, depth=depth).frozen()
    start, how = NOISE(0, "start")(70, dims), {"steps": 60, "step_size": 0.4}
    score = score_of(lambda z: energy.f(z) - 0.5 * z.square().sum(1))
    expected, info = langevin(score, start, NOISE(0, "chain"), **how)
    z, ours = closed_form_langevin(energy, start, NOISE(0, "chain"), kernel=kernel, **how)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.gradient_norm, info.gradient_norm, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.displacement, info.displacement, rtol=1e-5, atol=1e-5)
    other = ResolvedEnergy(energy.layers, "silu" if activation != "silu" else "leaky_relu")
    different, _ = closed_form_langevin(other, start, NOISE(0, "chain"), kernel=kernel, **how)
    assert (different - z).abs().max() > 1e-3  # the activation takes part


@SMOOTH
def test_in_double_precision_too(activation):
    energy, start = in_double(energy_net(activation).frozen()), NOISE(0, "start")(10, 6).double()
    score = score_of(lambda z: energy.f(z) - 0.5 * z.square().sum(1))

    def normal(*shape):
        return torch.linspace(-2, 2, math.prod(shape), dtype=torch.float64).view(shape)

    z, _ = closed_form_langevin(energy, start, normal, steps=20, step_size=0.4)
    expected, _ = langevin(score, start, normal, steps=20, step_size=0.4)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-13)


@needs_c
@SMOOTH
def test_the_c_kernel_is_accurate_everywhere(activation):
    """grad f of f = a(x) and f = a(a(x)), x from -120 to 120 and near 0, to 5e-7 of float64."""
    x = torch.cat(
        [torch.linspace(-120, 120, 40_001), torch.linspace(-2, 2, 20_001), torch.logspace(-30, 0, 99)]
    )
    z, first = x[:, None] / 1024, torch.full((1, 1), 1024.0)  # exactly x in the first layer
    for depth in (1, 2):
        weights = [first, *[torch.ones(1, 1)] * (depth - 1), 1 / first]
        energy = ResolvedEnergy(tuple((weight, torch.zeros(1)) for weight in weights), activation)
        gradient = native.run(energy, z.clone(), (0, 0), steps=1, step_size=0.1) + z
        torch.testing.assert_close(
            gradient.double(), in_double(energy).gradient(z.double()), rtol=0, atol=5e-7
        )


@needs_c
@SMOOTH
def test_what_is_not_finite_stays_visible(activation):
    energy, start = energy_net(activation).frozen(), NOISE(0, "start")(40, 6)
    start[3, 2] = math.nan
    z, _ = closed_form_langevin(energy, start, NOISE(0, "c"), steps=2, step_size=0.4)
    assert torch.equal(z.isnan().any(1), start.isnan().any(1))


@needs_c
@SMOOTH
def test_a_compiled_chain_depends_neither_on_threads_nor_on_the_chains_beside_it(activation):
    energy, start = energy_net(activation, 15, width=50, depth=4).frozen(), NOISE(0, "start")(70, 15)

    def chain(count: int) -> torch.Tensor:
        normal = PhiloxNoise(NOISE(0, "chain"))
        return closed_form_langevin(energy, start[:count], normal, steps=7, step_size=0.4)[0]

    whole = chain(70)
    assert all(torch.equal(chain(count), whole[:count]) for count in (1, 17, 33, 64))
    torch.set_num_threads(3)
    assert torch.equal(chain(70), whole)
    torch.set_num_threads(1)


@SMOOTH
def test_a_smooth_activation_runs_in_c_and_on_a_gpu_in_torch(activation, tiny_model, monkeypatch):
    model = tiny_model((2, 2), activation=activation)
    assert PriorSampler(model, Langevin()).kernel == native.describe()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton's kernel takes positions on any device
    hindrance = triton_chain.hindrance(model.energy.frozen(), torch.zeros(1, 4), philox=False)
    assert hindrance == f"it has no {activation}"
