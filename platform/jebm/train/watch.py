"""Watches every rank's progress: a run that hangs says where, and ends, so that it can be restarted.

Ranks wait for each other in every step. If one stands still, all do, and say nothing until the process
group's timeout. So in each rank a thread posts what the rank is doing, and compares if a step takes too long.
A thread that stops while it holds the GIL also stops this one; then the timer of faulthandler, which is C,
prints the stacks and ends the process.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType

from jebm.train.exchange import Exchange
from jebm.train.heartbeat import Note
from jebm.train.runtime import Runtime

__all__ = ["HUNG", "Watch"]

HUNG = 75
"""Exit code of a process that ends because its run hangs."""

_LOG = logging.getLogger("jebm.train")
_BEAT_SECONDS = 5.0
_FACTOR = 10.0  # a step may take so many times as long as the slowest before
_FIRST = 5.0  # before any step has ended, so many times the limit
_STOPPING_SECONDS = 30.0  # the limit once a stop was requested
_PUBLISH_BEATS = 3
_STORE_SECONDS = 10.0  # for an answer of the group's store
_NAMED = 8  # ranks in one line


class Watch:
    """Watches this rank's steps against those of the others, within a `with` block; all ranks have one.

    A step that takes longer than `seconds`, and ten times the slowest before it, is a hang, unless some rank
    says that it is busy. The log then names the ranks that hold the others up, with this rank's stack. A
    process that something restarts (Ray, torchrun) ends with the code `HUNG`; any other only says so.
    """

    def __init__(self, runtime: Runtime, seconds: float, should_stop: Callable[[], bool]) -> None:
        """Take the limit in seconds (0: watch nothing), and what tells whether the run is to stop."""
        self._runtime, self._seconds, self._should_stop = runtime, seconds, should_stop
        self._note = Note(runtime.rank, socket.gethostname(), os.getpid())
        self.publish: Callable[[Sequence[Note], bool], None] = lambda ranks, hung: None
        """Takes what all ranks do, and whether they hang; called on rank 0 every 15 s, in another thread."""
        self._thread = threading.get_ident()
        self._began = self._since = self._excused = time.monotonic()
        self._slowest, self._counts_from, self._said = 0.0, 0, 0.0
        self._beat = min(_BEAT_SECONDS, seconds / 8 or _BEAT_SECONDS)
        self._others: Exchange | None = None
        if runtime.world_size > 1:
            self._others = Exchange(runtime.world_size, min(_STORE_SECONDS, 2 * self._beat))
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._watching.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._watching.join(timeout=_STORE_SECONDS)
        if self._others is not None:
            self._others.end(self._note)

    def at(self, step: int, doing: str) -> None:
        """Record that this rank begins something within step `step`."""
        now = time.monotonic()
        if step != self._note.step:
            if self._note.step >= self._counts_from:
                self._slowest = max(self._slowest, now - self._began)
            self._began = now
        self._note.step, self._note.doing, self._note.busy, self._since = step, doing, False, now

    @contextmanager
    def busy(self, what: str, *, long: bool = True) -> Iterator[None]:
        """Let the body take as long as it needs: an evaluation, a save.

        Every rank says so, also one for which there is nothing to do: in the next step it waits for those
        that have. So, if it may take `long`, neither step is a measure of how long steps take.
        """
        before = self._note.doing
        if long:
            self._counts_from = self._note.step + 2
        self.at(self._note.step, what)
        self._note.busy = True
        try:
            yield
        finally:
            self.at(self._note.step, before)

    def _watch(self) -> None:
        try:
            if self._others is not None:
                self._others.post(self._note)  # a rank that dies at once has a name, too
            while not self._over.wait(self._beat):
                self._note.beat += 1
                if self._others is not None:
                    self._others.post(self._note)
                if self._runtime.is_main and self._note.beat % _PUBLISH_BEATS == 1:
                    self.publish(self._listen() or [self._note], self._said > 0)
                if self._seconds > 0:
                    self._look()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        """Find out whether this rank stands still for too long; if so, tell, and end a supervised process."""
        if self._runtime.supervised:
            with suppress(OSError):  # no stderr
                # Late enough for the others to find out first who holds them up.
                patience = 3.0 if self._others is not None else 1.5
                faulthandler.dump_traceback_later(patience * self._seconds, exit=True, file=2)
        since, now, limit = self._since, time.monotonic(), self._limit()
        still = now - max(since, self._excused)
        if still < self._said:
            self._said = 0.0  # it moves again
        if still < limit / 2:
            return
        notes = self._listen()
        if self._may_wait(notes):
            self._excused = now
        elif still > max(limit, 2 * self._said):
            self._tell(still, notes)
            if self._runtime.is_main:
                self.publish(notes or [self._note], True)
            # The others have something to tell, too; and the step may still end.
            stays = not self._over.wait(3 * self._beat) and since == self._since
            if self._runtime.supervised and stays and not self._may_wait(self._listen()):
                os._exit(HUNG)

    def _limit(self) -> float:
        """Return for how many seconds this rank may stand still now."""
        if not self._slowest:
            return _FIRST * self._seconds
        limit = max(self._seconds, _FACTOR * self._slowest)
        return min(limit, max(_STOPPING_SECONDS, 2 * self._slowest)) if self._should_stop() else limit

    def _listen(self) -> list[Note]:
        return self._others.listen() if self._others is not None else []

    def _silence(self, note: Note) -> float:
        return self._others.silence(note) if self._others is not None else 0.0

    def _silent(self, note: Note) -> bool:
        return self._silence(note) > max(self._seconds / 4, 4 * self._beat)

    def _may_wait(self, notes: list[Note]) -> bool:
        """Return whether this rank, or one that it waits for, is busy, and none has vanished."""
        if self._others is not None and self._others.standstill > self._seconds:
            return False
        if any(self._silence(note) > self._seconds for note in notes):
            return False
        return self._note.busy or any(note.busy and not self._silent(note) for note in notes)

    def _tell(self, still: float, notes: list[Note]) -> None:
        """Log who holds the others up, as far as this rank can tell, and where this rank stands."""
        self._said = still
        _LOG.error(
            "no progress at step %d (%s) for %.0f s, %s: %s; %s stands here:",
            self._note.step,
            self._note.doing,
            still,
            f"where steps took up to {self._slowest:.1f} s" if self._slowest else "before any step has ended",
            self._reason(notes),
            self._note,
        )
        for frame in traceback.extract_stack(sys._current_frames()[self._thread]):
            _LOG.error("  %s:%s in %s: %s", frame.filename, frame.lineno, frame.name, frame.line)

    def _reason(self, notes: list[Note]) -> str:
        if self._others is not None and not self._others.answers:
            keeper = self._others.keeper or "rank 0"
            return f"{keeper} or its launcher, which keeps the group's store, no longer answers"
        if silent := [note for note in notes if self._silent(note)]:
            return f"{_names(silent)} no longer answers"
        if self._others is not None and (unheard := self._others.unheard):
            return f"no word has come from rank {', '.join(map(str, unheard[:_NAMED]))}"
        last = min((note.step, note.doing != "images") for note in notes) if notes else None
        behind = [note for note in notes if (note.step, note.doing != "images") == last]
        if 0 < len(behind) < len(notes):
            return f"{_names(behind)} is behind the others, at {behind[0].doing} of step {behind[0].step}"
        if notes:
            return "all ranks are within it; the one that does not wait for the others holds them up"
        return "the stack below says where"


def _names(notes: list[Note]) -> str:
    more = f" and {len(notes) - _NAMED} more" if len(notes) > _NAMED else ""
    return ", ".join(map(str, notes[:_NAMED])) + more
