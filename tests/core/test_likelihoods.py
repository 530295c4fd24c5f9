"""Likelihoods against quadrature, closed forms and finite differences."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from jebm.config import Likelihood as Section
from jebm.core.likelihood import Bernoulli, DiscretisedLogistic, Gaussian, build_likelihood
from jebm.rng import gaussian_noise

NOISE = gaussian_noise(seed=0, rank=0)
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
KINDS = [
    Section("gaussian", 0.3),
    Section("gaussian", 0.3, "shared"),
    Section("gaussian", 0.3, "per_channel"),
    Section("discretised_logistic", components=3),
    Section("bernoulli"),
]
NAMES = ["fixed", "shared", "per_channel", "logistic", "bernoulli"]


def images(count: int, channels: int, side: int = 4) -> Tensor:
    """Images whose pixels are levels, the two ends among them."""
    draws = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))
    levels = (256 * draws).long()
    levels.view(-1)[0], levels.view(-1)[-1] = 0, 255
    return LEVELS[levels]


def parameters(likelihood, count: int, side: int = 4, scale: float = 1.0) -> Tensor:
    return scale * NOISE(0, "parameters")(count, likelihood.outputs, side, side).double()


@pytest.mark.parametrize("learn_std", ["no", "shared", "per_channel"])
def test_the_gaussian_is_torchs_with_the_mean_tanh(learn_std):
    likelihood = Gaussian(Section("gaussian", 0.3, learn_std), 3).double()
    std = torch.tensor(0.3, dtype=torch.float64)
    if learn_std == "per_channel":
        std = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
        likelihood.log_std.data = std.log()
    x, theta = images(5, 3), parameters(likelihood, 5)
    expected = -Normal(torch.tanh(theta), std.expand(3).view(3, 1, 1)).log_prob(x).sum((1, 2, 3))
    found = likelihood.distortion(x, theta) + likelihood.constant(x[0].numel())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(likelihood.mean(theta), torch.tanh(theta))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_discretised_logistics_sum_to_one_over_the_levels(channels, scale):
    """For one pixel: over 256 levels of grey, and over 256 blues given red and green."""
    likelihood = DiscretisedLogistic(4, channels)
    theta = parameters(likelihood, 1, side=1, scale=scale).expand(256, -1, 1, 1)
    x = images(1, channels, side=1).expand(256, -1, 1, 1).clone()
    x[:, -1, 0, 0] = LEVELS
    log_mass = -likelihood.distortion(x, theta)
    if channels == 1:
        total = log_mass.exp().sum()
    else:  # P(b | r, g) = P(r, g, b) / P(r, g): integrate the blue out
        total = (log_mass - torch.logsumexp(log_mass, 0)).exp().sum()
        total = total * _mass_of_first_two(likelihood, x, theta)
    assert total.item() == pytest.approx(1, abs=1e-9)


def _mass_of_first_two(likelihood, x, theta) -> float:
    """Sum over blue of P(r, g, b), divided by P(r, g) of the mixture without its blue logistics."""
    logits, means, log_scales, shifts = likelihood._split(theta[:1])
    first = likelihood._log_mass(
        x[:1].unsqueeze(2), likelihood._shifted(means, shifts, list(x[:1].unbind(1))), log_scales
    )[:, :2].sum(1)
    pair = torch.logsumexp(first + torch.log_softmax(logits, 1), 1)
    return (torch.logsumexp(-likelihood.distortion(x, theta), 0) - pair.squeeze()).exp().item()


def test_a_level_has_the_mass_of_the_logistic_between_its_edges():
    """One component, against the logistic's distribution function; the ends take the tails."""
    likelihood = DiscretisedLogistic(1, 1)
    mean, log_scale = 0.2, math.log(0.05)
    theta = torch.tensor([0.0, mean, log_scale], dtype=torch.float64).view(1, 3, 1, 1).expand(256, -1, 1, 1)
    edges = torch.cat([torch.tensor([-math.inf]), (LEVELS[:-1] + LEVELS[1:]) / 2, torch.tensor([math.inf])])
    mass = torch.sigmoid((edges[1:] - mean) / 0.05) - torch.sigmoid((edges[:-1] - mean) / 0.05)
    found = (-likelihood.distortion(LEVELS.view(256, 1, 1, 1), theta)).exp()
    torch.testing.assert_close(found, mass, rtol=1e-8, atol=1e-14)
    # Its mean, before the cut at the ends, is that of the logistic.
    assert likelihood.mean(theta)[0].item() == pytest.approx(mean)
    assert (mass @ LEVELS).item() == pytest.approx(mean, abs=1e-3)


