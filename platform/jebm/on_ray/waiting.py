"""Log when something waits for room in the cluster: for what, and who holds it."""

import logging
import time
from collections import Counter
from collections.abc import Callable

import ray
from ray._private import state as ray_state
from ray.core.generated.gcs_pb2 import (  # type: ignore[attr-defined]  # made by protobuf
    ActorTableData,
    JobTableData,
    PlacementGroupTableData,
)

__all__ = ["Waiting", "free_room", "holders"]

_LOG = logging.getLogger("jebm.on_ray")
_FIRST_WORD_SECONDS, _LONGEST_SILENCE_SECONDS = 15.0, 600.0
_KINDS = ("CPU", "GPU")
_MOST_HOLDERS = 5


class Waiting:
    """Logs after 15 seconds that something waits, then at intervals that double up to ten minutes."""

    def __init__(self, what: str, reason: Callable[[], str]) -> None:
        """Take what is being waited for, and a function that returns the reason at the time of logging."""
        self._what, self._reason = what, reason
        self._since, self._next = time.monotonic(), _FIRST_WORD_SECONDS

    def look(self, *, waits: bool) -> None:
        """Log if it is time to; call this at least every few seconds."""
        now = time.monotonic()
        if not waits:
            self._since, self._next = now, _FIRST_WORD_SECONDS
        elif (waited := now - self._since) > self._next:
            self._next = waited + min(waited, _LONGEST_SILENCE_SECONDS)
            _LOG.warning("waiting for %s for %.0f s; %s", self._what, waited, self._reason())


def free_room() -> str:
    """Describe the cluster's free resources, who holds the others, and how long a job waits for them."""
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    kinds = [kind for kind in _KINDS if kind in total]
    room = "free: " + ", ".join(f"{free.get(kind, 0):g} of {total[kind]:g} {kind}s" for kind in kinds)
    held = holders()
    return f"{room}{'; held by ' if held else ''}{held}; it waits until there is room, or until it is stopped"


def holders() -> str:
    """Return which jobs hold how many CPUs and GPUs, the largest first; empty if Ray does not tell.

    Counts placement groups, and actors outside of them; Ray's tables do not have the tasks.
    """
    try:  # private: the public State API needs the dashboard
        accessor = ray_state.state._connect_and_get_accessor()
        held: dict[bytes, Counter[str]] = {}
        for data in accessor.get_placement_group_table():
            group = PlacementGroupTableData.FromString(data)
            if group.state == PlacementGroupTableData.CREATED:
                for bundle in group.bundles:
                    held.setdefault(group.creator_job_id, Counter()).update(bundle.unit_resources)
        for data in accessor.get_actor_table(None, "ALIVE"):
            actor = ActorTableData.FromString(data)
            if not actor.placement_group_id:
                held.setdefault(actor.job_id, Counter()).update(actor.required_resources)
        names = {job.job_id: _name(job) for job in map(JobTableData.FromString, accessor.get_job_table())}
    except Exception as error:
        _LOG.debug("this Ray does not say who holds its resources", exc_info=error)
        return ""
    # The largest first, and no more than a line can hold.
    shown = {
        job: " and ".join(f"{amounts[kind]:g} {kind}" for kind in _KINDS if amounts[kind] > 0)
        for job, amounts in sorted(held.items(), key=lambda item: -sum(item[1][kind] for kind in _KINDS))
    }
    lines = [f"{names.get(job, job.hex())} ({amounts})" for job, amounts in shown.items() if amounts]
    more = f" and {len(lines) - _MOST_HOLDERS} other jobs" if len(lines) > _MOST_HOLDERS else ""
    return ", ".join(lines[:_MOST_HOLDERS]) + more


def _name(job: JobTableData) -> str:
    """Return how an operator finds a job: by its submission id, or else by its driver's process."""
    if job.job_id.hex() == ray.get_runtime_context().get_job_id():
        return "this job"
    submission = job.config.metadata.get("job_submission_id")
    where = submission or f"process {job.driver_pid} on {job.driver_address.ip_address}"
    return f"{'dead job' if job.is_dead else 'job'} {job.job_id.hex()}, {where}"
