"""The closed-form chain, in torch and in C, against autograd; and the counter-based noise against N(0, 1)."""

import itertools
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from scipy import stats

from jebm.config import Energy, Langevin
from jebm.core.chain import closed_form_langevin
from jebm.core.energy import EnergyNet, ResolvedEnergy
from jebm.core.kernels import TORCH
from jebm.core.langevin import ChainInfo, langevin, score_of
from jebm.core.philox import PhiloxNoise, philox
from jebm.core.prior import PriorSampler, sample_prior
from jebm.native import chain as native
from jebm.rng import gaussian_noise

PLATFORM = Path(__file__).parents[2] / "platform"
NOISE = gaussian_noise(seed=0, rank=0)
ALL = pytest.mark.parametrize("kernel", [TORCH, None], ids=["torch", "C"])
SHAPES = {
    # depth, width, latent width, steps, step size, output scale
    "hs": (4, 50, 16, 60, 0.4, 1.0),
    "hs x 4": (4, 50, 16, 60, 0.4, 4.0),
    "fid": (2, 100, 50, 100, 0.3, 1.0),
    "fashion": (2, 100, 14, 60, 0.4, 10.0),
    "odd": (1, 7, 3, 60, 0.4, 4.0),
}
no_wheel_compiles = pytest.mark.skipif(
    find_spec("ziglang") is not None, reason="the wheel ziglang is a compiler"
)


