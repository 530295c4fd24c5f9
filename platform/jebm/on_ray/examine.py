"""Look at the nodes of a cluster: one of each type, by a Ray task there."""

from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jebm.on_ray.cluster import connect
from jebm.store.diagnose import Check
from jebm.train.machine import cache_check, gpu_checks, kernel_check

__all__ = ["examine_nodes"]

_ANSWER_SECONDS = 120.0  # the first task of a node starts a process that imports torch
_TYPE_PREFIX = "accelerator_type:"


def examine_nodes() -> Iterator[tuple[str, Check]]:
    """Join the cluster, or start a local Ray; yield (node type, check) for a node of each type.

    Nodes are of one type if they have the same CPUs and GPUs. The task needs none of them, so it runs on a
    busy node too; for a moment it takes some memory of a GPU. Raises ConfigError as `connect`.
    """
    connect()
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    by_type: dict[str, list[Mapping[str, Any]]] = {}
    for node in alive:
        by_type.setdefault(_type(node["Resources"]), []).append(node)
    remote = ray.remote(num_cpus=0, max_retries=0)(_checks)
    answers: dict[str, Any] = {
        shape: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(nodes[0]["NodeID"], soft=False)
        ).remote(bool(nodes[0]["Resources"].get("GPU")))
        for shape, nodes in by_type.items()
    }
    for shape, answer in answers.items():
        count, name = len(by_type[shape]), by_type[shape][0]["NodeManagerHostname"]
        shown = f"{name} ({shape})" + (f" and {count - 1} like it" if count > 1 else "")
        try:
            for check in ray.get(answer, timeout=_ANSWER_SECONDS):
                yield shown, check
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            remedy = "install jebm's packages on its nodes (requirements/cluster.txt); see Ray's log there"
            yield shown, Check("task", "fail", reason, remedy)
    if not any(node["Resources"].get("GPU") for node in alive):
        yield "cluster", Check("GPUs", "ok", "no node has one: cluster.gpus_per_worker must stay 0")


def _type(resources: Mapping[str, float]) -> str:
    kinds = [name.removeprefix(_TYPE_PREFIX) for name in resources if name.startswith(_TYPE_PREFIX)]
    gpus = f", {resources['GPU']:g} GPU {' '.join(kinds)}".rstrip() if resources.get("GPU") else ""
    return f"{resources.get('CPU', 0):g} CPU{gpus}"


def _checks(gpu: bool) -> list[Check]:
    return [kernel_check(), cache_check(), *(gpu_checks() if gpu else ())]
