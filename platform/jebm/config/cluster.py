"""The section of the configuration that says what a run computes on."""

from dataclasses import dataclass
from typing import Literal

from jebm.config.roles import require

__all__ = ["Cluster"]


@dataclass(frozen=True)
class Cluster:
    """The resources that the run uses.

    Args:
        engine: ray (Ray Train; starts a local Ray if none runs) or process (only this process, or the
            processes that torchrun started).
        workers: Number of data-parallel workers.
        min_workers: Continue with at least this many when nodes are lost; grow again when they return (Ray
            only; image order stays the same, noise does not); null for a fixed number.
        cpus_per_worker: CPUs (and torch threads) of each worker.
        gpus_per_worker: GPUs of each worker: 0 for none, 1, or a share of one, such as 0.25, for runs
            and trials of a single worker, each with that share of its memory.
        accelerator: Use only nodes with this kind of GPU, by Ray's name (T4, L4, A10G, H100); null for any.
        max_failures: How often Ray may restart the workers after a crash.
        autoscales: The cluster adds nodes on demand, so wait for workers that do not fit on its present ones.
        hang_seconds: A step that takes longer, and ten times the slowest before, is a hang: the log names the
            ranks that hold the others up, and Ray or torchrun restart the workers; 0: never.

    """

    engine: Literal["ray", "process"] = "ray"
    workers: int = 1
    min_workers: int | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0
    accelerator: str | None = None
    max_failures: int = 3
    autoscales: bool = False
    hang_seconds: float = 120.0

    def __post_init__(self) -> None:
        require(self.workers >= 1, "cluster.workers", "must be at least 1")
        require(
            self.min_workers is None or 1 <= self.min_workers <= self.workers,
            "cluster.min_workers",
            f"must lie between 1 and cluster.workers = {self.workers}",
        )
        require(1 <= self.cpus_per_worker <= 1_024, "cluster.cpus_per_worker", "must lie between 1 and 1,024")
        self._check_gpus()
        require(self.max_failures >= 0, "cluster.max_failures", "must not be negative")
        require(0 <= self.hang_seconds <= 86_400, "cluster.hang_seconds", "must lie between 0 and 86,400")

    def _check_gpus(self) -> None:
        key, gpus = "cluster.gpus_per_worker", self.gpus_per_worker
        require(
            gpus == 0 or 0.01 <= gpus <= 1,
            key,
            f"must be 0, 1, or a share of one from 0.01 on, not {gpus:g}: a worker trains on one GPU; "
            "for more raise cluster.workers",
        )
        require(
            gpus in (0, 1) or self.workers == 1,
            key,
            f"{gpus:g} needs cluster.workers 1, not {self.workers}: the workers of a group cannot share one; "
            "set it to 1",
        )
        require(
            self.accelerator is None or gpus > 0,
            "cluster.accelerator",
            "names a kind of GPU, and cluster.gpus_per_worker is 0; set that to 1",
        )

    @property
    def gpus_text(self) -> str:
        """A worker's GPUs, to follow its CPUs: " and 0.5 GPU", or nothing."""
        return f" and {self.gpus_per_worker:g} GPU" if self.gpus_per_worker else ""
