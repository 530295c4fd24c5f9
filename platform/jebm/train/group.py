"""A torch.distributed process group whose threads end before the interpreter does.

gloo runs collectives in its own threads. Such a thread releases a collective's tensors only after it has
reported completion, and needs the GIL to release tensors that Python has seen. If the interpreter is shutting
down by then, Python ends the thread in the middle of a destructor, and the process aborts (exit code 134)
although its work is done.

The group's destructor joins the threads. It runs when the last reference is dropped, and must not run while
holding the GIL, for which the threads wait: Python drops its reference without the GIL, a C++ object (DDP's
reducer) does not. So this module ensures that nothing holds the group forever, that Python holds the last
reference, and that it is dropped before the interpreter shuts down.
"""

import gc
import logging
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

# DDP imports this module when it first wraps a model. Its functions have the group as a default argument
# (`group=group.WORLD`): imported while a group exists, they would hold it until the process ends.
import torch.distributed.nn.functional  # noqa: F401

__all__ = ["ControlGroup", "last_to_hold_the_group", "process_group", "running_loops"]

_LOG = logging.getLogger("jebm.train")
_PATIENCE_SECONDS = 10.0
_CONTROL_TIMEOUT = timedelta(hours=12)
"""A process that has died is noticed at once, by its closed connection; this is for one that works long."""


class ControlGroup:
    """A gloo group of all processes for agreements, on the CPU, that waits for hours.

    The group of the gradients has a timeout of minutes, so that a lost host is noticed; a process that
    decodes images or trains a feature net may take longer. Nothing holds the group after `close`.
    """

    def __init__(self) -> None:
        """Make the group; all processes do, with `process_group` or Ray's group in place."""
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)

    def close(self) -> None:
        """End the group and its threads."""
        group, self.group = self.group, None
        dist.destroy_process_group(group)  # noqa: TID251  (this frame drops the last reference)


@contextmanager
def process_group(backend: str, **place: Any) -> Iterator[None]:  # noqa: ANN401  (torch checks them)
    """Join a process group within the block; afterwards nothing of it is left, not even a thread.

    `place` is passed to `init_process_group`. A line is logged if the threads do not end: within ten seconds
    if, after an error, a collective still waits for another process; within one if the caller still holds a
    DDP module.
    """
    others = running_loops()
    dist.init_process_group(backend, **place)  # noqa: TID251
    try:
        with last_to_hold_the_group():
            yield
    finally:
        _end(others)


@contextmanager
def last_to_hold_the_group() -> Iterator[None]:
    """Hold this process's group, if any, until everything that the body created is gone.

    For callers that did not create the group (in a Ray worker, Ray did): afterwards, nothing left by the body
    holds it, even if the body raised.
    """
    group = dist.group.WORLD if dist.is_initialized() else None
    try:
        yield
    except BaseException as error:
        _clear_frames(error)
        raise
    finally:
        gc.collect()  # DDP's modules, optimizers and hooks form reference cycles
        del group  # explicitly, since a traceback may keep the frame


def running_loops() -> frozenset[str]:
    """Return the ids of this process's gloo collective threads (on Linux; elsewhere none)."""
    found = set()
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # the thread has just ended
            if (thread / "comm").read_text(encoding="ascii", errors="replace").strip() == "pt_gloo_runloop":
                found.add(thread.name)
    return frozenset(found)


def _end(others: frozenset[str]) -> None:
    """Destroy the group and wait, for a limited time, until only the loops in `others` run."""
    if not dist.is_initialized():
        return
    if dist.get_backend() != "gloo":
        dist.destroy_process_group()  # noqa: TID251
        return
    # In a separate thread: the destructor waits for a running collective, and that for its timeout.
    ending = threading.Thread(target=dist.destroy_process_group, name="jebm-end-group", daemon=True)  # noqa: TID251
    ending.start()
    ending.join(_PATIENCE_SECONDS)
    reason = "a collective has not ended" if ending.is_alive() else "something still holds the group"
    deadline = time.monotonic() + 1  # also lets the loops finish if something holds the group
    while running_loops() - others:
        if time.monotonic() > deadline:
            _LOG.warning("%s: its threads are left running, and the process may abort as it ends", reason)
            return
        time.sleep(0.01)


def _clear_frames(error: BaseException) -> None:
    """Clear the frames kept alive by the tracebacks of an error and its causes."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        link = pending.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            traceback.clear_frames(link.__traceback__)
            pending += [link.__cause__, link.__context__]
