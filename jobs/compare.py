r"""Compare priors fairly: train each arm with each seed, measure every model, test the paired differences.

  on this machine:   python jobs/compare.py --config jobs/configs/fashion_mnist.yaml \
                       --arms '[gaussian, joint, top, two_stage]' --seeds '[5, 6, 7, 8, 9]'
  on a cluster:      ray job submit --working-dir . -- python jobs/compare.py --config … \
                       --run.storage s3://bucket/prefix --cluster.engine ray
  look before:       … --dry-run

Arms differ in nothing but this:
  gaussian           the prior is N(0, I); always needed, the others are held against it
  joint              one energy over all latent layers, trained together with the nets
  top                an energy over the top layer alone (as LEBM)
  two_stage          a joint energy on the nets of the finished gaussian run of the same seed, which stay
  NAME=KEY:VALUE,…   joint with some keys changed, e.g. 'wide=energy.width:200,optimizer.energy.lr:3e-4'

For a seed all arms begin with the same weights of generator and inference net and see the same images and
noise in the same order. Any key can be set; all arms share it. The runs are RUN.NAME-ARM-SEED in run.storage.
By default they train one after another in this process (cluster.workers is 1 then), with --parallel N in so
many processes, with --cluster.engine ray on a cluster.

In --output: rows/RUN.json of each model, numbers.json, and the report comparison.html, .md, .json. The same
command resumes a comparison that was stopped or killed; what is trained or measured is not done again.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import torch
from jsonargparse import Namespace

from jebm.cli import log_lines, run, tell
from jebm.config import Config, config_to_dict, differing_keys
from jebm.data.dataset import load_images
from jebm.data.manifest import read_manifest
from jebm.errors import CheckpointError, ConfigError, DivergedError, JebmError
from jebm.evaluate.comparison import REFERENCE, compare, document
from jebm.evaluate.comparison_findings import comparison_findings
from jebm.evaluate.features import feature_net
from jebm.evaluate.measures import Row, long_factor, measure_model
from jebm.evaluate.quick import check_distances, quick_look
from jebm.evaluate.restore import restored
from jebm.parser import argument_parser, config_from_dict, config_to_yaml, parse_arguments
from jebm.parser.yaml_file import read_value
from jebm.report.write import finite, write_report
from jebm.store.checkpoint import Checkpoints, Manifest
from jebm.store.records import DamagedRecordError, read_object, set_aside, understood
from jebm.store.storage import ObjectMissingError, Store, open_store
from jebm.train.lease import Lease
from jebm.train.loop import Result, fit
from jebm.train.plan import make_plan
from jebm.train.provenance import provenance
from jebm.train.runtime import check_processes, first_signal, prepare_process, process_runtime
from jebm.train.start import total_steps_of
from jebm.untrusted import typed

ARMS: Mapping[str, Mapping[str, object]] = {
    "gaussian": {"prior.kind": "gaussian", "train.regime": "joint"},
    "joint": {"prior.kind": "joint", "train.regime": "joint"},
    "top": {"prior.kind": "top", "train.regime": "joint"},
    "two_stage": {"prior.kind": "joint", "train.regime": "two_stage", "train.gaussian_share": 0.0},
}
"""What is set in the config of each arm; two_stage also gets run.init_from."""


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
        """Where the run lies."""
        return f"{self.config.run.storage.rstrip('/')}/{self.name}"

    @property
    def begins_with_another(self) -> bool:
        """Whether another run of this comparison has to be finished first."""
        return self.config.train.regime == "two_stage"

    def latest(self) -> Manifest | None:
        """Return the newest checkpoint; ConfigError where it is of another config."""
        found = Checkpoints(open_store(self.config.run.storage), self.name).latest()
        keys = differing_keys(self.config, found.config) if found is not None else []
        if keys and not self.config.run.accept_changes:
            raise ConfigError(
                f"run.name: run {self.name} has a checkpoint made with another {', '.join(keys)}; "
                "choose a new run.name"
            )
        return found

    def finished(self) -> bool:
        """Whether nothing is left to train."""
        found = self.latest()
        return found is not None and found.step >= self.total_steps


def overrides_of(arm: str) -> tuple[str, Mapping[str, object]]:
    """Return name and changed keys of an arm as it is given; raises ConfigError."""
    name, changed, text = arm.partition("=")
    if not changed:
        if name not in ARMS:
            raise ConfigError(f"--arms: {arm!r} is none of {', '.join(ARMS)}; or write NAME=KEY:VALUE,…")
        return name, ARMS[name]
    if name in ARMS:
        raise ConfigError(f"--arms: {name} is taken; give the arm with changed keys another name")
    values: dict[str, object] = dict(ARMS["joint"])
    for item in text.split(","):
        key, colon, value = item.partition(":")
        if not colon:
            raise ConfigError(f"--arms: {item!r} of {name} is not KEY:VALUE, such as energy.width:200")
        values[key.strip()] = value.strip()
    return name, values


def changed_config(config: Config, changes: Mapping[str, object]) -> Config:
    """Return the config with dotted keys changed, checked as any other."""
    values: dict[str, Any] = config_to_dict(config)
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        branch = values
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[leaf] = read_value(value) if isinstance(value, str) and key != "run.init_from" else value
    return config_from_dict(values)


def trials_of(config: Config, arms: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    """Return the runs, seed by seed, those that others begin with first; raises ConfigError."""
    chosen = [overrides_of(arm) for arm in arms]
    names = [name for name, _ in chosen]
    for option, values in (("--arms", names), ("--seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{option}: {list(values)} must name at least one, and none twice")
    if REFERENCE not in names or len(names) < 2:
        raise ConfigError(f"--arms: needs {REFERENCE}, which the others are held against, and another one")
    chosen.sort(key=lambda arm: arm[0] != REFERENCE)
    images = read_manifest(open_store(config.data.train)).images
    storage, name = config.run.storage.rstrip("/"), config.run.name
    configs = {}
    for arm, changes in chosen:
        two_stage = changes["train.regime"] == "two_stage"
        origin = {"run.init_from": f"{storage}/{name}-{REFERENCE}-{seeds[0]}"} if two_stage else {}
        configs[arm] = changed_config(config, {**changes, **origin})
    trials = []
    for seed in seeds:
        for arm, shared in configs.items():
            run_ = replace(shared.run, seed=seed, name=f"{name}-{arm}-{seed}")
            if shared.train.regime == "two_stage":
                run_ = replace(run_, init_from=f"{storage}/{name}-{REFERENCE}-{seed}")
            total = total_steps_of(shared, images // shared.train.batch_size)
            trials.append(Trial(arm, seed, replace(shared, run=run_), total))
    return trials


def check(trials: Sequence[Trial], *, dry_run: bool) -> None:
    """Check what training and measuring the runs will need; in a dry run also the room, and who trains them.

    Raises:
        JebmError: what the start would end with.
    """
    for trial in trials:
        config = trial.config
        reference = Checkpoints(open_store(config.run.storage), str(config.run.init_from).rpartition("/")[2])
        if trial.begins_with_another and reference.latest() is None:
            continue  # that run is trained before
        plan = make_plan(config, read_images=True, deep=dry_run)
        check_distances(config, plan.data, plan.held_out, plan.images)
    if trials[0].config.cluster.engine == "process":
        check_processes(trials[0].config)
    left = [trial for trial in trials if not trial.finished()]
    if not dry_run or not left:
        return
    for trial in left:
        Lease(open_store(trial.uri)).check()
    if trials[0].config.cluster.engine == "ray":
        from jebm.on_ray.cluster import check_room  # noqa: PLC0415  (without Ray: no ray needed)

        check_room(trials[0].config)


# --------------------------------------------------------------------------------------------- training


def train_here(trial: Trial, asked: threading.Event) -> Result:
    """Train in this process until the run ends, or `asked` is set."""
    with process_runtime(trial.config) as runtime, Lease(open_store(trial.uri)):
        return fit(
            trial.config,
            runtime,
            provenance=provenance(),
            should_stop=asked.is_set,
            measure=quick_look(trial.config),
        )


def train_on_ray(trial: Trial) -> Result:
    """Train on the cluster."""
    from jebm.on_ray.trainer import train  # noqa: PLC0415  (without Ray: no ray needed)

    return train(trial.config, provenance())


class Processes:
    """Runs of jobs/train.py, each a process with one thread; a stop reaches all of them once."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def train(self, trial: Trial) -> None:
        """Train one run in a process of its own; raises what it ended with."""
        with tempfile.TemporaryDirectory(prefix="jebm-") as scratch:
            path = Path(scratch) / "config.yaml"
            path.write_text(config_to_yaml(trial.config), encoding="utf-8")
            job = Path(__file__).with_name("train.py")
            with self._lock:
                if self._stopping:
                    return
                # In a session of its own, so that Ctrl-C reaches it once, by `stop`.
                process = subprocess.Popen(  # noqa: S603
                    [sys.executable, str(job), "--config", str(path)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": str(trial.config.cluster.cpus_per_worker)},
                    start_new_session=True,
                )
                self._running.add(process)
            _, complaint = process.communicate()
            with self._lock:
                self._running.remove(process)
        if process.returncode == 0:
            return
        line = (complaint.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        kind, _, message = line.partition(": ")
        if kind == "diverged":
            raise DivergedError(message)
        raise CheckpointError(f"run {trial.name}: {message or line}")

    def stop(self) -> None:
        """Ask all to stop after their step, and start no more."""
        self._stopping = True
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)


# -------------------------------------------------------------------------------------------- measuring


class Rows:
    """Measured rows, kept in the output as rows/RUN.json beside what they depend on."""

    def __init__(self, store: Store, config: Config) -> None:
        """Take the output and the config that all arms share; makes the feature net."""
        self._store = store
        self._device = "cuda" if config.cluster.gpu else "cpu"
        train = load_images(open_store(config.data.train))
        self.held_out = load_images(open_store(config.data.held_out)) if config.data.held_out else train
        self.net = feature_net(config.evaluation, train, device=self._device)

    def _identity(self, trial: Trial, manifest: Manifest | None) -> dict[str, Any]:
        """Return what the row of a run with this newest checkpoint depends on."""
        values = config_to_dict(trial.config)
        return {
            "format": "jebm-comparison-row",
            "version": 2,
            "run": trial.name,
            "steps": trial.total_steps,
            "checkpoint": None if manifest is None else manifest.name,
            "created": None if manifest is None else manifest.created.isoformat(),
            "held_out": self.held_out.manifest.sha256,
            "features": self.net.sha256,
            "samples": trial.config.evaluation.samples,
            "langevin": values["langevin"],
            "long_steps": long_factor(trial.config) * trial.config.langevin.steps,
        }

    def kept(self, trial: Trial) -> Row | None:
        """Return the row of a run if it was measured as it would be now; an empty one if it diverged.

        A damaged one is set aside with a line.
        """
        key = f"rows/{trial.name}.json"
        try:
            found = read_object(self._store, key)
            with understood(self._store, key):
                identity, row = typed(found, "identity", dict), _row_of(typed(found, "row", dict))
        except ObjectMissingError:
            return None
        except DamagedRecordError as error:
            tell(f"{error}; it is kept as {set_aside(self._store, key)}, and the model is measured again")
            return None
        return row if identity == self._identity(trial, trial.latest()) else None

    def keep(self, trial: Trial, row: Row) -> None:
        """Write the row of a run; an empty one says that training diverged."""
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}
        content = {"identity": self._identity(trial, trial.latest()), "row": numbers}
        self._store.put(f"rows/{trial.name}.json", json.dumps(content, indent=1).encode())

    def measure(self, trial: Trial) -> Row:
        """Measure the finished run, write the row and return it."""
        tell(f"measuring {trial.name}")
        model = restored(trial.uri, device=self._device).model
        row = measure_model(model, trial.config, self.held_out, self.net)
        self.keep(trial, row)
        return row


