"""The chain in Triton against the chain in torch: on a GPU, or on a CPU by triton's interpreter.

TRITON_INTERPRET=1 python -m pytest tests/core/test_triton_chain.py
"""

import importlib.util
import math
import os

import pytest
import torch

from jebm.config import Energy, Langevin
from jebm.core.chain import closed_form_langevin
from jebm.core.energy import EnergyNet, ResolvedEnergy
from jebm.core.kernels import TORCH, fastest
from jebm.core.philox import PhiloxNoise
from jebm.core.prior import PriorSampler
from jebm.native import triton_chain
from jebm.rng import gaussian_noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NOISE = gaussian_noise(0, 0, DEVICE)
SHAPES = {
    # depth, width, latent width, steps, step size, output scale, chains: blocks are of 16
    "hs": (4, 50, 16, 20, 0.4, 4.0, 17),
    "fid": (2, 100, 50, 20, 0.3, 1.0, 3),
    "fashion": (2, 100, 14, 20, 0.4, 10.0, 16),
    "odd": (1, 7, 3, 60, 0.4, 4.0, 1),
    "wide": (3, 200, 20, 2, 0.4, 4.0, 3),
    "widest": (2, 300, 9, 2, 0.4, 4.0, 2),
    "more dimensions than units": (2, 10, 70, 5, 0.4, 4.0, 3),
}
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs triton, and a GPU or TRITON_INTERPRET=1",
)


def resolved(depth: int, width: int, latent_dim: int, scale: float = 4.0) -> ResolvedEnergy:
    torch.manual_seed(depth + width)
    net = EnergyNet(latent_dim, Energy(width=width, depth=depth, output_scale=scale, spectral_norm=True))
    return net.to(DEVICE).frozen()


def noise_of(kind: str):
    return NOISE(0, "chain") if kind == "torch" else PhiloxNoise(NOISE(0, "chain"))


@needs_triton
@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch_with_the_same_noise(shape, noise):
    """Positions after all steps, and the gradient at the last one, of every chain of the last block too."""
    depth, width, latent_dim, steps, step_size, scale, chains = SHAPES[shape]
    energy, start = resolved(depth, width, latent_dim, scale), NOISE(0, "start")(chains, latent_dim)
    assert fastest(energy, start, philox=noise == "philox").description == "Triton kernel"
    before, how = start.clone(), {"steps": steps, "step_size": step_size}
    expected, info = closed_form_langevin(energy, start, noise_of(noise), kernel=TORCH, **how)
    z, ours = closed_form_langevin(energy, start, noise_of(noise), **how)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        (ours.gradient_norm, ours.displacement), (info.gradient_norm, info.displacement), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(start, before)
    still, _ = closed_form_langevin(energy.scaled(0), start, noise_of(noise), kernel=TORCH, **how)
    assert (expected - still).abs().max() > 1e-3  # f takes part


@needs_triton
@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_a_chain_in_two_parts_is_the_chain(noise):
    energy, start, how = resolved(2, 20, 6), NOISE(0, "start")(17, 6), {"step_size": 0.4}
    whole, _ = closed_form_langevin(energy, start, noise_of(noise), steps=3, **how)
    again = noise_of(noise)
    part, _ = closed_form_langevin(energy, start, again, steps=1, **how)
    part, _ = closed_form_langevin(energy, part, again, steps=2, **how)
    assert torch.equal(part, whole)


@needs_triton
def test_starts_of_any_layout_no_chains_and_no_steps():
    energy, how = resolved(2, 20, 6), {"step_size": 0.4}
    start = NOISE(0, "start")(6, 5)
    z, _ = closed_form_langevin(energy, start.T, noise_of("philox"), steps=2, **how)
    same, _ = closed_form_langevin(energy, start.T.contiguous(), noise_of("philox"), steps=2, **how)
    assert torch.equal(z, same)
    assert closed_form_langevin(energy, start.T[:0], noise_of("philox"), steps=2, **how)[0].shape == (0, 6)
    z, info = closed_form_langevin(energy, start.T, noise_of("philox"), steps=0, **how)
    assert torch.equal(z, start.T)
    assert info.displacement == info.gradient_norm == 0


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of NaN in the interpreter
def test_what_is_not_finite_stays_visible():
    energy, start = resolved(2, 20, 6), NOISE(0, "start")(5, 6)
    start[3, 2] = math.nan
    z, _ = closed_form_langevin(energy, start, noise_of("philox"), steps=2, step_size=0.4)
    assert torch.equal(z.isnan(), start.isnan())


@needs_triton
def test_wider_nets_are_left_to_torch():
    assert triton_chain.hindrance(resolved(2, 513, 6), NOISE(0, "start")(5, 6), philox=True) == (
        "a layer is wider than 512"
    )


@needs_triton
def test_a_step_is_drawn_by_itself():
    """As the start of a chain is, from step -1."""
    noise = PhiloxNoise(NOISE(0, "chain"), step=-1)
    drawn = triton_chain.draw(noise.key, -1, 17, 6, torch.device(DEVICE))
    torch.testing.assert_close(drawn, noise(17, 6), rtol=0, atol=2e-6)


@needs_triton
def test_moments_of_the_noise():
    """With f = 0 and s = 1 a step from 0 is the noise: that of the definition, and N(0, 1) to 5 errors."""
    chains, dims, steps = 32, 128, 4
    zero, noise = torch.zeros(1, dims, device=DEVICE), PhiloxNoise(NOISE(0, "chain"))
    energy = ResolvedEnergy(((zero, zero[0, :1]), (zero[:, :1], zero[0, :1])))
    drawn = torch.zeros(steps, chains, dims, device=DEVICE)
    for step in range(steps):
        how = {"steps": 1, "step_size": 1.0, "first_step": 1000 + step}
        triton_chain.run(energy, drawn[step], noise.key, **how)
    noise.step = 1000
    defined = torch.stack([noise(chains, dims) for _ in range(steps)])
    torch.testing.assert_close(drawn, defined, rtol=0, atol=2e-6)
    n = drawn.numel()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        found = drawn.double().pow(power).mean().item()
        assert found == pytest.approx(moment, abs=5 * math.sqrt(variance / n)), power


@needs_triton
def test_the_log_names_the_kernel(tiny_model):
    model = tiny_model((2, 2)).to(DEVICE)
    assert PriorSampler(model, Langevin()).kernel == "Triton kernel"
    assert PriorSampler(model, Langevin(kernel="torch")).kernel == "torch"


def test_without_a_gpu_or_in_double_precision_it_is_not_used(monkeypatch):
    energy, start = resolved(2, 20, 6), torch.zeros(1, 6)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_chain.hindrance(energy, start, philox=True) == "positions are not on a GPU"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_chain.hindrance(energy, start.double(), philox=True) == "positions are not float32"


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="triton is installed")
def test_without_triton_torch_computes_the_chain(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    energy, start = resolved(2, 20, 6), torch.zeros(1, 6)
    assert triton_chain.hindrance(energy, start, philox=True) == "triton is not installed"