def test_the_colour_mean_is_that_of_the_conditional_logistics():
    """Ancestral means, component by component: green shifts with red, blue with both."""
    likelihood = DiscretisedLogistic(2, 3)
    theta = 0.3 * parameters(likelihood, 1, side=1)
    logits, means, _, shifts = (each[..., 0, 0] for each in likelihood._split(theta))
    red, c = means[0, 0], shifts[0]
    green = means[0, 1] + c[0] * red
    blue = means[0, 2] + c[1] * red + c[2] * green
    expected = torch.stack([red, green, blue]) @ logits[0].softmax(0)
    torch.testing.assert_close(likelihood.mean(theta).flatten(), expected)


def test_bernoulli_is_torchs_for_the_bits_above_the_middle_grey():
    likelihood = Bernoulli(1)
    x, theta = images(4, 1), parameters(likelihood := Bernoulli(1), 4)
    law = torch.distributions.Bernoulli(logits=theta)
    torch.testing.assert_close(
        likelihood.distortion(x, theta), -law.log_prob((x > 0).double()).sum((1, 2, 3))
    )
    torch.testing.assert_close(likelihood.mean(theta), 2 * law.mean - 1)


@pytest.mark.parametrize("section", KINDS, ids=NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_are_finite_differences(section, channels):
    likelihood = build_likelihood(section, channels).double()
    x = images(2, channels, side=2)
    theta = (0.5 * parameters(likelihood, 2, side=2)).requires_grad_()
    own = list(likelihood.parameters())

    def total(theta: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(dict(likelihood.named_parameters()), values, strict=True))
        return torch.func.functional_call(
            _Distortion(likelihood), {f"of.{k}": v for k, v in named.items()}, (x, theta)
        )

    assert torch.autograd.gradcheck(total, (theta, *own), atol=1e-6)


class _Distortion(torch.nn.Module):
    def __init__(self, of) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        return self.of.distortion(x, theta).sum()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_learned_sigma_ends_at_the_root_mean_square_error(channels):
    """The optimum of -log p in sigma is the RMSE: of all pixels, and of each channel."""
    x, theta = images(50, channels, side=8), torch.zeros(50, channels, 8, 8, dtype=torch.float64)
    x = x * torch.linspace(0.3, 1, channels, dtype=torch.float64).view(-1, 1, 1)
    for learn_std, error in [("shared", x.square().mean()), ("per_channel", x.square().mean((0, 2, 3)))]:
        likelihood = Gaussian(Section("gaussian", 0.9, learn_std), channels).double()
        adam = torch.optim.Adam(likelihood.parameters(), 1e-2, betas=(0.9, 0.99))
        for _ in range(400):
            adam.zero_grad()
            likelihood.distortion(x, theta).mean().backward()
            adam.step()
        torch.testing.assert_close(likelihood.std.squeeze(), error.sqrt().squeeze(), rtol=0.005, atol=0)


def test_a_sigma_below_its_floor_comes_back():
    likelihood = Gaussian(Section("gaussian", 0.01, "shared"), 1)
    likelihood.log_std.data.fill_(-8.0)  # an overshoot
    likelihood.distortion(torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)).sum().backward()
    assert likelihood.log_std.grad.item() < 0  # Adam moves it up


def test_a_learned_sigma_keeps_a_floor():
    likelihood = Gaussian(Section("gaussian", 0.01, "shared"), 1)
    likelihood.log_std.data.fill_(-20.0)
    assert likelihood.std.item() == pytest.approx(1 / 255)
    assert likelihood.distortion(torch.ones(1, 1, 4, 4), torch.full((1, 1, 4, 4), 9.0)).isfinite().all()


def test_extreme_parameters_stay_finite():
    likelihood = DiscretisedLogistic(3, 3)
    x = images(8, 3).float()
    for scale in (30.0, 300.0):
        theta = (scale * NOISE(1, "parameters")(8, likelihood.outputs, 4, 4)).requires_grad_()
        loss = likelihood.distortion(x, theta).sum()
        loss.backward()
        assert loss.isfinite()
        assert theta.grad.isfinite().all()
