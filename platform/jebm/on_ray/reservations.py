"""Find and free placement groups that are no longer in use.

Ray frees a group when both the job and the actor that made it are dead. This has two gaps, and a group that
falls through them reserves CPUs until the cluster ends:

- An actor killed while it waits for its group sees the group disappear before it dies itself, and requests
  another. No job remains whose end would free that one.
- While the job lives, the groups of a dead actor stay. Ray Train has a process that frees them, but it learns
  of a group only after all its workers have started.

So each of our jobs leaves a mark in Ray's key-value store, and each start and end of a job frees what dead
jobs left behind. Groups of other users, or that may still be in use, are not touched.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray._private import state as ray_state
from ray._raylet import PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]  # made by protobuf
from ray.experimental.internal_kv import _internal_kv_list, _internal_kv_put
from ray.util.placement_group import PlacementGroup, remove_placement_group

__all__ = ["free_abandoned_groups", "free_groups_of_this_actor", "has_room", "job_is_dead", "mark_job"]

_LOG = logging.getLogger("jebm.on_ray")
_NAMESPACE = "jebm"
_MARK = "job/"


@dataclass(frozen=True)
class _Group:
    """A placement group that has not been removed; ids in hexadecimal."""

    name: bytes
    job: str
    actor: str | None
    """The actor that made it; None if the job's driver did."""
    actor_dead: bool
    detached: bool
    placed: bool
    """Whether its resources are allocated."""


def mark_job() -> None:
    """Mark the job of this process as one of ours."""
    _internal_kv_put(_MARK + _this_job(), "jebm", namespace=_NAMESPACE)


def free_abandoned_groups() -> int:
    """Free our jobs' groups that are no longer in use; return how many there were."""
    marks = _internal_kv_list(_MARK, namespace=_NAMESPACE)
    ours = {mark.decode().removeprefix(_MARK) for mark in marks}
    dead = _dead_jobs()

    def abandoned(group: _Group) -> bool:
        return group.job in ours and not group.detached and (group.job in dead or group.actor_dead)

    freed = _free(abandoned)
    if freed:
        _LOG.info("freed %d reservation%s of jobs that are dead", freed, "s" if freed > 1 else "")
    return freed


def free_groups_of_this_actor() -> int:
    """Free the groups that this process's actor made; return how many there were."""
    me = _this_actor()
    return _free(lambda group: group.actor == me)


def has_room() -> bool:
    """Return whether a group made by this process's actor has its resources."""
    me = _this_actor()
    return any(group.placed for group in _groups() if group.actor == me)


def job_is_dead() -> bool:
    """Return whether this process's job has ended, in which case the process is about to be killed."""
    return _this_job() in _dead_jobs()


def _free(condition: Callable[[_Group], bool]) -> int:
    groups = [group for group in _groups() if condition(group)]
    for group in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID(group.name)))
    return len(groups)


def _groups() -> list[_Group]:
    accessor = ray_state.state._connect_and_get_accessor()
    tables = map(PlacementGroupTableData.FromString, accessor.get_placement_group_table())
    nobody = bytes.fromhex(ray.ActorID.nil().hex())
    return [
        _Group(
            name=table.placement_group_id,
            job=table.creator_job_id.hex(),
            actor=None if table.creator_actor_id == nobody else table.creator_actor_id.hex(),
            # Ray sets this for the driver's groups, too.
            actor_dead=table.creator_actor_dead and table.creator_actor_id != nobody,
            detached=table.is_detached,
            placed=table.state == PlacementGroupTableData.CREATED,
        )
        for table in tables
        if table.state != PlacementGroupTableData.REMOVED
    ]


def _dead_jobs() -> set[str]:
    jobs = ray_state.jobs()  # type: ignore[no-untyped-call]
    return {job["JobID"] for job in jobs if job["IsDead"]}


def _this_actor() -> str:
    actor: str | None = ray.get_runtime_context().get_actor_id()
    if actor is None:
        raise RuntimeError("this process is no actor")
    return actor


def _this_job() -> str:
    job: str = ray.get_runtime_context().get_job_id()
    return job
