"""A process group of torch.distributed whose threads have ended before the interpreter does.

gloo runs collectives in threads of its own. Such a thread drops the tensors of a collective only after it has
told the caller that the collective is done, and needs the interpreter lock to drop what Python has seen. If
the interpreter is ending by then, Python ends the thread instead, in the middle of a destructor, and the
process aborts (exit code 134) although its work is done.

The group's destructor joins the threads. It runs when the last reference to the group goes, and must not run
under the lock that the threads wait for: a reference of Python's goes without the lock, one of a C++ object's
(DDP's reducer) does not. So three things are seen to here: nothing binds the group for good, Python holds the
last reference, and that one goes while the interpreter is whole.
"""

import gc
import logging
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

# DDP imports this module when a model is first wrapped. Its functions have the group as the default of an
# argument (`group=group.WORLD`): imported while a group exists, they would hold it until the process ends.
import torch.distributed.nn.functional  # noqa: F401

__all__ = ["last_to_hold_the_group", "process_group", "running_loops"]

_LOG = logging.getLogger("jebm.train")
_PATIENCE_SECONDS = 10.0


@contextmanager
def process_group(backend: str, **place: Any) -> Iterator[None]:  # noqa: ANN401  (torch checks them)
    """Within it, this process is one of a group; after it, nothing of the group is left, no thread either.

    `place` is what `init_process_group` takes. One line of the log says so if the threads cannot be ended:
    within ten seconds, when after an error a collective still waits for another process; within one, when the
    caller still holds a DDP module.
    """
    others = running_loops()
    dist.init_process_group(backend, **place)
    try:
        with last_to_hold_the_group():
            yield
    finally:
        _end(others)


@contextmanager
def last_to_hold_the_group() -> Iterator[None]:
    """Hold this process's group, if there is one, until all that the body has made is gone.

    For whoever has not made the group (in a Ray worker, Ray has): what is left of the body, also of one that
    raised, does not hold it afterwards.
    """
    group = dist.group.WORLD if dist.is_initialized() else None
    try:
        yield
    except BaseException as error:
        _clear_frames(error)
        raise
    finally:
        gc.collect()  # modules, optimizers and hooks of DDP are full of cycles
        del group  # not left to the frame: a traceback may keep that


def running_loops() -> frozenset[str]:
    """Return the ids of this process's threads that run collectives of gloo (Linux; elsewhere none)."""
    found = set()
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # it has just ended
            if (thread / "comm").read_text(encoding="ascii", errors="replace").strip() == "pt_gloo_runloop":
                found.add(thread.name)
    return frozenset(found)


def _end(others: frozenset[str]) -> None:
    """Destroy the group and wait until no loop runs but `others`, within bounds."""
    if not dist.is_initialized():
        return
    if dist.get_backend() != "gloo":
        dist.destroy_process_group()
        return
    # In a thread of its own: the destructor waits for a collective that has begun, and that for its timeout.
    ending = threading.Thread(target=dist.destroy_process_group, name="jebm-end-group", daemon=True)
    ending.start()
    ending.join(_PATIENCE_SECONDS)
    reason = "a collective has not ended" if ending.is_alive() else "something still holds the group"
    deadline = time.monotonic() + 1  # also lets the loops finish what they have, if the group is held
    while running_loops() - others:
        if time.monotonic() > deadline:
            _LOG.warning("%s: its threads are left running, and the process may abort as it ends", reason)
            return
        time.sleep(0.01)


def _clear_frames(error: BaseException) -> None:
    """Clear the frames that the tracebacks of an error and of its causes keep alive."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        link = pending.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            traceback.clear_frames(link.__traceback__)
            pending += [link.__cause__, link.__context__]
