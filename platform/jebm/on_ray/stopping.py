"""Stopping gracefully: a signal to the driver reaches the workers, which save and return."""

import logging
import signal
import threading
from contextlib import AbstractContextManager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jebm.train.runtime import first_signal

__all__ = ["follow_stop_request", "stop_on_signals", "stop_request"]

_LOG = logging.getLogger("jebm.on_ray")
_POLL_SECONDS = 0.5


class _StopRequest:
    """Which runs somebody asked to stop: one by its name, or all."""

    def __init__(self) -> None:
        self._asked: set[str | None] = set()

    def ask(self, run: str | None = None) -> None:
        self._asked.add(run)

    def asked(self, run: str) -> bool:
        return not self._asked.isdisjoint((run, None))


def stop_request() -> Any:  # noqa: ANN401  # Ray's handles have no type that knows the methods
    """Return a new request: an actor on this driver's node, where no other node's end can take it away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_StopRequest).options(num_cpus=0, scheduling_strategy=here).remote()


def stop_on_signals(request: Any) -> AbstractContextManager[None]:  # noqa: ANN401
    """Return a context in which the first SIGTERM or SIGINT to this process asks, as `first_signal` says.

    To be entered after `ray.init`, which installs handlers of its own.
    """

    def ask(received: signal.Signals) -> None:
        _LOG.info("%s: stopping after this step, with a last checkpoint", received.name)
        request.ask.remote()

    return first_signal(ask)


def follow_stop_request(request: Any, run: str) -> threading.Event:  # noqa: ANN401
    """Return an event of this worker that is set within about half a second of the request to stop a run."""
    asked = threading.Event()

    def poll() -> None:
        while not asked.wait(_POLL_SECONDS):
            try:
                if ray.get(request.asked.remote(run)):
                    asked.set()
            except ray.exceptions.ActorDiedError:  # the driver is gone, and this worker with it
                return
            except ray.exceptions.RayError:  # out of reach for a moment
                continue

    threading.Thread(target=poll, name="stop request", daemon=True).start()
    return asked
