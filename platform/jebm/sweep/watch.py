"""A sweep's page, served on loopback while trials run; the browser asks for it again and again."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from jebm.errors import JebmError
from jebm.report.findings import Findings, duration
from jebm.report.page import page
from jebm.store.storage import Store
from jebm.sweep.findings import sweep_findings
from jebm.sweep.record import RECORD
from jebm.sweep.results import Sweep, Trial, read_sweep
from jebm.sweep.study_log import LOG

__all__ = ["Watch", "progress", "seconds_left"]

_LOG = logging.getLogger("jebm.sweep")
_REFRESH_SECONDS = 20
_CLIENT_SECONDS = 10.0  # for a browser to send its request


class Watch:
    """A server of one page on a free port of 127.0.0.1, made from the sweep's store when it is asked for.

    It serves no file, and answers only `GET /` under this machine's own name, so that no other site's page
    can read it. While the sweep cannot be read, the page says why.
    """

    def __init__(self, folder: Store, is_running: Callable[[], bool]) -> None:
        """Listen; `is_running` says whether a job runs the sweep.

        Raises:
            CheckpointError: there is no sweep in `folder`, or it cannot be read.
            StoreError: the store cannot be reached.
        """
        read_sweep(folder)
        self._folder, self._is_running = folder, is_running
        self._one = threading.Lock()  # matplotlib draws in one thread at a time
        self._state: tuple[object, ...] = ()
        self._page, self._made = b"", 0.0
        watch = self

        class Handler(BaseHTTPRequestHandler):
            timeout = _CLIENT_SECONDS

            def do_GET(self) -> None:
                own = self.headers.get("Host", "") in (
                    f"{h}:{watch.port}" for h in ("127.0.0.1", "localhost")
                )
                if not own or self.path != "/":
                    self.send_error(HTTPStatus.NOT_FOUND if own else HTTPStatus.FORBIDDEN)
                    return
                status, content = watch.answer()
                self.send_response(status)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (its name there)
                """Log nothing."""

        self._server = _Server(("127.0.0.1", 0), Handler)

    @property
    def port(self) -> int:
        """The port."""
        return self._server.server_port

    def serve(self) -> None:
        """Serve until interrupted."""
        with self._server:
            self._server.serve_forever()

    def answer(self) -> tuple[HTTPStatus, bytes]:
        """Return the status and the page as it is now, made anew at most twice per refresh."""
        with self._one:
            try:
                if time.monotonic() - self._made > _REFRESH_SECONDS / 2:
                    self._make()
            except JebmError as error:
                found = Findings("Sweep", (f"It cannot be read now: {error}",), {}, {}, ())
                text = page(found, _REFRESH_SECONDS)
                return HTTPStatus.SERVICE_UNAVAILABLE, text.encode("utf-8", "backslashreplace")
            return HTTPStatus.OK, self._page

    def _make(self) -> None:
        running = self._is_running()
        state = (running, *(self._folder.head(key) for key in (RECORD, LOG)))
        if state != self._state:
            sweep = read_sweep(self._folder)
            findings = sweep_findings(sweep, self._folder)
            findings = replace(findings, lead=(progress(sweep, running=running), *findings.lead))
            self._page = page(findings, _REFRESH_SECONDS).encode("utf-8", "backslashreplace")
            self._state = state
        self._made = time.monotonic()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # Ctrl-C waits for no page

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a browser that has gone; anything else is a fault, and is logged."""
        error = sys.exception()
        if not isinstance(error, OSError):
            _LOG.error("the page could not be sent", exc_info=error)


def progress(sweep: Sweep, *, running: bool) -> str:
    """Return how far a sweep is, in one sentence, and if a job runs it, about how long it still takes."""
    training, waiting = _training(sweep), _waiting(sweep)
    ended = ", ".join(
        f"{len(found)} {status}"
        for status in ("finished", "pruned", "diverged")
        if (found := sweep.having(status))
    )
    done = len(sweep.judged)
    parts = [
        f"{done} of {done + len(training) + waiting} trials done" + (f" ({ended})" if ended else ""),
        f"{len(training)} running",
        f"{waiting} waiting",
        *([f"{len(failed)} failed"] if (failed := sweep.having("failed")) else []),
    ]
    left = seconds_left(sweep)
    if not training and not waiting:
        end = "Nothing is left to run."
    elif not running:
        end = "No job runs it now; the command that began it resumes it."
    else:
        end = (
            "The time left is unknown until a trial has ended."
            if left is None
            else f"About {duration(left)} left."
        )
    return f"Progress: {', '.join(parts)}. {end}"


def seconds_left(sweep: Sweep) -> float | None:
    """Return the time that the rest of a sweep takes if its trials go on as those that have ended.

    As many trials at a time as now. None if no trial has ended, or none runs although some wait.
    """
    training, waiting = _training(sweep), _waiting(sweep)
    if not training and not waiting:
        return 0.0
    times = [trial.seconds for trial in sweep.judged if not trial.same_as]
    if not times or not training:
        return None
    mean = sum(times) / len(times)
    remaining = [max(0.0, mean - trial.seconds) for trial in training]
    return max(*remaining, (sum(remaining) + waiting * mean) / len(training))


def _training(sweep: Sweep) -> list[Trial]:
    """Return the trials that have begun and not ended."""
    return [trial for trial in sweep.having("running") if trial.attempts]


def _waiting(sweep: Sweep) -> int:
    """Return how many trials have not begun, including those that will be run in place of failed ones."""
    asked = sweep.search.get("trials")
    wanted = asked if isinstance(asked, int) else len(sweep.trials)
    return max(0, wanted - len(sweep.judged) - len(_training(sweep)))
