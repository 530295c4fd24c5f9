"""The training loop, the same under plain Python, torchrun and Ray."""

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from jebm.config import Config
from jebm.data.dataset import ImageSet
from jebm.data.loader import upload
from jebm.rng import gaussian_noise
from jebm.train.compiled import compile_ahead
from jebm.train.logs import KeptLog
from jebm.train.metrics import Clock
from jebm.train.recorder import Enough, Measure, OnReport, Recorder, never
from jebm.train.runtime import Runtime
from jebm.train.start import Start, begin
from jebm.train.update import EnergyUpdate, JointUpdate, features_of
from jebm.train.watch import Watch

__all__ = ["Result", "fit"]

_LOG = logging.getLogger("jebm.train")

_FEATURE_BYTES = 4 << 30
"""Two-stage training keeps the features of all images up to here, else it computes them batch by batch."""


@dataclass(frozen=True)
class Result:
    """How a call of `fit` ended."""

    status: Literal["finished", "already finished", "stopped", "stopped early"]
    """stopped early: by `train.early_stopping`, or by the callback of `jebm.fit`; stopped: by a signal."""
    step: int
    total_steps: int
    metrics: dict[str, float]
    """From the last report, or from the last checkpoint if the run was already finished."""
    place: str
    """The location of the run's files."""


def fit(
    config: Config,
    runtime: Runtime,
    *,
    provenance: Mapping[str, str],
    on_report: OnReport = lambda report: False,
    should_stop: Callable[[], bool] = lambda: False,
    enough: Enough = never,
    measure: Measure | None = None,
) -> Result:
    """Train until `train.epochs` are done, from the run's newest checkpoint if any; all ranks call this.

    `on_report` is called on every rank at every report, and after the last checkpoint is committed; if it
    returns True on any rank, a checkpoint is written at once. If `should_stop()` is true on any rank, all
    stop after the same step, with a last checkpoint. `enough` is called on rank 0 at every report; if it
    returns True, all stop at that step, likewise. `measure` is called on every rank, every
    `evaluation.every_steps` and at the end.

    Raises:
        ConfigError, DataError, StoreError, CheckpointError: before the first step; nothing is lost.
        DivergedError: loss or gradient is not finite; the newest checkpoint predates that.
    """
    start = begin(config, runtime)
    state, total_steps = start.state, start.horizon.total_steps
    if start.parent is not None and start.finished:
        return Result("already finished", state.step, total_steps, dict(start.parent.metrics), start.place)
    with (
        closing(start.loader),
        KeptLog(start.store.child(config.run.name), f"rank-{runtime.rank:05d}"),
        Watch(runtime, config.cluster.hang_seconds, should_stop) as watch,
        Recorder(start, provenance, on_report, enough, measure, watch) as recorder,
    ):
        batch_of, update = _course(start, recorder.clock, watch)
        stopped = not _compiled(start, batch_of, update, watch, recorder.clock, should_stop)
        while state.step < total_steps and not (stopped or recorder.ended_early):
            watch.at(state.step, "images")
            with recorder.clock("data"):
                batch = batch_of(state.step)
            watch.at(state.step, "update")
            # A failure on one rank ends the run on all ranks, like a stop request.
            outcome = update(batch, should_stop() or recorder.failed)
            stopped = outcome.stop
            recorder.record(outcome.metrics, stopped=stopped)
        recorder.finish()
    recorder.tell()
    status: Literal["finished", "stopped", "stopped early"] = "finished"
    if state.step < total_steps:
        status = "stopped early" if recorder.ended_early else "stopped"
    return Result(status, state.step, total_steps, recorder.metrics, start.place)


def _compiled(
    start: Start,
    batch_of: Callable[[int], Any],
    update: JointUpdate | EnergyUpdate,
    watch: Watch,
    clock: Clock,
    should_stop: Callable[[], bool],
) -> bool:
    """Do what `train.compile` asks for, with the next step's batch; return whether to go on."""
    if not start.config.train.compile:
        return True
    batch = batch_of(start.state.step)
    with watch.busy("compiling"):
        goes_on = compile_ahead(update.compile(batch), start.config, start.runtime, should_stop)
    clock.take()  # it is no part of a step
    return goes_on


def _course(
    start: Start, clock: Clock, watch: Watch
) -> tuple[Callable[[int], Any], JointUpdate | EnergyUpdate]:
    """Return a function from step to this rank's batch (images or features), and what updates from it."""
    config, runtime, state, loader = start.config, start.runtime, start.state, start.loader
    noise = gaussian_noise(config.run.seed, runtime.rank, runtime.device)
    kind = JointUpdate if config.train.regime == "joint" else EnergyUpdate
    update = kind(state, config, runtime, noise, start.horizon, clock)
    if runtime.is_main:
        _LOG.info("Langevin chain: %s", update.kernel)

    def images_of(step: int) -> Tensor:
        if loader.needs_preparing(step):
            # Decoding may take longer than a hang; without the images of one rank none can go on.
            with watch.busy("images"), runtime.together():
                loader.prepare(step)
        return loader.batch(step)

    if config.train.regime == "joint":
        return images_of, update
    features = None
    if isinstance(start.images, ImageSet):
        features = features_of(state.model, start.images.images_NHWC, runtime, most_bytes=_FEATURE_BYTES)
    if features is None:
        return lambda step: state.model.inference(images_of(step)), update

    def rows_of(step: int) -> list[Tensor]:
        rows = upload(torch.from_numpy(loader.rows(step)), runtime.device)
        return [each[rows] for each in features]

    return rows_of, update
