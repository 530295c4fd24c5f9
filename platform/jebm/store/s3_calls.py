"""Make requests to S3: retried while that may help, never forever, with one kind of error."""

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from jebm.errors import StoreError
from jebm.store.s3_errors import TooSlowError, explain, transient
from jebm.store.s3_session import Connection
from jebm.store.s3_watch import MOVED_BYTES, watched

__all__ = ["Calls"]

_FIRST_WAIT_SECONDS = 0.25
_LONGEST_WAIT_SECONDS = 10.0
_LIMIT_SECONDS = 45.0  # for a request that moves less than MOVED_BYTES in that time
_RETRY_LIMIT_SECONDS = 20.0  # minimum for a retry when patience is nearly used up

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Calls:
    """How long requests to a bucket are retried, and what is called at each retry."""

    connection: Connection
    bucket: str
    patience_seconds: float
    on_retry: Callable[[], None] | None

    def __call__(
        self, what: str, place: str, call: Callable[[], _T], progress: Callable[[], int] = lambda: 0
    ) -> _T:
        """Return the call's result, retrying with growing random waits while that may help.

        Patience is in seconds, since a number of attempts says nothing about an outage: refused connections
        fail at once, silent ones take a timeout each. It starts at the first failure, and again with each
        MOVED_BYTES of `progress`. So a call ends at most patience + 45 s + 20 s after its last progress.

        Raises only StoreError, whatever the libraries below raise.
        """
        failures, deadline, seen = 0, math.inf, progress()
        while True:
            try:
                return self._attempt(what, place, call, deadline)
            except StoreError:
                raise
            except Exception as error:
                failures += 1
                if failures == 1 or progress() >= seen + MOVED_BYTES:
                    failures, seen = 1, progress()
                    deadline = time.monotonic() + self.patience_seconds
                left = deadline - time.monotonic()
                if not transient(error) or left <= 0:
                    raise explain(error, what, place, self.bucket, self.connection) from error
                longest = min(_FIRST_WAIT_SECONDS * 2 ** (failures - 1), _LONGEST_WAIT_SECONDS)
                # Random, so that a job's ranks do not all return at once; the last try is at the end.
                seconds = min(random.uniform(0, longest), left)  # noqa: S311
                _logger.info("%s: %s failed, again in %.1f s: %s", place, what, seconds, error)
                time.sleep(seconds)
                if self.on_retry is not None:
                    self.on_retry()

    def _attempt(self, what: str, place: str, call: Callable[[], _T], deadline: float) -> _T:
        """Make the call once, within its time limit."""
        left = max(deadline - time.monotonic(), _RETRY_LIMIT_SECONDS)
        with watched(min(_LIMIT_SECONDS, left)) as watch:
            self.connection.find_credentials(place)
            try:
                return call()
            except StoreError:
                raise
            except Exception as error:
                if watch.late:
                    raise TooSlowError("cut off: it gave next to nothing for too long") from error
                raise