def _row_of(numbers: Mapping[str, object]) -> Row:
    """Return a row as it was kept; raises ValueError."""
    row = {}
    for name, number in numbers.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise ValueError(f"{name} is no number")
        try:
            row[name] = math.nan if number is None else float(number)
        except OverflowError as error:
            raise ValueError(f"{name} is too large") from error
    return row


def train_side_by_side(trials: Sequence[Trial], rows: Rows, processes: Processes, count: int) -> None:
    """Train what is not finished, `count` at a time; Gaussian runs come before those that begin with them."""
    waiting = [trial for trial in trials if rows.kept(trial) is None and not trial.finished()]
    for wave in (
        [t for t in waiting if not t.begins_with_another],
        [t for t in waiting if t.begins_with_another],
    ):
        with ThreadPoolExecutor(count) as pool:
            futures = {pool.submit(processes.train, trial): trial for trial in wave}
            for future in as_completed(futures):
                trial = futures[future]
                try:
                    future.result()
                except DivergedError as error:
                    diverged(trial, rows, error)
                except JebmError:
                    processes.stop()
                    raise
                else:
                    tell(f"trained {trial.name}")


def diverged(trial: Trial, rows: Rows, error: DivergedError) -> None:
    """Keep that a run diverged: it is a result, and would be the same another time."""
    tell(f"{trial.name} diverged: {error}")
    rows.keep(trial, {})


