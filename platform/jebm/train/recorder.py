"""Records a run: its journal, pictures, evaluations and checkpoints, each when it is due."""

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType

from torch import Tensor

from jebm.core.model import JointModel
from jebm.core.precision import tf32
from jebm.store.checkpoint import Manifest
from jebm.train.journal import Journal
from jebm.train.metrics import Clock, Meter
from jebm.train.pictures import Painter
from jebm.train.runtime import Runtime
from jebm.train.saver import Saver
from jebm.train.start import Start
from jebm.train.watch import Watch

__all__ = ["Enough", "Measure", "OnReport", "Recorder", "Report", "never"]

_LOG = logging.getLogger("jebm.train")


@dataclass(frozen=True)
class Report:
    """What training reports to its caller; times, `checkpoints` and `saving` are each rank's own."""

    step: int
    metrics: dict[str, float]
    checkpoints: Sequence[Manifest]
    """The one resumed from, then this attempt's newest, oldest first; only on rank 0."""
    saving: Mapping[str, float] = field(default_factory=dict)
    """What saving has cost this rank so far, as in the journal's `checkpoint/…`."""


OnReport = Callable[[Report], bool]
"""Takes a report on every rank; returns True if this machine is about to go away."""

Enough = Callable[[Report], object]
"""Takes a report on rank 0; returns a true value to end the run there."""


def never(report: Report) -> bool:
    """Return False: the run trains to its end."""
    return False


Measure = Callable[[JointModel, int, Runtime], Mapping[str, float]]
"""`measure(model, step, runtime)` returns a model's metrics by name; called on every rank."""


