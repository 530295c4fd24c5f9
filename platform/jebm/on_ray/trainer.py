"""From a config to a Ray Train run and back to its result."""

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import InsufficientClusterResourcesError, UserExceptionWithTraceback
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from jebm import errors
from jebm.config import Cluster, Config, config_to_dict
from jebm.data.manifest import read_manifest
from jebm.errors import ClusterError, ConfigError, JebmError
from jebm.on_ray.cluster import job_output, join, submission_id
from jebm.on_ray.filesystem import ray_filesystem
from jebm.on_ray.guard import Guard
from jebm.on_ray.meeting import GroupConfig
from jebm.on_ray.reports import ReportBox
from jebm.on_ray.reservations import free_abandoned_groups
from jebm.on_ray.stopping import StoppedError, StopRequest, attend
from jebm.on_ray.worker import SNAPSHOT, work
from jebm.store.checkpoint import Checkpoints
from jebm.store.storage import open_store
from jebm.train.lease import Lease
from jebm.train.logs import KeptLog
from jebm.train.loop import Result
from jebm.train.recorder import Enough, Report, never
from jebm.train.runtime import STOPPING
from jebm.train.start import total_steps_of

__all__ = ["health_check_seconds", "known_cause", "train", "train_workers"]

_LOG = logging.getLogger("jebm.on_ray")
_HARMLESS = "Ray's line about 'PreemptionWatcher' (E … core_worker.cc) is harmless: an actor of its own"
_ELASTIC_START_SECONDS = "20"
_HEALTH_CHECK = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"


class _NamedRun(RunConfig):
    """A run whose name in Ray's metrics and logs is its own, and whose folder for checkpoints is ours.

    Ray takes one name for both; in our folder it treats our checkpoints as its own.
    """

    @cached_property
    def storage_context(self) -> StorageContext:
        """Return where Ray looks for checkpoints and keeps its list of them."""
        return StorageContext(self.storage_path or "", "checkpoints", self.storage_filesystem)


def train(config: Config, provenance: Mapping[str, str], on_report: Enough = never) -> Result:
    """Run `fit` in `cluster.workers` Ray Train workers and return rank 0's result.

    Call from the main thread: SIGTERM and SIGINT stop the run, at once if no worker is training. `on_report`
    is called here within a second of each report; if it returns a true value the run stops.

    Raises:
        ConfigError: another job is training this run, the cluster is too small, or the run's checkpoint has
            another config.
        JebmError: the workers raised it; if a restart may help, after `cluster.max_failures` restarts.
    """
    request = StopRequest()
    box, last = None if on_report is never else ReportBox(), list[Report]()
    heard = threading.Event()

    def hear(reports: Sequence[Report] | None = None) -> bool:
        for report in reports if reports is not None else box.take() if box is not None else ():
            if on_report(report):
                heard.set()
        return heard.is_set()

    def start() -> Result:
        ours = not ray.is_initialized()
        join(config)
        _LOG.info("starting the workers; %s", _HARMLESS)
        try:
            return train_workers(config, provenance, request, box=box)
        finally:
            free_abandoned_groups()
            last.extend(box.take() if box is not None else ())
            if ours:
                ray.shutdown()  # a local Ray dies with this thread, and the next call would wait for it

    def stop() -> bool:
        if not ray.is_initialized():
            return False
        request.ask()
        return request.heeded(config.run.name)

    # Only one job may train a run.
    run = open_store(config.run.storage).child(config.run.name)
    with Lease(run, ray_job=submission_id()), KeptLog(run, "driver", job_output):
        try:
            result = attend(start, stop=stop, ending=STOPPING, enough=hear)
            hear(last)
            early = heard.is_set() and result.status == "stopped"
            return replace(result, status="stopped early") if early else result
        except StoppedError:
            return _as_it_stands(config)


