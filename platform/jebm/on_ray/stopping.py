"""Stopping gracefully: a signal to the driver reaches the workers, which save and return."""

import logging
import signal
import threading
import uuid
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import ray
from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_put

from jebm.train.runtime import first_signal

__all__ = ["StopRequest", "follow_stop_request", "stop_on_signals"]

_LOG = logging.getLogger("jebm.on_ray")
_NAMESPACE = "jebm"
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class StopRequest:
    """Which runs of a driver somebody asked to stop: one by its name, or all; the same in every process.

    The cluster's head keeps it, as a few bytes beside Ray's own. An actor would do as well, at the price of
    one more process: a second of CPU at the start, and a hundredth of a core ever after.
    """

    key: str = field(default_factory=lambda: f"stop/{uuid.uuid4().hex}")

    def ask(self, run: str | None = None) -> None:
        """Ask one run to stop, or all of them."""
        _internal_kv_put(self._key(run), "asked", namespace=_NAMESPACE)

    def asked(self, run: str) -> bool:
        """Return whether this run was asked to stop."""
        return any(_internal_kv_exists(self._key(one), namespace=_NAMESPACE) for one in (run, None))

    def _key(self, run: str | None) -> str:
        return self.key if run is None else f"{self.key}/{run}"


def stop_on_signals(request: StopRequest) -> AbstractContextManager[None]:
    """Return a context in which the first SIGTERM or SIGINT to this process asks, as `first_signal` says.

    To be entered after `ray.init`, which installs handlers of its own.
    """

    def ask(received: signal.Signals) -> None:
        _LOG.info("%s: stopping after this step, with a last checkpoint", received.name)
        request.ask()

    return first_signal(ask)


def follow_stop_request(request: StopRequest, run: str) -> threading.Event:
    """Return an event of this worker that is set within about half a second of the request to stop a run."""
    asked = threading.Event()

    def poll() -> None:
        while not asked.wait(_POLL_SECONDS):
            try:
                if request.asked(run):
                    asked.set()
            except ray.exceptions.RayError:  # the head is out of reach for a moment
                continue

    threading.Thread(target=poll, name="stop request", daemon=True).start()
    return asked
