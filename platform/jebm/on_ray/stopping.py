"""Stopping: a signal to the driver reaches the workers, which save and return; without workers it returns.

Who trains or evaluates on Ray waits for most of the time inside of Ray, some of it in C++ that no signal can
interrupt. So all of Ray happens in a thread, and the main thread has nothing to do but to hear.
"""

import logging
import signal
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TypeVar

import ray
from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_put

from jebm.train.runtime import first_signal

__all__ = ["StopRequest", "StoppedError", "attend", "follow_stop_request", "in_background"]

_LOG = logging.getLogger("jebm.on_ray")
_NAMESPACE = "jebm"
_POLL_SECONDS = 0.5
_HEAR_SECONDS = 0.2  # Python runs the handler of a signal when a wait of the main thread ends
_PATIENCE_SECONDS = 10.0  # with a head that does not answer

T = TypeVar("T")


class StoppedError(Exception):
    """Somebody asked to stop while nothing was running that could have saved more than there is."""

    def __init__(self, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


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

    def promise(self, run: str) -> None:
        """Say that somebody now ends this run within seconds of being asked."""
        _internal_kv_put(f"heeded-{self._key(run)}", "promised", namespace=_NAMESPACE)

    def heeded(self, run: str) -> bool:
        """Return whether somebody has promised to end this run when asked."""
        return bool(_internal_kv_exists(f"heeded-{self._key(run)}", namespace=_NAMESPACE))

    def _key(self, run: str | None) -> str:
        return self.key if run is None else f"{self.key}/{run}"


def in_background(work: Callable[[], T]) -> "Future[T]":
    """Run `work` in a daemon thread, which no exit waits for; return its future."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="ray driver", daemon=True).start()
    return outcome


def attend(work: Callable[[], T], *, stop: Callable[[], bool]) -> T:
    """Run `work` in a thread, and hear signals in this one, the main thread; return what `work` returns.

    The first SIGTERM or SIGINT calls `stop()`. True means that `work` was asked, and will return by itself;
    False that there is nothing to wait for. A second signal does what it always did.

    Raises:
        StoppedError: asked to stop, and there was nothing to wait for, or the cluster cannot be asked. `work`
            is left behind in its thread; Ray ends with this process.
    """
    received: list[signal.Signals] = []
    with first_signal(received.append):
        outcome = in_background(work)
        while not outcome.done() and not received:
            wait([outcome], timeout=_HEAR_SECONDS)
        if received:
            _LOG.info("%s: stopping", received[0].name)
            asking = in_background(stop)
            wait([asking], timeout=_PATIENCE_SECONDS)
            if not asking.done() or not asking.result():
                raise StoppedError(received[0])
        while not outcome.done():
            wait([outcome], timeout=_HEAR_SECONDS)
    return outcome.result()


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
