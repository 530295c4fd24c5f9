"""What runs in each trial of a sweep: `fit` in this process, or in a group of Ray Train workers."""

import gc
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import wait
from typing import Any

import ray
import ray.tune
import torch
from ray.exceptions import RayActorError
from ray.train import Checkpoint
from ray.train.v2.api.callback import UserCallback
from ray.util.queue import Queue

from jebm.cli import log_lines
from jebm.config import Config
from jebm.errors import CheckpointError, ConfigError, DataError, DivergedError, JebmError
from jebm.evaluate.quick import quick_look
from jebm.on_ray.gauges import Gauges
from jebm.on_ray.reservations import free_abandoned_groups
from jebm.on_ray.stopping import (
    StoppedError,
    StopRequest,
    follow,
    follow_stop_request,
    in_background,
    node_is_going,
)
from jebm.on_ray.trainer import train_workers
from jebm.parser import config_from_dict
from jebm.train.loop import Result, fit
from jebm.train.recorder import Report
from jebm.train.runtime import Runtime, device_of, prepare_process

__all__ = ["METRICS", "Reports", "needs_another_attempt", "run_trial"]

METRICS = "metrics/"
"""Prefix of the training metrics in a report to Tune."""

_LOG = logging.getLogger("jebm.on_ray")
_LOG_LEVEL = logging.WARNING  # the steps of all trials together are unreadable
_POLL_SECONDS = 0.5
_NOTICE_SECONDS = 2.0  # between questions whether the node is about to go


def run_trial(
    sample: dict[str, Any],
    *,
    provenance: Mapping[str, str],
    request: StopRequest,
) -> None:
    """Train the run of one trial, resuming from its newest checkpoint if any; a function for Tune.

    If the node of a single worker is about to go, the trial saves, reports status interrupted and raises
    Ray's error for that, which Tune does not charge: it starts the trial again on another node.

    `sample` holds the run's whole config as JSON under "config". Reports have `status`, `step`, `images`,
    `seconds` since this attempt began, and the metrics. The first has status begun; the last, with `done`,
    says how the trial ended: finished, stopped, diverged or failed, the latter two with `error`. An error
    that another attempt may overcome is reported with status error and raised, so that Tune retries.
    """
    log_lines()
    logging.getLogger("jebm").setLevel(_LOG_LEVEL)
    # How long the next trial in this process waits for this one's thread to end on a busy machine.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"
    _free_memory()  # of the trial before, in a process that Tune uses again
    config = config_from_dict(json.loads(sample["config"]))
    reports = Reports(config)
    reports("begun", 0, {})
    if request.asked(config.run.name):  # it came while this process started
        reports("stopped", 0, {}, done=True)
        return
    stop = follow_stop_request(request, config.run.name)
    try:
        if config.cluster.workers == 1:
            result = _train_here(config, provenance, stop, reports)
        else:
            result = _train_workers(config, provenance, request, stop, reports)
    except DivergedError as error:
        reports.end("diverged", error)
    except (ConfigError, DataError, CheckpointError) as error:  # another attempt would fail the same way
        reports.end("failed", error)
    except Exception as error:
        if needs_another_attempt(error, config.run.name, reports, stopping=stop.is_set()):
            raise
    else:
        status = "stopped" if result.status == "stopped" else "finished"
        reports(status, result.step, result.metrics, done=True)
    finally:
        stop.set()  # ends the polling thread


def needs_another_attempt(error: Exception, run: str, reports: "Reports", *, stopping: bool) -> bool:
    """Report an error; return whether to raise it, which ends this process and has Tune start another."""
    if isinstance(error, RayActorError) and error.preempted:
        reports("interrupted", reports.step, {})
        return True
    # After an error of its GPU a process can compute nothing more, and no later trial may get it.
    if isinstance(error, StoppedError) or (stopping and not isinstance(error, torch.AcceleratorError)):
        reports.end("stopped", error)
        return False
    if not isinstance(error, JebmError):
        _LOG.warning("%s: this attempt has failed", run, exc_info=error)
    reports("error", reports.step, {}, error=f"{type(error).__name__}: {error}")
    return True


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


class Reports:
    """Reports of one attempt to Tune. Each call waits until Tune has taken the report."""

    def __init__(self, config: Config) -> None:
        self._batch_size = config.train.batch_size
        self._began = time.monotonic()
        self.step = 0

    def __call__(self, status: str, step: int, metrics: Mapping[str, float], **more: object) -> None:
        """Report a status, and metrics by their names in training."""
        self.step = step
        ray.tune.report(
            {
                "status": status,
                "step": step,
                "images": step * self._batch_size,
                "seconds": time.monotonic() - self._began,
                **{METRICS + name: value for name, value in metrics.items()},
                **more,
            }
        )

    def end(self, status: str, error: Exception) -> None:
        """Report that this attempt is the last one."""
        self(status, self.step, {}, error=str(error), done=True)


def _train_here(
    config: Config,
    provenance: Mapping[str, str],
    stop: threading.Event,
    reports: Reports,
) -> Result:
    device = device_of(config)
    prepare_process(config, device)
    going = follow(node_is_going, _NOTICE_SECONDS)

    gauges = Gauges(config, 0)

    def on_report(report: Report) -> bool:
        gauges(report)
        if report.step > reports.step:  # the last report comes twice, then with its checkpoint
            reports("running", report.step, report.metrics)
        return False

    try:
        result = fit(
            config,
            Runtime(0, 1, device, supervised=True),
            provenance=provenance,
            on_report=on_report,
            should_stop=lambda: stop.is_set() or going.is_set(),
            measure=quick_look(config),
        )
        noticed = going.is_set()
    finally:
        going.set()  # ends the polling thread
        gauges.close()
    if noticed and result.status == "stopped" and not stop.is_set():
        raise RayActorError(error_msg=f"saved at step {result.step:,}: its node is going", preempted=True)
    return result


def _train_workers(
    config: Config,
    provenance: Mapping[str, str],
    request: StopRequest,
    stop: threading.Event,
    reports: Reports,
) -> Result:
    """Train in a group of workers and forward their reports.

    Does not use Ray's TuneReportCallback: there two threads report, this one and one of Tune's, and deadlock
    if Tune's driver is late.
    """
    free_abandoned_groups()  # of this sweep's dead trials, among others
    # Train in a thread; this thread reports to Tune.
    queue = Queue(actor_options={"num_cpus": 0})
    training = in_background(
        lambda: train_workers(
            config,
            provenance,
            request,
            callbacks=[_Forward(queue)],
            log_level=_LOG_LEVEL,
        )
    )
    finished = False
    try:
        while not finished:
            finished = bool(wait([training], timeout=_POLL_SECONDS).done)
            for metrics in queue.get_nowait_batch(queue.qsize()):
                if metrics["step"] > reports.step:
                    reports("running", metrics.pop("step"), metrics)
            if stop.is_set() and not request.heeded(config.run.name):  # its controller has not started yet
                raise StoppedError
    finally:
        queue.shutdown()
    return training.result()


class _Forward(UserCallback):
    """In Ray Train's controller: puts rank 0's reports into a queue, except those of a checkpoint."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def after_report(
        self, run_context: object, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        if checkpoint is None and metrics[0]:
            self._queue.put(dict(metrics[0]))
