"""What a run will do, determined before anything starts, with the same checks for dry runs and starts.

It reads the data, the run's storage, and the run that it starts from.
"""

from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from jebm.config import Config
from jebm.core.by_class import named_modules
from jebm.core.model import build_model
from jebm.data.dataset import ImageSet, load_images
from jebm.data.manifest import DatasetManifest, read_manifest
from jebm.data.windows import parts_at_once
from jebm.errors import CheckpointError, ConfigError, DataError
from jebm.store.checkpoint import Checkpoints, Manifest
from jebm.store.parts import damages, fitting_headers
from jebm.store.retrieve import open_checkpoint
from jebm.store.storage import Store, open_store
from jebm.train.early import patience_of
from jebm.train.memory import machine_memory
from jebm.train.resume import check_same, newest, origin_of
from jebm.train.runtime import Runtime
from jebm.train.start import check_images, total_steps_of
from jebm.train.state import TrainState
from jebm.train.tracked import check_trackers
from jebm.untrusted import escaped

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """The numbers of a run that can start."""

    config: Config
    data: DatasetManifest
    held_out: DatasetManifest
    """The images for final figures; the training images if there are no others."""
    judging: DatasetManifest
    """The images that evaluations during training see: `Data.judging`."""
    images: ImageSet | None
    """The training images, if read."""
    steps_per_epoch: int
    total_steps: int
    parameters: dict[str, int]
    resumes_at: int | None
    """The step of the checkpoint to resume from; None for a new run."""

    ended_early: bool
    """Whether early stopping has ended the run."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.ended_early or (self.resumes_at is not None and self.resumes_at >= self.total_steps)

    @property
    def how_finished(self) -> str:
        """Why nothing is left to do, and how to train further."""
        if self.ended_early and (self.resumes_at or 0) < self.total_steps:
            remedy = "to train further, raise train.early_stopping.patience"
            return f"early stopping at step {self.resumes_at:,}; {remedy}"
        return f"all {self.total_steps:,} steps; to train further, raise train.epochs"

    def describe(self) -> str:
        """Return the plan as a few lines for people."""
        # Values that are not plain config values.
        config, data = self.config, self.data
        latents = " + ".join(str(width) for width in config.model.latent_dims)
        counts = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        share, unequal = divmod(config.train.batch_size, config.cluster.workers)
        place = {"ray": "Ray workers", "process": "processes"}[config.cluster.engine]
        start = "new run" if self.resumes_at is None else f"resumes at step {self.resumes_at:,}"
        prior = "Gaussian"
        if config.has_energy:
            which = {"joint": "joint EBM", "top": "EBM on the top layer"}[config.prior.kind]
            which += f" by {config.energy.class_path}" if config.energy.class_path else ""
            prior = f"{which}, {config.langevin.steps} Langevin steps of size {config.langevin.step_size:g}"
        if config.train.regime == "two_stage":
            start += f", only the energy, on the nets of {config.run.init_from}"
        # One line per part of the run.
        shape = f"{data.height}x{data.width}x{data.channels}"
        lines = [
            f"run      {config.run.name} in {config.run.storage} ({start})",
            f"data     {config.data.train}: {data.images:,} images {shape}, sha256 {data.sha256[:12]}",
            *self._judging_line(),
            f"model    latents {latents} (bottom to top); prior {prior}",
            *self._class_lines(),
            f"weights  {counts}",
            f"steps    {self.total_steps:,} ({config.train.epochs:g} epochs of {self.steps_per_epoch:,}),"
            f" batch {config.train.batch_size} = {config.cluster.workers} x {share}"
            + (f" or {share + 1}" if unequal else ""),
            *self._energy_line(),
            *self._early_line(),
            f"workers  {config.cluster.workers} {place}, {config.cluster.cpus_per_worker} CPU"
            + config.cluster.gpus_text
            + " each",
        ]
        return "\n".join(map(escaped, lines))

    def _judging_line(self) -> list[str]:
        """Return which images evaluations during training see, if there are evaluations."""
        if not self.config.evaluation.every_steps:
            return []
        key, place = self.config.data.judging
        line = f"judged   on {place}: {self.judging.images:,} images"
        if key == "data.validation":
            return [line]
        return [f"{line} of {key}, for want of data.validation: choose nothing by these evaluations"]

    def _class_lines(self) -> list[str]:
        """Return the user's own classes beside the energy's, if any."""
        names = ("generator", "inference", "likelihood", "evaluation.features")
        parts = {name: attrgetter(name)(self.config).class_path for name in names}
        named = ", ".join(f"{name} {path}" for name, path in parts.items() if path)
        return [f"classes  {named}"] if named else []

    def _energy_line(self) -> list[str]:
        """Return when the energy joins, if not at once."""
        joins = self.config.energy_joins_at(self.total_steps)
        if not joins:
            return []
        share = f"train.gaussian_share {self.config.train.gaussian_share:g}"
        if joins >= self.total_steps:
            return [f"energy   never joins: {share} of {self.total_steps:,} steps leaves none for it"]
        return [f"energy   joins at step {joins:,} ({share}); the prior is N(0, I) until then"]

    def _early_line(self) -> list[str]:
        """Return when the run ends before its last step, if it may."""
        rule = self.config.train.early_stopping
        if rule.metric is None:
            return []
        worth = f" by more than {rule.min_improvement:g}" if rule.min_improvement else ""
        every = f"evaluations (one every {self.config.evaluation.every_steps:,} steps)"
        return [f"ends     after {rule.patience} {every} in a row that do not improve {rule.metric}{worth}"]


def make_plan(config: Config, *, read_images: bool = False, deep: bool = False) -> Plan:
    """Check data, storage, sizes and checkpoints and return the plan; starts nothing.

    With `read_images`, the images are read into this machine's cache, for workers on this machine; otherwise
    only the existence of the data sets' parts is checked. With `deep`, the checkpoint to start from counts
    only if every byte of it is intact, as when it is loaded.

    Raises:
        ConfigError: values do not fit the data or the machine, or the checkpoint has another config.
        DataError: a data set is missing or unreadable.
        StoreError: the storage cannot be reached, read or written.
        CheckpointError: checkpoints are damaged, do not fit, are missing, or use up the attempt numbers.
    """
    windowed = config.data.cache_gb is not None
    data, images = _data_set(config, "data.train", config.data.train, read=read_images and not windowed)
    if config.data.cache_gb is not None:
        parts_at_once(data, config.data.cache_gb, config.train.batch_size)
    sets = {"data.train": data, **_other_sets(config, data, read=read_images)}
    check_trackers(config.run.track)
    if data.images < config.train.batch_size:
        raise ConfigError(
            f"train.batch_size: {config.train.batch_size} is more than the {data.images} images of data.train"
        )
    # The storage, and the checkpoint that the run starts from.
    state = _initial_state(config)
    store = open_store(config.run.storage)
    store.probe()
    steps_per_epoch = data.images // config.train.batch_size
    total_steps = total_steps_of(config, steps_per_epoch)
    parent = _resumed(config, store, data, state.tensors())
    if deep and parent is not None and parent.step < total_steps:
        parent = _resumed(config, store, data, state.tensors(), deep=True)
    if parent is None and config.run.init_from is not None:
        _check_origin(config, state.tensors(), deep=deep)
    # Whether an attempt number is free.
    if parent is None or parent.step < total_steps:
        Checkpoints(store, config.run.name).next_attempt()  # raises if a start would find none
    return Plan(
        config=config,
        data=data,
        held_out=sets.get("data.held_out", data),
        judging=sets[config.data.judging[0]],
        images=images,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        parameters=_parameters(state),
        resumes_at=None if parent is None else parent.step,
        ended_early=parent is not None and _over(config, store, parent.step, total_steps),
    )


def _other_sets(config: Config, train: DatasetManifest, *, read: bool) -> dict[str, DatasetManifest]:
    """Return the sets that no net is trained on, by key; raises as `make_plan`."""
    places = {"data.validation": config.data.validation, "data.held_out": config.data.held_out}
    sets = {key: _data_set(config, key, place, read=read)[0] for key, place in places.items() if place}
    if "data.validation" in sets and sets["data.validation"].sha256 == train.sha256:
        raise ConfigError(
            "data.validation: its images are those of data.train; jebm ingest --validation N holds some back"
        )
    return sets


def _parameters(state: TrainState) -> dict[str, int]:
    """Return how many parameters each part of the model has, of those that have any."""
    counts = {
        name: sum(parameter.numel() for parameter in net.parameters())
        for name, net in state.model.named_children()
    }
    return {name: count for name, count in counts.items() if count}


def _over(config: Config, store: Store, step: int, total_steps: int) -> bool:
    """Return whether early stopping has ended the run."""
    return patience_of(config, store.child(config.run.name), step, total_steps).over


def _data_set(config: Config, key: str, uri: str, *, read: bool) -> tuple[DatasetManifest, ImageSet | None]:
    """Return a data set's manifest, and its images if `read`."""
    store = open_store(uri)
    manifest = read_manifest(store)
    check_images(config, manifest, key)
    if read:
        return manifest, load_images(store)
    sizes = {info.key: info.size for info in store.list("part-")}
    for part in manifest.parts:
        if sizes.get(part.name) != part.bytes:
            found = (
                "is missing" if part.name not in sizes else f"has {sizes[part.name]} of {part.bytes} bytes"
            )
            raise DataError(f"{store.uri}/{part.name}: {found}; ingest the data set again")
    return manifest, None


