"""The energy net: spectral norm, resolved weights, slope."""

import copy

import numpy as np
import pytest
import torch

from jebm.config import Energy
from jebm.core.energy import EnergyNet, SpectralLinear
from jebm.rng import gaussian_noise

NOISE = gaussian_noise(seed=0, rank=0)


def energy_net(latent_dim: int = 16, seed: int = 0, **section) -> EnergyNet:
    torch.manual_seed(seed)
    return EnergyNet(latent_dim, Energy(**{"width": 50, "depth": 4, **section}))


def top_singular_values(energy: EnergyNet) -> torch.Tensor:
    weights = [weight for weight, _ in energy.frozen().layers]
    weights[-1] = weights[-1] / energy.output_scale
    return torch.stack([torch.linalg.svdvals(weight)[0] for weight in weights])


@pytest.mark.parametrize("section", [{}, {"width": 100, "depth": 2}, {"output_scale": 4.0}])
def test_weights_have_norm_one_at_construction(section):
    """100 power iterations: what is left depends on the gap of the two largest singular values."""
    ours = top_singular_values(energy_net(**section))
    torch.testing.assert_close(ours, torch.ones_like(ours), rtol=0, atol=5e-3)
    plain = top_singular_values(energy_net(spectral_norm=False, **section))
    assert (plain - 1).abs().max() > 0.1  # and not by luck


def train(energy: EnergyNet, lr: float, updates: int = 200) -> list[float]:
    """Pull f apart on two clouds, the same way each time; return the worst norm's error after each update."""
    optimizer = torch.optim.Adam(energy.parameters(), lr=lr, betas=(0.0, 0.9))
    errors = []
    for step in range(updates):
        normal = NOISE(step, "data")
        loss = energy(normal(64, 16)).mean() - energy(0.5 * normal(64, 16) + 1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        energy.settle()
        errors.append((top_singular_values(energy) - 1).abs().max().item())
    return errors


@pytest.mark.parametrize(("lr", "allowed"), [(2e-6, 1e-3), (3e-5, 0.06), (3e-4, 0.3)])
def test_norms_stay_near_one_through_training(lr, allowed):
    """2e-6 is the paper's rate. The norm lags behind faster weights: at 3e-4 it is up to 1.21 for a while."""
    assert max(train(energy_net(), lr)) < allowed


def test_the_settle_after_each_update_is_what_keeps_the_norm():
    energy = energy_net()
    left_behind = {key: value.clone() for key, value in energy.named_buffers()}
    assert train(energy, 1e-3)[-1] < 0.01
    energy.load_state_dict({**energy.state_dict(), **left_behind})
    assert (top_singular_values(energy) - 1).abs().max() > 0.3


def reference(energy: EnergyNet, z: torch.Tensor) -> np.ndarray:
    """f in double precision, the norm by singular values instead of power iteration."""
    h = z.numpy().astype(np.float64)
    last = len(energy.linears) - 1
    for i, linear in enumerate(energy.linears):
        weight = linear.weight.detach().numpy().astype(np.float64)
        if isinstance(linear, SpectralLinear):
            weight = weight / np.linalg.svd(weight, compute_uv=False)[0]
        h = h @ weight.T + linear.bias.detach().numpy()
        if i < last:
            h = np.where(h > 0, h, 0.2 * h)
    return energy.output_scale * h[:, 0]


@pytest.mark.parametrize("spectral_norm", [True, False])
def test_f_is_the_scaled_perceptron_of_the_resolved_weights(spectral_norm):
    energy = energy_net(spectral_norm=spectral_norm, output_scale=4.0)
    for linear in energy.linears:  # fully converged, so that singular values can be the reference
        if isinstance(linear, SpectralLinear):
            linear.iterate(3000)
    z = 2 * NOISE(0, "z")(32, 16)
    f = energy(z)
    assert f.shape == (32,)
    np.testing.assert_allclose(f.detach().numpy(), reference(energy, z), rtol=0, atol=2e-5)
    h = z
    layers = energy.frozen().layers
    for weight, bias in layers[:-1]:
        h = torch.nn.functional.leaky_relu(h @ weight.T + bias, 0.2)
    torch.testing.assert_close((h @ layers[-1][0].T + layers[-1][1]).squeeze(1), f.detach())
    assert not any(t.requires_grad for layer in layers for t in layer)


def test_forward_and_backward_leave_the_singular_vectors_alone():
    energy = energy_net()
    before = copy.deepcopy(energy.state_dict())
    z = NOISE(0, "z")(8, 16)
    assert torch.equal(energy.train()(z), energy.eval()(z))
    energy(z).sum().backward()
    energy.frozen()
    assert all(torch.equal(value, before[key]) for key, value in energy.state_dict().items())


def test_settle_moves_only_the_singular_vectors():
    energy = energy_net()
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    before = copy.deepcopy(energy.state_dict())
    energy.settle()
    after = energy.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {f"linears.{i}.{name}" for i in range(4) for name in "uv"} | {"linears.4.v"}
    torch.testing.assert_close(after["linears.4.u"].abs(), torch.ones(1))  # one row: u is a sign


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_slope_of_f_is_bounded_by_the_output_scale(scale):
    energy = energy_net(output_scale=scale)
    normal = NOISE(0, "pairs")
    near, far = 3 * normal(5000, 16), 3 * normal(5000, 16)
    slopes = (energy(near) - energy(far)).abs() / (near - far).norm(dim=1)
    assert slopes.max() <= scale * 1.01
    with torch.no_grad():  # the bound is met where every layer stretches along one direction
        for layer in energy.linears:
            layer.weight.copy_(7 * torch.eye(*layer.weight.shape))
            layer.bias.zero_()
            layer.iterate(100)
    along = torch.zeros(1, 16)
    along[0, 0] = 3.0
    assert energy(along).item() == pytest.approx(3 * scale, rel=1e-4)


def test_the_gradient_flows_through_the_norm():
    """sigma is part of f: a weight and its multiple give the same f, so the gradient has no radial part."""
    energy = energy_net()
    energy(NOISE(0, "z")(8, 16)).sum().backward()
    for linear in energy.linears:
        radial = (linear.weight.grad * linear.weight).sum()
        assert abs(radial.item()) < 1e-4 * linear.weight.grad.norm() * linear.weight.norm()


def test_initial_weights_are_those_of_a_plain_net():
    """Spectral norm changes f, not the draw of the weights of the first layer."""
    plain, normed = energy_net(spectral_norm=False), energy_net()
    assert torch.equal(plain.linears[0].weight, normed.linears[0].weight)
