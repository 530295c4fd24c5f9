"""Copies what a process logs into the run's storage, so that it can be read when the machine is gone.

Each process of a run has a file of its own, `logs/<start>-<who>.log`. A thread writes it: training never
waits for its log, and never fails because of it.
"""

import logging
import os
import re
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from types import TracebackType

from jebm.store.storage import Store
from jebm.untrusted import escaped

__all__ = ["LOGS", "KeptLog", "without_secrets"]

LOGS = "logs/"

_FILE_BYTES = 512 * 2**10  # of one process: the newest
_ALL_BYTES = 64 * 2**20  # of a run: a start deletes the oldest of others
_ONE_START_SECONDS = 900.0  # within which all processes of a start begin
_EVERY_SECONDS = 30.0  # at once after an error
_GATHER_SECONDS = 1.0
_LAST_SECONDS = 10.0  # for the last write
_SECRET = re.compile(r"(SECRET|TOKEN|PASSWORD|API_KEY|CREDENTIAL)(?!.*_(PATH|FILE|URI)$)")
_SHORTEST_SECRET = 8  # a shorter value would blacken ordinary words
_IN_URL = re.compile(r"(\w://)[^\s/@]+@")
_LOG = logging.getLogger("jebm.train")


class KeptLog(logging.Handler):
    """Keeps what this process logs within a `with` block, and the error that ends it, in the run's storage.

    Lines have the time (UTC) and the level, are escaped, and hold no secret of the environment. Nothing is
    written for a process that logs nothing.
    """

    def __init__(self, run: Store, who: str, source: Callable[[], bytes | None] = lambda: None) -> None:
        """Take the run's store and who logs, such as rank-00003.

        `source` returns the end of a file that has more than this process logs, such as a job's output; it is
        kept instead of the log. None: there is no such file.
        """
        super().__init__()
        self._run, self._source = run, source
        began = time.time()
        self._key = f"{_key(began)}-{who}.log"
        self._earlier = _key(began - _ONE_START_SECONDS)
        self._lines: deque[str] = deque()
        self._size = self._dropped = 0
        self._error = ""
        self._written = b""
        self._secrets = _secrets()
        self._guard = threading.Lock()
        self._hurry, self._end = threading.Event(), threading.Event()
        self._within = threading.local()
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(name)s: %(message)s")
        formatter.converter = time.gmtime
        self.setFormatter(formatter)

    def __enter__(self) -> "KeptLog":
        logging.getLogger().addHandler(self)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        logging.getLogger().removeHandler(self)
        if error is not None:
            self._error = "".join(traceback.format_exception(error)).rstrip()
        self._end.set()
        self._hurry.set()
        self._thread.join(_LAST_SECONDS)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record; one of an error is written at once."""
        if getattr(self._within, "writing", False):  # what the storage says while it takes this log
            return
        last = logging.lastResort
        if last is not None and logging.getLogger().handlers == [self] and record.levelno >= last.level:
            last.handle(record)  # nobody has set up logging: without this handler it would have been printed
        try:
            lines = [escaped(line) for line in self.format(record).split("\n")]
        except Exception:  # wrong arguments of whoever logs
            self.handleError(record)
            return
        with self._guard:
            self._lines.extend(lines)
            self._size += sum(len(line) + 1 for line in lines)
            while self._size > _FILE_BYTES:
                self._size -= len(self._lines.popleft()) + 1
                self._dropped += 1
        if record.levelno >= logging.ERROR:
            self._hurry.set()

    # ── In the thread ───────────────────────────────────────────────────────────────────────────────────

    def _write_all(self) -> None:
        self._within.writing = True
        ended = False
        while not ended:
            self._hurry.wait(_EVERY_SECONDS)
            self._hurry.clear()
            self._end.wait(_GATHER_SECONDS)  # an error has many lines
            ended = self._end.is_set()
            try:
                begins = not self._written
                if self._write() and begins:
                    self._make_room()
            except Exception as error:  # the log is not worth a run, and the next turn tries again
                _LOG.debug("the log is not written: %s", error)

    def _write(self) -> bool:
        """Write what there is, if anything is new; return whether something was written."""
        output = self._source()
        with self._guard:
            lines = [f"({self._dropped:,} earlier lines are not kept)"] if self._dropped else []
            lines += self._lines
        if output is not None:
            lines = [escaped(line) for line in output.decode("utf-8", "replace").splitlines()]
        lines += [escaped(line) for line in self._error.splitlines()]
        text = "".join(without_secrets(line, self._secrets) + "\n" for line in lines)
        content = text.encode("utf-8", "backslashreplace")
        if content == self._written:
            return False
        self._run.put(self._key, content)
        self._written = content
        return True

    def _make_room(self) -> None:
        """Delete the oldest files of earlier starts, as far as all together are too large."""
        infos = sorted(self._run.list(LOGS), key=lambda info: info.key)
        excess = sum(info.size for info in infos) - _ALL_BYTES
        old = []
        for info in infos:
            if excess > 0 and info.key < self._earlier:
                old.append(info.key)
                excess -= info.size
        if old:
            self._run.delete(old)


def _key(seconds: float) -> str:
    return LOGS + time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))


def without_secrets(text: str, secrets: tuple[str, ...]) -> str:
    """Return the text with `[secret]` for each secret and for names and passwords in URLs."""
    for secret in secrets:
        text = text.replace(secret, "[secret]")
    return _IN_URL.sub(r"\1[secret]@", text)


def _secrets() -> tuple[str, ...]:
    """Return the lines of this process's environment that are secrets by their names, the longest first."""
    named = (value for name, value in os.environ.items() if _SECRET.search(name.upper()))
    lines = {escaped(line.strip()) for value in named for line in value.splitlines()}
    return tuple(sorted((one for one in lines if len(one) >= _SHORTEST_SECRET), key=len, reverse=True))
