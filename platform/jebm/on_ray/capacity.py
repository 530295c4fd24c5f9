"""How many workers fit on the cluster."""

from collections.abc import Mapping

import ray
from ray._private.resource_and_label_spec import ResourceAndLabelSpec

from jebm.config import Cluster, Config
from jebm.errors import ConfigError

__all__ = ["check_capacity", "needs", "nodes_there", "places"]

_ROUNDING = 1e-9  # 1 / 0.1 GPUs are ten places, not nine


def needs(config: Config) -> str:
    """Describe the resources of a run's workers, such as 2 workers x 1 CPU."""
    cluster = config.cluster
    workers, cpus = cluster.workers, cluster.cpus_per_worker
    count = f"{workers} worker{'s' if workers > 1 else ''}"
    return f"{count} x {cpus} CPU{'s' if cpus > 1 else ''}{cluster.gpus_text}"


def check_capacity(config: Config, *, here: bool) -> None:
    """Raise `ConfigError` if the workers can never fit on the joined cluster, or else on this machine.

    `here`: the workers run on this machine only.
    """
    cluster = config.cluster
    room = places(config)
    # What an autoscaler may add, Ray 2.60 does not say.
    if room >= (cluster.min_workers or cluster.workers) or (cluster.autoscales and not here):
        return
    # Say what was requested, what there is, and the remedy.
    nodes = list(nodes_there())
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    asked = f"cluster.workers: {cluster.workers} workers of {cluster.cpus_per_worker} CPU{cluster.gpus_text}"
    remedy = "lower it" if room else "lower it, or cluster.cpus_per_worker"
    if cluster.accelerator and not any(f"accelerator_type:{cluster.accelerator}" in node for node in nodes):
        asked, remedy = f"cluster.accelerator: workers with a {cluster.accelerator}", "correct it"
    elif cluster.gpus_per_worker and not gpus:
        asked, remedy = "cluster.gpus_per_worker: workers with a GPU", "set it to 0"
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
    """Return how many workers the cluster's nodes can hold at once, if empty, each on a single node."""
    return sum(_fit(config.cluster, node) for node in nodes_there())


def nodes_there() -> list[Mapping[str, float]]:
    """Return the resources of each live node; before joining a cluster, those of this machine."""
    if not ray.is_initialized():
        found = ResourceAndLabelSpec().resolve(is_head=True, node_ip_address="127.0.0.1")
        return [{"CPU": found.num_cpus or 0, "GPU": found.num_gpus or 0, **(found.resources or {})}]
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def _fit(cluster: Cluster, node: Mapping[str, float]) -> int:
    if cluster.accelerator and f"accelerator_type:{cluster.accelerator}" not in node:
        return 0
    room = int(node.get("CPU", 0) // cluster.cpus_per_worker)
    if cluster.gpus_per_worker:  # a share lies on one GPU
        room = min(room, int(node.get("GPU", 0)) * int(1 / cluster.gpus_per_worker + _ROUNDING))
    return room
