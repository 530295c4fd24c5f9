"""What fits on a cluster, and who holds its resources: asked of a real Ray."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, RayActorError
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.util.placement_group import placement_group, remove_placement_group

from jebm.config import Cluster, Config
from jebm.errors import ClusterError, ConfigError, DataError
from jebm.on_ray import waiting
from jebm.on_ray.capacity import check_capacity, places
from jebm.on_ray.examine import examine_nodes
from jebm.on_ray.stopping import StoppedError
from jebm.on_ray.trainer import known_cause
from jebm.on_ray.trial import Reports, needs_another_attempt
from jebm.on_ray.waiting import Waiting, free_room

# A driver of its own, which holds one CPU in an actor.
OTHER = """
import ray, sys
ray.init(sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=1)
class Holder:
    def ready(self): pass
holder = Holder.remote()
ray.get(holder.ready.remote())
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of 4 CPUs and 2 GPUs of one kind, as far as Ray can tell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_worker_niceness", "0")
        sizes = {"num_cpus": 4, "num_gpus": 2, "resources": {"accelerator_type:T4": 1.0}}
        ray.init("local", **sizes, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def room(workers: int = 1, cpus: int = 1, gpus: float = 0, accelerator: str | None = None) -> int:
    return places(Config(cluster=Cluster("ray", workers, None, cpus, gpus, accelerator)))


def refusal(cluster: Cluster) -> str:
    with pytest.raises(ConfigError) as refused:
        check_capacity(Config(cluster=cluster), here=False)
    return str(refused.value)


def test_places_are_counted_node_by_node(cluster: None) -> None:
    assert (room(), room(cpus=3), room(cpus=5)) == (4, 1, 0)
    assert (room(gpus=1), room(gpus=1, cpus=4)) == (2, 1)
    # Two shares of 0.4 fit on a GPU, and what is left of two GPUs makes no fifth.
    assert [room(gpus=share) for share in (0.5, 0.4, 0.6)] == [4, 4, 2]
    assert (room(gpus=1, accelerator="T4"), room(gpus=1, accelerator="H100")) == (2, 0)


def test_what_does_not_fit_is_refused_with_the_remedy(cluster: None) -> None:
    ending = "or set cluster.autoscales to true if nodes are added on demand"
    assert refusal(Cluster(workers=12)) == (
        "cluster.workers: 12 workers of 1 CPU do not fit: the cluster has 4 CPUs and 2 GPUs, room for 4; "
        f"lower it, {ending}"
    )
    assert f"room for 0; lower it, or cluster.cpus_per_worker, {ending}" in refusal(
        Cluster(cpus_per_worker=16, gpus_per_worker=1)
    )
    assert refusal(Cluster(gpus_per_worker=1, accelerator="H100")).startswith(
        "cluster.accelerator: workers with a H100 do not fit: the cluster has 4 CPUs and 2 GPUs, room for 0; "
        "correct it, or"
    )
    check_capacity(Config(cluster=Cluster(workers=12, autoscales=True)), here=False)
    with pytest.raises(ConfigError, match=r"cluster\.workers: "):
        check_capacity(Config(cluster=Cluster(workers=12, autoscales=True)), here=True)


def test_who_waits_hears_who_holds_what(
    cluster: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ray.get_runtime_context().gcs_address
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        while other.stdout.readline() != "ready\n":
            assert other.poll() is None
        group = placement_group([{"CPU": 1, "GPU": 1}, {"CPU": 1}])
        assert group.wait(300)
        line = (
            r"free: 1 of 4 CPUs, 1 of 2 GPUs; held by this job \(2 CPU and 1 GPU\), job \w+, process "
            rf"{other.pid} on [\d.]+ \(1 CPU\); it waits until there is room, or until it is stopped"
        )
        deadline = time.monotonic() + 300
        while not re.fullmatch(line, said := free_room()):  # what is free is reported now and then
            assert time.monotonic() < deadline, said
            time.sleep(0.5)
        remove_placement_group(group)
        other.communicate(timeout=300)
    # Once, and then at growing intervals.
    now = 0.0
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now))
    waits, heard = Waiting("room", lambda: "free: none"), list[float]()
    for _ in range(4000):
        now += 1.0
        waits.look(waits=True)
        if caplog.messages:
            heard.append(now)
            caplog.clear()
    assert heard[:4] == [16, 33, 67, 135]
    assert {later - earlier for earlier, later in pairwise(heard[6:])} == {601}


