"""How the workers of a group find each other: only over the network that connects the nodes.

By default, gloo binds to the address of the host's name, which on many machines is loopback (Debian's
installer writes `127.0.1.1 name` into /etc/hosts), and torch's store listens on every interface. Ray knows
better: it has the address by which each node joined the cluster.
"""

import ipaddress
import os
import socket
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

import jebm.train.group  # noqa: F401 (before a group is made; the module says why)

__all__ = ["GroupConfig", "interface_of", "meet", "node_address", "open_meeting_place", "use_interface_of"]

_listening: socket.socket | None = None  # where rank 0 waits for the others


def interface_of(address: str) -> str | None:
    """Return the network interface of this machine that carries an IP address; None if there is none.

    The loopback interface carries every loopback address, including 127.0.1.1.
    """
    import psutil  # noqa: PLC0415 (bundled with Ray, importable only after ray)

    wanted = ipaddress.ip_address(address)
    loopback = None
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            carried = ipaddress.ip_address(entry.address)
            if carried == wanted:
                return str(name)
            if carried.is_loopback:
                loopback = str(name)
    return loopback if wanted.is_loopback else None


def use_interface_of(address: str) -> None:
    """Make gloo and NCCL in this process use the interface that carries the address.

    Values already in the environment (`GLOO_SOCKET_IFNAME`, `NCCL_SOCKET_IFNAME`) are kept. If no interface
    carries the address, as behind a NAT, nothing is set.
    """
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": an exact match, not a prefix


def open_meeting_place() -> str:
    """Listen, as rank 0, on a free port of this node's address; return HOST:PORT for `meet`."""
    global _listening  # noqa: PLW0603 (the same process listens, then meets)
    host = node_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    _listening = socket.create_server((host, 0), family=family)
    return f"{host}:{_listening.getsockname()[1]}"


def meet(address: str, *, rank: int, workers: int, timeout: timedelta) -> TCPStore:
    """Return the store of a group once rank 0 is there; rank 0 must have opened the meeting place."""
    global _listening  # noqa: PLW0603
    host, _, port = address.rpartition(":")
    more: dict[str, Any] = {}
    if rank == 0:
        if _listening is None:
            raise RuntimeError("no meeting place was opened in this process")
        more["master_listen_fd"] = _listening.detach()  # the store closes it
        _listening = None
    return TCPStore(host, int(port), workers, rank == 0, timeout, wait_for_workers=False, **more)


class GroupConfig(TorchConfig):
    """Ray's setup of a torch process group, over the nodes' own network."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Return the backend that sets up the group."""
        return _Group


class _Group(_TorchBackend):
    def on_start(  # type: ignore[override]  # Ray's own narrows it as well
        self, worker_group: BaseWorkerGroup, backend_config: TorchConfig
    ) -> None:
        """Join the workers of a group. This runs in Ray's controller, the functions in the workers."""
        workers = len(worker_group)
        worker_group.execute(_set_torch_distributed_env_vars)
        address = worker_group.execute_single(0, open_meeting_place)
        timeout = timedelta(seconds=backend_config.timeout_s)
        joining: list[Any] = [
            worker_group.execute_single_async(
                rank, _join, backend_config.backend, address, rank, workers, timeout
            )
            for rank in range(workers)
        ]
        ray.get(joining)


def _join(backend: str, address: str, rank: int, workers: int, timeout: timedelta) -> None:
    use_interface_of(node_address())
    if backend == "nccl" and "TORCH_NCCL_BLOCKING_WAIT" not in os.environ:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # a late collective aborts, as in Ray
    store = meet(address, rank=rank, workers=workers, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=workers, timeout=timeout)  # noqa: TID251


def node_address() -> str:
    """Return the address by which the node of this Ray worker joined the cluster."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address
