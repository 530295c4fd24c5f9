"""Time Langevin chains on the prior: ours, the paper's released loop and other libraries, in one process.

    benchmarks/chain.py                         three shapes, 100 and 1,000 chains
    benchmarks/chain.py --threads 2             with two threads
    benchmarks/chain.py --clock cpu             on a busy machine: CPU time instead of wall time (one thread)
    benchmarks/chain.py --device cuda           on a GPU
    benchmarks/chain.py --plot FOLDER           no tables: three plots of the cost

Before measuring, it checks that all implementations sample the same: the released loop, with converged
spectral norm, and our torch and C chains to 1e-4 with the same noise; the others by their mean of f. They
take turns; figures are medians with quartiles. `torchebm` and `blackjax` take part if installed.

The plots show the released loop, our torch chain and the C kernel with Philox noise, for the shape hs and 100
chains, with one thing varied: the steps, the width or the number of chains.
"""

import argparse
import importlib
import importlib.util
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils.dlpack
from plots import MILLISECONDS, draw  # type: ignore[import-not-found, unused-ignore]
from plug_in import plug_ins  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor, nn

from jebm.core.chain import closed_form_langevin
from jebm.core.energy import ResolvedEnergy
from jebm.core.kernels import TORCH, Kernel, fastest
from jebm.core.langevin import langevin, score_of
from jebm.core.philox import PhiloxNoise
from jebm.native import chain as native
from jebm.native.perceptron import SLOPE
from jebm.rng import Normal, gaussian_noise

__all__ = ["main"]

Way = Callable[[], Tensor]


class Shape(NamedTuple):
    """One configuration of the energy and its chain."""

    latent_dims: tuple[int, ...]
    depth: int
    width: int
    steps: int
    step_size: float

    def flop(self, chains: int) -> int:
        """Return the floating-point operations of the chains' products, forward and backward."""
        weights = sum(self.latent_dims) * self.width + (self.depth - 1) * self.width**2 + self.width
        return 4 * chains * self.steps * weights


SHAPES = {
    "hs": Shape((2, 2, 2, 10), 4, 50, 60, 0.4),
    "fid": Shape((10,) * 5, 2, 100, 100, 0.3),
    "fashion": Shape((2, 2, 10), 2, 100, 60, 0.4),
}

SWEEPS = {
    "steps": ("Langevin steps", [10, 20, 40, 80, 160, 320]),
    "width": ("width of the energy net", [12, 25, 50, 100, 200]),
    "chains": ("chains", [10, 30, 100, 300, 1000, 3000]),
}
"""What a plot varies: the name of its axis, and the values."""

PLOTTED = ["torch", "C, Philox noise"]
"""Our implementations that the plots show next to the released loop."""


