"""Spread an evaluation's batches over the workers of a Ray cluster."""

import logging
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from jebm import errors
from jebm.cli import log_lines
from jebm.config import Cluster, Config, Train
from jebm.errors import ConfigError, DataError, JebmError
from jebm.evaluate.restore import stored_config
from jebm.evaluate.share import group_share
from jebm.evaluate.suite import Request, check, evaluate_request
from jebm.on_ray.capacity import check_capacity, needs
from jebm.on_ray.cluster import connect, job_environment, runs_here
from jebm.on_ray.meeting import meet, node_address, open_meeting_place, use_interface_of
from jebm.on_ray.places import everywhere, shared
from jebm.on_ray.reservations import free_abandoned_groups
from jebm.on_ray.stopping import StoppedError, attend
from jebm.on_ray.waiting import Waiting, free_room
from jebm.report.findings import Findings
from jebm.store.retrieve import open_checkpoint
from jebm.train.group import process_group
from jebm.train.runtime import device_of

__all__ = ["check_output", "evaluate_on_ray", "resolve_request"]

_PATIENCE = timedelta(hours=2)
"""How long a worker waits for another that trains a feature net or has more batches."""
_LOOK_SECONDS = 2.0


def check_output(uri: str) -> None:
    """Raise ConfigError if this is a job whose output would be lost with its temporary folder."""
    if job_environment() is not None and "://" not in uri and not Path(uri).is_absolute():
        raise ConfigError(
            f"output: {uri!r} would lie in the job's temporary folder and be lost with it; "
            "give s3://bucket/prefix, or an absolute path"
        )


def resolve_request(request: Request) -> Request:
    """Return the request with paths that mean the same in the workers and in this process.

    Fills in the run's data if the request names none. Raises as `check` and `everywhere`.
    """
    checkpoint = everywhere("checkpoint", request.checkpoint)
    run, manifest = open_checkpoint(checkpoint)
    data = stored_config(manifest, f"{run.uri}/checkpoints/{manifest.name}").data
    others = {name: everywhere(name, uri) for name, uri in request.out_of_distribution.items()}
    request = replace(
        request,
        checkpoint=checkpoint,
        data=everywhere("data", request.data or data.held_out or data.train),
        train=everywhere("train", request.train) if request.train else shared("train", data.train),
        out_of_distribution=others,
    )
    try:
        check(request)
    except DataError:
        everywhere("train", request.train or "")  # the run's, which not every measure needs
        raise
    return request


def evaluate_on_ray(request: Request, cluster: Cluster, *, provenance: Mapping[str, str]) -> Findings:
    """Run `evaluate_request` in the cluster's workers, of one CPU (and GPU) each; return the findings.

    Joins the cluster at RAY_ADDRESS, or starts a local Ray. Call from the main thread: SIGTERM and SIGINT end
    it at once.

    Raises:
        ConfigError: the cluster cannot hold the workers.
        JebmError: a worker raised it, which ends the others.
        KeyboardInterrupt: on SIGINT.
        SystemExit: on SIGTERM, with a shell's exit code for it, 143.
    """
    request = resolve_request(request)

    def start() -> Findings:
        connect()
        config = Config(train=Train(batch_size=cluster.workers), cluster=cluster)
        check_capacity(config, here=runs_here())
        try:
            return _evaluate(request, config, provenance)
        finally:
            free_abandoned_groups()

    try:
        return attend(start, stop=lambda: False, ending="stopping, without a report")
    except StoppedError as stopped:
        if stopped.signal_number == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + stopped.signal_number) from None


def _evaluate(request: Request, config: Config, provenance: Mapping[str, str]) -> Findings:
    workers, device = config.cluster.workers, device_of(config)
    gpus = config.cluster.gpus_per_worker
    bundle = {"CPU": 1.0, "GPU": gpus} if gpus else {"CPU": 1.0}
    group = placement_group([bundle] * workers)  # all or none, so that two evaluations never halve the room
    actors: list[Any] = []  # no type knows their methods
    try:
        waiting, ready = Waiting(needs(config), free_room), group.ready()
        while not ray.wait([ready], timeout=_LOOK_SECONDS)[0]:
            waiting.look(waits=True)
        remote = ray.remote(num_cpus=1, num_gpus=gpus)(_Worker)
        for rank in range(workers):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            actors.append(remote.options(scheduling_strategy=place).remote())
        address = ray.get(actors[0].open_meeting_place.remote())  # where all meet
        # Every worker evaluates; rank 0's findings are returned.
        pending = {
            actor.run.remote(rank, workers, address, request, dict(provenance), device): rank
            for rank, actor in enumerate(actors)
        }
        findings: Findings | None = None
        while pending:
            (ended,), _ = ray.wait(list(pending), num_returns=1)
            result = ray.get(ended)
            if isinstance(result, tuple):  # at once, since the others would wait for this one
                kind, message = result
                raise getattr(errors, kind)(message)
            findings = result if pending.pop(ended) == 0 else findings
    finally:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)
    if findings is None:
        raise JebmError("the workers have ended without findings")
    return findings


class _Worker:
    """One process of the group."""

    def open_meeting_place(self) -> str:
        """Return the group's rendezvous address, on the node of this worker, rank 0."""
        return open_meeting_place()

    def run(
        self,
        rank: int,
        workers: int,
        address: str,
        request: Request,
        provenance: dict[str, str],
        device: torch.device,
    ) -> Any:  # noqa: ANN401 # findings, or an error's class name and message
        """Evaluate as one of the group; return errors that the user can fix as text."""
        log_lines()
        logging.getLogger("jebm").setLevel(logging.INFO if rank == 0 else logging.WARNING)
        with ExitStack() as stack:
            if workers > 1:
                use_interface_of(node_address())
                store = meet(address, rank=rank, workers=workers, timeout=_PATIENCE)
                place = {"store": store, "rank": rank, "world_size": workers, "timeout": _PATIENCE}
                stack.enter_context(process_group("gloo", **place))
            try:
                return evaluate_request(request, device=device, share=group_share(), provenance=provenance)
            except JebmError as error:
                # If the group ended now, the others would fail too, and their errors might arrive first.
                self._group = stack.pop_all()
                kind = next(base for base in type(error).__mro__ if base.__module__ == errors.__name__)
                return kind.__name__, str(error)
