"""Start a run: load its data, its state, and the checkpoint that it resumes from."""

from dataclasses import dataclass

from jebm.config import Config
from jebm.data.dataset import ImageSet, load_images
from jebm.data.loader import Loader
from jebm.data.manifest import DatasetManifest, read_manifest
from jebm.data.windows import Windows
from jebm.errors import ConfigError
from jebm.store.checkpoint import Checkpoints, Manifest
from jebm.store.storage import Store, open_store
from jebm.train.early import Patience, patience_of
from jebm.train.resume import resume
from jebm.train.runtime import Runtime
from jebm.train.state import Horizon, TrainState

__all__ = ["Start", "begin", "check_images", "total_steps_of"]


@dataclass(frozen=True)
class Start:
    """A run ready to train, the same on every rank except for the rows of its loader."""

    config: Config
    runtime: Runtime
    images: ImageSet | Windows
    held_out: ImageSet
    """The training images if there are no others."""
    loader: Loader
    state: TrainState
    horizon: Horizon
    store: Store
    """The store of `run.storage`."""
    checkpoints: Checkpoints
    parent: Manifest | None
    """The checkpoint that the run resumes from."""
    patience: Patience
    """Of `train.early_stopping`; rank 0's knows the journal."""
    finished: bool
    """Whether nothing is left to do."""

    @property
    def place(self) -> str:
        """The location of the run's files."""
        return self.store.child(self.config.run.name).uri


def total_steps_of(config: Config, steps_per_epoch: int) -> int:
    """Return the number of updates in the whole run, at least 1."""
    return max(1, round(config.train.epochs * steps_per_epoch))


def check_images(config: Config, manifest: DatasetManifest, key: str) -> None:
    """Raise `ConfigError` if the images do not have the model's shape."""
    have = (manifest.height, manifest.width, manifest.channels)
    want = (config.model.image_size, config.model.image_size, config.model.image_channels)
    if have != want:
        raise ConfigError(
            f"{key}: images are {have[0]}x{have[1]}x{have[2]}, but model.image_size and "
            f"model.image_channels ask for {want[0]}x{want[1]}x{want[2]}; "
            "set them to the data's, or ingest again with --size and --channels"
        )


def begin(config: Config, runtime: Runtime) -> Start:
    """Read the data and the run's newest checkpoint; every rank calls this.

    Raises:
        ConfigError, DataError, StoreError, CheckpointError: on all ranks, with nothing written.
    """
    with runtime.together():
        images, held_out = _images(config)
        loader = Loader(
            images,
            batch_size=config.train.batch_size,
            rank=runtime.rank,
            world_size=runtime.world_size,
            seed=config.run.seed,
            device=runtime.device,
        )
    state = TrainState.build(config, runtime)
    horizon = Horizon(loader.steps_per_epoch, total_steps_of(config, loader.steps_per_epoch))
    store = open_store(config.run.storage)
    checkpoints = Checkpoints(store, config.run.name)
    parent = resume(config, runtime, state, checkpoints, images.manifest)
    # A run that early stopping has ended is as finished as one at its last step.
    patience = Patience(config, horizon.total_steps)
    with runtime.together():
        if runtime.is_main:
            run = store.child(config.run.name)
            patience = patience_of(config, run, state.step, horizon.total_steps)
    over = runtime.from_main(patience.over)
    finished = parent is not None and (over or state.step >= horizon.total_steps)
    if not finished:
        try:
            with runtime.together():
                loader.prepare(state.step)
        except BaseException:  # an interrupt, too: the process would wait for its threads
            loader.close()
            raise
    return Start(
        config,
        runtime,
        images,
        held_out,
        loader,
        state,
        horizon,
        store,
        checkpoints,
        parent,
        patience,
        finished,
    )


def _images(config: Config) -> tuple[ImageSet | Windows, ImageSet]:
    """Return the images to train on, and those of the pictures."""
    data = config.data
    held_out = _load(config, "data.held_out", data.held_out) if data.held_out else None
    if data.cache_gb is None or held_out is None:  # Config asks for the latter if the former is set
        images = _load(config, "data.train", data.train)
        return images, held_out or images
    store = open_store(data.train)
    manifest = read_manifest(store)
    check_images(config, manifest, "data.train")
    windows = Windows(
        store,
        manifest,
        cache_gb=data.cache_gb,
        batch_size=config.train.batch_size,
        seed=config.run.seed,
    )
    return windows, held_out


def _load(config: Config, key: str, uri: str) -> ImageSet:
    store = open_store(uri)
    check_images(config, read_manifest(store), key)
    return load_images(store)
