"""Join a Ray cluster, or start a local one, so that its workers can import this package."""

import contextlib
import ipaddress
import json
import logging
import os
import socket
import stat
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray._private import auto_init_hook, ray_constants

import jebm
from jebm.config import Config
from jebm.errors import ConfigError
from jebm.on_ray.capacity import check_capacity
from jebm.on_ray.reservations import free_abandoned_groups, mark_job

__all__ = [
    "check_room",
    "connect",
    "job_environment",
    "job_output",
    "join",
    "runs_here",
    "submission_id",
]

_SOURCE_ROOT = Path(jebm.__file__).parents[1]
_ANSWER_SECONDS = 10.0


def _job() -> dict[str, Any] | None:
    """Return what Ray tells a job's driver about the job; None outside a job."""
    text = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return None if text is None else json.loads(text)


def job_environment() -> dict[str, Any] | None:
    """Return the runtime environment of the Ray job that this process drives; None outside a job."""
    job = _job()
    return None if job is None else job.get("runtime_env") or {}


def submission_id() -> str | None:
    """Return Ray's submission id of the job that this process drives; None outside a job."""
    name: str | None = ((_job() or {}).get("metadata") or {}).get("job_submission_id")
    return name


def job_output(most_bytes: int = 512 * 2**10) -> bytes | None:
    """Return the end of what the Ray job that this process drives has printed; None outside a job.

    Ray keeps that on the head's disk alone. It has what the workers and Ray itself print, too.
    """
    if submission_id() is None:
        return None
    with contextlib.suppress(OSError), Path("/proc/self/fd/1").open("rb") as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.seek(max(0, os.fstat(file.fileno()).st_size - most_bytes))
            return file.read(most_bytes)
    return None


def connect() -> None:
    """Join the cluster at RAY_ADDRESS (set in a job), or start a local Ray if it is not set.

    Frees reservations of our dead jobs. Does nothing if this process has already joined.

    Raises:
        ConfigError: RAY_ADDRESS is not an address to join, or nothing answers there; or a node joined the
            cluster under a loopback address.
    """
    if ray.is_initialized():  # a comparison trains many runs from one process
        return
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")  # 60 s is short on small machines
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # workers stay in the working directory of the job
    _leave_process_alone()
    address = _address()
    if address == "local":
        _start_local()
    else:
        _join(address)
        _check_addresses()
    mark_job()
    free_abandoned_groups()


def _address() -> str:
    return os.environ.get("RAY_ADDRESS") or "local"


def _leave_process_alone() -> None:
    """Turn off what Ray does to a driver unasked."""
    # On SIGTERM, a stack dump and an abort.
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    logging.getLogger("ray._private.worker").addFilter(
        lambda record: "SIGTERM handler" not in str(record.msg)
    )
    # Reconnecting when a thread left running at process exit calls Ray.
    auto_init_hook.enable_auto_connect = False


def _start_local() -> None:
    """Start a Ray on this machine that only this machine can reach."""
    _forget_dead_cluster()
    # Read by the processes that start now; a cluster's nodes have their own settings.
    os.environ.setdefault("RAY_worker_niceness", "0")  # else workers run at nice 15
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Prestarted workers are never used: the trainer gives each worker its own environment variable.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Otherwise every Ray server listens on all interfaces. Ray restricts them by default only on Windows and
    # macOS, and read the variable when it was imported here.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(_SOURCE_ROOT), os.environ.get("PYTHONPATH")])
    )
    ray.init(address="local")


def _join(address: str) -> None:
    """Join a cluster; its workers find this package through PYTHONPATH.

    The path is relative to the uploaded working directory in a job (workers have another path than the
    driver), absolute otherwise. Variables that the job already sets are kept, since Ray rejects duplicates.
    """
    if address.startswith("http"):
        raise ConfigError(
            f"RAY_ADDRESS: {address} is a job server's address, which only `ray job submit` can use; "
            "unset it to train on this machine, or set it to HOST:6379 to join the cluster"
        )
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:  # Ray itself tries for a minute, uninterruptibly
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"RAY_ADDRESS: nobody answers at {address} ({error}); start the cluster, correct the "
                "address, or unset it to train on this machine"
            ) from None
    job = job_environment()
    uploaded = job is not None and _SOURCE_ROOT.is_relative_to(Path.cwd())
    variables = {
        "PYTHONPATH": str(_SOURCE_ROOT.relative_to(Path.cwd()) if uploaded else _SOURCE_ROOT),
        "RAY_ADDRESS": address,  # else some Ray processes look for a cluster on their machine
    }
    given = (job or {}).get("env_vars", {})
    runtime_env = {"env_vars": {name: value for name, value in variables.items() if name not in given}}
    # Not "auto": that takes any Ray on this machine, and waits minutes for one that is gone.
    try:
        ray.init(address=address, runtime_env=runtime_env)
    except ValueError as error:
        raise ConfigError(f"RAY_ADDRESS: {error}; give HOST:6379, or unset it") from None


def _check_addresses() -> None:
    """Raise `ConfigError` if one of several hosts joined under an address that the others cannot reach."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if len({node["NodeManagerHostname"] for node in alive}) < 2:
        return
    for node in alive:
        if ipaddress.ip_address(node["NodeManagerAddress"]).is_loopback:
            raise ConfigError(
                f"RAY_ADDRESS: host {node['NodeManagerHostname']} has joined the cluster as "
                f"{node['NodeManagerAddress']}, which other hosts cannot reach; start Ray there again with "
                "--node-ip-address and the address of its interface"
            )


def _forget_dead_cluster() -> None:
    """Remove the address file that a killed `ray start` left behind, if nothing listens there any more.

    Parts of Ray follow it even inside another cluster, and wait for minutes.
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
    return _address() == "local"


def join(config: Config) -> None:
    """Join the cluster, or start a local one, if it has room for the workers; else start nothing.

    Raises:
        ConfigError: as `connect` and `check_capacity`.
    """
    if runs_here():
        check_capacity(config, here=True)
    connect()
    check_capacity(config, here=runs_here())


def check_room(config: Config) -> None:
    """Raise what `join` would; start nothing, and leave the cluster again."""
    if runs_here() or ray.is_initialized():
        check_capacity(config, here=runs_here())
        return
    try:
        join(config)
    finally:
        ray.shutdown()
