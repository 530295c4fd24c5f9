"""Feed a run's journal to experiment trackers (W&B, MLflow): whatever they do, training does not notice.

Each tracker has a thread of its own and is told what the journal has told the storage: rows of metrics.jsonl,
pictures, run.json, pages of evaluations, and references to checkpoints. How far it has got is kept with the
run, in `<run>/trackers/<name>.json`, together with a token by which it finds its own run again. So a tracker
that is away catches up from the journal later, and a resumed run continues the same tracker run.
"""

import json
import logging
import math
import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from jebm.store.storage import Store
from jebm.train.history import RUN, rows_between
from jebm.train.trackers import About, Ending, Progress, Reference, Row, Tracker, progress_of

__all__ = ["Feed"]

_LOG = logging.getLogger("jebm.train")
_MOST_WAITING_ROWS = 2_000  # then they are read back from the journal
_BATCH_ROWS = 200
_SAVE_SECONDS = 15.0  # between records of how far it has got
_RETRY_SECONDS = (2.0, 5.0, 15.0, 30.0)
_LAST_PATIENCE_SECONDS = 15.0
_PICTURE = re.compile(r"pictures/step-(\d{8,15})\.png", re.ASCII)
_PAGE = re.compile(r"evaluations/[A-Za-z0-9][A-Za-z0-9._-]*/evaluation\.html")
_FILE_BYTES = 64 * 2**20
_SECRET = re.compile(r"//[^/@\s]*@")


