"""Chains of energies that a user brings: by their own gradient, or by autograd where they have none."""

import pytest
import torch
from torch import nn

from jebm.config import Langevin
from jebm.core.energy import ResolvedEnergy
from jebm.core.kernels import without_autograd
from jebm.core.parts import Energy, by_autograd
from jebm.core.philox import PhiloxNoise
from jebm.core.prior import PriorSampler, sample_prior
from jebm.errors import ConfigError
from jebm.native import chain as native
from jebm.rng import gaussian_noise

NOISE = gaussian_noise(seed=0, rank=0)


class Wells(Energy):
    """f = log sum_k exp(-2 |z - a_k|^2), without parameters; its gradient in closed form where `closed`."""

    centres: torch.Tensor

    def __init__(self, dims: int, *, closed: bool = True) -> None:
        super().__init__(((dims,),))
        self.register_buffer("centres", torch.linspace(-1.5, 1.5, 3 * dims).view(3, dims))
        self.closed, self.frozen_times = closed, 0

    def _squares(self, z_BS):
        return -2 * (z_BS[:, None] - self.centres).square().sum(2)

    def forward(self, z_BS):
        return torch.logsumexp(self._squares(z_BS), 1)

    def gradient(self, z_BS):
        if not self.closed:
            return None
        weights_BK = torch.softmax(self._squares(z_BS), 1)
        return -4 * (weights_BK[:, :, None] * (z_BS[:, None] - self.centres)).sum(1)

    def frozen(self):
        self.frozen_times += 1
        return super().frozen()


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize(("kind", "seen"), [("joint", 5), ("top", 3)])
def test_the_chain_by_its_own_gradient_is_that_by_autograd(tiny_model, kind, seen, noise):
    model, how = tiny_model((2, 3), kind=kind), Langevin(30, 0.4, noise=noise)
    z_BS, found = NOISE(0, "z")(20, seen), []
    for closed in (True, False):
        model.energy = energy = Wells(seen, closed=closed)
        sampler = PriorSampler(model, how)
        energy.frozen_times = 0
        code_BD, info = sampler(50, NOISE(0, "chain"))
        found.append((code_BD, info.gradient_norm, info.displacement))
        assert energy.frozen_times == 1
        torch.testing.assert_close(energy.frozen().gradient(z_BS), by_autograd(energy, z_BS)[1])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    normal = NOISE(0, "chain")
    start = PhiloxNoise(normal, step=-1) if noise == "philox" else normal
    unseen = start(50, 5)[:, : 5 - seen]
    assert all(torch.equal(code_BD[:, : 5 - seen], unseen) for code_BD, *_ in found)  # exact as drawn


class Squeezed(Energy):
    """f = 3 softplus(2 z W + b) v: a perceptron that says so."""

    def __init__(self) -> None:
        super().__init__(((5,),))
        self.inner, self.outer = nn.Linear(5, 20), nn.Linear(20, 1)

    def forward(self, z_BS):
        return 3 * self.outer(nn.functional.softplus(self.inner(2 * z_BS))).squeeze(1)

    def frozen(self):
        inner, outer = ((layer.weight.detach(), layer.bias.detach()) for layer in (self.inner, self.outer))
        return ResolvedEnergy(((2 * inner[0], inner[1]), outer), "softplus").scaled(3)


def test_an_energy_that_is_a_perceptron_runs_in_the_kernels(tiny_model):
    torch.manual_seed(0)
    model = tiny_model((2, 3))
    model.energy = Squeezed()
    assert PriorSampler(model, Langevin()).kernel == native.describe()
    (one, _), *others = (
        sample_prior(model, Langevin(30, 0.4, kernel), 50, NOISE(0, "chain"))
        for kernel in ("autograd", "torch", "auto")
    )
    for other, _ in others:
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    # The reference is f itself, not what `frozen` says of it.
    torch.testing.assert_close(model.energy(one), model.energy.frozen().f(one), rtol=1e-5, atol=1e-5)


def test_what_computes_the_chain_is_said(tiny_model):
    model = tiny_model((2, 3))
    model.energy = Wells(5)
    for kernel in ("auto", "torch"):
        assert PriorSampler(model, Langevin(kernel=kernel)).kernel == "torch (the energy's own gradient)"
    assert PriorSampler(model, Langevin(kernel="autograd")).kernel == "autograd (langevin.kernel)"
    model.energy.closed = False
    assert PriorSampler(model, Langevin()).kernel == "autograd (Wells has no gradient of its own)"


def test_a_gradient_of_another_shape_is_refused(tiny_model):
    model = tiny_model((2, 3))

    class Summed(Wells):
        def gradient(self, z_BS):
            return super().gradient(z_BS).sum(1, keepdim=True)

    model.energy = Summed(5)
    with pytest.raises(
        ConfigError, match=r"^energy: the gradient of Summed has the shape \(8, 1\) for latents"
    ):
        PriorSampler(model, Langevin())


@pytest.mark.parametrize("kernel", ["auto", "autograd"])
def test_a_closed_form_of_another_function_is_refused(tiny_model, kernel):
    """What chains take is held to `forward` before a run: they would sample another prior in silence."""
    model = tiny_model((2, 3))

    class Halved(Wells):
        def gradient(self, z_BS):
            return 0.5 * super().gradient(z_BS)

    class Squared(type(model.energy)):
        """A child of our own net that changes f, and inherits the closed form of its parent."""

        def forward(self, z_BS):
            return super().forward(z_BS) ** 2

    model.energy.__class__ = Squared
    with pytest.raises(
        ConfigError, match=r"^energy: the f of frozen\(\) of Squared is not that of its forward"
    ):
        PriorSampler(model, Langevin(kernel=kernel))
    model.energy = Halved(5)
    with pytest.raises(ConfigError, match=r"^energy: the gradient of Halved is not that of its forward"):
        PriorSampler(model, Langevin(kernel=kernel))


def test_one_thread_for_small_dense_nets(tiny_model):
    """Several threads cost more than they give there; a convolution's weights do not tell its work."""

    class Net(Wells):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__(5)
            self.layers = nn.Sequential(*layers)
            self.threads: set[int] = set()

        def gradient(self, z_BS):
            self.threads.add(torch.get_num_threads())
            return super().gradient(z_BS)

    probe, model, used = torch.zeros(1, 5), tiny_model((2, 3)), {}
    nets = {
        "small": Net(nn.Linear(50, 50)),
        "wide": Net(nn.Linear(1000, 100)),
        "conv": Net(nn.Conv2d(1, 2, 3)),
    }
    torch.set_num_threads(2)
    for name, net in nets.items():
        assert without_autograd(net, probe, compiled=True, philox=False) is not None
        model.energy, net.threads = net, set()
        sampler = PriorSampler(model, Langevin(3))
        net.threads.clear()
        sampler(100, NOISE(0, "chain"))
        used[name] = net.threads
        assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert used == {"small": {1}, "wide": {2}, "conv": {2}}
