"""The trials of a campaign: each arm with each seed is a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jebm.config import SHAPES_RESULT, Config, differing_keys, leaves, role_of
from jebm.data.manifest import read_manifest
from jebm.errors import ConfigError
from jebm.evaluate.comparison import REFERENCE
from jebm.evaluate.quick import check_distances, check_quick_look
from jebm.parser import override, with_own_classes
from jebm.parser.yaml_file import read_value
from jebm.store.checkpoint import Checkpoints, Manifest
from jebm.store.storage import open_store
from jebm.train.lease import Lease
from jebm.train.plan import make_plan
from jebm.train.runtime import check_processes
from jebm.train.start import total_steps_of

__all__ = ["ARMS", "Trial", "check_trials", "describe", "trials_of"]

ARMS: Mapping[str, Mapping[str, object]] = {
    "gaussian": {"prior.kind": "gaussian", "train.regime": "joint"},
    "joint": {"prior.kind": "joint", "train.regime": "joint"},
    "top": {"prior.kind": "top", "train.regime": "joint"},
    "two_stage": {"prior.kind": "joint", "train.regime": "two_stage", "train.gaussian_share": 0.0},
}
"""The config keys that each arm sets; two_stage also gets run.init_from."""


@dataclass(frozen=True)
class Trial:
    """One arm with one seed: a run."""

    arm: str
    seed: int
    config: Config
    total_steps: int

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.config.run.name

    @property
    def uri(self) -> str:
        """URI of the run."""
        return f"{self.config.run.storage.rstrip('/')}/{self.name}"

    @property
    def key(self) -> str:
        """Key of its row, unique in a campaign."""
        return self.name

    @property
    def origin(self) -> str:
        """Name of the run of this campaign that must finish first; empty if there is none."""
        two_stage = self.config.train.regime == "two_stage"
        return str(self.config.run.init_from).rpartition("/")[2] if two_stage else ""

    def latest(self) -> Manifest | None:
        """Return the newest checkpoint; raises ConfigError if it was made with another config."""
        found = Checkpoints(open_store(self.config.run.storage), self.name).latest()
        keys = differing_keys(self.config, found.config) if found is not None else []
        if keys and not self.config.run.accept_changes:
            raise ConfigError(
                f"run.name: run {self.name} has a checkpoint made with another {', '.join(keys)}; "
                "choose a new run.name"
            )
        return found

    def finished(self) -> bool:
        """Return whether nothing is left to train."""
        found = self.latest()
        return found is not None and found.step >= self.total_steps


def trials_of(config: Config, arms: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    """Return the runs RUN.NAME-ARM-SEED, seed by seed, the Gaussian arm first, since others start from it.

    An arm is one of `ARMS`, or NAME=KEY:VALUE,… for joint with some keys changed.

    Raises:
        ConfigError: an arm is unknown, an arm or seed is repeated, or the Gaussian arm or any other arm is
        missing.
    """
    # Check the names of arms and seeds.
    changes = [_changes_of(arm) for arm in arms]
    names = [name for name, _ in changes]
    for option, values in (("--arms", names), ("--seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{option}: {list(values)} must name at least one, and none twice")
    if REFERENCE not in names or len(names) < 2:
        raise ConfigError(f"--arms: needs {REFERENCE}, which the others are held against, and another one")
    changes.sort(key=lambda arm: arm[0] != REFERENCE)
    # One run per seed and arm; two_stage starts from the Gaussian run of its seed.
    images = read_manifest(open_store(config.data.train)).images
    trials = []
    for seed in seeds:
        for arm, changed in changes:
            run = {"run.seed": seed, "run.name": f"{config.run.name}-{arm}-{seed}"}
            if changed["train.regime"] == "two_stage":
                storage = config.run.storage.rstrip("/")
                run["run.init_from"] = f"{storage}/{config.run.name}-{REFERENCE}-{seed}"
            of_arm = with_own_classes(override(config, {**changed, **run}))
            total = total_steps_of(of_arm, images // of_arm.train.batch_size)
            trials.append(Trial(arm, seed, of_arm, total))
    return trials


def _changes_of(arm: str) -> tuple[str, Mapping[str, object]]:
    """Return the name and the changed keys of an arm; raises `ConfigError`, also for shared keys."""
    name, changed, text = arm.partition("=")
    if not changed:
        if name not in ARMS:
            raise ConfigError(f"--arms: {arm!r} is none of {', '.join(ARMS)}; or write NAME=KEY:VALUE,…")
        return name, ARMS[name]
    if name in ARMS:
        raise ConfigError(f"--arms: {name} is taken; give the arm with changed keys another name")
    values = dict(ARMS["joint"])
    for item in text.split(","):
        key, colon, value = item.partition(":")
        if not colon:
            raise ConfigError(f"--arms: {item!r} of {name} is not KEY:VALUE, such as energy.width:200")
        values[key.strip()] = read_value(value.strip())
    for key, _ in leaves(values):
        if role_of(key) not in SHAPES_RESULT or key == "run.seed":
            raise ConfigError(f"--arms: {name} sets {key}, which all arms share; take it out of the arm")
    return name, values


def check_trials(trials: Sequence[Trial], *, deep: bool) -> None:
    """Check what training and measuring need; with `deep` also checkpoints' bytes and leases of the runs.

    Raises:
        JebmError: the error that a start would raise.
    """
    for trial in trials:
        config = trial.config
        if trial.origin and Checkpoints(open_store(config.run.storage), trial.origin).latest() is None:
            continue  # that run is trained first
        plan = make_plan(config, read_images=True, deep=deep)
        key = "data.held_out" if config.data.held_out else "data.train"
        check_distances(config, plan.data, plan.held_out, plan.images, key=key)
        check_quick_look(config, plan.data, plan.judging, plan.images)
    if trials[0].config.cluster.engine == "process":
        check_processes(trials[0].config)
    for trial in trials:
        if not trial.finished() and deep:
            Lease(open_store(trial.uri)).check()


def describe(trials: Sequence[Trial]) -> str:
    """Return a line with the state of each run."""
    width = max(len(trial.name) for trial in trials)
    lines = []
    for trial in trials:
        found = trial.latest()
        step = 0 if found is None else found.step
        if step >= trial.total_steps:
            status = "finished"
        else:
            status = f"{trial.total_steps:,} steps" + (f", resumes at step {step:,}" if step else "")
        origin = f", begins with {trial.config.run.init_from}" if trial.origin else ""
        lines.append(f"{trial.name:{width}}  {status}{origin}")
    return "\n".join(lines)
