"""Run a search as trials on a Ray cluster, as many at a time as fit, and find the best.

Ray Tune places the trials and restarts those that crash, and its ASHA decides which to prune. All lasting
state is in the sweep's own folder: Tune's files are scratch and never read back.
"""

import logging
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray.tune
from optuna.trial import FrozenTrial, TrialState
from ray.tune.execution import class_cache
from ray.tune.registry import _unregister_all

from jebm.config import Cluster, Config
from jebm.data.honesty import check_honest
from jebm.errors import ConfigError
from jebm.evaluate.quick import check_measured
from jebm.on_ray.capacity import needs, nodes_there, places
from jebm.on_ray.cluster import join, submission_id
from jebm.on_ray.reservations import free_abandoned_groups
from jebm.on_ray.searcher import StudyPruner, StudySearcher, whole_images
from jebm.on_ray.stopping import StoppedError, StopRequest, attend
from jebm.on_ray.trial import run_trial
from jebm.on_ray.waiting import Waiting, free_room
from jebm.store.storage import open_store
from jebm.sweep.record import check_same
from jebm.sweep.space import Search
from jebm.sweep.study import SweepStudy
from jebm.sweep.study_log import run_name
from jebm.train.lease import Lease
from jebm.train.plan import Plan

__all__ = ["Ending", "SweepPlan", "plan_sweep", "tune"]

_LOG = logging.getLogger("jebm.on_ray")
_ENDING = "stopping: running trials end after a step, with a last checkpoint; a second signal ends it at once"
_TUNE_LOGS = {
    "ray.tune": logging.WARNING,
    "ray.tune.tune": logging.CRITICAL,  # failed trials, which we have already logged
    "ray.tune.analysis": logging.ERROR,  # missing result files, for each trial
}
_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # its result files: runs have their own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would end trials without a last checkpoint
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every report has the objective
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the trial has logged it
    "RAY_AIR_NEW_OUTPUT": "0",  # tables, even with verbose 0
}

