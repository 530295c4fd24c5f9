"""Diagonal Gaussians against torch.distributions."""

import math

import torch
from torch.distributions import Independent, Normal, kl_divergence

from jebm.core.distributions import DiagGaussian, standard_log_density
from jebm.rng import gaussian_noise


def some_gaussian(batch: int = 5, dims: int = 3) -> tuple[DiagGaussian, Normal]:
    normal = gaussian_noise(0, 0)(0, "moments")
    mean, log_variance = 2 * normal(batch, dims), normal(batch, dims) - 0.5
    return DiagGaussian(mean, log_variance), Normal(mean, (0.5 * log_variance).exp())


def test_rate_is_the_closed_form_kl():
    ours, reference = some_gaussian()
    torch.testing.assert_close(ours.rate(), kl_divergence(reference, Normal(0.0, 1.0)))


def test_rate_is_zero_at_the_prior_and_nowhere_negative():
    zeros = torch.zeros(1, 4)
    assert torch.equal(DiagGaussian(zeros, zeros).rate(), zeros)
    assert (some_gaussian(1000)[0].rate() > 0).all()


def test_one_sample_kl_has_the_rate_as_its_mean():
    ours, _ = some_gaussian(batch=2)
    samples = 200_000
    noise = gaussian_noise(0, 0)(0, "kl")(samples, 2, 3)
    z = ours.mean_BD + (0.5 * ours.log_variance_BD).exp() * noise
    kl = ours.log_density(z) - Normal(0.0, 1.0).log_prob(z)
    five_errors = 5 * kl.std(0) / math.sqrt(samples)
    assert ((kl.mean(0) - ours.rate()).abs() < five_errors).all()
    assert (five_errors < 0.05 * ours.rate()).all()  # the test is sharp


def test_densities_are_those_of_torch():
    ours, reference = some_gaussian()
    z = gaussian_noise(0, 0)(1, "z")(5, 3)
    torch.testing.assert_close(ours.log_density(z), reference.log_prob(z))
    standard = Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
    torch.testing.assert_close(standard_log_density(z), standard.log_prob(z))


def test_rsample_shifts_and_scales_the_noise_and_carries_the_gradient():
    ours, reference = some_gaussian()
    noise = gaussian_noise(0, 0)(1, "z")(5, 3)
    torch.testing.assert_close(ours.rsample(noise), reference.mean + reference.stddev * noise)
    mean, log_variance = (t.clone().requires_grad_() for t in ours)
    DiagGaussian(mean, log_variance).rsample(noise).sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones(5, 3))
    torch.testing.assert_close(log_variance.grad, 0.5 * reference.stddev * noise)