@pytest.fixture(autouse=True)
def _a_kernel_where_there_is_a_compiler(request):
    """A machine without a C compiler has the torch chain to test, and no other."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "kernel" in parameters and parameters["kernel"] is None and not native.usable(torch.zeros(1)):
        pytest.skip(native.describe())


def resolved(depth: int, width: int, latent_dim: int, scale: float = 1.0, **section) -> ResolvedEnergy:
    torch.manual_seed(depth + width)
    section = {"spectral_norm": True, **section}
    return EnergyNet(latent_dim, Energy(width=width, depth=depth, output_scale=scale, **section)).frozen()


def reference(energy: ResolvedEnergy, start, normal, **how):
    score = score_of(lambda z: energy.f(z) - 0.5 * z.square().sum(1))
    return langevin(score, start, normal, **how)


def both(info: ChainInfo) -> torch.Tensor:
    return torch.stack([info.gradient_norm, info.displacement])


@ALL
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chains", [1, 100])
def test_equals_autograd_with_the_same_noise(shape, chains, kernel):
    depth, width, latent_dim, steps, step_size, scale = SHAPES[shape]
    energy = resolved(depth, width, latent_dim, scale)
    start, how = NOISE(0, "start")(chains, latent_dim), {"steps": steps, "step_size": step_size}
    before = start.clone()
    expected, info = reference(energy, start, NOISE(0, "chain"), **how)
    z, ours = closed_form_langevin(energy, start, NOISE(0, "chain"), kernel=kernel, **how)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(both(ours), both(info), rtol=1e-5, atol=1e-5)
    assert torch.equal(start, before)
    still, _ = reference(ResolvedEnergy(energy.scaled(0).layers), start, NOISE(0, "chain"), **how)
    assert (expected - still).abs().max() > 1e-3  # f takes part


@ALL
def test_equals_autograd_with_counter_based_noise(kernel):
    energy, start = resolved(4, 50, 14, 4.0), NOISE(0, "start")(100, 14)
    how = {"steps": 60, "step_size": 0.4}
    expected, _ = reference(energy, start, PhiloxNoise(NOISE(0, "chain")), **how)
    z, _ = closed_form_langevin(energy, start, PhiloxNoise(NOISE(0, "chain")), kernel=kernel, **how)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)


@ALL
@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_a_chain_in_two_parts_is_the_chain(noise, kernel):
    energy, start = resolved(2, 20, 6), NOISE(0, "start")(33, 6)
    normal, again = (NOISE(0, "chain") if noise == "torch" else PhiloxNoise(NOISE(0, "c")) for _ in range(2))
    whole, _ = closed_form_langevin(energy, start, normal, steps=9, step_size=0.4, kernel=kernel)
    part, _ = closed_form_langevin(energy, start, again, steps=4, step_size=0.4, kernel=kernel)
    part, _ = closed_form_langevin(energy, part, again, steps=5, step_size=0.4, kernel=kernel)
    assert torch.equal(part, whole)


@ALL
def test_long_chains_draw_the_noise_that_short_ones_draw(kernel, monkeypatch):
    """The C kernel is called again for every million draws: here for every step or two."""
    energy, start, how = resolved(2, 20, 6), NOISE(0, "start")(10, 6), {"steps": 5, "step_size": 0.4}
    whole, info = closed_form_langevin(energy, start, NOISE(0, "chain"), kernel=kernel, **how)
    monkeypatch.setattr("jebm.core.chain._NOISE_NUMBERS", 130)
    cut, cut_info = closed_form_langevin(energy, start, NOISE(0, "chain"), kernel=kernel, **how)
    assert torch.equal(whole, cut)
    assert torch.equal(both(info), both(cut_info))


@ALL
@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_the_number_of_threads_does_not_matter(noise, kernel):
    energy, start = resolved(4, 50, 16), NOISE(0, "start")(101, 16)
    positions = []
    for threads in (1, 2, 3, 7, 50):
        torch.set_num_threads(threads)
        normal = NOISE(0, "chain") if noise == "torch" else PhiloxNoise(NOISE(0, "chain"))
        z, _ = closed_form_langevin(energy, start, normal, steps=7, step_size=0.4, kernel=kernel)
        assert torch.get_num_threads() == threads
        positions.append(z)
    torch.set_num_threads(1)
    assert all(torch.equal(positions[0], z) for z in positions[1:])


def test_a_compiled_chain_does_not_depend_on_the_chains_beside_it():
    """Blocks are of 32 or 16 chains on AVX-512, 24, 16 or 8 on AVX2: torch does not promise it."""
    if not native.usable(torch.zeros(1)):
        pytest.skip(native.describe())
    energy, start = resolved(4, 50, 15), NOISE(0, "start")(70, 15)

    def chain(count):
        normal = PhiloxNoise(NOISE(0, "chain"))
        return closed_form_langevin(energy, start[:count], normal, steps=7, step_size=0.4)[0]

    whole = chain(70)
    for count in (1, 8, 17, 24, 32, 33, 64):
        assert torch.equal(chain(count), whole[:count])


@ALL
def test_starts_of_any_layout_and_no_chains_at_all(kernel):
    energy = resolved(2, 20, 6)
    how = {"steps": 3, "step_size": 0.4, "kernel": kernel}
    start = NOISE(0, "start")(6, 40)
    z, _ = closed_form_langevin(energy, start.T, NOISE(0, "c"), **how)
    assert torch.equal(z, closed_form_langevin(energy, start.T.contiguous(), NOISE(0, "c"), **how)[0])
    assert closed_form_langevin(energy, start.T[:0], NOISE(0, "c"), **how)[0].shape == (0, 6)
    z, info = closed_form_langevin(energy, start.T, NOISE(0, "c"), **{**how, "steps": 0})
    assert torch.equal(z, start.T)
    assert info.displacement == info.gradient_norm == 0


@ALL
def test_what_is_not_finite_stays_visible(kernel):
    """A diverged net must be seen by the check of the loss, not be hidden by a comparison with NaN."""
    energy, start = resolved(2, 20, 6), NOISE(0, "start")(40, 6)
    start[3, 2] = math.nan
    how = {"steps": 2, "step_size": 0.4}
    z, info = closed_form_langevin(energy, start, NOISE(0, "c"), kernel=kernel, **how)
    assert torch.equal(z.isnan(), start.isnan())  # as with autograd: the slope at NaN is that at 0
    assert torch.equal(reference(energy, start, NOISE(0, "c"), **how)[0].isnan(), start.isnan())
    assert info.gradient_norm.isnan()
    energy.layers[1][0][5, 5] = math.nan
    z, _ = closed_form_langevin(energy, start, NOISE(0, "c"), kernel=kernel, **how)
    assert z.isnan().all()


def test_double_precision_is_left_to_torch():
    layers = tuple((weight.double(), bias.double()) for weight, bias in resolved(2, 20, 6).layers)
    energy, start = ResolvedEnergy(layers), NOISE(0, "start")(10, 6).double()
    how = {"steps": 20, "step_size": 0.4}

    def normal(*shape):
        return torch.linspace(-2, 2, math.prod(shape), dtype=torch.float64).view(shape)

    z, _ = closed_form_langevin(energy, start, normal, **how)
    torch.testing.assert_close(z, reference(energy, start, normal, **how)[0], rtol=0, atol=1e-13)


# --- which way sample_prior goes ---


@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_kernels_of_the_config_sample_the_same(tiny_model, noise):
    model = tiny_model((2, 2), output_scale=4.0)
    one, *others = (
        sample_prior(model, Langevin(40, 0.4, kernel, noise), 50, NOISE(0, "chain"))[0]
        for kernel in ("autograd", "torch", "auto")
    )
    for other in others:
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    different = sample_prior(model, Langevin(40, 0.4, "auto", noise), 50, NOISE(1, "chain"))[0]
    assert (different - one).abs().max() > 0.1


def test_torch_noise_and_philox_noise_are_not_the_same(tiny_model):
    model = tiny_model((2, 2))
    one, other = (
        sample_prior(model, Langevin(5, 0.4, "torch", noise), 50, NOISE(0, "chain"))[0]
        for noise in ("torch", "philox")
    )
    assert (one - other).abs().max() > 0.1


def test_a_generator_that_maps_noise_to_latents_goes_through_autograd(tiny_model):
    """Its gradient is that of f(T(e)), which the closed form of grad f is not."""
    model, how = tiny_model((2, 1), output_scale=4.0), Langevin(20, 0.4)
    identity, _ = sample_prior(model, how, 30, NOISE(0, "chain"))
    assert PriorSampler(model, how).kernel == native.describe()
    assert PriorSampler(model, Langevin(20, 0.4, "torch")).kernel == "torch"
    assert PriorSampler(model, Langevin(20, 0.4, "autograd")).kernel == "autograd (langevin.kernel)"
    assert "Gaussian" in PriorSampler(tiny_model((2, 1), width=0), how).kernel

    class Stretched(type(model.generator)):
        def latents(self, noise):
            return 3 * noise

    model.generator.__class__ = Stretched
    assert PriorSampler(model, how).kernel == "autograd (the generator maps codes to latents)"
    normal = NOISE(0, "chain")
    start, energy = normal(30, 3), model.energy.frozen()
    score = score_of(lambda e: energy.f(3 * e) - 0.5 * e.square().sum(1))
    expected, _ = langevin(score, start, normal, steps=20, step_size=0.4)
    stretched, _ = sample_prior(model, how, 30, NOISE(0, "chain"))
    torch.testing.assert_close(stretched, expected)
    assert (stretched - identity).abs().max() > 0.1


def sum_of_a_chain() -> float:
    torch.manual_seed(0)
    energy, how = EnergyNet(6, Energy(width=10, depth=2)).frozen(), {"steps": 30, "step_size": 0.4}
    return closed_form_langevin(energy, NOISE(0, "s")(20, 6), NOISE(0, "c"), **how)[0].double().sum().item()


def probe(**environment: str) -> tuple[float, str]:
    """Run a chain in a fresh process, which has not built or loaded anything."""
    program = "import test_chain as t; print(t.sum_of_a_chain()); print(t.native.describe())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{PLATFORM}:{Path(__file__).parent}", **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    value, description = done.stdout.strip().splitlines()
    return float(value), description


@no_wheel_compiles
def test_a_machine_without_a_compiler_gets_the_same_from_torch(tmp_path):
    value, description = probe(PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), CC="")
    assert description == "torch (no C kernel: no C compiler found)"
    assert value == pytest.approx(sum_of_a_chain(), abs=1e-4)
    assert not list(tmp_path.iterdir())


@no_wheel_compiles
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "No such file"),
        ("echo out of order >&2; exit 1", "out of order"),
        ("exit 0", "invalid ELF|too short"),
    ],
    ids=["absent", "broken", "builds nothing useful"],
)
def test_a_compiler_that_fails_is_named(tmp_path, monkeypatch, script, reason):
    compiler = tmp_path / "compiler"
    if script:
        out = 'for word; do case "$last" in -o) : > "$word";; esac; last=$word; done'
        compiler.write_text(f"#!/bin/sh\n{out}\n{script}\n")
        compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library, description = native._library.__wrapped__()
    assert library is None
    assert re.search(rf"^torch \(no C kernel: {re.escape(str(compiler))}: .*({reason})", description), (
        description
    )


def test_the_kernel_is_built_once_and_anew_where_no_home_can_be_written(tmp_path, monkeypatch):
    if not native.usable(torch.zeros(1)):
        pytest.skip(native.describe())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    value, description = probe()
    assert value == sum_of_a_chain()
    assert description.startswith("C kernel")
    (library,) = tmp_path.glob("jebm/*")
    built = library.stat().st_mtime_ns
    assert native._library.__wrapped__()[0] is not None
    assert [library] == list(tmp_path.glob("jebm/*"))
    assert library.stat().st_mtime_ns == built
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert native._library.__wrapped__()[0] is not None
    assert len(list(tmp_path.glob("jebm-*/*.so"))) == 1


# --- the counter-based noise ---


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_has_its_known_answers(counter, key, words):
    """The vectors that its authors publish (Random123, kat_vectors)."""
    made = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(word.item() for word in made) == words


def test_philox_noise_is_these_numbers_on_every_device(tiny_model):
    """Computed in Python's integers, from the place alone; "meta" tensors can be neither drawn nor read."""
    place = gaussian_noise(0, 0)(0, "prior chain")
    noise = PhiloxNoise(place, step=-1)
    assert noise.key == (2554479037, 806105350)
    start = torch.tensor([-1.8470747, -0.0189868, -0.3670087, -0.9684538])
    first = torch.tensor([0.7380794, -0.8887225, -2.9915381, 0.2348124])
    torch.testing.assert_close(noise(3, 4)[0], start, rtol=0, atol=1e-6)
    torch.testing.assert_close(noise(3, 7)[0, :4], first, rtol=0, atol=1e-6)
    elsewhere = PhiloxNoise(gaussian_noise(0, 0, "meta")(0, "prior chain"), step=-1)
    assert elsewhere.key == noise.key
    assert elsewhere(3, 4).shape == (3, 4)
    # A chain's start is the noise of step -1, in a kernel too; of a place's second chains it is another one.
    model, place = tiny_model((2, 2)), gaussian_noise(0, 0)(0, "prior chain")
    for kernel in ("auto", "torch", "autograd"):
        sample = PriorSampler(model, Langevin(1, 1e-6, kernel, "philox"))
        z, _ = sample(3, gaussian_noise(0, 0)(0, "prior chain"))
        torch.testing.assert_close(z[0], start, rtol=0, atol=1e-5)
    assert not torch.equal(sample(3, place)[0], sample(3, place)[0])


