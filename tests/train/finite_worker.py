"""Steps in which nothing may be read from a tensor; `finite_worker.py RANKS FILE` does them in processes.

At one step one rank's images hold an infinity: it must be named, and nothing may have moved by it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forked import exit_code
from jebm.data.dataset import load_images
from jebm.data.loader import Loader
from jebm.errors import DivergedError
from jebm.rng import gaussian_noise
from jebm.store.storage import open_store
from jebm.train.finite import Finite
from jebm.train.group import process_group
from jebm.train.metrics import Clock, Meter
from jebm.train.runtime import Runtime, member_runtime, prepare_process
from jebm.train.state import Horizon, TrainState
from jebm.train.update import JointUpdate

READERS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "__array__")
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal")


class _NoWaiting(TorchDispatchMode):
    """Refuses the operations by which torch itself would read from a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not str(func).startswith(WAITING), f"{func} waits for the device"
        return func(*args, **kwargs or {})


@contextmanager
def no_reads() -> Iterator[None]:
    def refuse(name: str) -> Callable[..., object]:
        def read(*_: object) -> object:
            raise AssertionError(f"Tensor.{name} in a step")

        return read

    with ExitStack() as stack:
        for name in READERS:
            stack.enter_context(patch.object(Tensor, name, refuse(name)))
        stack.enter_context(_NoWaiting())
        yield


def work(runtime: Runtime, noise: str = "philox", *, late: bool = True) -> None:
    """Do four steps, the last one with an infinity in the last rank's images, and check what is known."""
    config = tiny_config(
        "unused",
        cluster__workers=runtime.world_size,
        train__ema_decay=0.9,
        train__energy_updates=2,
        train__accumulate=2,
        optimizer__energy__clip_norm=0.1,
        langevin__noise=noise,
    )
    prepare_process(config, runtime.device)
    images = load_images(open_store(config.data.train))
    place = {"rank": runtime.rank, "world_size": runtime.world_size}
    loader = Loader(images, batch_size=64, **place, seed=0, device=runtime.device)
    state = TrainState.build(config, runtime)
    state.finite = Finite(runtime.device, late=late)
    for player in state.players:
        player.adam.found_inf = state.finite.found_inf  # type: ignore[attr-defined]
    noises = gaussian_noise(0, runtime.rank)
    update = JointUpdate(state, config, runtime, noises, Horizon(25, 100), Clock(runtime.device))
    meter = Meter()

    def step(x: Tensor) -> None:
        with no_reads():
            meter.add(update(x, stop=False).metrics)

    for i in range(3):
        step(loader.batch(i))
        state.finite.check()
    state.finite.check(now=True)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    bad = loader.batch(3)
    if runtime.rank == runtime.world_size - 1:
        bad[0, 0, 0, 0] = torch.inf
    step(bad)
    if late:
        state.finite.check()  # not yet known
        step(loader.batch(4))
    with pytest.raises(DivergedError, match="not finite at step 3 "):
        state.finite.check()
    # Nothing moved at the step, nor after it; of the singular vectors only the iterations went on.
    after = state.tensors()
    still = [name for name in before if not name.startswith("ema.") and not name.endswith((".u", ".v"))]
    assert len(still) > 50
    assert [name for name in still if not torch.equal(before[name], after[name])] == []
    assert all(tensor.isfinite().all() for tensor in after.values())


def process(rank: int, world_size: int, meeting: str) -> None:
    place = {"rank": rank, "world_size": world_size}
    with ExitStack() as stack:
        stack.enter_context(process_group("gloo", init_method=f"file://{meeting}", **place))
        work(stack.enter_context(member_runtime(**place, device=torch.device("cpu"))))


if __name__ == "__main__":
    sys.exit(exit_code(process, int(sys.argv[1]), int(sys.argv[1]), sys.argv[2]))
