"""Stopping: a signal to the driver reaches the workers, which save and return; without workers, it returns.

Training or evaluating on Ray mostly waits inside Ray, partly in C++ that no signal can interrupt. So all
calls to Ray run in a thread, and the main thread only listens for signals.
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
from ray._private import state as ray_state
from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_put

from jebm.train.runtime import first_signal

__all__ = [
    "StopRequest",
    "StoppedError",
    "attend",
    "follow",
    "follow_stop_request",
    "in_background",
    "node_is_going",
    "poll_seconds",
]

_LOG = logging.getLogger("jebm.on_ray")
_NAMESPACE = "jebm"
_POLL_SECONDS = 0.5
_NODE_POLL_SECONDS = 10.0
_HEAR_SECONDS = 0.2  # Python handles signals when the main thread's wait ends
_PATIENCE_SECONDS = 10.0  # for a head that does not answer

T = TypeVar("T")


class StoppedError(Exception):
    """A stop was requested while nothing was running that had anything to save."""

    def __init__(self, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


@dataclass(frozen=True)
class StopRequest:
    """Stop requests for a driver's runs: one by name, or all; visible in every process.

    The cluster's head stores it, a few bytes in Ray's key-value store. An actor would work as well, but costs
    one more process: a second of CPU at the start, then a hundredth of a core.
    """

    key: str = field(default_factory=lambda: f"stop/{uuid.uuid4().hex}")

    def ask(self, run: str | None = None) -> None:
        """Request that one run stop, or all of them."""
        _internal_kv_put(self._key(run), "asked", namespace=_NAMESPACE)

    def asked(self, run: str) -> bool:
        """Return whether this run was asked to stop."""
        return any(_internal_kv_exists(self._key(one), namespace=_NAMESPACE) for one in (run, None))

    def promise(self, run: str) -> None:
        """Announce that a stop request will now end this run within seconds."""
        _internal_kv_put(f"heeded-{self._key(run)}", "promised", namespace=_NAMESPACE)

    def heeded(self, run: str) -> bool:
        """Return whether `promise` was called for this run."""
        return bool(_internal_kv_exists(f"heeded-{self._key(run)}", namespace=_NAMESPACE))

    def _key(self, run: str | None) -> str:
        return self.key if run is None else f"{self.key}/{run}"


def in_background(work: Callable[[], T]) -> "Future[T]":
    """Run `work` in a daemon thread, which does not delay exit; return its future."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="ray driver", daemon=True).start()
    return outcome


def attend(
    work: Callable[[], T],
    *,
    stop: Callable[[], bool],
    ending: str,
    enough: Callable[[], bool] = lambda: False,
) -> T:
    """Run `work` in a thread and handle signals in the main thread, this one; return its result.

    The first SIGTERM or SIGINT logs `ending`, how the work stops, and calls `stop()`. True means that `work`
    was asked to stop and will return; False that there is nothing to wait for. A second signal has its
    default effect.

    `enough` is called here several times a second; True is the same as a signal, and so is an error of its
    own, which is raised once `work` has ended.

    Raises:
        StoppedError: a stop was requested, and there is nothing to wait for, or the cluster does not answer.
            `work` is left in its thread; Ray ends with this process.
    """
    received: list[signal.Signals] = []
    failure: Exception | None = None
    ended = False
    with first_signal(received.append):
        outcome = in_background(work)
        while not (outcome.done() or received or ended or failure):
            wait([outcome], timeout=_HEAR_SECONDS)
            try:
                ended = enough()
            except Exception as error:  # the caller's own
                failure = error
        # Ask the work to stop; leave it if it cannot hear.
        if received or ended or failure:
            if received:
                _LOG.info("%s: %s", received[0].name, ending)
            asking = in_background(stop)
            wait([asking], timeout=_PATIENCE_SECONDS)
            heard = asking.done() and asking.exception() is None and asking.result()
            if not (outcome.done() or heard):
                raise failure or StoppedError(*received)
        while not outcome.done():
            wait([outcome], timeout=_HEAR_SECONDS)
    if failure is not None:
        raise failure
    return outcome.result()


def poll_seconds(rank: int = 0, local_rank: int = 0) -> float | None:
    """Return how often a worker asks for stop requests, in seconds; None for one that does not.

    Rank 0's answer stops all ranks at their next step, so the head is not asked by thousands of workers. One
    worker of each other node asks now and then: it ends a step that rank 0 is stuck in.
    """
    if rank == 0:
        return _POLL_SECONDS
    return _NODE_POLL_SECONDS if local_rank == 0 else None


def node_is_going() -> bool:
    """Return whether the node of this process was given notice of its end; False if this Ray does not tell.

    The same table as of Ray Train's preemption watcher, which trials of one worker do not have.
    """
    try:
        return ray.get_runtime_context().get_node_id() in ray_state.state.get_draining_nodes()
    except AttributeError:  # private: Ray has no public function for it
        return False


def follow_stop_request(
    request: StopRequest, run: str, every_seconds: float | None = _POLL_SECONDS
) -> threading.Event:
    """Return an event that is set within about `every_seconds` of a request to stop the run; None: never."""
    return follow(lambda: request.asked(run), every_seconds)


def follow(question: Callable[[], bool], every_seconds: float | None) -> threading.Event:
    """Return an event that a thread sets once the answer is true; setting it ends that. None: never."""
    answered = threading.Event()

    def poll() -> None:
        while not answered.wait(every_seconds):
            try:
                if question():
                    answered.set()
            except ray.exceptions.RayError:  # the head is briefly out of reach
                continue

    if every_seconds is not None:
        threading.Thread(target=poll, name="stop request", daemon=True).start()
    return answered
