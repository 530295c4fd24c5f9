"""A worker's rank and device, and the few collectives that training needs."""

import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from jebm.config import Config
from jebm.core.precision import set_tf32
from jebm.errors import ConfigError, JebmError
from jebm.train.group import ControlGroup, process_group
from jebm.train.memory import keep_freed_memory

__all__ = [
    "STOPPING",
    "Runtime",
    "check_cuda",
    "check_processes",
    "device_here",
    "device_of",
    "first_signal",
    "member_runtime",
    "prepare_process",
    "process_runtime",
    "started_by_torchrun",
]

STOPPING = "stopping after this step, with a last checkpoint; a second signal ends it at once, without one"
"""The answer to the first signal."""

_LOG = logging.getLogger("jebm.train")

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """One worker: its rank, the world size, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device
    supervised: bool = False
    """Whether something restarts this process if it ends: Ray Train, Tune or torchrun."""
    control: ControlGroup | None = None
    """What several workers agree by; None if this is the only one."""

    def __post_init__(self) -> None:
        """Refuse several workers that could not agree."""
        if (self.world_size > 1) != (self.control is not None):
            raise ValueError("several workers need a control group, and one has none: use member_runtime")

    @property
    def is_main(self) -> bool:
        """Whether this worker writes logs and checkpoints."""
        return self.rank == 0

    def agree(self, *flags: bool) -> list[bool]:
        """Return, for each flag, whether it is true on every rank (one all-reduce for all flags)."""
        if self.control is None:
            return list(flags)
        votes = np.array(flags, dtype=np.int32)  # on the host: no device waits for it
        dist.all_reduce(torch.from_numpy(votes), dist.ReduceOp.MIN, group=self.control.group)
        return [bool(vote) for vote in votes]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise a `JebmError` of any rank on all ranks; the body must not run collectives.

        Otherwise the others would wait in their next collective for a rank that is gone.
        """
        error: JebmError | None = None
        try:
            yield
        except JebmError as raised:
            error = raised
        for first in filter(None, self.gathered(error)):
            raise first

    def gathered(self, value: T) -> list[T]:
        """Return every rank's `value`, a small plain object, by rank, on every rank."""
        values = [value] * self.world_size
        if self.control is not None:
            dist.all_gather_object(values, value, group=self.control.group)
        return values

    def from_main(self, value: T) -> T:
        """Return rank 0's `value`, a small plain object, on every rank."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control.group)
        return box[0]

    def added(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks of a tensor on the CPU, however long another rank takes."""
        if self.control is not None:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.control.group)
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over ranks."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of `tensor` over ranks."""
        return self.total(tensor) / self.world_size if self.world_size > 1 else tensor


@contextmanager
def member_runtime(
    rank: int, world_size: int, device: torch.device, *, supervised: bool = False
) -> Iterator[Runtime]:
    """Yield the runtime of one of torch.distributed's processes, or of the only one."""
    control = ControlGroup() if world_size > 1 else None
    try:
        yield Runtime(rank, world_size, device, supervised, control)
    finally:
        if control is not None:
            control.close()


def device_of(config: Config, index: int = 0) -> torch.device:
    """Return the device that a worker trains on, the GPU of this index or the CPU."""
    return torch.device("cuda", index) if config.cluster.gpus_per_worker else torch.device("cpu")


def device_here(config: Config) -> torch.device:
    """Return `device_of`, or the CPU if this machine has no GPU, as a cluster's head."""
    return device_of(config) if torch.cuda.is_available() else torch.device("cpu")


def prepare_process(config: Config, device: torch.device) -> None:
    """Set this process's memory, threads, precision, determinism and device as configured."""
    keep_freed_memory()
    rounded = config.train.precision == "tf32"
    set_tf32(convolutions=rounded, linear=rounded)
    # The gradient of a one-channel convolution has ambiguous strides; DDP copies it and warns.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    torch.set_num_threads(config.cluster.cpus_per_worker)
    slow = config.train.precision == "bf16" and device.type == "cpu"
    if slow and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        _LOG.warning(
            "train.precision: this CPU has no bfloat16 arithmetic: bf16 is emulated, and far slower than fp32"
        )
    torch.use_deterministic_algorithms(config.run.deterministic, warn_only=True)
    # In deterministic mode torch also fills new memory with NaN, to reveal reads before writes. Determinism
    # does not need that, and it costs 3 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
        torch.cuda.set_device(device)
        torch.cuda.set_per_process_memory_fraction(float(config.cluster.gpus_per_worker) or 1.0, device)
        torch.backends.cudnn.deterministic = config.run.deterministic
        torch.backends.cudnn.benchmark = not config.run.deterministic


@contextmanager
def first_signal(react: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call `react` on the first SIGTERM or SIGINT within; a second one has its usual effect.

    `react` may interrupt anything in the main thread, even a print. Called in another thread, this changes
    nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _: FrameType | None) -> None:
        restore()
        react(signal.Signals(number))

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def check_cuda(key: str, otherwise: str) -> None:
    """Raise `ConfigError` under the key or option that asks for a GPU if torch finds none here."""
    if not torch.cuda.is_available():
        raise ConfigError(f"{key}: torch finds no CUDA device on this machine; {otherwise}")


def check_processes(config: Config) -> None:
    """Raise `ConfigError` if the number of processes is not `cluster.workers`."""
    processes = int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1
    if processes != config.cluster.workers:
        raise ConfigError(
            f"cluster.workers: is {config.cluster.workers}, but "
            + (f"torchrun started {processes}" if started_by_torchrun() else "this is one process")
        )
    if config.cluster.gpus_per_worker:
        check_cuda("cluster.gpus_per_worker", "set it to 0")


@contextmanager
def process_runtime(config: Config) -> Iterator[Runtime]:
    """Yield the runtime of plain Python (one worker) or of a process started by torchrun.

    Raises:
        ConfigError: as `check_processes`.
    """
    check_processes(config)
    rank, world_size, local_rank = 0, 1, 0
    if started_by_torchrun():
        rank, world_size, local_rank = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = device_of(config, local_rank)
    prepare_process(config, device)
    with ExitStack() as stack:
        if world_size > 1:
            stack.enter_context(process_group("nccl" if config.cluster.gpus_per_worker else "gloo"))
        place = (rank, world_size, device)
        yield stack.enter_context(member_runtime(*place, supervised=started_by_torchrun()))
