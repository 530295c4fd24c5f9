"""`train.compile`: losses and their gradients as few fused kernels, compiled before the first step."""

import logging
import time
import warnings
from collections.abc import Callable, Iterable

import torch

from jebm.config import Config
from jebm.errors import ConfigError
from jebm.train.runtime import Runtime

__all__ = ["compile_ahead"]

_LOG = logging.getLogger("jebm.train")


def compile_ahead(
    graphs: Iterable[None], config: Config, runtime: Runtime, should_stop: Callable[[], bool]
) -> bool:
    """Let torch compile one graph after the other, on every rank; return whether to go on.

    `graphs` compiles the next one when asked for it, and must not run collectives. If `should_stop()` is
    true on any rank, no rank goes on.

    Raises:
        ConfigError: on all ranks, if torch cannot compile one on some rank.
    """
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415 (takes seconds, and few ask for it)

    if runtime.is_main:
        _LOG.info("compiling losses and gradients (train.compile): the first time here, a minute or more")
    began = time.perf_counter()
    _set_up(config)
    with runtime.together(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # train.precision decides that
        try:
            for _ in graphs:
                if should_stop():
                    break
        except TorchDynamoException as error:
            if not should_stop():  # the signal may have ended a compiler as well
                raise ConfigError(
                    f"train.compile: torch cannot compile the losses: {_reason(error)}; set it to false"
                ) from error
    (goes_on,) = runtime.agree(not should_stop())
    if runtime.is_main and goes_on:
        _LOG.info("compiled in %.0f s", time.perf_counter() - began)
    return goes_on


def _set_up(config: Config) -> None:
    """Have torch compile anew, on the CPUs of this worker, and choose the same kernels each time."""
    import torch._inductor.config as inductor  # noqa: PLC0415 (as above)

    # Torch compiles a function only so many times, and an earlier run in this process had other nets.
    torch.compiler.reset()
    inductor.compile_threads = min(inductor.compile_threads or 1, config.cluster.cpus_per_worker)
    if hasattr(inductor, "deterministic"):  # newer torch
        inductor.deterministic = config.run.deterministic


def _reason(error: Exception) -> str:
    """Return the reason in an error of dozens of lines, and the line of code that it names last."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    reasons = [line for line in lines if line and not line.endswith(" raised:")] or [type(error).__name__]
    places = [line for line in lines if line.startswith('File "')]
    return f"{reasons[0]} ({places[-1]})" if places else reasons[0]