def _initial_state(config: Config) -> TrainState:
    """Return the initial state of training, on the CPU.

    Raises:
        ConfigError: its tensors exceed this machine's memory, or the sizes that torch can represent.
    """
    remedy = "lower model.latent_dims, or the widths and channels of the nets"
    try:
        # Before anything is allocated: a system that runs out of memory kills, and says nothing.
        with torch.device("meta"):
            model = build_model(config, named_modules(config))
        need = (4 if config.train.ema_decay else 3) * sum(each.nbytes for each in model.parameters())
        if need > (there := machine_memory()):
            raise ConfigError(
                f"model: nets of these sizes and their optimizers take {need / 1e9:,.0f} GB, and this "
                f"machine has {there / 1e9:,.0f} GB; {remedy}"
            )
        return TrainState.build(config, Runtime(0, 1, torch.device("cpu")))
    except (MemoryError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or ["out of memory"])[0]
        raise ConfigError(f"model: nets of these sizes cannot be built ({reason}); {remedy}") from error


def _resumed(
    config: Config, store: Store, data: DatasetManifest, tensors: dict[str, Tensor], *, deep: bool = False
) -> Manifest | None:
    """Return the checkpoint that `resume` will read, or None for a new run; raises what `resume` would."""
    # As `resume`: the newest one, or else the newest that is intact in every byte.
    checkpoints = Checkpoints(store, config.run.name)
    failure: CheckpointError | None = None
    for every_byte in (True,) if deep else (False, True):
        manifest = newest(checkpoints, deep=every_byte)
        if manifest is None:
            break
        try:
            if not config.run.accept_changes:
                check_same(config, manifest, data)
            folder = store.child(f"{config.run.name}/checkpoints/{manifest.name}")
            fitting_headers(folder, manifest.objects, tensors)
        except CheckpointError as error:
            failure = error
        else:
            return manifest
    # There is no checkpoint, or none that fits.
    if failure is not None:
        accepted = "; choose a new run.name" if config.run.accept_changes else ""
        raise CheckpointError(f"{failure}{accepted}") from failure
    if deep:  # a shallow check found one
        raise CheckpointError(
            f"{store.uri}/{config.run.name}: no checkpoint is right in every byte; "
            "jebm checkpoints verify --deep says where, and a new run.name starts anew"
        )
    return None


def _check_origin(config: Config, tensors: dict[str, Tensor], *, deep: bool) -> None:
    """Raise what `resume` would for the checkpoint of `run.init_from`."""
    run, origin = open_checkpoint(origin_of(config))
    folder = run.folder(origin.name)
    try:
        if config.train.regime != "two_stage":  # two_stage takes only two nets, shaped by its config
            fitting_headers(folder, origin.objects, tensors)
        lines = damages(folder, origin.objects) if deep else []
        if lines:
            raise CheckpointError(lines[0])
    except CheckpointError as error:
        raise CheckpointError(f"run.init_from: {error}") from error
