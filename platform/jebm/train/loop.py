"""Training from the first or the last step to the end: the same under plain python, torchrun and Ray."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from jebm.config import Config
from jebm.core.distributions import DiagGaussian
from jebm.core.model import JointModel
from jebm.core.prior import chain_kernel
from jebm.data.dataset import ImageSet, load_images
from jebm.data.loader import Loader, to_float
from jebm.data.manifest import DatasetManifest, read_manifest
from jebm.errors import ConfigError
from jebm.rng import gaussian_noise
from jebm.store.checkpoint import Checkpoints, Manifest
from jebm.store.storage import open_store
from jebm.train.journal import Journal
from jebm.train.metrics import Clock, Meter
from jebm.train.pictures import PICTURED_IMAGES, pictures
from jebm.train.posteriors import posteriors
from jebm.train.resume import resume
from jebm.train.runtime import Runtime
from jebm.train.saver import Saver
from jebm.train.state import TrainState
from jebm.train.step import energy_step, train_step

__all__ = ["Report", "Result", "check_images", "fit", "total_steps_of"]

_LOG = logging.getLogger("jebm.train")


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


@dataclass(frozen=True)
class Report:
    """What training tells its surroundings, the same on every rank but for `checkpoints`."""

    step: int
    metrics: dict[str, float]
    checkpoints: Sequence[Manifest]
    """What was resumed from, then this attempt's newest, oldest first; only rank 0 knows them."""


def total_steps_of(config: Config, steps_per_epoch: int) -> int:
    """Return the number of updates of the whole run, at least 1."""
    return max(1, round(config.train.epochs * steps_per_epoch))


def check_images(config: Config, manifest: DatasetManifest, key: str) -> None:
    """Raise `ConfigError` where the images' shape is not the model's."""
    have = (manifest.height, manifest.width, manifest.channels)
    want = (config.model.image_size, config.model.image_size, config.model.image_channels)
    if have != want:
        raise ConfigError(
            f"{key}: images are {have[0]}x{have[1]}x{have[2]}, but model.image_size and "
            f"model.image_channels ask for {want[0]}x{want[1]}x{want[2]}; "
            "set them to the data's, or ingest again with --size and --channels"
        )


def fit(
    config: Config,
    runtime: Runtime,
    *,
    provenance: Mapping[str, str],
    on_report: Callable[[Report], bool] = lambda report: False,
    should_stop: Callable[[], bool] = lambda: False,
    measure: Callable[[JointModel, int], Mapping[str, float]] | None = None,
) -> Result:
    """Train until `train.epochs` are done, from the newest checkpoint of the run where there is one.

    Every rank calls this. `on_report` is called on every rank at every report, and once more when the last
    checkpoint is committed; where it returns True on any rank (a machine is about to go) a checkpoint is
    written at once. When `should_stop()` holds on any rank, all stop after the same step, with a last
    checkpoint.
    `measure(model, step)` is called on rank 0 every `evaluation.every_steps` and after the last step; what it
    returns joins the metrics of that step, under names `evaluation/…`.

    Raises:
        ConfigError, DataError, StoreError, CheckpointError: before the first step, nothing lost.
        DivergedError: loss or gradient not finite; the newest checkpoint is from before.
    """
    with runtime.together():
        images = _load(config, "data.train", config.data.train)
        held_out = _load(config, "data.held_out", config.data.held_out) if config.data.held_out else images
        loader = _loader(config, runtime, images)
    total_steps = total_steps_of(config, loader.steps_per_epoch)
    state = TrainState.build(config, runtime)
    store = open_store(config.run.storage)
    place = store.child(config.run.name).uri
    checkpoints = Checkpoints(store, config.run.name)
    parent = resume(config, runtime, state, checkpoints, images.manifest)
    if parent is not None and state.step >= total_steps:
        return Result("already finished", state.step, total_steps, dict(parent.metrics), place)

    noise = gaussian_noise(config.run.seed, runtime.rank, runtime.device)
    meter, clock = Meter(), Clock(runtime.device)
    metrics: dict[str, float] = {}
    stopped = False
    with ExitStack() as stack:
        with runtime.together():
            if runtime.is_main:
                facts = _facts(runtime, images.manifest, parent, provenance)
                journal = stack.enter_context(Journal(store, config, step=state.step, facts=facts))
        if runtime.is_main:
            painter = _Painter(config, runtime, state, held_out)
            _LOG.info("run %s: step %d of %d, results in %s", config.run.name, state.step, total_steps, place)
            _LOG.info("Langevin chain: %s", chain_kernel(state.model, config.langevin))
        saver = stack.enter_context(
            Saver(config, runtime, state, checkpoints, parent, images.manifest, provenance)
        )
        advance: Callable[..., tuple[dict[str, Tensor], bool]] = train_step
        batch: Callable[[int], Tensor | DiagGaussian] = loader.batch
        if config.train.regime == "two_stage":
            advance = energy_step
            batch = _posterior_batches(state.model, images, loader, runtime)
        while state.step < total_steps and not stopped:
            with clock("data"):
                given = batch(state.step)
            values, stopped = advance(
                state,
                config,
                runtime,
                given,
                noise,
                clock,
                steps_per_epoch=loader.steps_per_epoch,
                total_steps=total_steps,
                # What fails on one rank alone ends the run on all ranks, by the same way as a wish to stop.
                stop=should_stop() or saver.failure is not None,
            )
            meter.add(values)
            last = stopped or state.step == total_steps
            leaving = False
            measured = measure is not None and not stopped and _due(state.step, config.evaluation.every_steps)
            measured = measured or (measure is not None and state.step == total_steps)
            if last or measured or state.step % config.train.report_every_steps == 0:
                metrics = _report(config, runtime, meter, clock)
                if measure is not None and measured:
                    metrics |= _measured(runtime, measure, state)
                    clock.take()  # not a part of training's speed
                if runtime.is_main:
                    journal.metrics(state.step, total_steps, metrics | saver.metrics())
                notice = on_report(Report(state.step, metrics, saver.kept()))
                leaving = not all(runtime.agree(not notice))
            if runtime.is_main and (last or _due(state.step, config.train.pictures_every_steps)):
                journal.pictures(state.step, painter())
            if last or leaving or _due(state.step, config.checkpoint.every_steps):
                saver.save(metrics)
        with runtime.together():
            if runtime.is_main:
                journal.hyperparameters(metrics)
            saver.close()
    on_report(Report(state.step, metrics, saver.kept()))
    finished = state.step >= total_steps
    return Result("finished" if finished else "stopped", state.step, total_steps, metrics, place)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _load(config: Config, key: str, uri: str) -> ImageSet:
    store = open_store(uri)
    check_images(config, read_manifest(store), key)
    return load_images(store)


