"""Files queued for a store: kept in memory and written by a thread that training never waits for.

A full, read-only or unreachable storage must not end a run because of its log. So files that cannot be
written stay here and are retried; this is logged once when it begins and once when it is over.
"""

import logging
import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from jebm.errors import StoreError
from jebm.store.protocol import EndpointError
from jebm.store.storage import LocalStore, Store

__all__ = ["Outbox"]

_LOG = logging.getLogger("jebm.train")
_REMOTE_EVERY_SECONDS = 15.0
_RETRY_SECONDS = 5.0  # in a local folder, where writes are otherwise immediate
_LAST_PATIENCE_SECONDS = 60.0  # for the last attempt; whatever remains is then lost
_FLUSH_SECONDS = 5.0  # at most, for `flush`
_MOST_WAITING_BYTES = 256 * 2**20
_MOST_WAITING_EXTRAS_BYTES = 64 * 2**20  # drop further pictures to leave room for reports


@dataclass
class _File:
    content: bytearray
    grows: bool
    stored: int | None = None
    """The store holds exactly this many leading bytes of `content`; None if unknown."""
    begun: int = 0
    """Bytes from an earlier attempt, which do not count as waiting."""

    @property
    def waiting(self) -> int:
        return len(self.content) - max(self.stored or 0, self.begun)


class Outbox:
    """Files written whole, and files that grow. Used by one thread."""

    def __init__(self, store: Store) -> None:
        """Start the thread that writes to `store`: at once to a folder, every 15 s elsewhere."""
        self._store = store
        local = isinstance(store, LocalStore)
        self._every_seconds = 0.0 if local else _REMOTE_EVERY_SECONDS
        self._retry_seconds = _RETRY_SECONDS if local else _REMOTE_EVERY_SECONDS
        # The lock guards both.
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._refused = 0
        self._lock = threading.Lock()
        self._news, self._hurry, self._end = threading.Event(), threading.Event(), threading.Event()
        self._failing = False
        self._taken_away = False  # whether a written file has vanished: others may have too
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def put(self, key: str, content: bytes, *, extra: bool = False) -> None:
        """Write a whole file; `extra` ones are dropped first if too much is waiting."""
        with self._lock:
            if self._has_room(len(content), extra=extra):
                self._files[key] = _File(bytearray(content), grows=False)
        self._news.set()

    def open(self, key: str, content: bytes, *, stored: bool) -> None:
        """Start a file that grows; `stored` means that the store holds exactly this content."""
        with self._lock:
            size = len(content)
            self._files[key] = _File(bytearray(content), True, stored=size if stored else None, begun=size)
        self._news.set()

    def append(self, key: str, content: bytes, *, extra: bool = False) -> None:
        """Append to an opened file."""
        with self._lock:
            if self._has_room(len(content), extra=extra):
                self._files[key].content += content
        self._news.set()

    def finish(self, key: str) -> None:
        """Mark a file as complete: its memory is freed once it is stored."""
        with self._lock:
            self._files[key].grows = False
        self._news.set()

    def flush(self) -> None:
        """Write what waits now, and wait for that: at most 5 s, since the storage may be away."""
        deadline = time.monotonic() + _FLUSH_SECONDS
        self._news.set()
        self._hurry.set()
        while self._left() and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        """Write what is left and stop the thread; log the files that could not be written."""
        self._end.set()
        self._news.set()
        self._hurry.set()
        self._thread.join()

    def _left(self) -> list[str]:
        """Return the files that are not written, or not in full."""
        with self._lock:
            return [key for key, file in self._files.items() if file.stored != len(file.content)]

    def _has_room(self, more: int, *, extra: bool) -> bool:
        waiting = sum(file.waiting for file in self._files.values())
        fits = waiting + more <= (_MOST_WAITING_EXTRAS_BYTES if extra else _MOST_WAITING_BYTES)
        if not fits and not self._refused:
            _LOG.warning(
                "%d MB of the journal wait to be written; some of what follows is lost", waiting >> 20
            )
        self._refused += not fits
        return fits

    # ── In the thread ───────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        pause = self._every_seconds
        while not self._end.is_set():
            self._hurry.wait(pause)
            self._hurry.clear()
            self._news.wait()
            self._news.clear()
            if self._end.is_set():
                break
            failed = not self._deliver()
            pause = self._retry_seconds if failed else self._every_seconds
            if failed:
                self._news.set()
        self._store = self._store.patient(_LAST_PATIENCE_SECONDS)
        if not self._deliver():
            _LOG.warning("%s: not or not wholly written: %s", self._store.uri, ", ".join(self._left()))

    def _deliver(self) -> bool:
        """Write all waiting files if possible; return whether none is left."""
        failure = self._pass()
        if failure is None and self._taken_away:
            with self._lock:
                for file in self._files.values():
                    file.stored = None
            failure = self._pass()
            self._taken_away = False
        if failure is not None and not self._failing:
            _LOG.warning("the journal cannot be written; training continues, retrying: %s", failure)
        if failure is None and self._failing:
            with self._lock:
                refused, self._refused = self._refused, 0
            missing = f"{refused:,} entries that there was no room for are" if refused else "nothing is"
            _LOG.warning("the journal is written again; %s missing", missing)
        self._failing = failure is not None
        return failure is None

    def _pass(self) -> Exception | None:
        """Try to write every waiting file and return the first failure."""
        failure: Exception | None = None
        with self._lock:
            keys = list(self._files)
        for key in keys:
            try:
                self._deliver_file(key)
            except Exception as error:  # any error: the log is not worth a run
                failure = failure or error
                if isinstance(error, EndpointError):  # the other files would get no answer either
                    break
        return failure

    def _deliver_file(self, key: str) -> None:
        with self._lock:
            file = self._files[key]
            start, end = file.stored, len(file.content)
            if start == end and file.grows:
                return
            rest = bytes(file.content[start or 0 :])
        if start != end and not self._appended(key, start, rest):
            with self._lock:
                content = bytes(file.content[:end])
            self._store.put(key, content)
        with self._lock:
            file.stored = end
            done = not file.grows and end == len(file.content)
            if done and self._files.get(key) is file:  # it may have been replaced meanwhile
                del self._files[key]

    def _appended(self, key: str, start: int | None, rest: bytes) -> bool:
        """Append to a file in place, for readers that follow it; return whether that is possible.

        That requires a local folder in which the file has exactly the `start` bytes written before.
        """
        store = self._store
        if start is None or not isinstance(store, LocalStore):
            return False
        try:
            with (store.folder / key).open("r+b") as file:
                self._taken_away |= file.seek(0, os.SEEK_END) < start
                if not self._taken_away:
                    file.truncate(start)  # remove what a failed attempt left
                    file.seek(start)
                    file.write(rest)
        except FileNotFoundError:
            self._taken_away = True
        except OSError as error:
            raise StoreError(f"{store.uri}/{key}: cannot write: {error.strerror or error}") from error
        return not self._taken_away
