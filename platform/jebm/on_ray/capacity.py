"""How many workers fit on the cluster: on its nodes, and on those that its autoscaler may add."""

import logging
import sys
from collections.abc import Iterator, Mapping

import ray
from ray._private import state as ray_state
from ray._private.resource_and_label_spec import ResourceAndLabelSpec

from jebm.config import Cluster, Config
from jebm.errors import ConfigError

__all__ = ["check_capacity", "needs", "node_types", "places"]

_LOG = logging.getLogger("jebm.on_ray")
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
    if room >= (cluster.min_workers or cluster.workers):
        return
    # Say what was requested, what there is, and the remedy.
    cpus, gpus = (sum(node.get(kind, 0) for node in _nodes()) for kind in ("CPU", "GPU"))
    asked = f"cluster.workers: {cluster.workers} workers of {cluster.cpus_per_worker} CPU{cluster.gpus_text}"
    remedy = "lower it"
    if cluster.accelerator and not room:
        asked, remedy = f"cluster.accelerator: workers with a {cluster.accelerator}", "correct it"
    elif cluster.gpus_per_worker and not room:
        asked, remedy = "cluster.gpus_per_worker: workers with a GPU", "set it to 0"
    grows = "" if here or not _additions() else ", all nodes included that its autoscaler may add"
    raise ConfigError(
        f"{asked} do not fit: {'this machine' if here else 'the cluster'} has {cpus:g} CPUs and {gpus:g} "
        f"GPUs, room for {room}{grows}; {remedy}, or "
        + ("set RAY_ADDRESS to the cluster that you mean" if here else "let the cluster have more nodes")
    )


def places(config: Config) -> int:
    """Return how many workers the cluster can hold at once, empty and fully grown, each on a single node."""
    cluster = config.cluster
    added = sum(_fit(cluster, node) * count for node, count in _additions())
    return min(sys.maxsize, max(sum(_fit(cluster, node) for node in _nodes()), added))


def node_types() -> Iterator[Mapping[str, float]]:
    """Yield the resources of each node that is there, and of one of each kind that may be added."""
    yield from _nodes()
    yield from (node for node, _ in _additions())


def _fit(cluster: Cluster, node: Mapping[str, float]) -> int:
    if cluster.accelerator and f"accelerator_type:{cluster.accelerator}" not in node:
        return 0
    room = int(node.get("CPU", 0) // cluster.cpus_per_worker)
    if cluster.gpus_per_worker:  # a share lies on one GPU
        room = min(room, int(node.get("GPU", 0)) * int(1 / cluster.gpus_per_worker + _ROUNDING))
    return room


def _nodes() -> list[dict[str, float]]:
    """Return the resources of each live node; before joining a cluster, those of this machine."""
    if not ray.is_initialized():
        found = ResourceAndLabelSpec().resolve(is_head=True, node_ip_address="127.0.0.1")
        return [{"CPU": found.num_cpus or 0, "GPU": found.num_gpus or 0, **(found.resources or {})}]
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def _additions() -> list[tuple[Mapping[str, float], int]]:
    """Return the autoscaler's kinds of nodes: the resources of one, and how many there may be of it at most.

    Nodes that run already count as well. Empty without an autoscaler, or if this Ray does not tell.
    """
    if not ray.is_initialized():
        return []
    try:  # private: Ray has no public function for it
        config = ray_state.state.get_cluster_config()
        groups = [] if config is None else config.node_group_configs
        return [(_unlimited(group.resources), _unlimited({"": group.max_count})[""]) for group in groups]
    except Exception as error:
        _LOG.warning("this Ray does not say which nodes its autoscaler may add: %s", error)
        return []


def _unlimited(values: Mapping[str, int]) -> dict[str, int]:
    """Return the values with Ray's -1, no limit, as the largest integer."""
    return {name: sys.maxsize if value < 0 else value for name, value in values.items()}