def test_counter_based_noise_needs_a_place():
    with pytest.raises(TypeError, match="belongs to a place"):
        PhiloxNoise(torch.randn)


def draws(count: int, dims: int, steps: int, position: int = 0) -> torch.Tensor:
    """(steps, count, dims) of the noise: as the C kernel draws it where there is one."""
    noise = PhiloxNoise(NOISE(position, "chain"))
    if not native.usable(torch.zeros(1)):
        return torch.stack([noise(count, dims) for _ in range(steps)])
    zero = torch.zeros(1, dims), torch.zeros(1)
    energy, out = ResolvedEnergy((zero, (torch.zeros(1, 1), torch.zeros(1)))), []
    for step in range(steps):
        z = torch.zeros(count, dims)
        native.run(energy, z, noise.key, first_step=step, steps=1, step_size=1.0)
        out.append(z)
    return torch.stack(out)


def test_the_kernel_draws_what_the_definition_says():
    noise = PhiloxNoise(NOISE(0, "chain"))
    defined = torch.stack([noise(1000, 15) for _ in range(20)])
    torch.testing.assert_close(draws(1000, 15, 20), defined, rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    """Two million draws: 1,000 steps, 125 chains, 16 dimensions, in double precision."""
    return draws(125, 16, 1000).double()


def test_moments_of_the_noise(sample):
    """Five standard errors: those of the k-th moment are sqrt(((2k - 1)!! - ((k - 1)!!)^2) / n), k even."""
    n = sample.numel()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)]:
        found = sample.pow(power).mean().item()
        assert found == pytest.approx(moment, abs=5 * math.sqrt(variance / n)), power


