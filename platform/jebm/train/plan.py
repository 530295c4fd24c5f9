"""What a run will do, found out before anything starts: data read, storage probed, parameters counted."""

from dataclasses import dataclass
from pathlib import Path

from jebm.config import INCEPTION_FILE, Config
from jebm.core.model import build_model
from jebm.data.shards import DatasetManifest, read_manifest
from jebm.errors import ConfigError
from jebm.store.checkpoint import Checkpoints
from jebm.store.storage import open_store
from jebm.train.loop import check_images, total_steps_of
from jebm.train.resume import origin_of

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """The numbers of a run that can be had."""

    config: Config
    data: DatasetManifest
    steps_per_epoch: int
    total_steps: int
    parameters: dict[str, int]
    resumes_at: int | None
    """Step of the checkpoint that the run goes on from; None for a new run."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.resumes_at is not None and self.resumes_at >= self.total_steps

    def describe(self) -> str:
        """Return the plan as a few lines for a person."""
        config, data = self.config, self.data
        latents = " + ".join(str(width) for width in config.model.latent_dims)
        counts = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        share = config.train.batch_size // config.cluster.workers
        place = {"ray": "Ray workers", "process": "processes"}[config.cluster.engine]
        start = "new run" if self.resumes_at is None else f"goes on from step {self.resumes_at}"
        prior = "Gaussian"
        if config.has_energy:
            which = {"joint": "joint EBM", "top": "EBM on the top layer"}[config.prior.kind]
            prior = f"{which}, {config.langevin.steps} Langevin steps of size {config.langevin.step_size:g}"
        if config.train.regime == "two_stage":
            start += f", the energy alone, on the nets of {config.run.init_from}"
        shape = f"{data.height}x{data.width}x{data.channels}"
        return "\n".join(
            [
                f"run      {config.run.name} in {config.run.storage} ({start})",
                f"data     {config.data.train}: {data.images:,} images {shape}, sha256 {data.sha256[:12]}",
                f"model    latents {latents} (bottom to top); prior {prior}",
                f"weights  {counts}",
                f"steps    {self.total_steps:,} ({config.train.epochs:g} epochs of {self.steps_per_epoch:,}),"
                f" batch {config.train.batch_size} = {config.cluster.workers} x {share}",
                f"workers  {config.cluster.workers} {place}, {config.cluster.cpus_per_worker} CPU"
                + (" and 1 GPU" if config.cluster.gpu else "")
                + " each",
            ]
        )


def make_plan(config: Config) -> Plan:
    """Check data and storage and return the plan; starts nothing.

    Raises:
        ConfigError: the images do not fit the model, or are fewer than one batch.
        DataError: a data set is missing or unreadable.
        StoreError: the storage cannot be reached, read or written.
    """
    data = read_manifest(open_store(config.data.train))
    check_images(config, data, "data.train")
    if config.data.held_out:
        check_images(config, read_manifest(open_store(config.data.held_out)), "data.held_out")
    if data.images < config.train.batch_size:
        raise ConfigError(
            f"train.batch_size: {config.train.batch_size} is more than the {data.images} images of data.train"
        )
    looks = config.evaluation.every_steps > 0
    if looks and config.evaluation.features == "classifier" and data.labels_sha256 is None:
        raise ConfigError(
            "evaluation.features: a classifier needs labels, and data.train has none; "
            "set it to effnetlite0, or ingest again with --labels"
        )
    weights = config.evaluation.inception_weights
    if looks and config.evaluation.features == "inceptionv3" and not Path(weights or "").is_file():
        raise ConfigError(
            f"evaluation.inception_weights: {weights} is not there; give the path of your copy of "
            f"{INCEPTION_FILE}"
        )
    store = open_store(config.run.storage)
    store.probe()
    latest = Checkpoints(store, config.run.name).latest()
    if latest is None and config.run.init_from is not None:
        origin_of(config)
    model = build_model(config)
    parameters = {
        name: sum(parameter.numel() for parameter in net.parameters()) for name, net in model.named_children()
    }
    steps_per_epoch = data.images // config.train.batch_size
    total = total_steps_of(config, steps_per_epoch)
    return Plan(config, data, steps_per_epoch, total, parameters, None if latest is None else latest.step)