class Feed:
    """Feeds one tracker. Its methods return at once; only its thread calls the tracker."""

    def __init__(self, tracker: Tracker, run: Store, about: About, from_step: int) -> None:
        """Start the thread; what the journal has up to `from_step` is sent if the tracker lacks it."""
        self._tracker, self._run, self._about = tracker, run, about
        self._key = f"trackers/{tracker.name}.json"
        self._lock, self._news, self._end = threading.Lock(), threading.Event(), threading.Event()
        # The lock guards these: what waits, and up to which step rows must be read from the journal.
        self._waiting: deque[Row] = deque()
        self._journal_until = from_step
        self._kept: Sequence[Reference] = ()
        self._files_changed = True
        # Only the thread uses these.
        self._progress = self._saved = Progress("")
        self._saved_at = 0.0
        self._sent: dict[str, str] = {}  # etags of run.json and reports
        self._opened = self._failing = self._complete = False
        self._ending: Ending = "failed"
        self._thread = threading.Thread(target=self._work, name=f"tracker {tracker.name}", daemon=True)
        self._thread.start()

    def row(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send a report. If too many wait, the oldest is read from the journal later."""
        with self._lock:
            if len(self._waiting) == _MOST_WAITING_ROWS:
                self._journal_until = self._waiting.popleft().step
            self._waiting.append(Row(step, _finite(metrics), time.time()))
        self._news.set()

    def files_changed(self) -> None:
        """Send new pictures and run.json."""
        with self._lock:
            self._files_changed = True
        self._news.set()

    def checkpoints(self, kept: Sequence[Reference]) -> None:
        """Send references to the checkpoints that there are, oldest first, unless it has them."""
        with self._lock:
            self._kept = kept
        self._news.set()

    def close(self, ending: Ending) -> None:
        """Send what is left, until nothing has moved for 15 s, and end the thread; log what is missing."""
        self._ending = ending
        self._end.set()
        self._news.set()
        before: tuple[Progress, bool] | None = None
        while self._thread.is_alive() and before != (self._progress, self._opened):
            before = (self._progress, self._opened)
            self._thread.join(_LAST_PATIENCE_SECONDS)
        if not self.complete:
            name, place = self._tracker.name, self._run.uri
            _LOG.warning("%s does not have all of this run; jebm track %s sends the rest", name, place)

    @property
    def complete(self) -> bool:
        """After `close`: whether the tracker has everything."""
        return self._complete

    # ── In the thread ───────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        attempt, deadline = 0, math.inf
        while time.monotonic() < deadline:
            self._news.wait()
            self._news.clear()
            ends = self._end.is_set()
            if self._delivered(ends=ends):
                attempt = 0
                if ends:
                    self._complete = True
                    return
                continue
            # It is away: wait, longer each time, or until the run ends; then only for the last patience.
            if ends:
                deadline = min(deadline, time.monotonic() + _LAST_PATIENCE_SECONDS)
                time.sleep(_RETRY_SECONDS[0])
            else:
                self._end.wait(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
            attempt += 1
            self._news.set()

    def _delivered(self, *, ends: bool) -> bool:
        """Send all that waits; return whether that succeeded. No error ends a run."""
        name = self._tracker.name
        try:
            self._open()
            self._send_rows()
            self._send_files()
            self._send_references()
            if ends:
                self._tracker.close(self._ending)
            self._save(now=ends)
        except Exception as error:  # a tracker may raise anything
            if not self._failing:
                text = _SECRET.sub("//***@", " ".join(f"{type(error).__name__}: {error}".split()))[:300]
                _LOG.warning("%s is away; training continues, and it catches up later: %s", name, text)
            self._failing = True
            self._opened = False  # to be asked again how far it has got: an answer may have been lost
            return False
        if self._failing:
            _LOG.info("%s has caught up", name)
        self._failing = False
        return True

    def _open(self) -> None:
        if self._opened:
            return
        if not self._progress.token:
            self._progress = progress_of(self._run, self._key)
        self._save(now=True)  # the token first: whatever happens next, the tracker run is found again
        last = self._tracker.open(self._progress.token, self._about)
        if last is not None:  # it may have more than the record says, or have lost what it had
            with self._lock:
                self._journal_until = max(self._journal_until, self._progress.step)
            self._progress = replace(self._progress, step=last)
        self._opened = True

    def _send_rows(self) -> None:
        # What did not fit, or an earlier attempt has left, is read from the journal.
        with self._lock:
            until = self._journal_until
        if self._progress.step < until:
            missing = [
                Row(step, _finite(metrics), time.time())
                for step, metrics in rows_between(self._run, self._progress.step, until)
            ]
            for start in range(0, len(missing), _BATCH_ROWS):
                self._send(missing[start : start + _BATCH_ROWS])
            self._progress = replace(self._progress, step=until)  # also if its row is missing
        while True:
            with self._lock:
                batch = [row for _, row in zip(range(_BATCH_ROWS), self._waiting, strict=False)]
            if not batch:
                return
            self._send([row for row in batch if row.step > self._progress.step])
            with self._lock:
                while self._waiting and self._waiting[0].step <= batch[-1].step:
                    self._waiting.popleft()

    def _send(self, rows: Sequence[Row]) -> None:
        if rows:
            self._tracker.rows(rows)
            self._progress = replace(self._progress, step=rows[-1].step)
            self._save()

    def _send_files(self) -> None:
        with self._lock:
            changed, self._files_changed = self._files_changed, False
        if not changed:
            return
        try:
            for info in sorted(self._run.list("pictures/"), key=lambda info: info.key):
                found = _PICTURE.fullmatch(info.key)
                step = int(found[1]) if found else -1
                if step > self._progress.picture and info.size <= _FILE_BYTES:
                    self._tracker.file(info.key, self._run.get(info.key), step)
                    self._progress = replace(self._progress, picture=step)
            record = self._run.head(RUN)
            pages = [info for info in self._run.list("evaluations/") if _PAGE.fullmatch(info.key)]
            for info in [*pages, *([record] if record is not None else [])]:
                if self._sent.get(info.key) != info.etag and info.size <= _FILE_BYTES:
                    self._tracker.file(info.key, self._run.get(info.key), self._progress.step)
                    self._sent[info.key] = info.etag
        except BaseException:
            with self._lock:
                self._files_changed = True
            raise

    def _send_references(self) -> None:
        with self._lock:
            kept = self._kept
        names = [reference.name for reference in kept]
        sent = self._progress.checkpoint
        for reference in kept[names.index(sent) + 1 :] if sent in names else kept:
            self._tracker.checkpoint(reference)
            self._progress = replace(self._progress, checkpoint=reference.name)

    def _save(self, *, now: bool = False) -> None:
        """Record the progress with the run, at most every few seconds unless `now`."""
        due = now or time.monotonic() - self._saved_at >= _SAVE_SECONDS
        if due and self._progress != self._saved:
            self._run.put(self._key, json.dumps(asdict(self._progress)).encode())
            self._saved, self._saved_at = self._progress, time.monotonic()


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