def test_distribution_of_the_noise(sample):
    """Kolmogorov and Smirnov at 1e-4, over all and in each dimension; and the tails by their counts."""
    flat = sample.flatten()
    assert stats.kstest(flat.numpy(), "norm").pvalue > 1e-4
    for dim in range(16):
        assert stats.kstest(sample[:, :, dim].flatten().numpy(), "norm").pvalue > 1e-4
    for edge in (3.0, 4.0):
        expected = 2 * stats.norm.sf(edge) * len(flat)
        assert (flat.abs() > edge).sum().item() == pytest.approx(expected, abs=5 * math.sqrt(expected))


@pytest.mark.parametrize("power", [1, 2])
def test_neighbours_in_the_noise_are_uncorrelated(sample, power):
    """Over steps, chains and dimensions, values and squares: correlations are N(0, 1/n) where independent."""
    values = sample.pow(power)
    values = (values - values.mean()) / values.std()
    steps, chains, dims = sample.shape
    for lag in [
        (1, 0, 0),
        (2, 0, 0),
        (0, 1, 0),
        (0, 16, 0),
        (0, 32, 0),
        *((0, 0, d) for d in range(1, 8)),
        (1, 1, 1),
    ]:
        ahead = values[lag[0] :, lag[1] :, lag[2] :]
        behind = values[: steps - lag[0], : chains - lag[1], : dims - lag[2]]
        correlation = (ahead * behind).mean().item()
        assert abs(correlation) < 5 / math.sqrt(ahead.numel()), lag


def test_streams_of_other_places_are_uncorrelated(sample):
    streams = [sample[:100], *(draws(125, 16, 100, position).double() for position in (1, 2, 2**31))]
    for one, other in itertools.combinations(streams, 2):
        assert abs((one * other).mean().item()) < 5 / math.sqrt(one.numel())
    assert (
        len(
            {
                PhiloxNoise(gaussian_noise(*place)(0, "c")).key
                for place in itertools.product(range(8), range(8))
            }
        )
        == 64
    )


@ALL
def test_stationary_variance_with_counter_based_noise(kernel):
    """f = 0: 1 / (1 - s^2/4), as with any noise that is white (test_langevin.py)."""
    energy = resolved(1, 4, 4).scaled(0)
    chains, step_size = 20_000, 0.8
    noise = PhiloxNoise(NOISE(5, "chain"))
    how = {"steps": 60, "step_size": step_size, "kernel": kernel}
    z, _ = closed_form_langevin(energy, NOISE(5, "start")(chains, 4), noise, **how)
    variance = 1 / (1 - step_size**2 / 4)
    assert z.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / (4 * chains)))
    assert abs(z.mean().item()) < 5 * math.sqrt(variance / (4 * chains))