def main() -> int:
    """Print a table for each shape and number of chains, or draw; return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="benchmarks/chain.py", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--chains", nargs="+", type=int, default=[100, 1000])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="how often each way has its turn")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw cost against " + ", ".join(SWEEPS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # about torch's old spectral norm and jax's choice of device
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.clock} time, {device}")
    print(f"C: {native.describe()}")
    if arguments.plot is not None:
        for varied in SWEEPS:
            sweep(varied, device, arguments)
        return 0
    for name in arguments.shapes:
        for chains in arguments.chains:
            measure(name, chains, device, arguments)
    return 0


def measure(name: str, chains: int, device: torch.device, arguments: argparse.Namespace) -> dict[str, float]:
    """Check and time all implementations for one shape; print their table and return their milliseconds."""
    shape = SHAPES[name]
    net, energy, start_BD = converged(shape, chains, device)
    ways = {
        "released loop": lambda: released(net, shape, start_BD),
        **ours(energy, shape, start_BD),
        **torchebm(energy, shape, start_BD),
        **blackjax(energy, shape, start_BD),
    }
    check(ways, energy, net, shape, start_BD)
    # Take turns; a large product shows the peak rate at that time.
    gemm = torch.randn(1024, 1024, device=device)
    seconds: dict[str, list[float]] = {way: [] for way in [*ways, "peak"]}
    busy: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        seconds["peak"].append(timed(lambda: gemm @ gemm, device, arguments.clock)[0])
        for way, chain in ways.items():
            elapsed, share = timed(chain, device, arguments.clock)
            seconds[way].append(elapsed)
            busy[way].append(share)
    # The table, relative to the released loop and to the peak.
    peak = 2 * 1024**3 / statistics.median(seconds["peak"]) / 1e9
    first = statistics.median(seconds["released loop"])
    gflop = shape.flop(chains) / 1e9
    print(f"\n{name}, {chains} chains: {gflop:.2f} GFLOP; torch's 1024 x 1024 product {peak:.0f} GFLOP/s")
    print("| | ms | quartiles | times the released loop | GFLOP/s | of the product's rate | CPU / wall |")
    print("|---|---|---|---|---|---|---|")
    for way in ways:
        low, middle, high = statistics.quantiles(seconds[way], n=4)
        print(
            f"| {way} | {1e3 * middle:.2f} | {1e3 * low:.2f} to {1e3 * high:.2f} | {first / middle:.1f} "
            f"| {gflop / middle:.1f} | {gflop / middle / peak:.0%} | {statistics.median(busy[way]):.2f} |",
            flush=True,
        )
    return {way: 1e3 * statistics.median(found) for way, found in seconds.items()}


def sweep(varied: str, device: torch.device, arguments: argparse.Namespace) -> None:
    """Time the plotted implementations while one thing varies, and draw their medians."""
    x_name, values = SWEEPS[varied]
    lines: dict[str, list[float]] = {}
    for value in values:
        changes: dict[str, Any] = {} if varied == "chains" else {varied: value}
        shape = SHAPES["hs"]._replace(**changes)
        net, energy, start_BD = converged(shape, value if varied == "chains" else 100, device)
        ways: dict[str, Way] = {"released loop": partial(released, net, shape, start_BD)}
        ways |= {way: chain for way, chain in ours(energy, shape, start_BD).items() if way in PLOTTED}
        for chain in ways.values():  # warm
            chain()
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.rounds):
            for way, chain in ways.items():
                seconds[way].append(timed(chain, device, arguments.clock)[0])
        for way, found in seconds.items():
            lines.setdefault(way, []).append(1e3 * statistics.median(found))
    draw(
        arguments.plot / f"chain-{varied}.svg",
        f"Time of a chain against {x_name}",
        x_name,
        MILLISECONDS[arguments.clock],
        values,
        lines,
    )


def converged(
    shape: Shape, chains: int, device: torch.device
) -> tuple[nn.Sequential, ResolvedEnergy, Tensor]:
    """Return the released net with converged spectral norm, its function, and a start (B, D)."""
    torch.manual_seed(0)
    net = released_net(shape).to(device)
    start_BD = torch.randn(chains, sum(shape.latent_dims), device=device)
    with torch.no_grad():
        for _ in range(500):  # each forward is one power iteration
            net(start_BD[:1])
    return net, resolved(net), start_BD


def timed(work: Callable[[], object], device: torch.device, clock: str) -> tuple[float, float]:
    """Return the seconds that `work` takes by the clock, and CPU time over wall time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return (cpu if clock == "cpu" else wall), cpu / wall


def check(
    ways: dict[str, Way], energy: ResolvedEnergy, net: nn.Sequential, shape: Shape, start_BD: Tensor
) -> None:
    """Stop unless all implementations sample the same; this is also their warm-up."""
    how: dict[str, Any] = {"steps": shape.steps, "step_size": shape.step_size}
    torch.manual_seed(1)
    expected = released(net, shape, start_BD)
    for kernel in (TORCH, None):
        torch.manual_seed(1)
        z, _ = closed_form_langevin(energy, start_BD, layerwise(shape, start_BD.device), kernel=kernel, **how)
        # Occasionally a LeakyReLU is so near its kink that rounding decides its slope.
        difference = (z - expected).abs()
        assert (difference.amax(1) > 1e-4).float().mean() < 0.01, f"{difference.max()} from the released loop"
    f_B = energy.f(expected)
    for way, chain in ways.items():
        values = energy.f(chain())
        error = math.hypot(*(f.std().item() / math.sqrt(len(f)) for f in (values, f_B)))
        assert abs((values.mean() - f_B.mean()).item()) < 6 * error, f"{way} samples something else"


def layerwise(shape: Shape, device: torch.device) -> Normal:
    """Return a `Normal` with the noise of the released loop: drawn separately for each latent layer."""

    def normal(chains: int, _: int) -> Tensor:
        return torch.cat([torch.randn(chains, dim, device=device) for dim in shape.latent_dims], 1)

    return normal


def released_net(shape: Shape) -> nn.Sequential:
    """Return the energy with torch's old spectral norm, which iterates at each training forward."""
    widths = [sum(shape.latent_dims), *[shape.width] * shape.depth]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.utils.spectral_norm(nn.Linear(inputs, outputs)), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers, nn.utils.spectral_norm(nn.Linear(shape.width, 1)))