def _loader(config: Config, runtime: Runtime, images: ImageSet) -> Loader:
    return Loader(
        images,
        batch_size=config.train.batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=config.run.seed,
        device=runtime.device,
    )


def _posterior_batches(
    model: JointModel, images: ImageSet, loader: Loader, runtime: Runtime
) -> Callable[[int], DiagGaussian]:
    """Return a function from the step to the posteriors (B, D) of this rank's batch."""
    everything = posteriors(model, images.images_NHWC, runtime)

    def batch(step: int) -> DiagGaussian:
        rows_B = torch.from_numpy(loader.rows(step)).to(runtime.device)
        return DiagGaussian(*(moment_ND[rows_B] for moment_ND in everything))

    return batch


def _facts(
    runtime: Runtime, data: DatasetManifest, parent: Manifest | None, provenance: Mapping[str, str]
) -> dict[str, object]:
    return {
        "world_size": runtime.world_size,
        "device": str(runtime.device),
        "data_sha256": data.sha256,
        "resumed_from": None if parent is None else parent.name,
        "provenance": dict(provenance),
    }


def _report(config: Config, runtime: Runtime, meter: Meter, clock: Clock) -> dict[str, float]:
    """Return the means since the last report over steps and ranks, with speed and shares of time."""
    steps = meter.steps
    metrics = meter.take(runtime)
    wall, seconds = clock.take()
    metrics["time/images_per_second"] = steps * config.train.batch_size / wall
    metrics["time/seconds_per_step"] = wall / steps
    metrics["time/chain_share"] = seconds.get("chain", 0.0) / wall
    metrics["time/data_share"] = seconds["data"] / wall
    return metrics


def _measured(
    runtime: Runtime, measure: Callable[[JointModel, int], Mapping[str, float]], state: TrainState
) -> dict[str, float]:
    """Return what rank 0 measures of the model, on every rank."""
    values: dict[str, float] = {}
    with runtime.together():
        if runtime.is_main:
            values = {f"evaluation/{k}": v for k, v in measure(state.picture_model, state.step).items()}
    return runtime.from_main(values)


class _Painter:
    """Pictures of the current model, always of the same images with the same noise."""

    def __init__(self, config: Config, runtime: Runtime, state: TrainState, images: ImageSet) -> None:
        self._config, self._state = config, state
        self._noise = gaussian_noise(config.run.seed, 0, runtime.device)
        first = np.arange(PICTURED_IMAGES) % len(images.images_NHWC)
        self._x_NCHW = to_float(images.images_NHWC[first], runtime.device)

    def __call__(self) -> dict[str, Tensor]:
        normal = self._noise(0, "pictures")
        return pictures(self._state.picture_model, self._config.langevin, self._x_NCHW, normal)