_TRIAL_BYTES = 1_500_000_000
"""Memory of what drives a trial of several workers: Tune's process, Ray's controller and its four actors."""


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that can be started."""

    base: Config
    search: Search
    data_sha256: str
    data_images: int
    images: int
    """Seen by a full-length trial of the base config."""
    begun: bool
    """Whether a sweep of this name exists, to be resumed."""

    def describe(self) -> str:
        """Return the plan as a few readable lines."""
        run = self.base.run
        return "\n".join(
            [
                f"sweep    {run.name} in {run.storage} ({'goes on' if self.begun else 'new'})",
                *self.search.describe(),
                f"each     {self.images:,} images of {self.base.data.train}, {needs(self.base)}",
            ]
        )


@dataclass(frozen=True)
class Ending:
    """How a call of `tune` ended."""

    status: Literal["finished", "stopped"]
    trials: Counter[str]
    """Trials by status; those that another start would resume are interrupted."""
    best: list[FrozenTrial]
    """The best finished trial; with several objectives, the Pareto front, by the first objective."""
    place: str


def plan_sweep(search: Search, plan: Plan) -> SweepPlan:
    """Check a search against the plan of its base config; starts nothing.

    Raises:
        ConfigError: the base config is unfit for a sweep, the sweep was started with another search or base,
            pruning would come too late, or an objective is not measured or would see test images.
    """
    config = plan.config
    if config.cluster.engine != "ray":
        raise ConfigError("cluster.engine: a sweep needs ray, not process")
    if config.cluster.autoscales and search.max_concurrent is None:
        raise ConfigError("max_concurrent: is missing; a cluster that grows on demand sets no limit")
    if plan.resumes_at is not None:
        raise ConfigError(f"run.name: {config.run.name} is a run with checkpoints; choose another name")
    # Pruning must come before the end of a trial.
    images = whole_images(config, plan.data.images)
    if search.scheduler is not None:
        first = search.scheduler.grace_images
        if search.objectives[0].metric.startswith("evaluation/"):
            first = max(first, config.evaluation.every_steps * config.train.batch_size)
        if first >= images:
            raise ConfigError(
                f"scheduler.asha: trials would be judged after {first:,} images, and end after {images:,}; "
                "lower grace_images or evaluation.every_steps, or set scheduler to none"
            )
    for objective in search.objectives:
        if objective.metric.startswith("evaluation/"):
            check_measured(objective.metric, "objective.metric")
        check_honest(objective.metric, config, plan.judging)
    store = open_store(config.run.storage).child(config.run.name)
    # What trials train on, and what judges them.
    sets = dict.fromkeys([plan.data.sha256, plan.judging.sha256])
    data_sha256 = "+".join(sets)
    record = check_same(store, config.run.name, search, config, data_sha256)
    return SweepPlan(config, search, data_sha256, plan.data.images, images, record is not None)


def tune(plan: SweepPlan, provenance: Mapping[str, str]) -> Ending:
    """Run the remaining trials of a sweep; called again, resume it.

    Call from the main thread: SIGTERM and SIGINT stop the sweep, at once if no trial is training.

    Raises:
        ConfigError: the cluster cannot hold a trial, another job is running this sweep, or an objective is
            not among the metrics.
        StoreError: the sweep's folder cannot be reached, read or written.
    """
    base = plan.base
    store = open_store(base.run.storage).child(base.run.name)
    with Lease(store, ray_job=submission_id()):
        study = SweepStudy(
            store, base.run.name, plan.search, base, data_sha256=plan.data_sha256, provenance=provenance
        )
        try:
            stopped = study.left > 0 and _attended(plan, study, provenance)
        finally:
            study.close()
    trials = Counter(
        "interrupted" if trial.state == TrialState.RUNNING else str(trial.user_attrs["status"])
        for trial in study.trials
    )
    return Ending("stopped" if stopped else "finished", trials, study.best, store.uri)


def _attended(plan: SweepPlan, study: SweepStudy, provenance: Mapping[str, str]) -> bool:
    """Run the remaining trials; return whether a stop was requested."""
    request = StopRequest()
    stopping, running = threading.Event(), threading.Event()

    def stop() -> None:
        stopping.set()
        request.ask()

    def start() -> None:
        _prepare_tune()
        join(plan.base)
        running.set()
        try:
            _run(plan, study, provenance, request=request, stopping=stopping, stop=stop)
        finally:
            # Process exit is too late: a local Ray ends with the thread that started it; Tune would wait a
            # minute for it and exit with code 1.
            try:
                _unregister_all()  # type: ignore[no-untyped-call]
            finally:
                free_abandoned_groups()

    def on_signal() -> bool:
        stopping.set()  # first: the thread may begin to run at this moment
        if not running.is_set():
            return False
        stop()
        return True

    try:
        attend(start, stop=on_signal, ending=_ENDING)
    except StoppedError:
        return True
    return stopping.is_set()


def _prepare_tune() -> None:
    """Quiet Tune, and turn off its unwanted defaults."""
    os.environ.update(_TUNE_SETTINGS)
    for logger, level in _TUNE_LOGS.items():
        logging.getLogger(logger).setLevel(level)
    # Otherwise Tune copies the driver's AWS keys into its trials' runtime environment, which Ray stores and
    # shows.
    propagated = class_cache.ENV_VARS_TO_PROPAGATE
    propagated.difference_update({name for name in propagated if name.startswith("AWS_")})


def _run(
    plan: SweepPlan,
    study: SweepStudy,
    provenance: Mapping[str, str],
    *,
    request: StopRequest,
    stopping: threading.Event,
    stop: Callable[[], None],
) -> None:
    """Run the remaining trials, until the study has no more or `stopping` is set.

    Raises:
        ConfigError: continuing is pointless; `stop` has stopped all trials.
    """
    cluster = plan.base.cluster
    at_once = _at_once(plan, study)
    _LOG.info("%d trials to run, %d at a time of %s", study.left, at_once, needs(plan.base))

    def prune(number: int) -> None:
        request.ask(run_name(number))

    # The study suggests and records trials; ASHA prunes them if configured.
    trials = StudySearcher(plan, study, stopping, stop)
    scheduler = None
    if plan.search.scheduler is not None:
        halving, objective = plan.search.scheduler, plan.search.objectives[0]
        scheduler = StudyPruner(halving, objective, study, images=plan.images, prune=prune)
    trainable = ray.tune.with_parameters(run_trial, provenance=dict(provenance), request=request)
    with tempfile.TemporaryDirectory(prefix="jebm-tune-") as scratch:
        ray.tune.Tuner(
            ray.tune.with_resources(trainable, _resources(cluster)),
            tune_config=ray.tune.TuneConfig(
                search_alg=trials,
                scheduler=scheduler,
                num_samples=-1,  # until the study has no more
                max_concurrent_trials=at_once,
                reuse_actors=True,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=ray.tune.RunConfig(
                name="tune",
                storage_path=scratch,
                failure_config=ray.tune.FailureConfig(max_failures=cluster.max_failures),
                stop=_StopWaiting(trials, stopping, needs(plan.base)),
                verbose=0,
            ),
        ).fit()
    if trials.failure is not None:
        raise trials.failure


def _at_once(plan: SweepPlan, study: SweepStudy) -> int:
    """Return how many trials run at a time: limited by the request, the cluster and the remaining trials."""
    limits = [study.left, plan.search.max_concurrent or study.left]
    if not plan.base.cluster.autoscales:
        limits.append(max(1, places(plan.base) // plan.base.cluster.workers))
    return min(limits)


def _resources(cluster: Cluster) -> dict[str, float]:
    """Return what Tune reserves for a trial."""
    if cluster.workers > 1:
        # Workers reserve their own. What drives them needs no CPU, so a head that offers none would take all
        # of it: memory is what it has too little of.
        return {"memory": min(_TRIAL_BYTES, max(int(node.get("memory", 1)) for node in nodes_there()))}
    shape: dict[str, float] = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    if cluster.accelerator:
        shape[f"accelerator_type:{cluster.accelerator}"] = 0.001  # as much as Ray itself asks for
    return shape


class _StopWaiting(ray.tune.Stopper):
    """Ends Tune's wait for room for its next trial once a stop is requested."""

    def __init__(self, trials: StudySearcher, stopping: threading.Event, needs: str) -> None:
        self._trials, self._stopping = trials, stopping
        self._waiting = Waiting(f"{needs} of the next trial", free_room)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as in StudySearcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no running trial: it has already been asked to stop."""
        return False

    def stop_all(self) -> bool:
        """Return whether to drop waiting trials; Tune calls this in each pass of its loop."""
        idle = self._trials.is_idle()
        self._waiting.look(waits=idle)
        return self._stopping.is_set() and idle


def _name(trial: Any) -> str:  # noqa: ANN401  (Tune's)
    return run_name(trial.config["number"])