def test_the_doctor_looks_at_a_node_of_each_type(cluster: None, tmp_path: Path) -> None:
    """One node, which claims two GPUs that no driver knows of, if this machine has none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JEBM_CACHE", str(tmp_path))
        found = list(examine_nodes())
    assert {node.partition(" (")[2] for node, _ in found} == {"4 CPU, 2 GPU T4)"}
    checks = {check.name: check for _, check in found}
    assert list(checks)[:3] == ["chain kernel", "image cache", "driver"]
    assert re.search(r": [\d.]+ GB free$", checks["image cache"].finding)
    if not torch.cuda.is_available():
        assert (checks["driver"].level, "CUDA" in checks) == ("fail", False)
        assert "install NVIDIA's driver" in checks["driver"].remedy
    else:
        assert {checks[name].level for name in ("driver", "CUDA", "NCCL", "Triton")} == {"ok"}


class Told(Reports):
    """Keeps the reports instead of sending them to Tune."""

    def __init__(self) -> None:
        super().__init__(Config())
        self.statuses: list[str] = []

    def __call__(self, status: str, step: int, metrics: Mapping[str, float], **more: object) -> None:
        self.statuses.append(status)


def test_a_trial_whose_gpu_or_node_is_lost_ends_its_process() -> None:
    told = Told()
    broken = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    gone = RayActorError(error_msg="its node is going", preempted=True)
    for error, stopping, raised in (
        (broken, True, True),  # else the next trial would get the process
        (broken, False, True),
        (gone, False, True),
        (OSError("disk full"), False, True),
        (OSError("disk full"), True, False),
        (StoppedError(), False, False),
    ):
        assert needs_another_attempt(error, "t0000", told, stopping=stopping) == raised
    assert told.statuses == ["error", "error", "interrupted", "error", "stopped", "stopped"]


def test_what_ray_itself_refuses_is_one_line() -> None:
    def of(error: Exception) -> Exception:
        return known_cause(error)  # type: ignore[arg-type]

    too_few = InsufficientClusterResourcesError(
        'Insufficient cluster resources to launch training workers.\nThe worker group requires {"GPU": 8} '
        'but the cluster only has a maximum of {"GPU": 0} resources.\nPlease reduce `num_workers`.'
    )
    found = of(ControllerError(too_few))
    assert isinstance(found, ConfigError)
    assert str(found).startswith('cluster.workers: The worker group requires {"GPU": 8} but the cluster only')
    no_nccl = RuntimeError("Distributed package doesn't have NCCL built in")
    assert str(of(ControllerError(no_nccl))) == (
        "RuntimeError: Distributed package doesn't have NCCL built in. "
        "The same command resumes the run from its newest checkpoint"
    )
    assert str(of(ControllerError(TimeoutError()))).startswith("TimeoutError: no reason. ")
    assert isinstance(of(ControllerError(no_nccl)), ClusterError)
    assert isinstance(of(ControllerError(StoppedError())), StoppedError)
    lost = WorkerHealthCheckFailedError("A worker health check failed", ActorDiedError())
    assert isinstance(of(WorkerGroupError("lost", {1: lost})), ClusterError)
    # An error of ours is itself, and one of the code in a worker keeps its traceback.
    ours = UserExceptionWithTraceback(DataError("x.npy: gone"), "Traceback …")
    assert str(of(WorkerGroupError("ours", {0: lost, 1: ours}))) == "x.npy: gone"
    bug = WorkerGroupError("bug", {0: UserExceptionWithTraceback(ZeroDivisionError(), "Traceback …")})
    assert of(bug) is bug
