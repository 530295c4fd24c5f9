"""Count what one training step would launch on a GPU, without one.

    benchmarks/launches.py                       a table of all configurations
    benchmarks/launches.py --operations          also the operations behind it

A step of `JointUpdate` runs on the CPU; each torch operation that computes counts as one kernel, and so
does each launch of a Triton kernel, which is not run. Where losses are compiled (`train.compile`; a minute
or more), each kernel counts that torch's compiler makes, and each operation of a library that its code
calls. All that is a lower bound: cuDNN's backward passes are several kernels each, and so are changes of
layout. Noise is Philox's.
"""

import argparse
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from step import config_of  # type: ignore[import-not-found, unused-ignore]
from torch._inductor.output_code import CompiledFxGraph
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from jebm.native import triton_chain, triton_power
from jebm.parser import override
from jebm.rng import gaussian_noise
from jebm.train.metrics import Clock, Meter
from jebm.train.runtime import Runtime
from jebm.train.state import Horizon, TrainState
from jebm.train.update import EnergyUpdate, JointUpdate

__all__ = ["count", "main"]

_CALLS = re.compile(r"((?:cpp_fused|extern_kernels\.|torch\.ops\.)[\w.]+)\(")
"""Calls in the code that torch's compiler generates for a CPU."""

_VIEWS = {
    *("alias", "as_strided", "detach", "diagonal", "expand", "permute", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view"),
    *("_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty"),
    *("new_empty_strided", "lift_fresh", "is_same_size"),
    *("_record_function_enter_new", "_record_function_exit"),
}
"""Operations that launch nothing: they give memory, or another view of it."""


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by part and name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "rest"
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        name = func.overloadpacket.__name__
        if name not in _VIEWS:
            self.launch(name)
        return func(*args, **kwargs or {})

    def launch(self, name: str) -> None:
        """Count one more of this name."""
        self.found[self.part, name] += 1

    def within(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, which counts as this part."""

        def counted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            before, self.part = self.part, part
            try:
                return function(*args, **kwargs)
            finally:
                self.part = before

        return counted


def _uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, whose operations count for nothing: torch runs nothing compiled where they do."""

    def uncounted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with _disable_current_modes():
            return function(*args, **kwargs)

    return uncounted


@contextmanager
def _triton_as_on_a_gpu(counter: _Counter) -> Iterator[None]:
    """Let chain and power iterations go by Triton's kernels, whose launches count and do nothing."""

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, _: object) -> Callable[..., None]:
            return lambda *_args, **_kwargs: counter.launch(self.name)

    names = ("chain_kernel", "noise_kernel", "power_kernel")
    module = types.ModuleType("jebm.native.triton_kernel")
    module.__dict__.update({name: Launch(name) for name in names})
    before, hindrance, usable = sys.modules.get(module.__name__), triton_chain.hindrance, triton_power.usable
    sys.modules[module.__name__] = module
    triton_chain.hindrance = lambda *_, **_named: None
    triton_power.usable = lambda weight_OI: weight_OI.dim() == 2
    try:
        yield
    finally:
        triton_chain.hindrance, triton_power.usable = hindrance, usable
        del sys.modules[module.__name__]
        if before is not None:
            sys.modules[module.__name__] = before


@contextmanager
def _compiled_as_on_a_gpu(counter: _Counter) -> Iterator[None]:
    """Let calls of compiled graphs count the kernels and the library's operations in their code."""
    run = CompiledFxGraph.__call__

    def call(graph: CompiledFxGraph, inputs: Any) -> Any:  # noqa: ANN401
        body = graph.source_code[graph.source_code.index("def call(") :]
        for name in _CALLS.findall(body):
            counter.launch(name)
        return _uncounted(run)(graph, inputs)

    CompiledFxGraph.__call__ = call  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        CompiledFxGraph.__call__ = run  # type: ignore[method-assign]


def count(name: str, batch: int, changes: Mapping[str, object]) -> Counter[tuple[str, str]]:
    """Return how often a step of a configuration launches what: (part, operation) -> number."""
    config = override(config_of(name, batch=batch), {"langevin.noise": "philox", **changes})
    runtime, counter = Runtime(0, 1, torch.device("cpu")), _Counter()
    with _triton_as_on_a_gpu(counter), _compiled_as_on_a_gpu(counter):
        state = TrainState.build(config, runtime)
        noise = gaussian_noise(0, 0)
        horizon = Horizon(10, 1000)
        update = JointUpdate(state, config, runtime, noise, horizon, Clock(runtime.device))
        energy = update._energy
        assert isinstance(energy, EnergyUpdate)
        energy.sample = counter.within("chain", energy.sample)  # type: ignore[assignment]
        energy.net.settle = counter.within("power iterations", energy.net.settle)  # type: ignore[method-assign]
        state.average = counter.within("averaged weights", state.average)  # type: ignore[method-assign]
        model, autograd = config.model, torch.autograd
        shape = batch, model.image_channels, model.image_size, model.image_size
        x_BCHW, meter = torch.zeros(shape), Meter()
        if config.train.compile:
            list(update.compile(x_BCHW))
            forward = state.objective._compiled_call_impl
            assert forward is not None
            state.objective._compiled_call_impl = _uncounted(counter.within("forward", forward))
            energy._loss = _uncounted(energy._loss)
        else:
            state.objective.forward = counter.within("forward", state.objective.forward)
        meter.add(update(x_BCHW).metrics)
        counter.found.clear()
        backward, grad = autograd.backward, autograd.grad
        autograd.backward = counter.within("backward", backward)
        autograd.grad = counter.within("backward", grad)
        try:
            with counter:
                meter.add(update(x_BCHW).metrics)
        finally:
            autograd.backward, autograd.grad = backward, grad
    return counter.found


PARTS = ("power iterations", "averaged weights", "chain", "forward", "backward", "rest")

_FASHION = {"train.energy_updates": 3, "likelihood.learn_std": "shared"}

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "hs": ("hs", {}),
    "hs, averaged weights": ("hs", {"train.ema_decay": 0.999}),
    "fashion_mnist": ("fashion_mnist", _FASHION),
    "fashion_mnist, compiled": ("fashion_mnist", {**_FASHION, "train.compile": True}),
    "hs, compiled": ("hs", {"train.compile": True}),
    "fid": ("fid", {}),
    "fid, compiled": ("fid", {"train.compile": True}),
}


def main() -> int:
    """Print the table; return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="benchmarks/launches.py", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--operations", action="store_true", help="print how often which operation runs")
    arguments = parser.parse_args()
    print("| | all | " + " | ".join(PARTS) + " |\n|---|---|" + "---|" * len(PARTS))
    for case in arguments.cases:
        name, changes = CASES[case]
        found = count(name, 4 if name == "fid" else 16, changes)
        parts = [sum(n for (part, _), n in found.items() if part == each) for each in PARTS]
        print(f"| {case} | {found.total():,} | " + " | ".join(f"{n:,}" for n in parts) + " |", flush=True)
        if arguments.operations:
            for (part, operation), number in sorted(found.items(), key=lambda item: (item[0][0], -item[1])):
                print(f"  {part}: {operation} {number}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
