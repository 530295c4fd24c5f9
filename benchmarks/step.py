"""Time one training iteration: ours against the paper's released one, each in a separate process.

    benchmarks/step.py                          four configurations, float32
    benchmarks/step.py --precisions fp32 bf16   also bfloat16, if the CPU has it
    benchmarks/step.py --clock cpu --threads 1  on a busy machine: CPU time instead of wall time
    benchmarks/step.py --device cuda            on a GPU
    benchmarks/step.py --configs hs_small --batches 25 50 100 200 --plot FOLDER   also a plot

The released iteration is reimplemented here: its nets (channels first in memory), its two losses with the
energy evaluated in both, torch's old spectral norm in training mode, a Langevin chain by autograd, Adam in
torch's plain loop, and every logged figure copied to the host at each step. Before measuring, the losses and
gradients of both are compared at the same weights and noise. Both get the same batch; the time that ours
needs to load one has its own column (the released code decodes and resizes pictures in the training process;
that is left out). The processes take turns, one iteration each; figures are medians with quartiles. Ours is
`JointUpdate` with all process settings of `fit`.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from chain import Shape, released, released_net  # type: ignore[import-not-found, unused-ignore]
from plots import MILLISECONDS, draw  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from jebm.config import Config
from jebm.core.energy import EnergyNet, SpectralLinear
from jebm.core.model import JointModel, build_model
from jebm.core.objective import Objective
from jebm.data.loader import to_float
from jebm.parser import load_config
from jebm.rng import gaussian_noise
from jebm.train.metrics import Clock, Meter
from jebm.train.runtime import Runtime, prepare_process
from jebm.train.state import Horizon, TrainState
from jebm.train.update import JointUpdate

__all__ = ["Released", "gradients_of_both", "main"]

_JOBS = Path(__file__).resolve().parents[1] / "jobs" / "configs"

_HALF_WIDTH: dict[str, object] = {
    "model.image_channels": 1,
    "inference.channels": [16, 32, 32],
    "inference.width": 128,
    "generator.channels": [16, 32, 32],
    "generator.width": 128,
}

CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "hs": ("svhn_hierarchical", {}),
    "hs_small": ("svhn_hierarchical", _HALF_WIDTH),
    "fashion_mnist": (
        "fashion_mnist",
        {
            "cluster.workers": 1,
            "train.gaussian_share": 0.0,
            "train.energy_updates": 1,
            # The released code fixes sigma, and lets all layers join at once.
            "likelihood.learn_std": "no",
            "hierarchy.rate_factor": 1.0,
        },
    ),
    "fid": ("svhn_fid", {}),
}

PARTS = ("chain", "forward", "backward", "optimizer")


def config_of(name: str, precision: str = "fp32", batch: int | None = None) -> Config:
    """Return the configuration of that name in `CONFIGS`, by default with its own batch size."""
    file, changes = CONFIGS[name]
    batches = {} if batch is None else {"train.batch_size": batch}
    return load_config(_JOBS / f"{file}.yaml", {**changes, **batches, "train.precision": precision})


class ReleasedInference(nn.Module):
    """The ladder as released: two linear heads per layer, and no choice of memory format."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels = (config.model.image_channels, *config.inference.channels)
        size = config.model.image_size >> len(config.inference.channels)
        top, width = channels[-1] * size**2, config.inference.width

        def down(channels_in: int, channels_out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 4, 2, 1, bias=False),
                nn.LeakyReLU(0.01),
                nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False),
                nn.LeakyReLU(0.01),
            )

        # The trunk, a head for each layer, then the moments.
        self.trunk = nn.ModuleList(down(a, b) for a, b in pairwise(channels))
        self.heads = nn.ModuleList(nn.Sequential(down(a, b), nn.Flatten()) for a, b in pairwise(channels))
        self.heads.append(
            nn.Sequential(
                nn.Flatten(),
                nn.Linear(top, width),
                nn.LeakyReLU(0.01),
                nn.Linear(width, width),
                nn.LeakyReLU(0.01),
            )
        )
        sizes = [config.model.image_size >> k for k in range(1, len(channels))]
        features = [c * s**2 for c, s in zip(channels[1:], sizes, strict=True)] + [width]
        dims = config.model.latent_dims
        self.means = nn.ModuleList(nn.Linear(n, dim) for n, dim in zip(features, dims, strict=True))
        self.log_variances = nn.ModuleList(nn.Linear(n, dim) for n, dim in zip(features, dims, strict=True))

    def forward(self, x_BCHW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (mean, log variance) of each layer, bottom first."""
        moments, r = [], x_BCHW
        for i, head in enumerate(self.heads):
            h = head(r)
            moments.append((self.means[i](h), self.log_variances[i](h)))
            if i < len(self.trunk):
                r = self.trunk[i](r)
        return moments


class ReleasedGenerator(nn.Module):
    """The generator as released: 3 × 3 convolutions are transposed, too."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dims, width = config.model.latent_dims, config.generator.width
        levels, self.concat = len(dims) - 1, config.generator.join == "concat"
        channels = config.generator.channels
        if not self.concat:
            channels = (config.model.image_channels, *channels)
        sizes = [config.model.image_size >> k for k in range(levels + 1)]
        act = nn.LeakyReLU(0.2)

        def same(channels_in: int, channels_out: int) -> nn.Module:
            return nn.ConvTranspose2d(channels_in, channels_out, 3, 1, 1, bias=False)

        def up(channels_in: int, channels_out: int) -> nn.Module:
            return nn.ConvTranspose2d(channels_in, channels_out, 4, 2, 1, bias=False)

        # Levels top first, in the order of computation.
        self.joins, self.bodies = nn.ModuleList(), nn.ModuleList()
        for i in range(levels, 0, -1):
            a, b, plane = channels[i], channels[i - 1], (channels[i], sizes[i], sizes[i])
            spread = nn.Linear(dims[i - 1], math.prod(plane))
            if self.concat:
                self.joins.append(nn.Sequential(spread, act, nn.Unflatten(1, plane)))
                self.bodies.append(nn.Sequential(same(2 * a, a), act, up(a, b), act, same(b, b), act))
            elif i == levels:
                self.joins.append(nn.Linear(dims[i - 1], a))
                first = nn.Sequential(nn.Linear(a, math.prod(plane)), act, nn.Unflatten(1, plane))
                self.bodies.append(nn.Sequential(first, up(a, a), act, same(a, b)))
            else:
                self.joins.append(nn.Sequential(spread, nn.Unflatten(1, plane)))
                self.bodies.append(nn.Sequential(up(a, a), act, same(a, b)))
        plane = (channels[levels], sizes[levels], sizes[levels])
        out = math.prod(plane) if self.concat else channels[levels]
        top = [nn.Linear(dims[-1], width), act, nn.Linear(width, width), act, nn.Linear(width, out)]
        self.top = nn.Sequential(*top, *([act, nn.Unflatten(1, plane)] if self.concat else []))
        last = [same(channels[0], config.model.image_channels)] if self.concat else []
        self.final = nn.Sequential(*last, nn.Tanh())

    def forward(self, zs: list[Tensor]) -> Tensor:
        """Return the mean of p(x|z) for the latent layers, bottom first."""
        h = self.top(zs[-1])
        for join, body, z in zip(self.joins, self.bodies, reversed(zs[:-1]), strict=True):
            h = body(torch.cat([h, join(z)], 1) if self.concat else h + join(z))
        x: Tensor = self.final(h)
        return x


class Released:
    """The released training iteration."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.dims, self.device = list(config.model.latent_dims), device
        self.factor = 1 / (2 * config.likelihood.std**2)
        energy, langevin = config.energy, config.langevin
        # The energy's scale is ours; in the released code it is 1, and costs nothing.
        self.scale = energy.output_scale
        self.shape = Shape(tuple(self.dims), energy.depth, energy.width, langevin.steps, langevin.step_size)
        self.inference = ReleasedInference(config).to(device)
        self.generator = ReleasedGenerator(config).to(device)
        self.energy = released_net(self.shape).to(device)
        rest = [*self.inference.parameters(), *self.generator.parameters()]
        self.adam, self.energy_adam = (
            torch.optim.Adam(
                parameters, lr=o.lr, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay, foreach=False
            )
            for parameters, o in (
                (rest, config.optimizer.generator),
                (list(self.energy.parameters()), config.optimizer.energy),
            )
        )

    def f(self, zs: Sequence[Tensor]) -> Tensor:
        """Return f, (B,)."""
        f_B: Tensor = self.scale * self.energy(torch.cat(tuple(zs), 1)).squeeze(1)
        return f_B

    def first_loss(
        self, x_BCHW: Tensor, noise: Sequence[Tensor], *, exact_rate: bool = False
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the loss of generator and inference net, the logged values, and z_q.

        The rate is estimated from z_q as released, or exact as in ours (`exact_rate`): equal in expectation.
        """
        moments = self.inference(x_BCHW)
        zs = [mean + torch.exp(0.5 * v) * e for (mean, v), e in zip(moments, noise, strict=True)]
        if exact_rate:
            rates = [0.5 * (mean**2 + v.exp() - 1 - v).sum(1).mean() for mean, v in moments]
        else:
            rates = [
                (0.5 * z**2 - 0.5 * (v + (z - mean) ** 2 / v.exp())).sum(1).mean()
                for z, (mean, v) in zip(zs, moments, strict=True)
            ]
        f_posterior = self.f(zs).mean()
        error = F.mse_loss(self.generator(zs), x_BCHW, reduction="sum") / len(x_BCHW)
        loss = self.factor * error + sum(rates) - f_posterior
        return loss, [error, *rates], zs

    def second_loss(self, zs: Sequence[Tensor], prior_zs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the energy's loss, and the logged values."""
        f_posterior, f_prior = self.f([z.detach() for z in zs]).mean(), self.f(prior_zs).mean()
        return f_prior - f_posterior, [f_posterior, f_prior]

    def iterate(self, x_BCHW: Tensor, mark: Callable[[str], None]) -> None:
        """Do one iteration; `mark(part)` is called when a part is done."""
        self.adam.zero_grad()
        noise = [torch.randn(len(x_BCHW), dim, device=self.device) for dim in self.dims]
        loss, shown, zs = self.first_loss(x_BCHW, noise)
        _ = [value.item() for value in shown]
        mark("forward")
        torch.autograd.backward(loss)
        mark("backward")
        self.adam.step()
        mark("optimizer")
        self.energy_adam.zero_grad()
        start = torch.randn(len(x_BCHW), sum(self.dims), device=self.device)
        prior_zs = torch.split(released(self.energy, self.shape, start), self.dims, 1)
        mark("chain")
        loss, shown = self.second_loss(zs, prior_zs)
        mark("forward")
        torch.autograd.backward(loss)
        mark("backward")
        self.energy_adam.step()
        _ = [value.item() for value in shown]
        mark("optimizer")

    def pairs(self, model: JointModel) -> list[tuple[Tensor, str, Callable[[Tensor], Tensor]]]:
        """Return (parameter here, its name in `model`, map from that one to it), for every parameter.

        The map is linear and orthogonal, so it is valid for gradients as well.
        """

        def turned(w: Tensor) -> Tensor:
            return w.flip(2, 3).transpose(0, 1)  # a 3 x 3 convolution as a transposed one

        def same(w: Tensor) -> Tensor:
            return w

        convolutions = {
            id(p)
            for m in self.generator.modules()
            if isinstance(m, nn.ConvTranspose2d) and m.kernel_size[0] == 3
            for p in m.parameters()
        }
        named = dict(model.named_parameters())
        pairs: list[tuple[Tensor, str, Callable[[Tensor], Tensor]]] = []
        ladder = self.inference
        # The ladder, whose moments we hold in one map and the released code in two.
        names = [n for n in named if n.startswith("inference.") and ".moments." not in n]
        pairs += zip(
            [*ladder.trunk.parameters(), *ladder.heads.parameters()], names, [same] * len(names), strict=True
        )
        for i, (mean, log_variance) in enumerate(zip(ladder.means, ladder.log_variances, strict=True)):
            for part in ("weight", "bias"):
                name = f"inference.moments.{i}.{part}"
                pairs.append((getattr(mean, part), name, lambda w: w.chunk(2)[0]))
                pairs.append((getattr(log_variance, part), name, lambda w: w.chunk(2)[1]))
        # The generator, then the energy.
        theirs = [
            p
            for join, body in zip(self.generator.joins, self.generator.bodies, strict=True)
            for p in (*join.parameters(), *body.parameters())
        ]
        theirs += [*self.generator.top.parameters(), *self.generator.final.parameters()]
        names = [n for n in named if n.startswith("generator.")]
        pairs += [
            (p, n, turned if id(p) in convolutions else same) for p, n in zip(theirs, names, strict=True)
        ]
        linears = [layer for layer in self.energy if isinstance(layer, nn.Linear)]
        for i, linear in enumerate(linears):
            pairs.append((linear.get_parameter("weight_orig"), f"energy.linears.{i}.weight", same))
            pairs.append((linear.bias, f"energy.linears.{i}.bias", same))
        return pairs

    @torch.no_grad()
    def copy_from(self, model: JointModel) -> None:
        """Copy the weights of `model` and its spectral norm's vectors."""
        named = dict(model.named_parameters())
        for parameter, name, lay in self.pairs(model):
            parameter.copy_(lay(named[name]))
        assert isinstance(model.energy, EnergyNet)
        linears = [layer for layer in self.energy if isinstance(layer, nn.Linear)]
        for linear, ours in zip(linears, model.energy.linears, strict=True):
            linear.get_buffer("weight_u").copy_(ours.get_buffer("u"))
            linear.get_buffer("weight_v").copy_(ours.get_buffer("v"))


def gradients_of_both(
    config: Config, batch: int, autocast: torch.dtype | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return {name: (ours, released)}: both losses and all gradients, for the same weights and noise."""
    model = build_model(config)
    assert isinstance(model.energy, EnergyNet)
    for linear in model.energy.linears:
        if isinstance(linear, SpectralLinear):
            linear.iterate(1000)  # so that the released code's own iterations change nothing
    released_ = Released(config, torch.device("cpu"))
    released_.copy_from(model)
    stream = torch.Generator().manual_seed(0)
    image = (config.model.image_channels, config.model.image_size, config.model.image_size)
    x = torch.tanh(torch.randn(batch, *image, generator=stream))
    noise, prior_z = (torch.randn(batch, model.latent_dim, generator=stream) for _ in range(2))

    # Both losses of both, at the same point.
    terms = Objective(model, autocast=autocast)(x, noise, prior_z)
    torch.autograd.backward(terms.loss)
    loss, _, zs = released_.first_loss(x, torch.split(noise, released_.dims, 1), exact_rate=True)
    torch.autograd.backward(loss)
    released_.energy_adam.zero_grad()  # the released loop drops the first loss's energy gradients
    second, _ = released_.second_loss(zs, torch.split(prior_z, released_.dims, 1))
    torch.autograd.backward(second)
    both = {
        "first loss": ((terms.loss - terms.f_prior).detach(), loss.detach()),
        "second loss": (terms.f_prior - terms.f_posterior, second.detach()),
    }
    named = dict(model.named_parameters())
    for parameter, name, lay in released_.pairs(model):
        ours, theirs = named[name].grad, parameter.grad
        assert ours is not None
        assert theirs is not None
        both[f"{name} {tuple(parameter.shape)}"] = (lay(ours), theirs)
    return both


class Ours:
    """The iteration of `fit`: an update and the sum of its metrics."""

    def __init__(self, config: Config, device: torch.device) -> None:
        runtime, self.meter = Runtime(0, 1, device), Meter()
        self.state = TrainState.build(config, runtime)
        horizon, noise = Horizon(1000, 100_000), gaussian_noise(0, 0, device)
        self.update = JointUpdate(self.state, config, runtime, noise, horizon, Clock(device))
        self.mark: Callable[[str], None] = lambda _: None
        self.state.objective.register_forward_pre_hook(lambda *_: self.mark("chain"))
        self.state.objective.register_forward_hook(lambda *_: self.mark("forward"))
        self.state.players[0].adam.register_step_pre_hook(lambda *_: self.mark("backward"))

    def iterate(self, x_BCHW: Tensor, mark: Callable[[str], None]) -> None:
        """Do one iteration; `mark(part)` is called when a part is done."""
        self.mark = mark
        self.meter.add(self.update(x_BCHW).metrics)
        self.state.finite.check()
        mark("optimizer")


class Turn(NamedTuple):
    """What one process measured in one turn, in seconds."""

    seconds: float
    busy: float
    """CPU time over wall time."""
    parts: dict[str, float]
    data: float
    convolution: float
    """Seconds of a 3 x 3 convolution of 64 channels on 100 planes of 16 x 16: `CONVOLUTION_FLOP`."""


CONVOLUTION_FLOP = 2 * 100 * 16**2 * 9 * 64**2


def process(
    pipe: Connection,
    way: str,
    name: str,
    precision: str,
    batch: int | None,
    device_name: str,
    threads: int,
    clock: str,
) -> None:
    """Build one way and send its FLOP; then do an iteration and send a `Turn` per message, until None."""
    warnings.simplefilter("ignore")
    device = torch.device(device_name)
    config = config_of(name, precision, batch)
    config = replace(config, cluster=replace(config.cluster, cpus_per_worker=threads))
    if way == "ours":
        prepare_process(config, device)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    it = Ours(config, device) if way == "ours" else Released(config, device)
    model = config.model
    # A batch of images, and a convolution that shows the machine's rate.
    images = np.random.default_rng(0).integers(
        256, size=(5000, model.image_size, model.image_size, model.image_channels), dtype=np.uint8
    )
    rows = np.random.default_rng(1).permutation(5000)[: config.train.batch_size]
    x = to_float(images[rows], device)
    plane = torch.randn(100, 64, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device=device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    plane, weight = plane.to(dtype), weight.to(dtype)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.process_time() if clock == "cpu" else time.perf_counter()

    def seconds_of(work: Callable[[], object]) -> float:
        began = now()
        work()
        return now() - began

    # Count operations in a first iteration, warm up, then take turns.
    with FlopCounterMode(display=False) as counter:
        it.iterate(x, lambda _: None)
    it.iterate(x, lambda _: None)
    pipe.send(counter.get_total_flops())
    while pipe.recv() is not None:
        parts = dict.fromkeys(PARTS, 0.0)
        wall, cpu, began = time.perf_counter(), time.process_time(), now()
        last = began

        def mark(part: str, parts: dict[str, float] = parts) -> None:
            nonlocal last
            parts[part] += now() - last
            last = now()

        it.iterate(x, mark if device.type == "cpu" else lambda _: None)
        whole = now() - began
        busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
        if device.type == "cuda":  # again, since timing the parts synchronises
            last = now()
            it.iterate(x, mark)
        with torch.no_grad():
            convolution = seconds_of(lambda: F.conv2d(plane, weight, padding=1))
        pipe.send(Turn(whole, busy, parts, seconds_of(lambda: to_float(images[rows], device)), convolution))


def measure(name: str, batch: int | None, arguments: argparse.Namespace) -> dict[str, float]:
    """Time the ways of one configuration in turn, print their table and return their milliseconds."""
    worst = 0.0
    for key, (ours, theirs) in gradients_of_both(config_of(name), 4).items():
        error = ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()
        worst = max(worst, error)
        # In the wide nets of fid, both differ from the float64 gradients by up to 1e-3.
        assert error < 1e-2, f"{name}: {key} differs by {error}"
    size = config_of(name, batch=batch).train.batch_size
    print(f"\n{name}, batch {size}")
    print(f"losses and gradients equal the released ones to {worst:.0e} (relative, batch of 4)")
    ways = [("released", "fp32"), *(("ours", precision) for precision in arguments.precisions)]
    context = multiprocessing.get_context("spawn")
    pipes, processes, flops = [], [], []
    for way, precision in ways:
        pipe, other = context.Pipe()
        child = context.Process(
            target=process,
            args=(other, way, name, precision, batch, arguments.device, arguments.threads, arguments.clock),
            daemon=True,
        )
        child.start()
        pipes.append(pipe)
        processes.append(child)
        flops.append(pipe.recv())
    turns: list[list[Turn]] = [[] for _ in ways]
    for _ in range(arguments.turns):
        for pipe, seen in zip(pipes, turns, strict=True):
            pipe.send("go")
            seen.append(pipe.recv())
    for pipe, child in zip(pipes, processes, strict=True):
        pipe.send(None)
        child.join()
    config = config_of(name, batch=batch)
    # torch does not count a C kernel's operations: ours get the chain's products from its shape.
    chain = Shape(
        config.model.latent_dims, config.energy.depth, config.energy.width, config.langevin.steps, 0.0
    ).flop(config.train.batch_size)
    print(
        "| | ms | quartiles | times released | chain | forward | backward | optimizer | data | GFLOP "
        "| of a convolution's rate | CPU / wall |\n" + "|---" * 12 + "|"
    )
    first = statistics.median(turn.seconds for turn in turns[0])
    medians: dict[str, float] = {}
    for (way, precision), seen, flop in zip(ways, turns, flops, strict=True):
        low, middle, high = statistics.quantiles([turn.seconds for turn in seen], n=4)
        rate = CONVOLUTION_FLOP / statistics.median(turn.convolution for turn in seen)
        total = flop if way == "released" else flop + chain
        parts = [1e3 * statistics.median(turn.parts[part] for turn in seen) for part in PARTS]
        data = "" if way == "released" else f"{1e3 * statistics.median(turn.data for turn in seen):.1f}"
        print(
            f"| {way} {precision} | {1e3 * middle:.1f} | {1e3 * low:.1f} to {1e3 * high:.1f} "
            f"| {first / middle:.2f} | "
            + " | ".join(f"{part:.1f}" for part in parts)
            + f" | {data} | {total / 1e9:.1f} | {total / middle / rate:.0%} of {rate / 1e9:.0f} GFLOP/s "
            f"| {statistics.median(turn.busy for turn in seen):.2f} |",
            flush=True,
        )
        medians[f"{way} {precision}"] = 1e3 * middle
    return medians


def main() -> int:
    """Print a table for each configuration; return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="benchmarks/step.py", description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "tf32", "bf16"], default=["fp32"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", nargs="+", type=int, help="instead of the configuration's own batch")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the time against --batches")
    arguments: Any = parser.parse_args()
    if arguments.plot is not None and arguments.batches is None:
        parser.error("--plot needs --batches")
    warnings.simplefilter("ignore")  # torch's old spectral norm
    torch.set_num_threads(arguments.threads)
    where = f"{arguments.threads} thread(s), {arguments.clock} time, {arguments.device}"
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {where}")
    for name in arguments.configs:
        found = [measure(name, batch, arguments) for batch in arguments.batches or [None]]
        if arguments.plot is not None:
            draw(
                arguments.plot / f"step-{name}.svg",
                f"Time of an iteration of {name} against the batch",
                "images in a batch",
                MILLISECONDS[arguments.clock],
                arguments.batches,
                {way: [medians[way] for medians in found] for way in found[0]},
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
