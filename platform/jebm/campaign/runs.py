"""Train and measure all trials, in turn or in parallel; finished work is not repeated."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeAlias

import jebm
from jebm.campaign.rows import Row, Rows, T
from jebm.campaign.trials import Trial
from jebm.cli import STOPPED, announce, tell
from jebm.errors import CheckpointError, DivergedError, JebmError
from jebm.evaluate.comparison import REFERENCE
from jebm.evaluate.quick import quick_look
from jebm.parser import config_to_yaml
from jebm.store.storage import open_store
from jebm.train.lease import Lease
from jebm.train.loop import Result, fit
from jebm.train.provenance import provenance
from jebm.train.runtime import STOPPING, first_signal, process_runtime

__all__ = ["rows_of", "train_here"]

Trainer: TypeAlias = Callable[[Trial, threading.Event], Result]
"""Trains a trial until its run ends or the event is set."""


def rows_of(
    trials: Sequence[T], rows: Rows[T], *, parallel: int = 1, train: Trainer | None = None
) -> dict[str, Row] | None:
    """Return key -> row of all trials, in order; None if SIGTERM or SIGINT stopped them.

    `train` trains one trial, by default `train_here`; with `parallel` above 1, that many processes on this
    machine train first. A trial that others start from comes before them. Call from the main thread.

    Raises:
        JebmError: a training failed, unless it diverged: that is a result, an empty row.
    """
    asked, processes = threading.Event(), _Processes()

    def stop(received: signal.Signals) -> None:
        asked.set()
        announce(f"{received.name}: {STOPPING}")
        processes.stop()

    found: dict[str, Row] = {}
    with first_signal(stop):
        # Train in parallel first; then measure, and train what is still missing, in order.
        if parallel > 1:
            _train_side_by_side(trials, rows, processes, parallel)
        for trial in trials:
            row = rows.kept(trial)
            if row is None and not asked.is_set():
                row = _new_row(trial, rows, found, asked, train or train_here)
            if row is None:
                return None
            found[trial.key] = row
    return found


def train_here(trial: Trial, asked: threading.Event) -> Result:
    """Train in this process until the run ends, or `asked` is set."""
    with process_runtime(trial.config) as runtime, Lease(open_store(trial.uri)):
        return fit(
            trial.config,
            runtime,
            provenance=provenance(trial.config),
            should_stop=asked.is_set,
            measure=quick_look(trial.config),
        )


def _new_row(
    trial: T, rows: Rows[T], found: dict[str, Row], asked: threading.Event, train: Trainer
) -> Row | None:
    """Return the row of a run, trained if needed and measured; None if a stop was requested."""
    if not trial.finished():
        if trial.origin and not found[trial.origin]:
            tell(f"{trial.name} has nothing to begin with: the {REFERENCE} run diverged")
            return {}
        tell(f"training {trial.name}: {trial.total_steps:,} steps")
        try:
            result = train(trial, asked)
        except DivergedError as error:
            return _diverged(trial, rows, error)
        if result.status == "stopped":
            asked.set()
            return None
    return rows.measure(trial)


def _diverged(trial: T, rows: Rows[T], error: DivergedError) -> Row:
    """Record that a run diverged: this is a result, and would be the same next time."""
    tell(f"{trial.name} diverged: {error}")
    rows.keep(trial, {})
    return {}


def _train_side_by_side(trials: Sequence[T], rows: Rows[T], processes: "_Processes", count: int) -> None:
    """Train unfinished runs, `count` at a time; runs come before those that start from them."""
    waiting = [trial for trial in trials if rows.kept(trial) is None and not trial.finished()]
    for wave in ([t for t in waiting if not t.origin], [t for t in waiting if t.origin]):
        with ThreadPoolExecutor(count) as pool:
            futures = {pool.submit(processes.train, trial): trial for trial in wave}
            for future in as_completed(futures):
                trial = futures[future]
                try:
                    ended = future.result()
                except DivergedError as error:
                    _diverged(trial, rows, error)
                except JebmError:
                    processes.stop()
                    raise
                else:
                    tell(f"{'trained' if ended else 'stopped'} {trial.name}")


class _Processes:
    """Runs of `jebm train`, one process each; a stop request reaches each of them once."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.RLock()  # a signal's handler may call `stop` within it
        self._stopping = threading.Event()

    def train(self, trial: Trial) -> bool:
        """Train one run in a separate process; return whether it ended; raises its error."""
        package = str(Path(jebm.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = str(trial.config.cluster.cpus_per_worker)
        with tempfile.TemporaryDirectory(prefix="jebm-") as scratch:
            path = Path(scratch) / "config.yaml"
            path.write_text(config_to_yaml(trial.config), encoding="utf-8")
            with self._lock:
                if self._stopping.is_set():
                    return False
                # In its own session, so that Ctrl-C reaches it only once, through `stop`.
                process = subprocess.Popen(  # noqa: S603
                    [sys.executable, "-P", "-m", "jebm", "train", "--config", str(path)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads},
                    start_new_session=True,
                )
                self._running.add(process)
            _, complaint = process.communicate()
            with self._lock:
                self._running.remove(process)
        # Before its first step a run does not listen, and the request ends it.
        unheard = self._stopping.is_set() and process.returncode == -signal.SIGTERM
        if process.returncode in (0, STOPPED) or unheard:  # stopped: `rows_of` sees that it is unfinished
            return process.returncode == 0
        line = (complaint.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        kind, _, message = line.partition(": ")
        if kind == "diverged":
            raise DivergedError(message)
        raise CheckpointError(f"run {trial.name}: {message or line}")

    def stop(self) -> None:
        """Ask all runs to stop after their current step, and start no more."""
        with self._lock:  # none is just being started
            if not self._stopping.is_set():
                self._stopping.set()
                for process in self._running:
                    process.send_signal(signal.SIGTERM)
