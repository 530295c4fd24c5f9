"""Watch over a run in Ray's controller, so that it does not wait for workers in vain.

While Ray's controller waits for room for its workers, or for them to start, it checks for nothing else:
neither a stop request nor the end of its own job. It waits for a placement group; when that is gone, it wakes
up.
"""

import logging
import threading

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller.state import (
    PreemptingState,
    RunningState,
    ShuttingDownState,
    TrainControllerState,
)

from jebm.config import Config
from jebm.on_ray.capacity import needs
from jebm.on_ray.gauges import gauge, tags_of
from jebm.on_ray.reservations import free_groups_of_this_actor, has_room, job_is_dead
from jebm.on_ray.stopping import StoppedError, StopRequest
from jebm.on_ray.waiting import Waiting, free_room
from jebm.store.storage import open_store
from jebm.train.logs import KeptLog

__all__ = ["Guard"]

_LOOK_SECONDS = 0.5
# Logs tracebacks for a requested end.
_NOISY = "ray.train.v2._internal.execution"


class Guard(ControllerCallback):
    """Ends the wait for workers on a stop request; frees what the controller has reserved."""

    def __init__(self, request: StopRequest, config: Config) -> None:
        self._request, self._run, self._needs = request, config.run.name, needs(config)
        self._storage, self._tags = config.run.storage, tags_of(config)

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Start watching."""
        self._ended, self._working = threading.Event(), False
        self._log = KeptLog(open_store(self._storage).child(self._run), "controller").__enter__()
        self._starts = gauge("group_starts", self._tags)
        self._started = 0
        threading.Thread(target=self._watch, name="guard", daemon=True).start()
        self._request.promise(self._run)

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Record the controller's state; raise if it would wait for workers no longer needed."""
        works = isinstance(current_state, (RunningState, PreemptingState, ShuttingDownState))
        if isinstance(current_state, RunningState) and not self._working:
            self._started += 1
            self._starts.set(self._started)
        self._working = works or current_state.is_terminal()
        if not self._working and (self._request.asked(self._run) or job_is_dead()):
            logging.getLogger(_NOISY).setLevel(logging.CRITICAL + 1)
            raise StoppedError

    async def before_controller_shutdown(self) -> None:
        """Free what remains reserved, however the run ended."""
        self.before_controller_abort()

    def before_controller_abort(self) -> None:
        """Free what remains reserved."""
        self._ended.set()
        free_groups_of_this_actor()
        self._log.__exit__()

    def _watch(self) -> None:
        waiting = Waiting(
            f"{self._needs} of {self._run}", lambda: "they are starting" if has_room() else free_room()
        )
        while not self._ended.wait(_LOOK_SECONDS):
            try:
                if not self._working and self._request.asked(self._run):
                    logging.getLogger(_NOISY).setLevel(logging.CRITICAL + 1)
                    free_groups_of_this_actor()
                waiting.look(waits=not self._working)
            except ray.exceptions.RayError:  # the head is briefly out of reach
                continue
