"""What ranks tell each other outside the collectives: notes in the group's store.

The store lives in one process: rank 0's, or its launcher's. If that stands still, a request may never end,
its own time limit notwithstanding (torch 2.13, `TCPStore.get` and `check`): a thread of their own makes them.
"""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from datetime import timedelta
from queue import SimpleQueue
from typing import TypeVar

from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from jebm.train.heartbeat import Note

__all__ = ["Exchange"]

_ENDED = "ended"
_T = TypeVar("_T")


class Exchange:
    """The notes of a group's ranks. Used by one thread at a time; no call takes longer than `patience`."""

    def __init__(self, ranks: int, patience: float) -> None:
        """Take the number of ranks, and for how many seconds to wait for an answer of the store."""
        self._ranks, self._patience = ranks, patience
        self._board = _board(patience)
        self._requests: SimpleQueue[tuple[Future[object], Callable[[], object]]] = SimpleQueue()
        self._last: Future[object] | None = None
        self._notes: list[Note] = []
        self._heard: dict[int, tuple[int, float]] = {}
        self._answered = time.monotonic()
        self._gone = False
        self.answers = True
        """Whether the store has answered the last request."""
        self.keeper: Note | None = None
        """What rank 0 said when it was first heard."""
        threading.Thread(target=self._serve, name="exchange", daemon=True).start()

    def post(self, note: Note) -> None:
        """Tell the others; without an answer of the store, they do not hear it."""
        text = json.dumps(asdict(note))
        self._ask(lambda: self._board.set(str(note.rank), text))
        if self.keeper is None:
            self.keeper = self._ask(lambda: self._read(0))

    def end(self, note: Note) -> None:
        """Tell the others that they will hear no more of this rank."""
        note.doing = _ENDED
        self.post(note)

    def listen(self) -> list[Note]:
        """Return what those ranks that have not ended said last; older words if the store does not answer."""
        notes = self._ask(lambda: [note for rank in range(self._ranks) if (note := self._read(rank))])
        if notes is not None:
            self._notes = [note for note in notes if note.doing != _ENDED]
            for note in notes:
                if self._heard.get(note.rank, (-1, 0.0))[0] != note.beat:
                    self._heard[note.rank] = (note.beat, time.monotonic())
        return self._notes

    @property
    def unheard(self) -> list[int]:
        """The ranks that `listen` has not found a word of so far."""
        return [rank for rank in range(self._ranks) if rank not in self._heard]

    @property
    def standstill(self) -> float:
        """For how many seconds the store has not answered; 0 if it has, or its process is gone."""
        return 0.0 if self.answers or self._gone else time.monotonic() - self._answered

    def silence(self, note: Note) -> float:
        """Return for how many seconds a rank that was heard has posted nothing."""
        return time.monotonic() - self._heard[note.rank][1]

    def _read(self, rank: int) -> Note | None:
        key = str(rank)
        return Note(**json.loads(self._board.get(key))) if self._board.check([key]) else None

    def _ask(self, request: Callable[[], _T]) -> _T | None:
        """Return the answer to a request; None without one. None is made before the last one has ended."""
        self.answers = False
        if self._last is not None and not self._last.done():
            return None
        asked: Future[_T] = Future()
        self._last = asked  # type: ignore[assignment]
        self._requests.put((asked, request))  # type: ignore[arg-type]
        try:
            answer = asked.result(self._patience)
        except TimeoutError:
            return None
        except RuntimeError:
            self._gone = True
            return None
        self.answers, self._gone, self._answered = True, False, time.monotonic()
        return answer

    def _serve(self) -> None:
        while True:
            asked, request = self._requests.get()
            try:
                asked.set_result(request())
            except Exception as error:  # whoever asks judges it
                asked.set_exception(error)


def _board(patience: float) -> Store:
    """Return a connection of its own to the group's store, which another thread may use."""
    store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=10 * patience))  # later, so that a failure means it is gone
    return PrefixStore("jebm/watch", store)