def row_of(
    trial: Trial, rows: Rows, found: Mapping[str, Mapping[int, Row]], asked: threading.Event
) -> Row | None:
    """Return the row of a run, trained and measured where need be; None where a stop was asked for."""
    row = rows.kept(trial)
    if row is not None or asked.is_set():
        return row
    if not trial.finished():
        if trial.begins_with_another and not found[REFERENCE][trial.seed]:
            tell(f"{trial.name} has nothing to begin with: the {REFERENCE} run diverged")
            return {}
        tell(f"training {trial.name}: {trial.total_steps:,} steps")
        try:
            here = trial.config.cluster.engine == "process"
            result = train_here(trial, asked) if here else train_on_ray(trial)
        except DivergedError as error:
            diverged(trial, rows, error)
            return {}
        if result.status == "stopped":
            asked.set()
            return None
    return rows.measure(trial)


def rows_of(trials: Sequence[Trial], rows: Rows, parallel: int) -> dict[str, dict[int, Row]] | None:
    """Return arm -> seed -> row of all runs; None where a signal stopped it."""
    asked, processes = threading.Event(), Processes()

    def stop(_: signal.Signals) -> None:
        asked.set()
        processes.stop()

    found: dict[str, dict[int, Row]] = {trial.arm: {} for trial in trials}
    with first_signal(stop):
        if parallel > 1:
            train_side_by_side(trials, rows, processes, parallel)
        for trial in trials:
            row = row_of(trial, rows, found, asked)
            if row is None:
                return None
            found[trial.arm][trial.seed] = row
    return found


