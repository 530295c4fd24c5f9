"""Training from the first or the last step to the end: the same under plain python, torchrun and Ray."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from jebm.config import Config
from jebm.core.distributions import DiagGaussian
from jebm.rng import gaussian_noise
from jebm.train.metrics import Clock
from jebm.train.posteriors import posteriors
from jebm.train.recorder import Measure, OnReport, Recorder
from jebm.train.runtime import Runtime
from jebm.train.start import Start, begin
from jebm.train.update import EnergyUpdate, JointUpdate, Outcome

__all__ = ["Result", "fit"]

_LOG = logging.getLogger("jebm.train")

B = TypeVar("B")


@dataclass(frozen=True)
class Result:
    """How a call of `fit` ended."""

    status: Literal["finished", "already finished", "stopped"]
    step: int
    total_steps: int
    metrics: dict[str, float]
    """Of the last report; of the last checkpoint where the run was already finished."""
    place: str
    """Where the run's files are."""


def fit(
    config: Config,
    runtime: Runtime,
    *,
    provenance: Mapping[str, str],
    on_report: OnReport = lambda report: False,
    should_stop: Callable[[], bool] = lambda: False,
    measure: Measure | None = None,
) -> Result:
    """Train until `train.epochs` are done, from the run's newest checkpoint if it has one; all ranks call.

    `on_report` is called on every rank at every report, and once the last checkpoint is committed; if it is
    True on any rank, a checkpoint is written at once. If `should_stop()` holds on any rank, all stop after
    the same step, with a last checkpoint. `measure` is called every `evaluation.every_steps` and at the end.

    Raises:
        ConfigError, DataError, StoreError, CheckpointError: before the first step, nothing lost.
        DivergedError: loss or gradient not finite; the newest checkpoint is from before.
    """
    start = begin(config, runtime)
    state, total_steps = start.state, start.horizon.total_steps
    if start.parent is not None and state.step >= total_steps:
        return Result("already finished", state.step, total_steps, dict(start.parent.metrics), start.place)
    stopped = False
    with Recorder(start, provenance, on_report, measure) as recorder:
        advance = _steps(start, recorder.clock)
        while state.step < total_steps and not stopped:
            # What fails on one rank alone ends the run on all ranks, like a stop request.
            outcome = advance(should_stop() or recorder.failed)
            stopped = outcome.stop
            recorder.record(outcome.metrics, stopped=stopped)
        recorder.finish()
    recorder.tell()
    finished = state.step >= total_steps
    return Result(
        "finished" if finished else "stopped", state.step, total_steps, recorder.metrics, start.place
    )


def _steps(start: Start, clock: Clock) -> Callable[[bool], Outcome]:
    """Return what does one step after the other; its argument says whether this rank wants to stop."""
    config, runtime, state = start.config, start.runtime, start.state
    noise = gaussian_noise(config.run.seed, runtime.rank, runtime.device)
    what = (state, config, runtime, noise, start.horizon, clock)
    if config.train.regime == "joint":
        joint = JointUpdate(*what)
        kernel, advance = joint.kernel, _step(start, clock, start.loader.batch, joint)
    else:
        everything = posteriors(state.model, start.images.images_NHWC, runtime)

        def batch(step: int) -> DiagGaussian:
            rows_B = torch.from_numpy(start.loader.rows(step)).to(runtime.device)
            return DiagGaussian(*(moment_ND[rows_B] for moment_ND in everything))

        alone = EnergyUpdate(*what)
        kernel, advance = alone.kernel, _step(start, clock, batch, alone)
    if runtime.is_main:
        _LOG.info("Langevin chain: %s", kernel)
    return advance


def _step(
    start: Start, clock: Clock, batch: Callable[[int], B], update: Callable[[B, bool], Outcome]
) -> Callable[[bool], Outcome]:
    def advance(stop: bool) -> Outcome:
        with clock("data"):
            images = batch(start.state.step)
        return update(images, stop)

    return advance
