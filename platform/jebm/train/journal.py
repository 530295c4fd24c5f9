"""What rank 0 writes besides checkpoints: a line log, JSONL metrics, TensorBoard, pictures, run.json.

All files go through an `Outbox` to the run's storage: training never waits for its journal and never fails
because of it.
"""

import io
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor

from jebm.config import SHAPES_RESULT, Config, config_to_dict, leaves, role_of
from jebm.store.manifest import Manifest
from jebm.store.storage import Store
from jebm.train.board import Board
from jebm.train.heartbeat import HEARTBEAT, Heartbeat, Note
from jebm.train.history import METRICS, RUN, attempts_before, rows_before
from jebm.train.outbox import Outbox
from jebm.train.pictures import sheet
from jebm.train.tracked import feeds_of, references_to
from jebm.train.trackers import Ending
from jebm.untrusted import escaped

__all__ = ["Journal", "time_left"]

_EVENT_FILE_BYTES = 8 * 2**20  # then a new file: an object store rewrites whole files
_REASON = 500  # characters
_LOG = logging.getLogger("jebm.train")


class Journal:
    """The log of one run, continued from `step`; lines of later steps, left by a crash, are dropped."""

    def __init__(self, store: Store, config: Config, *, step: int, facts: Mapping[str, Any]) -> None:
        """Open the journal of the run `config.run.name` under `store` (the run's storage).

        Raises:
            StoreError: the store cannot be reached, or a damaged journal cannot be set aside.
        """
        self._config = config
        run = store.child(config.run.name)
        attempts, rows = attempts_before(run), rows_before(run, step)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        attempts.append({"started": now, "from_step": step, **facts})
        self._attempt = attempts[-1]
        self._hosts = {name: value for name, value in facts.items() if name == "hosts"}
        values = config_to_dict(config)
        self._record = {"run": config.run.name, "config": values, "attempts": attempts}
        self._run, self._feeds = run, feeds_of(config.run.track, values, run, step)
        self._outbox = Outbox(run)
        self._outbox.open(RUN, self._encoded_record(), stored=False)
        self._outbox.open(METRICS, rows.content, stored=rows.stored)
        self._told: list[str] = []
        self.ending: Ending = "failed"
        """How the run has ended, for the trackers."""
        self._has_events, self._board = "tensorboard" in config.run.track, Board()
        if self._has_events:
            self._begin_events(purge_step=step or None)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        reason = {} if error is None else {"reason": escaped(str(error) or type(error).__name__)[:_REASON]}
        self._attempt |= {"ended": now, "ending": self.ending, **reason}
        self._outbox.put(RUN, self._encoded_record())
        self._outbox.close()
        for feed in self._feeds:  # pictures and run.json are in the storage now
            feed.files_changed()
            feed.close(self.ending)

    def metrics(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Write one report: a log line, a line of metrics.jsonl, and TensorBoard scalars.

        The line has the seconds since 1970 (UTC), and the first of an attempt the hosts.
        """
        facts = {"step": step, "time": round(time.time(), 3), **self._hosts}
        self._hosts = {}
        row = facts | {name: _finite(value) for name, value in metrics.items()}
        self._outbox.append(METRICS, json.dumps(row).encode() + b"\n")
        for feed in self._feeds:
            feed.row(step, metrics)
        self._add_events(self._board.scalars(metrics, step))
        left = time_left(self._config, step, total_steps, metrics["time/seconds_per_step"])
        _LOG.info("%s", _line(step, total_steps, metrics, left))

    def heartbeat(self, ranks: Sequence[Note], hung: bool) -> None:
        """Write what the ranks do; safe in any thread."""
        self._outbox.put(HEARTBEAT, Heartbeat.encoded(ranks, hung=hung), extra=True)

    def pictures(self, step: int, grids: dict[str, Tensor]) -> None:
        """Write one sheet of pictures (PNG), and each grid to TensorBoard."""
        png = io.BytesIO()
        sheet(grids).save(png, "PNG")
        self._outbox.put(f"pictures/step-{step:08d}.png", png.getvalue(), extra=True)
        for feed in self._feeds:
            feed.files_changed()
        named = {caption.replace(":", " -"): picture for caption, picture in grids.items()}
        self._add_events(self._board.pictures(named, step), extra=True)

    def checkpoints(self, kept: Sequence[Manifest]) -> None:
        """Tell the trackers which checkpoints there are, oldest first."""
        names = [manifest.name for manifest in kept]
        if self._feeds and names != self._told:
            references, self._told = references_to(self._run, kept), names
            for feed in self._feeds:
                feed.checkpoints(references)

    def flush(self) -> None:
        """Wait until the storage has what was reported so far, for a few seconds at most."""
        self._outbox.flush()

    def hyperparameters(self, metrics: Mapping[str, float]) -> None:
        """Write settings that affect the result, and the final metrics, for TensorBoard's HPARAMS page."""
        values = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in leaves(config_to_dict(self._config))
            if role_of(key) in SHAPES_RESULT
        }
        final = {f"final/{name}": value for name, value in metrics.items()}
        self._add_events(self._board.hyperparameters(values, final))

    def ended_early(self, step: int) -> None:
        """Record that early stopping has ended the run: its total is this step, not what was planned."""
        self._attempt |= {"planned_steps": self._attempt["total_steps"], "total_steps": step}
        self._outbox.put(RUN, self._encoded_record())

    def _encoded_record(self) -> bytes:
        return json.dumps(self._record, indent=2).encode() + b"\n"

    def _begin_events(self, purge_step: int | None = None) -> None:
        self._board = Board()
        beginning = self._board.beginning(purge_step)
        self._event_bytes = len(beginning)
        self._outbox.open(self._events, beginning, stored=False)

    def _add_events(self, records: bytes, *, extra: bool = False) -> None:
        if not self._has_events:
            return
        if self._event_bytes > _EVENT_FILE_BYTES:
            self._outbox.finish(self._events)
            self._begin_events()
        self._event_bytes += len(records)
        self._outbox.append(self._events, records, extra=extra)

    @property
    def _events(self) -> str:
        return f"tensorboard/{self._config.run.name}/{self._board.file}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _line(step: int, total_steps: int, metrics: Mapping[str, float], left: str) -> str:
    rates = " ".join(f"{value:.2f}" for name, value in metrics.items() if name.startswith("rate/"))
    measured = "".join(
        f"  {name.removeprefix('evaluation/')} {value:.4g}"
        for name, value in metrics.items()
        if name.startswith("evaluation/")
    )
    nets = f"distortion {metrics['distortion']:.2f}  rates [{rates}]  " if "distortion" in metrics else ""
    return (
        f"step {step}/{total_steps}  {nets}"
        f"f posterior {metrics['f_posterior']:+.3f} prior {metrics['f_prior']:+.3f}  "
        f"{metrics['time/images_per_second']:.0f} images/s  "
        f"chain {metrics['time/chain_share']:.0%}  data {metrics['time/data_share']:.0%}  "
        f"{left}{measured}"
    )


def time_left(config: Config, step: int, total_steps: int, seconds_per_step: float) -> str:
    """Return the remaining time at the speed since the last report, such as `12:05 left`.

    Steps take longer once the energy joins (`train.gaussian_share`). Their speed is unknown until a whole
    report period lies after that step; until then the result is a lower bound, and says so.
    """
    left = int((total_steps - step) * seconds_per_step)
    text = f"{left // 60}:{left % 60:02d} left"
    joins = config.energy_joins_at(total_steps) or 0
    known_from = joins + config.train.report_every_steps if joins else 0
    if step >= min(known_from, total_steps):
        return text
    return f"more than {text}" + (f" (the energy joins at step {joins})" if step < joins else "")