# ------------------------------------------------------------------------------------------------- job


def facts_of(config: Config, trials: Sequence[Trial], rows: Rows) -> dict[str, str]:
    """Return what the figures come from, in lines for a person."""
    seeds = sorted({trial.seed for trial in trials})
    steps = sorted({trial.total_steps for trial in trials})
    factor = long_factor(config)
    made = provenance()
    versions = ("python", "torch", "ray", "numpy", "machine")
    held_out = rows.held_out.manifest
    return {
        "budget of each run": " or ".join(f"{count:,}" for count in steps)
        + f" updates of {config.train.batch_size} images",
        "seeds": ", ".join(map(str, seeds)),
        "chains": f"{config.langevin.steps} steps of size {config.langevin.step_size:g}; long ones "
        f"{factor * config.langevin.steps:,}",
        "training images": config.data.train,
        "held-out images": f"{held_out.images:,} of {config.data.held_out or config.data.train} for the "
        f"likelihood, the first {min(held_out.images, config.evaluation.samples):,} for distances, "
        f"sha256 {held_out.sha256[:12]}",
        "prior samples": f"{config.evaluation.samples:,} of each model",
        "features": f"{rows.net.name}, sha256 {rows.net.sha256}",
        "command": f"`{shlex.join(['python', 'jobs/compare.py', *sys.argv[1:]])}`",
        "git revision": made["git_revision"],
        "source": f"jebm {made['jebm']}, sha256 {made['source_sha256'][:12]}",
        "versions": ", ".join(f"{name} {made[name]}" for name in versions),
    }


