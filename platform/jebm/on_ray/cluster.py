"""Joining a Ray cluster, or starting a local one, so that its workers can import this package."""

import contextlib
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray._private.resource_and_label_spec import ResourceAndLabelSpec

import jebm
from jebm.config import Config
from jebm.errors import ConfigError

__all__ = [
    "check_capacity",
    "check_room",
    "connect",
    "job_environment",
    "join",
    "places",
    "runs_here",
    "submission_id",
]

_SOURCE_ROOT = Path(jebm.__file__).parents[1]


def _job() -> dict[str, Any] | None:
    """Return what Ray tells the driver of a job about it; None outside a job."""
    text = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return None if text is None else json.loads(text)


def job_environment() -> dict[str, Any] | None:
    """Return the runtime environment of the Ray job that this process drives; None outside a job."""
    job = _job()
    return None if job is None else job.get("runtime_env") or {}


def submission_id() -> str | None:
    """Return by which name Ray knows the job that this process drives; None outside a job."""
    name: str | None = ((_job() or {}).get("metadata") or {}).get("job_submission_id")
    return name


def connect() -> None:
    """Join the cluster of RAY_ADDRESS (a job has it); start a local Ray where it is not set.

    Workers find the package by PYTHONPATH: relative to the uploaded working directory in a job (the driver's
    path is not theirs), absolute otherwise. A variable that the job has set already is left to it, since Ray
    refuses the same variable twice. Where this process has joined already, it stays.
    """
    if ray.is_initialized():  # a comparison trains many runs from one process
        return
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")  # 60 s is short on small machines
    # Each look of the controller at its workers takes one report from each; Ray's own 2 s make a sweep wait.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # workers stay in the working directory of the job
    address = os.environ.get("RAY_ADDRESS", "local")
    if address.startswith("http"):
        raise ConfigError(
            f"RAY_ADDRESS: {address} is a job server's address, which only `ray job submit` can use; "
            "unset it to train on this machine, or set it to HOST:6379 to join the cluster"
        )
    if address == "local":
        _forget_dead_cluster()
        # Read by the processes that are started now; a cluster's nodes have their own.
        os.environ.setdefault("RAY_worker_niceness", "0")  # else workers run at nice 15
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Those that Ray would start in advance are never used: its trainer gives each a variable of its own.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(_SOURCE_ROOT), os.environ.get("PYTHONPATH")])
        )
        ray.init(address="local")
        return
    job = job_environment()
    uploaded = job is not None and _SOURCE_ROOT.is_relative_to(Path.cwd())
    variables = {"PYTHONPATH": str(_SOURCE_ROOT.relative_to(Path.cwd()) if uploaded else _SOURCE_ROOT)}
    given = (job or {}).get("env_vars", {})
    runtime_env = {"env_vars": {name: value for name, value in variables.items() if name not in given}}
    # Not "auto": that takes any Ray of this machine, and waits for minutes for one that is gone.
    ray.init(address=address, runtime_env=runtime_env)


def _forget_dead_cluster() -> None:
    """Remove the note that a killed `ray start` has left of its address, where nobody listens there any more.

    Parts of Ray follow it even from within another cluster, and wait for minutes.
    """
    note = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    try:
        host, _, port = note.read_text().strip().rpartition(":")
        socket.create_connection((host, int(port)), timeout=2).close()
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        with contextlib.suppress(OSError):  # another user's
            note.unlink()


def runs_here() -> bool:
    """Return whether the workers will run on this machine only: RAY_ADDRESS names no cluster."""
    return os.environ.get("RAY_ADDRESS", "local") == "local"


def join(config: Config) -> None:
    """Join the cluster, or start a local one, if it has room for the workers; nothing is started without.

    Raises:
        ConfigError: as `connect` and `check_capacity`.
    """
    if runs_here():
        check_capacity(config)
    connect()
    check_capacity(config)


def check_room(config: Config) -> None:
    """Raise what `join` would; starts nothing, and leaves the cluster again."""
    if runs_here() or ray.is_initialized():
        check_capacity(config)
        return
    try:
        join(config)
    finally:
        ray.shutdown()


def check_capacity(config: Config) -> None:
    """Raise `ConfigError` if the workers never fit the cluster that was joined, or else this machine."""
    cluster = config.cluster
    here = runs_here()
    if cluster.autoscales and not here:
        return
    room = places(config)
    if room >= (cluster.min_workers or cluster.workers):
        return
    nodes = _nodes()
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    asked = f"cluster.workers: {cluster.workers} workers of {cluster.cpus_per_worker} CPU"
    remedy = "lower it"
    if cluster.gpu and gpus:
        asked += " and 1 GPU"
    elif cluster.gpu:
        asked, remedy = "cluster.gpu: workers with a GPU", "set it to false"
    raise ConfigError(
        f"{asked} do not fit: {'this machine' if here else 'the cluster'} has {cpus:g} CPUs and {gpus:g} "
        f"GPUs, room for {room}; {remedy}, or set "
        + (
            "RAY_ADDRESS to the cluster that you mean"
            if here
            else "cluster.autoscales to true if nodes are added on demand"
        )
    )


def places(config: Config) -> int:
    """Return how many workers the cluster holds at once, none of them split between two nodes."""
    cluster = config.cluster
    room = 0
    for node in _nodes():
        fit_in = int(node.get("CPU", 0) // cluster.cpus_per_worker)
        room += min(fit_in, int(node.get("GPU", 0))) if cluster.gpu else fit_in
    return room


def _nodes() -> list[dict[str, float]]:
    """Return the resources of each node that is alive; before a cluster was joined, those of this machine."""
    if not ray.is_initialized():
        found = ResourceAndLabelSpec().resolve(is_head=True, node_ip_address="127.0.0.1")
        return [{"CPU": found.num_cpus or 0, "GPU": found.num_gpus or 0}]
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]
