"""Why sweeps are not judged by short-run samples: the case of a step size that does not mix.

Latents of data are N(m, I); the best tilt of N(0, I) is f(z) = m.z, worth |m|^2/2 nats. Training by chains of
K steps makes the *chains'* law that of the data. For f(z) = a.z the chains' mean is (1 - (1 - s^2/2)^K) a, so
that a becomes m / (1 - (1 - s^2/2)^K): at K = 40, 1.04 m for s = 0.4, and 5.5 m for s = 0.1. Its samples are
as good, and its gain a.m - |a|^2/2 is -9.6 |m|^2.
"""

import functools

import pytest
import torch

from jebm.config import Energy
from jebm.core.chain import closed_form_langevin
from jebm.core.energy import EnergyNet
from jebm.evaluate.partition import log_partition_annealed
from jebm.rng import gaussian_noise

MEAN = torch.tensor([1.5, 0.0])
BEST_GAIN = float(MEAN.square().sum() / 2)
STEPS = 40


@functools.cache
def trained(step_size: float) -> EnergyNet:
    """Train an energy net as the objective does, on latents that are N(MEAN, I)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = EnergyNet(2, Energy(width=32, depth=1, spectral_norm=False))
    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    noise = gaussian_noise(0, 0)
    for step in range(600):
        normal = noise(step, "chain")
        prior_z, _ = closed_form_langevin(
            net.frozen(), normal(128, 2), normal, steps=STEPS, step_size=step_size
        )
        posterior_z = MEAN + noise(step, "posterior")(128, 2)
        for group in adam.param_groups:
            group["lr"] = 1e-2 * (1 - step / 600)
        adam.zero_grad()
        torch.autograd.backward(net(prior_z).mean() - net(posterior_z).mean())
        adam.step()
    return net.requires_grad_(requires_grad=False)


def chain_mean(net: EnergyNet, step_size: float, steps: int) -> torch.Tensor:
    normal = gaussian_noise(1, 0)(0, "chain")
    z, _ = closed_form_langevin(net.frozen(), normal(4000, 2), normal, steps=steps, step_size=step_size)
    return z.mean(0)


@pytest.mark.parametrize("step_size", [0.4, 0.1])
def test_samples_of_training_length_look_right_whether_the_chain_mixes_or_not(step_size: float) -> None:
    net = trained(step_size)
    assert (chain_mean(net, step_size, STEPS) - MEAN).norm() < 0.25


def test_long_chains_and_the_normalised_bound_tell_the_unmixed_chain_from_the_mixed_one() -> None:
    gains, drifts = {}, {}
    for step_size in (0.4, 0.1):
        net = trained(step_size)
        drifts[step_size] = float((chain_mean(net, step_size, 50 * STEPS) - MEAN).norm())
        log_z = log_partition_annealed(net.frozen().f, 2, gaussian_noise(2, 0)(0, "log Z"), chains=2000).log_z
        posterior_z = MEAN + gaussian_noise(3, 0)(0, "posterior")(4000, 2)
        gains[step_size] = float(net(posterior_z).mean()) - log_z.value
    assert drifts[0.4] < 0.4
    assert drifts[0.1] > 3
    assert 0.7 * BEST_GAIN < gains[0.4] <= 1.1 * BEST_GAIN
    assert gains[0.1] < -5