def describe(trials: Sequence[Trial]) -> str:
    """Return a line for each run: what there is of it."""
    width = max(len(trial.name) for trial in trials)
    lines = []
    for trial in trials:
        found = trial.latest()
        step = 0 if found is None else found.step
        if step >= trial.total_steps:
            status = "finished"
        else:
            status = f"{trial.total_steps:,} steps" + (f", resumes at step {step:,}" if step else "")
        origin = trial.config.run.init_from if trial.begins_with_another else None
        lines.append(f"{trial.name:{width}}  {status}" + (f", begins with {origin}" if origin else ""))
    return "\n".join(lines)


def settings() -> tuple[Config, Namespace]:
    """Return config and arguments of the command line; raises ConfigError."""
    parser = argument_parser(__doc__ or "")
    parser.usage = "%(prog)s [--config FILE] [--arms LIST] [--seeds LIST] [--KEY VALUE ...]"
    parser.set_defaults({"cluster.engine": "process"})
    parser.add_argument("--arms", type=list[str], default=list(ARMS), help="what is compared, see above")
    parser.add_argument(
        "--seeds", type=list[int], default=[0, 1, 2, 3, 4], help="run.seed of each repetition"
    )
    parser.add_argument(
        "--output", type=str | None, help="folder or s3://…; default run.storage/RUN.NAME-comparison"
    )
    parser.add_argument(
        "--parallel", type=int, default=1, help="runs that train side by side on this machine"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all that a start checks, say what would be trained, start nothing",
    )
    config, arguments = parse_arguments(parser)
    if arguments.parallel < 1:
        raise ConfigError("--parallel: must be at least 1")
    if config.cluster.engine == "process":
        return replace(config, cluster=replace(config.cluster, workers=1, min_workers=None)), arguments
    if arguments.parallel > 1:
        raise ConfigError("--parallel: is for cluster.engine process; a cluster has cluster.workers")
    from jebm.on_ray.places import resolve_paths  # noqa: PLC0415  (without Ray: no ray needed)

    return resolve_paths(config), arguments


def main() -> int:
    """Parse, check, train, measure, compare; return 1 where a signal stopped it."""
    log_lines()
    config, arguments = settings()
    trials = trials_of(config, arguments.arms, arguments.seeds)
    check(trials, dry_run=arguments.dry_run)
    place = arguments.output or f"{config.run.storage.rstrip('/')}/{config.run.name}-comparison"
    tell(f"{len(trials)} runs in {config.run.storage}, results in {place}\n{describe(trials)}")
    output = open_store(place)
    output.probe()
    if arguments.dry_run:
        return 0
    prepare_process(config, torch.device("cuda" if config.cluster.gpu else "cpu"))
    rows = Rows(output, config)
    found = rows_of(trials, rows, arguments.parallel)
    if found is None:
        tell("stopped; the same command goes on from here")
        return 1
    comparison = compare(found, len(config.model.latent_dims))
    facts = facts_of(config, trials, rows)
    findings = comparison_findings(comparison, facts, config)
    contents = {
        **document(comparison),
        "rows": {arm: {str(seed): row for seed, row in of_arm.items()} for arm, of_arm in found.items()},
        "facts": facts,
        "provenance": provenance(),
        "config": config_to_dict(config),
        "runs": {trial.name: trial.uri for trial in trials},
    }
    output.put("numbers.json", json.dumps(finite(contents), indent=1, ensure_ascii=False).encode())
    write_report(findings, output, "comparison")
    tell("\n".join(claim.sentence for claim in comparison.claims))
    tell(f"report   {place}/comparison.html")
    return 0


if __name__ == "__main__":
    run(main)
