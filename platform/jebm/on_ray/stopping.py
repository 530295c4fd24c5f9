"""Stopping gracefully: a signal to the driver reaches the workers, which save and return."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["follow_stop_request", "stop_on_signals", "stop_request"]

_LOG = logging.getLogger("jebm.on_ray")
_POLL_SECONDS = 0.5


class _StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self._asked = False

    def ask(self) -> None:
        self._asked = True

    def asked(self) -> bool:
        return self._asked


def stop_request() -> Any:  # noqa: ANN401  # Ray's handles have no type that knows the methods
    """Return a new request: an actor on this driver's node, where no other node's end can take it away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_StopRequest).options(num_cpus=0, scheduling_strategy=here).remote()


@contextmanager
def stop_on_signals(request: Any) -> Iterator[None]:  # noqa: ANN401
    """Within it, the first SIGTERM or SIGINT to this process asks; a second one does what it always did.

    To be entered after `ray.init`, which installs handlers of its own.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        _LOG.info("%s: stopping after this step, with a last checkpoint", signal.Signals(number).name)
        request.ask.remote()
        restore()

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()


def follow_stop_request(request: Any) -> threading.Event:  # noqa: ANN401
    """Return an event of this worker that is set within about half a second of the request."""
    asked = threading.Event()

    def poll() -> None:
        while not asked.wait(_POLL_SECONDS):
            try:
                if ray.get(request.asked.remote()):
                    asked.set()
            except ray.exceptions.ActorDiedError:  # the driver is gone, and this worker with it
                return
            except ray.exceptions.RayError:  # out of reach for a moment
                continue

    threading.Thread(target=poll, name="stop request", daemon=True).start()
    return asked
