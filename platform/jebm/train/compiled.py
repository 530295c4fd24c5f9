"""`train.compile`: losses and their gradients as few fused kernels, compiled before the first step."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from jebm.errors import ConfigError
from jebm.train.runtime import Runtime

__all__ = ["compiling"]

_LOG = logging.getLogger("jebm.train")


@contextmanager
def compiling(runtime: Runtime) -> Iterator[None]:
    """Let torch compile what first runs within, on every rank; the body must not run collectives.

    Raises:
        ConfigError: on all ranks, if torch cannot compile it on some rank.
    """
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415 (takes seconds, and few ask for it)

    if runtime.is_main:
        _LOG.info("compiling losses and gradients (train.compile): the first time here, a minute or more")
    began = time.perf_counter()
    # Torch compiles a function only so many times, and an earlier run in this process had other nets.
    torch.compiler.reset()
    with runtime.together():
        try:
            yield
        except TorchDynamoException as error:
            raise ConfigError(
                f"train.compile: torch cannot compile the losses: {_reason(error)}; set it to false"
            ) from error
    if runtime.is_main:
        _LOG.info("compiled in %.0f s", time.perf_counter() - began)


def _reason(error: Exception) -> str:
    """Return the reason in an error of dozens of lines, and the line of code that it names last."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    reasons = [line for line in lines if line and not line.endswith(" raised:")] or [type(error).__name__]
    places = [line for line in lines if line.startswith('File "')]
    return f"{reasons[0]} ({places[-1]})" if places else reasons[0]
