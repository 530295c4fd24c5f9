"""What runs in each Ray Train worker: turn the context into a `Runtime` and call `fit`."""

import dataclasses
import logging
from typing import Any

import ray.train
import ray.train.torch
from ray.train import Checkpoint, CheckpointUploadMode

from jebm import errors
from jebm.cli import log_lines
from jebm.config import Config
from jebm.errors import CheckpointError, ConfigError, DataError, DivergedError
from jebm.evaluate.quick import quick_look
from jebm.on_ray.gauges import Gauges
from jebm.on_ray.reports import ReportBox
from jebm.on_ray.stopping import follow_stop_request, poll_seconds
from jebm.parser import config_from_dict
from jebm.store.manifest import Manifest, step_and_attempt
from jebm.train.group import last_to_hold_the_group
from jebm.train.loop import fit
from jebm.train.recorder import Enough, Report, never
from jebm.train.runtime import Runtime, member_runtime, prepare_process

__all__ = ["SNAPSHOT", "work"]

SNAPSHOT = "checkpoints/checkpoint_manager_snapshot.json"
"""Where Ray writes its list of checkpoints, relative to the run."""


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train as one worker of the group; `arguments` come from `train_workers`.

    Returns the `Result` as a dict, or {"error": kind, "message": text} if a restart of the group would fail
    the same way: bad values, data or checkpoint (raised on all ranks), or divergence.
    """
    log_lines()
    logging.getLogger("jebm").setLevel(arguments["log_level"])
    for name in ("ray.train", "ray.train.v2._internal.execution.context"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they print every report in full
    # The run's config, and this worker's place in the group.
    config = config_from_dict(arguments["config"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    prepare_process(config, device)
    place = (context.get_world_rank(), context.get_world_size(), device)
    every = poll_seconds(place[0], context.get_local_rank())
    stop = follow_stop_request(arguments["stop_request"], config.run.name, every)
    try:
        # Ray destroys its group next, so release it here.
        with last_to_hold_the_group(), member_runtime(*place, supervised=True) as runtime:
            result = fit(
                config,
                runtime,
                provenance=arguments["provenance"],
                on_report=_Reporter(config, runtime, every=arguments["every_report"]),
                enough=_forwarded(arguments["report_box"]),
                should_stop=stop.is_set,
                measure=quick_look(config),
            )
    except (ConfigError, DataError, CheckpointError, DivergedError) as error:
        kind = next(base for base in type(error).__mro__ if base.__module__ == errors.__name__)
        return {"error": kind.__name__, "message": str(error)}
    finally:
        stop.set()  # ends the polling thread
    return dataclasses.asdict(result)


def _forwarded(box: ReportBox | None) -> Enough:
    """Return what puts each report of rank 0 into the driver's box, if there is one."""
    return never if box is None else box.put


class _Reporter:
    """Registers each committed checkpoint with Ray Train; with `every`, also passes on every report.

    Each rank's gauges show every report.

    It sends no more, since reports to Ray are slow: all ranks synchronise in one Ray process, and the
    controller takes one report per worker at each health check. The next report waits for that: training in
    steps of 10 ms would mostly wait.

    Retention does not involve Ray. Ray's list may name a deleted checkpoint until the next report, and
    `StoreFileSystem` keeps that from ending a run; at the end the list names the kept ones.
    """

    def __init__(self, config: Config, runtime: Runtime, *, every: bool) -> None:
        self._runtime, self._every = runtime, every
        self._gauges = Gauges(config, runtime.rank)
        self._folder = f"{config.run.name}/checkpoints"
        known = ray.train.get_checkpoint()
        self._registered = (0, 0) if known is None else _written(known.path.rpartition("/")[2])

    def __call__(self, report: Report) -> bool:
        """Report; return whether a node of this group is about to be preempted."""
        self._gauges(report)
        # In the order they were written, so that none is registered twice, which Ray does not tolerate.
        committed = [found for found in report.checkpoints if _written(found.name) > self._registered]
        for index in range(self._runtime.from_main(len(committed))):
            self._register(committed[index] if committed else None)
        if self._every:
            _tell_ray({"step": report.step, **report.metrics})
        notice = ray.train.get_preemption_info()
        if notice is not None:
            logging.getLogger("jebm.on_ray").info("nodes are about to go: saving at step %d", report.step)
        return notice is not None

    def _register(self, manifest: Manifest | None) -> None:
        """Give Ray a checkpoint with its step and metrics; with None, only join the rank that has one."""
        if manifest is None:
            _tell_ray({})
            return
        self._registered = _written(manifest.name)
        filesystem = ray.train.get_context().get_storage().storage_filesystem
        checkpoint = Checkpoint(f"{self._folder}/{manifest.name}", filesystem)
        _tell_ray({**manifest.metrics, "step": manifest.step}, checkpoint)


def _written(name: str) -> tuple[int, int]:
    """Return attempt and step of a checkpoint's folder, which sort checkpoints by time of writing."""
    step, attempt = step_and_attempt(name) or (0, 0)
    return attempt, step


def _tell_ray(metrics: dict[str, float], checkpoint: Checkpoint | None = None) -> None:
    ray.train.report(
        metrics,
        checkpoint=checkpoint,
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        delete_local_checkpoint_after_upload=False,  # else Ray would delete the checkpoint itself
    )