@torch.no_grad()
def resolved(net: nn.Sequential) -> ResolvedEnergy:
    """Return the net's function with the norms of its last forward."""
    linears = [layer for layer in net if isinstance(layer, nn.Linear)]
    return ResolvedEnergy(
        tuple((layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in linears)
    )


def released(net: nn.Sequential, shape: Shape, start_BD: Tensor) -> Tensor:
    """Sample as the paper's released code does: a tensor for each latent layer, autograd at each step."""
    zs = [z.clone().requires_grad_() for z in torch.split(start_BD, list(shape.latent_dims), dim=1)]
    s = shape.step_size
    for _ in range(shape.steps):
        gradients = torch.autograd.grad(net(torch.cat(zs, 1)).squeeze(1).sum(), zs)
        for z, gradient in zip(zs, gradients, strict=True):
            z.data += 0.5 * s * s * (gradient - z.data)
            z.data += s * torch.randn_like(z)
    return torch.cat([z.detach() for z in zs], 1)


def ours(energy: ResolvedEnergy, shape: Shape, start_BD: Tensor) -> dict[str, Way]:
    """Return our implementations: the reference, torch in closed form, C if it runs, a user's own energy."""
    how: dict[str, Any] = {"steps": shape.steps, "step_size": shape.step_size}
    normal = gaussian_noise(2, 0, start_BD.device)(0, "chain")
    score = score_of(lambda z: energy.f(z) - 0.5 * z.square().sum(1))
    ways: dict[str, Way] = {
        "autograd, norm resolved": lambda: langevin(score, start_BD, normal, **how)[0],
        "torch": lambda: closed_form_langevin(energy, start_BD, normal, kernel=TORCH, **how)[0],
    }
    drawings: dict[str, Callable[[], Normal]] = {
        "torch's noise": lambda: normal,
        "Philox noise": lambda: PhiloxNoise(normal),
    }
    for noise, drawn in drawings.items():
        kernel = fastest(energy, start_BD, philox=noise == "Philox noise")
        if kernel.compiled is not None:
            name = kernel.description.partition(" ")[0]
            ways[f"{name}, {noise}"] = partial(_in_kernel, kernel, energy, start_BD, drawn, how)
    return {**ways, **plug_ins(energy, start_BD, normal, **how)}


def _in_kernel(
    kernel: Kernel, energy: ResolvedEnergy, start_BD: Tensor, noise: Callable[[], Normal], how: dict[str, Any]
) -> Tensor:
    return closed_form_langevin(energy, start_BD, noise(), kernel=kernel, **how)[0]


def torchebm(energy: ResolvedEnergy, shape: Shape, start_BD: Tensor) -> dict[str, Way]:
    """Return torchebm's Langevin sampler on the same density, weights resolved; empty if not installed."""
    if not importlib.util.find_spec("torchebm"):
        return {}
    core, samplers = (importlib.import_module(f"torchebm.{part}") for part in ("core", "samplers"))

    class Energy(core.BaseModel):  # type: ignore[misc, name-defined]
        def forward(self, z_BD: Tensor) -> Tensor:
            return 0.5 * z_BD.square().sum(1) - energy.f(z_BD)

    sampler = samplers.LangevinDynamics(
        Energy(), step_size=0.5 * shape.step_size**2, noise_scale=1.0, device=start_BD.device
    )
    version = importlib.import_module("importlib.metadata").version("torchebm")
    return {f"torchebm {version}": lambda: sampler.sample(x=start_BD.clone(), n_steps=shape.steps)}


def blackjax(energy: ResolvedEnergy, shape: Shape, start_BD: Tensor) -> dict[str, Way]:
    """Return blackjax's stochastic-gradient Langevin kernel, jitted over all steps; empty without it."""
    if not importlib.util.find_spec("blackjax"):
        return {}
    jax, blackjax_ = (importlib.import_module(part) for part in ("jax", "blackjax"))
    layers = [
        (jax.numpy.asarray(w.cpu().numpy()), jax.numpy.asarray(b.cpu().numpy())) for w, b in energy.layers
    ]

    def log_density(z: Any) -> Any:  # noqa: ANN401 (jax arrays; jax is optional)
        h = z
        for weight, bias in layers[:-1]:
            h = jax.nn.leaky_relu(h @ weight.T + bias, SLOPE)
        return (h @ layers[-1][0].T).sum() - 0.5 * (z**2).sum()

    gradient = jax.grad(log_density)
    kernel = blackjax_.sgld(lambda z, _: gradient(z))

    @jax.jit  # type: ignore[untyped-decorator, unused-ignore]
    def chain(key: Any, z: Any) -> Any:  # noqa: ANN401
        def step(z: Any, key: Any) -> tuple[Any, None]:  # noqa: ANN401
            return kernel.step(key, z, None, 0.5 * shape.step_size**2), None

        return jax.lax.scan(step, z, jax.random.split(key, shape.steps))[0]

    start, key = jax.numpy.asarray(start_BD.cpu().numpy()), jax.random.key(0)

    def run() -> Tensor:
        return torch.utils.dlpack.from_dlpack(chain(key, start).block_until_ready()).to(start_BD.device)

    return {f"blackjax {blackjax_.__version__} sgld": run}


if __name__ == "__main__":
    sys.exit(main())
