"""Connect Tune to the study of a sweep: which trial comes next, how each ended, and which to prune."""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from jebm.config import Config, config_to_dict
from jebm.errors import ConfigError
from jebm.on_ray.trial import METRICS
from jebm.parser import override
from jebm.sweep.space import Halving, Objective
from jebm.sweep.study import Status, SweepStudy
from jebm.sweep.study_log import run_name
from jebm.sweep.twins import SAME_AS
from jebm.train.start import total_steps_of

if TYPE_CHECKING:
    from jebm.on_ray.tuner import SweepPlan

__all__ = ["StudyPruner", "StudySearcher", "whole_images"]

_LOG = logging.getLogger("jebm.on_ray")
_STORE_SECONDS = 2.0  # how long Tune's loop waits for the store before it serves running trials
_FAILURES = 3  # first trials that all fail: then the values are not to blame
_LINE_SECONDS = 15.0  # between progress lines of one trial


def whole_images(config: Config, data_images: int) -> int:
    """Return the images seen by a full-length trial with this config."""
    batch = config.train.batch_size
    return total_steps_of(config, data_images // batch) * batch


@dataclass
class _Live:
    """A trial known to Tune."""

    number: int
    images: int
    """At its full length."""
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = "its process died: killed, out of memory, or its node is gone"
    attempts: int = 0
    """Made by this start of the sweep."""
    said: float = 0.0

    @property
    def name(self) -> str:
        return run_name(self.number)


class StudySearcher(Searcher):
    """Tune's interface to the study: which trial comes next, and how each ended.

    Ray's own OptunaSearch keeps its study in a pickle, forgets trials that are running when the driver dies,
    and takes a pruned trial's last value as its result.
    """

    def __init__(
        self, plan: "SweepPlan", study: SweepStudy, stopping: threading.Event, stop: Callable[[], None]
    ) -> None:
        super().__init__()
        self._plan, self._study, self._stopping, self._stop = plan, study, stopping, stop
        self._goals = plan.search.objectives
        self._attempts = plan.base.cluster.max_failures + 1
        self._live: dict[str, _Live] = {}
        self._ended: Counter[Status] = Counter()
        self.failure: ConfigError | None = None
        """The error that makes continuing pointless, if any."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its state to the scratch folder; nothing reads it

    def suggest(self, trial_id: str) -> Any:  # noqa: ANN401  (a sample, FINISHED or None)
        """Return the next trial as Tune's flat sample; None if there is none yet."""
        if self._stopping.is_set() or not self._study.left:
            return self.FINISHED
        suggestion = self._study.suggest(_STORE_SECONDS)
        if suggestion is None:
            return None
        run = self._plan.base.run
        trial = _Live(suggestion.number, self._plan.images)
        shown = "  ".join(f"{key} {_brief(value)}" for key, value in suggestion.parameters.items())
        try:
            place = {"run.storage": f"{run.storage.rstrip('/')}/{run.name}/trials", "run.name": trial.name}
            config = override(self._plan.base, suggestion.parameters | place)
        except ConfigError as error:  # values valid separately but not together
            _LOG.info("%s  %s", trial.name, shown)
            self._end(trial, "failed", str(error))
            return None
        trial.images = whole_images(config, self._plan.data_images)
        self._live[trial_id] = trial
        _LOG.info("%s  %s%s", trial.name, shown, "  (goes on)" if suggestion.interrupted else "")
        values = json.dumps(config_to_dict(config))
        return {"number": trial.number, "images": trial.images, "config": values}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record a report other than the last."""
        trial = self._live[trial_id]
        if result["status"] == "begun":
            self._study.begin(trial.number)
            trial.attempts += 1
            if trial.attempts > 1:
                _LOG.info("%s  begins attempt %d of %d", trial.name, trial.attempts, self._attempts)
        elif result["status"] == "interrupted":  # by a notice; Tune starts it again without charging it
            trial.attempts -= 1
            _LOG.info("%s  saved at step %d: its node is about to go", trial.name, result["step"])
        elif result["status"] == "error":
            trial.error = result["error"]
            _LOG.info("%s  this attempt failed: %s", trial.name, trial.error)
        else:
            self._note(trial, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record how a trial ended; with `error` it has used up its attempts."""
        trial = self._live.pop(trial_id)
        if self._stopping.is_set() and not trial.attempts:  # Tune dropped it while it waited for room
            return
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

    def is_idle(self) -> bool:
        """Return whether every trial that has begun has ended."""
        return not any(trial.attempts for trial in self._live.values())

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
        evaluated = any(name.startswith("evaluation/") for name in metrics)  # they arrive together
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
    """Ray's ASHA, but it remembers earlier starts, and asks trials to stop instead of ending them.

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
            # Tune adds running ones when they resume; ASHA ranks each run once.
            if trial.state != TrialState.RUNNING and SAME_AS not in trial.user_attrs:
                past = SimpleNamespace(trial_id=run_name(trial.number), config={"number": trial.number})
                self.on_trial_add(None, past)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as in StudySearcher

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:  # noqa: ANN401  # Tune's
        """Add a trial to the rungs, with its results from earlier attempts."""
        super().on_trial_add(tune_controller, trial)
        past = self._study.trials[trial.config["number"]].intermediate_values
        for images, value in sorted(past.items()):
            super().on_trial_result(tune_controller, trial, {"images": images, self._metric: value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ANN401
        """Let the trial continue; if it is not good enough and not at its end, ask it to stop."""
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


def _brief(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