def _as_it_stands(config: Config) -> Result:
    """Return the result of a run that was stopped before it could resume."""
    store = open_store(config.run.storage)
    newest = Checkpoints(store, config.run.name).latest()
    images = read_manifest(open_store(config.data.train)).images
    total_steps = total_steps_of(config, images // config.train.batch_size)
    step, metrics = (0, {}) if newest is None else (newest.step, dict(newest.metrics))
    return Result("stopped", step, total_steps, metrics, store.child(config.run.name).uri)


def train_workers(
    config: Config,
    provenance: Mapping[str, str],
    request: StopRequest,
    callbacks: Sequence[UserCallback] = (),
    log_level: int = logging.INFO,
    box: ReportBox | None = None,
) -> Result:
    """Run `fit` in a group of workers on the joined cluster.

    The workers stop on `request`. `callbacks` run in Ray's controller; with them it gets every report,
    without them only those of checkpoints. The workers print this package's log from `log_level` up, and rank
    0 puts its reports into `box`.

    Raises:
        StoppedError: a stop was requested while no worker was training.
        JebmError: as `train`.
    """
    # Ray would refuse to start if its list named a deleted checkpoint. Nothing here reads that list: a run
    # resumes from the newest checkpoint in its storage.
    open_store(config.run.storage).child(config.run.name).delete([SNAPSHOT])
    trainer = TorchTrainer(
        work,  # type: ignore[arg-type] # its result is rank 0's return_value
        train_loop_config={
            "config": config_to_dict(config),
            "provenance": dict(provenance),
            "stop_request": request,
            "log_level": log_level,
            "every_report": bool(callbacks),
            "report_box": box,
        },
        torch_config=GroupConfig(backend="nccl" if config.cluster.gpus_per_worker else "gloo"),
        scaling_config=_scaling(config.cluster),
        run_config=_NamedRun(  # type: ignore[arg-type] # mypy sees the trainer of Train V1
            name=config.run.name,
            storage_path=config.run.name,
            storage_filesystem=ray_filesystem(config.run.storage),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep_last),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            # Ray's own callbacks come this way, too.
            callbacks=[*callbacks, Guard(request, config)],  # type: ignore[list-item]
        ),
    )
    return _result_of(trainer)


def _result_of(trainer: TorchTrainer) -> Result:
    """Run a trainer to its end and return rank 0's result; raises as `train_workers`."""
    try:
        value = trainer.fit().return_value  # type: ignore[attr-defined]
    except TrainingFailedError as error:
        raise known_cause(error) from error
    if "error" in value:
        raise getattr(errors, value["error"])(value["message"])
    return Result(**value)


def health_check_seconds(workers: int) -> float:
    """Return how often Ray's controller asks each worker how it is, and takes a report of it.

    Half a second up to 64 workers, as Ray's 2 s slow sweeps. Beyond, it grows with their number: each check
    takes the controller some 0.7 ms for each; at half a second 1,024 workers would cost it 1.4 cores.
    """
    return max(0.5, workers / 128)


def _scaling(cluster: Cluster) -> ScalingConfig:
    """Return how many workers Ray starts, with the resources of each."""
    os.environ.setdefault(_HEALTH_CHECK, f"{health_check_seconds(cluster.workers):g}")
    workers: int | tuple[int, int] = cluster.workers
    if cluster.min_workers:
        workers = (cluster.min_workers, cluster.workers)
        # An elastic group starts on the nodes that Ray lists, and a lost node stays listed for half a minute.
        # Waiting for it as long as for a node being provisioned would be in vain.
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = _ELASTIC_START_SECONDS
    return ScalingConfig(
        num_workers=workers,  # type: ignore[arg-type]
        use_gpu=cluster.gpus_per_worker > 0,
        resources_per_worker={"CPU": cluster.cpus_per_worker}
        | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
        accelerator_type=cluster.accelerator,
    )


def known_cause(error: TrainingFailedError) -> Exception:
    """Return what to raise in place of Ray's error.

    That is the error of this package that caused it, or a stop; Ray's own error, with its traceback, if code
    of a worker raised another; else one line with Ray's reason: a ConfigError if the cluster can never hold
    the workers, a ClusterError otherwise.
    """
    failures: list[BaseException] = [error]
    if isinstance(error, WorkerGroupError):
        failures = list(error.worker_failures.values())
    elif isinstance(error, ControllerError):
        failures = [error.controller_failure]
    causes = [cause for failure in failures for cause in _causes(failure)]
    for cause in causes:
        if isinstance(cause, JebmError | StoppedError):
            return cause
    if any(isinstance(cause, UserExceptionWithTraceback) for cause in causes):
        return error
    lines = [line.strip(" .") for line in str(failures[0]).splitlines() if line.strip(" .")] or ["no reason"]
    if isinstance(failures[0], InsufficientClusterResourcesError):
        reason = next((line for line in lines if "requires" in line), lines[-1])
        return ConfigError(f"cluster.workers: {reason}. Lower it, or let the cluster have more nodes")
    reason = f"{type(failures[0]).__name__}: {lines[-1]}"
    return ClusterError(f"{reason}. The same command resumes the run from its newest checkpoint")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it wraps, in any of Ray's ways."""
    cause: BaseException | None = error
    while isinstance(cause, BaseException):
        yield cause
        inner = (getattr(cause, name, None) for name in ("_base_exc", "health_check_failure", "cause"))
        cause = next(filter(None, inner), None) or cause.__cause__
