"""From a search to trials on a Ray cluster, as many at once as it holds, and to the best of them.

Ray Tune places the trials, starts them again where one crashes, and its ASHA says which to prune. What is to
be remembered is in the sweep's own folder: Tune's files are scratch, and nothing of them is read back.
"""

import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import ray.tune
from optuna.trial import FrozenTrial, TrialState
from ray.tune.execution import class_cache
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from jebm.config import Config, config_to_dict
from jebm.errors import ConfigError
from jebm.on_ray.cluster import join, places, submission_id
from jebm.on_ray.stopping import StopRequest
from jebm.on_ray.trial import METRICS, run_trial
from jebm.store.storage import open_store
from jebm.sweep.record import check_same
from jebm.sweep.space import Halving, Objective, Search, with_parameters
from jebm.sweep.study import Status, SweepStudy, run_name
from jebm.train.lease import Lease
from jebm.train.loop import total_steps_of
from jebm.train.plan import Plan
from jebm.train.runtime import first_signal

__all__ = ["Ending", "StudyPruner", "StudySearcher", "SweepPlan", "plan_sweep", "tune"]

_LOG = logging.getLogger("jebm.on_ray")
_STORE_SECONDS = 2.0  # that Tune's loop waits for the store; then it looks after the running trials first
_FAILURES = 3  # of the first trials: then the fault is not one of their values
_LINE_SECONDS = 15.0  # between two lines of progress of one trial
_TUNE_LOGS = {
    "ray.tune": logging.WARNING,
    "ray.tune.tune": logging.CRITICAL,  # trials that have failed: we have said so
    "ray.tune.analysis": logging.ERROR,  # result files that are not there, for each trial
}
_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # its result files: runs have their own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would end trials without a last checkpoint
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every report has been measured
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the trial has logged it
    "RAY_AIR_NEW_OUTPUT": "0",  # tables, even where nothing is asked to be shown
}


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that can be started."""

    base: Config
    search: Search
    data_sha256: str
    data_images: int
    images: int
    """That a whole trial of the base sees."""
    begun: bool
    """Whether there is a sweep of this name, to be gone on with."""

    def describe(self) -> str:
        """Return the plan as a few lines for a person."""
        run = self.base.run
        return "\n".join(
            [
                f"sweep    {run.name} in {run.storage} ({'goes on' if self.begun else 'new'})",
                *self.search.describe(),
                f"each     {self.images:,} images of {self.base.data.train}, {_needs(self.base)}",
            ]
        )


@dataclass(frozen=True)
class Ending:
    """How a call of `tune` ended."""

    status: Literal["finished", "stopped"]
    trials: Counter[str]
    """Trials by status; those that go on with another start are interrupted."""
    best: list[FrozenTrial]
    """The best finished trial; with several objectives, those that no other beats, by the first one."""
    place: str


def plan_sweep(search: Search, plan: Plan) -> SweepPlan:
    """Check a search against the plan of its base config; starts nothing.

    Raises:
        ConfigError: the base is no config for a sweep, the sweep was begun with another search or base, or
            pruning would come too late.
    """
    config = plan.config
    if config.cluster.engine != "ray":
        raise ConfigError("cluster.engine: a sweep needs ray, not process")
    if config.cluster.autoscales and search.max_concurrent is None:
        raise ConfigError("max_concurrent: is missing; a cluster that grows on demand sets no limit")
    if plan.resumes_at is not None:
        raise ConfigError(f"run.name: {config.run.name} is a run with checkpoints; choose another name")
    images = _whole(config, plan.data.images)
    if search.scheduler is not None:
        first = search.scheduler.grace_images
        if search.objectives[0].metric.startswith("evaluation/"):
            first = max(first, config.evaluation.every_steps * config.train.batch_size)
        if first >= images:
            raise ConfigError(
                f"scheduler.asha: trials would be judged after {first:,} images, and end after {images:,}; "
                "lower grace_images or evaluation.every_steps, or set scheduler to none"
            )
    store = open_store(config.run.storage).child(config.run.name)
    record = check_same(store, config.run.name, search, config, plan.data.sha256)
    return SweepPlan(config, search, plan.data.sha256, plan.data.images, images, record is not None)


def tune(plan: SweepPlan, provenance: Mapping[str, str]) -> Ending:
    """Run what is left of a sweep; the same sweep goes on when called again.

    Raises:
        ConfigError: the cluster cannot hold a trial, another job runs this sweep, or an objective is not
            among the metrics.
        StoreError: the sweep's folder cannot be reached, read or written.
    """
    base = plan.base
    store = open_store(base.run.storage).child(base.run.name)
    with Lease(store, ray_job=submission_id()):
        study = SweepStudy(
            store, base.run.name, plan.search, base, data_sha256=plan.data_sha256, provenance=provenance
        )
        try:
            stopped = study.left > 0 and _run(plan, study, provenance)
        finally:
            study.close()
    trials = Counter(
        "interrupted" if trial.state == TrialState.RUNNING else str(trial.user_attrs["status"])
        for trial in study.trials
    )
    return Ending("stopped" if stopped else "finished", trials, study.best, store.uri)


def _run(plan: SweepPlan, study: SweepStudy, provenance: Mapping[str, str]) -> bool:
    """Run the trials that are left; return whether somebody asked to stop."""
    cluster = plan.base.cluster
    os.environ.update(_TUNE_SETTINGS)
    for logger, level in _TUNE_LOGS.items():
        logging.getLogger(logger).setLevel(level)
    # Else Tune puts the driver's keys into the runtime environment of its trials, which Ray stores and shows.
    propagated = class_cache.ENV_VARS_TO_PROPAGATE
    propagated.difference_update({name for name in propagated if name.startswith("AWS_")})
    join(plan.base)
    at_once = plan.search.max_concurrent or study.left
    if not cluster.autoscales:
        at_once = min(at_once, max(1, places(plan.base) // cluster.workers))
    at_once = min(at_once, study.left)
    _LOG.info("%d trials to run, %d at a time of %s", study.left, at_once, _needs(plan.base))
    request = StopRequest()
    stopping = threading.Event()

    def stop() -> None:
        stopping.set()
        request.ask()

    def on_signal(received: signal.Signals) -> None:
        _LOG.info("%s: stopping; every trial saves a last checkpoint", received.name)
        stop()

    trials = StudySearcher(plan, study, stopping, stop)
    scheduler = None
    if plan.search.scheduler is not None:
        scheduler = StudyPruner(
            plan.search.scheduler,
            plan.search.objectives[0],
            study,
            images=plan.images,
            prune=lambda number: request.ask(run_name(number)),
        )
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker, "GPU": int(cluster.gpu)}
    if cluster.workers > 1:
        resources = {"memory": 1}  # the workers take what they need; a trial without any resource cannot be
    trainable = ray.tune.with_parameters(run_trial, provenance=dict(provenance), request=request)
    with tempfile.TemporaryDirectory(prefix="jebm-tune-") as scratch, first_signal(on_signal):
        ray.tune.Tuner(
            ray.tune.with_resources(trainable, resources),
            tune_config=ray.tune.TuneConfig(
                search_alg=trials,
                scheduler=scheduler,
                num_samples=-1,  # until the study has none left
                max_concurrent_trials=at_once,
                reuse_actors=True,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=ray.tune.RunConfig(
                name="tune",
                storage_path=scratch,
                failure_config=ray.tune.FailureConfig(max_failures=cluster.max_failures),
                verbose=0,
            ),
        ).fit()
    if trials.failure is not None:
        raise trials.failure
    return stopping.is_set()


def _whole(config: Config, data_images: int) -> int:
    """Return the images that a whole trial with this config sees."""
    batch = config.train.batch_size
    return total_steps_of(config, data_images // batch) * batch


def _name(trial: Any) -> str:  # noqa: ANN401  (Tune's)
    return run_name(trial.config["number"])


@dataclass
class _Live:
    """A trial that Tune knows."""

    number: int
    images: int
    """Of its whole length."""
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = "its process died: killed, out of memory, or its node is gone"
    attempts: int = 0
    """That this start of the sweep has made."""
    said: float = 0.0

    @property
    def name(self) -> str:
        return run_name(self.number)


class StudySearcher(Searcher):
    """Tune's way to the study: which trial comes next, and what has come of each.

    Ray's own OptunaSearch keeps its study in a pickle, forgets trials that run when the driver dies, and
    takes the last value of a pruned trial for its result.
    """

    def __init__(
        self, plan: SweepPlan, study: SweepStudy, stopping: threading.Event, stop: Callable[[], None]
    ) -> None:
        super().__init__()
        self._plan, self._study, self._stopping, self._stop = plan, study, stopping, stop
        self._goals = plan.search.objectives
        self._attempts = plan.base.cluster.max_failures + 1
        self._live: dict[str, _Live] = {}
        self._ended: Counter[Status] = Counter()
        self.failure: ConfigError | None = None
        """What makes going on useless."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its settings to the scratch folder, where nobody reads them

    def suggest(self, trial_id: str) -> Any:  # noqa: ANN401  (a sample, FINISHED or None)
        """Return the next trial as Tune's flat sample; None for not yet."""
        if self._stopping.is_set() or not self._study.left:
            return self.FINISHED
        suggestion = self._study.suggest(_STORE_SECONDS)
        if suggestion is None:
            return None
        run = self._plan.base.run
        trial = _Live(suggestion.number, self._plan.images)
        shown = "  ".join(f"{key} {_brief(value)}" for key, value in suggestion.parameters.items())
        try:
            config = with_parameters(
                self._plan.base,
                suggestion.parameters,
                storage=f"{run.storage.rstrip('/')}/{run.name}/trials",
                name=trial.name,
            )
        except ConfigError as error:  # values that are fine alone, and not together
            _LOG.info("%s  %s", trial.name, shown)
            self._end(trial, "failed", str(error))
            return None
        trial.images = _whole(config, self._plan.data_images)
        self._live[trial_id] = trial
        _LOG.info("%s  %s%s", trial.name, shown, "  (goes on)" if suggestion.interrupted else "")
        values = json.dumps(config_to_dict(config))
        return {"number": trial.number, "images": trial.images, "config": values}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note a report that is not the last one."""
        trial = self._live[trial_id]
        if result["status"] == "begun":
            self._study.begin(trial.number)
            trial.attempts += 1
            if trial.attempts > 1:
                _LOG.info("%s  begins attempt %d of %d", trial.name, trial.attempts, self._attempts)
        elif result["status"] == "error":
            trial.error = result["error"]
            _LOG.info("%s  this attempt failed: %s", trial.name, trial.error)
        else:
            self._note(trial, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Note how a trial has ended; with `error` it has used up its attempts."""
        trial = self._live.pop(trial_id)
        if error or result is None:
            self._end(trial, "failed", trial.error)
            return
        self._note(trial, result)
        if result["status"] != "stopped":
            self._end(trial, result["status"], result.get("error", ""))
        elif self._study.is_pruned(trial.number):
            self._end(trial, "pruned", "")
        else:
            _LOG.info(
                "%s  stopped at %s of %s images", trial.name, f"{result['images']:,}", f"{trial.images:,}"
            )

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study is in the store."""

    def _note(self, trial: _Live, result: Mapping[str, Any]) -> None:
        metrics = {k.removeprefix(METRICS): float(v) for k, v in result.items() if k.startswith(METRICS)}
        trial.metrics = metrics or trial.metrics
        running = result["status"] == "running"
        value = self._study.report(
            trial.number,
            metrics,
            images=result["images"],
            step=result["step"],
            seconds=result["seconds"],
            last=not running,
        )
        now = time.monotonic()
        if running and value is not None and now - trial.said > _LINE_SECONDS:
            trial.said = now
            far = f"{result['images']:,} of {trial.images:,} images"
            _LOG.info("%s  %s  %s", trial.name, far, self._shown([value]))
        evaluated = any(name.startswith("evaluation/") for name in metrics)  # they come all at once
        for goal in self._goals:
            due = evaluated or (metrics and not goal.metric.startswith("evaluation/"))
            if due and goal.metric not in metrics:
                self._give_up(
                    f"objective: there is no metric {goal.metric}; there are {', '.join(sorted(metrics))}; "
                    "correct it, and choose a new run.name"
                )

    def _give_up(self, why: str) -> None:
        self.failure = self.failure or ConfigError(why)
        self._stop()

    def _end(self, trial: _Live, status: Status, error: str) -> None:
        status, error = self._study.end(trial.number, status, trial.metrics, error=error)
        self._ended[status] += 1
        if self._ended["failed"] == self._ended.total() == _FAILURES:
            self._give_up(
                f"search: the first {_FAILURES} trials have failed, the last one by {error}; "
                "put that right, and the same command tries again"
            )
        ended = self._study.trials[trial.number]
        values = ended.values if status == "finished" else list(ended.intermediate_values.values())[-1:]
        parts = [trial.name, status, self._shown(values)]
        if "images" in ended.user_attrs:
            parts.append(f"({ended.user_attrs['images']:,} images, {ended.user_attrs['seconds']:.0f} s)")
        best = self._study.best
        if best and len(self._goals) == 1:
            parts.append(f"best so far {run_name(best[0].number)} {self._shown(best[0].values)}")
        _LOG.info("%s%s", "  ".join(filter(None, parts)), error and f": {error}")

    def _shown(self, values: Sequence[float]) -> str:
        return "  ".join(
            f"{goal.metric} {value:.5g}" for goal, value in zip(self._goals, values, strict=False)
        )


class StudyPruner(ASHAScheduler):
    """Ray's ASHA, with the memory of earlier starts, and asking trials to stop instead of ending them.

    So a pruned trial saves a last checkpoint and its log, and its process can take the next trial.
    """

    def __init__(
        self,
        halving: Halving,
        objective: Objective,
        study: SweepStudy,
        *,
        images: int,
        prune: Callable[[int], object],
    ) -> None:
        super().__init__(
            time_attr="images",
            metric=METRICS + objective.metric,
            mode="min" if objective.direction == "minimize" else "max",
            max_t=images,
            grace_period=halving.grace_images,
            reduction_factor=halving.reduction,
            stop_last_trials=False,
        )
        self._study, self._prune = study, prune
        for trial in study.trials:
            if trial.state != TrialState.RUNNING:  # those come by Tune, when they go on
                past = SimpleNamespace(trial_id=run_name(trial.number), config={"number": trial.number})
                self.on_trial_add(None, past)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as that of StudySearcher

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:  # noqa: ANN401  # Tune's
        """Put a trial on its rungs, with what it has shown in earlier attempts."""
        super().on_trial_add(tune_controller, trial)
        past = self._study.trials[trial.config["number"]].intermediate_values
        for images, value in sorted(past.items()):
            super().on_trial_result(tune_controller, trial, {"images": images, self._metric: value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ANN401
        """Let the trial go on; where it is not good enough, and not at its end, ask it to stop."""
        decision = super().on_trial_result(tune_controller, trial, result)
        number = trial.config["number"]
        if (
            decision == TrialScheduler.STOP
            and result["images"] < trial.config["images"]
            and not self._study.is_pruned(number)
        ):
            self._study.prune(number)
            self._prune(number)
        return str(TrialScheduler.CONTINUE)


def _needs(config: Config) -> str:
    """Return what a trial takes, such as 2 workers x 1 CPU."""
    cluster = config.cluster
    workers, cpus = cluster.workers, cluster.cpus_per_worker
    return f"{workers} worker{'s' if workers > 1 else ''} x {cpus} CPU{'s' if cpus > 1 else ''}" + (
        " and 1 GPU" if cluster.gpu else ""
    )


def _brief(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