class Recorder:
    """Takes every step's metrics on every rank and does what is due; rank 0 writes."""

    def __init__(
        self,
        start: Start,
        provenance: Mapping[str, str],
        on_report: OnReport,
        enough: Enough,
        measure: Measure | None,
        watch: Watch,
    ) -> None:
        """Open the journal and begin an attempt; their errors are raised on all ranks."""
        config, runtime, state = start.config, start.runtime, start.state
        self._config, self._runtime, self._state = config, runtime, state
        self._total_steps = start.horizon.total_steps
        self._on_report, self._enough, self._measure = on_report, enough, measure
        self._watch = watch
        self._patience = start.patience
        self.ended_early = False
        """Whether early stopping, or `enough`, ended the run at this step."""
        self._journal: Journal | None = None
        self._meter, self.clock = Meter(), Clock(runtime.device)
        self.metrics: dict[str, float] = {}
        """Of the last report."""
        hosts = runtime.gathered(socket.gethostname())
        with ExitStack() as stack:
            with runtime.together():
                if runtime.is_main:
                    facts = _facts(start, provenance) | {"hosts": list(dict.fromkeys(hosts))}
                    self._journal = stack.enter_context(
                        Journal(start.store, config, step=state.step, facts=facts)
                    )
                    watch.publish = self._journal.heartbeat
            if runtime.is_main:
                self._painter = Painter(config, state, start.held_out, runtime.device)
                begins = (config.run.name, state.step, self._total_steps, start.place)
                _LOG.info("run %s: step %d of %d, results in %s", *begins)
            self._saver = stack.enter_context(Saver(start, provenance))
            self._stack = stack.pop_all()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._watch.busy("the end"):
            self._stack.__exit__(kind, error, trace)

    @property
    def failed(self) -> bool:
        """Whether this rank can no longer write checkpoints; `finish` raises the reason."""
        return self._saver.failure is not None

    def record(self, metrics: Mapping[str, Tensor], *, stopped: bool) -> None:
        """Add this rank's metrics of a step and do what is due; after the last step everything is.

        Raises:
            DivergedError: a loss or gradient was not finite; nothing of it is reported or saved.
        """
        config, step = self._config, self._state.step
        self._state.finite.check()
        self._meter.add(metrics)
        last = stopped or step == self._total_steps
        watched = config.train.early_stopping.metric is not None
        measured = self._measure is not None and (
            step == self._total_steps
            # Early stopping counts evaluations: none is left out for a stop.
            or (_due(step, config.evaluation.every_steps) and (watched or not stopped))
        )
        leaving = False
        if last or measured or _due(step, config.train.report_every_steps):
            leaving = self._report(measured=measured)
            last = last or self.ended_early
        if last or _due(step, config.train.pictures_every_steps):
            self._state.finite.check(now=True)
            with self._watch.busy("pictures"):
                if self._journal is not None:
                    self._journal.pictures(step, self._painter())
        if last or leaving or _due(step, config.checkpoint.every_steps):
            self._state.finite.check(now=True)
            with self._watch.busy("saving"):
                if self._journal is not None and watched:
                    self._journal.flush()  # no checkpoint is newer than an evaluation that stopping counts
                self._saver.save(self.metrics)

    def finish(self) -> None:
        """Write the hyperparameters and wait for the last checkpoint; raises on all ranks if it failed."""
        with self._watch.busy("the last save"), self._runtime.together():
            if self._journal is not None:
                self._journal.hyperparameters(self.metrics)
                if self._patience.over:
                    self._journal.ended_early(self._state.step)
            self._saver.close()
            if self._journal is not None:
                self._journal.checkpoints(self._saver.kept())
                over = self._patience.over or self._state.step == self._total_steps
                self._journal.ending = "finished" if over else "stopped"

    def tell(self) -> bool:
        """Call `on_report` with the last metrics, if any, and the present checkpoints; return its result."""
        if not self.metrics:
            return False
        with self._watch.busy("a report", long=False):
            return self._on_report(self._last_report())

    def _last_report(self) -> Report:
        return Report(self._state.step, self.metrics, self._saver.kept(), self._saver.metrics())

    def _report(self, *, measured: bool) -> bool:
        """Report the metrics since the last report; return whether any machine is about to go away."""
        self._state.finite.check(now=True)
        steps = self._meter.steps
        self.metrics = self._meter.take(self._runtime) | self._speed(steps)
        if measured:
            with self._watch.busy("an evaluation"):
                self.metrics |= self._measured()
            self.clock.take()  # evaluation does not count towards training speed
        if self._journal is not None:
            self._journal.metrics(self._state.step, self._total_steps, self.metrics | self._saver.metrics())
            self._journal.checkpoints(self._saver.kept())
        leaving, enough = self.tell(), False
        if self._runtime.is_main:
            self._patience.see(self._state.step, self.metrics)
            with self._watch.busy("a callback", long=False):
                enough = self._patience.over or bool(self._enough(self._last_report()))
        all_stay, more = self._runtime.agree(not leaving, not enough)
        self.ended_early = not more
        return not all_stay

    def _speed(self, steps: int) -> dict[str, float]:
        """Return the speed since the last report, and how its time was spent."""
        wall, seconds = self.clock.take()
        return {
            "time/images_per_second": steps * self._config.train.batch_size / wall,
            "time/seconds_per_step": wall / steps,
            "time/chain_share": seconds.get("chain", 0.0) / wall,
            "time/data_share": seconds["data"] / wall,
        }

    def _measured(self) -> dict[str, float]:
        """Return the evaluation of the model: all ranks take part, and rank 0's figures count."""
        if self._measure is None:
            return {}
        measures = self._measure(self._state.picture_model, self._state.step, self._runtime)
        return self._runtime.from_main({f"evaluation/{name}": value for name, value in measures.items()})


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _facts(start: Start, provenance: Mapping[str, str]) -> dict[str, object]:
    return {
        "world_size": start.runtime.world_size,
        "device": str(start.runtime.device),
        "tf32": tf32(),
        "data_sha256": start.images.manifest.sha256,
        "total_steps": start.horizon.total_steps,
        "resumed_from": None if start.parent is None else start.parent.name,
        "provenance": dict(provenance),
    }
