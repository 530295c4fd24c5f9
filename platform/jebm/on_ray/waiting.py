"""Log when something waits for room in the cluster, and for what."""

import logging
import time
from collections.abc import Callable

import ray

__all__ = ["Waiting", "free_room"]

_LOG = logging.getLogger("jebm.on_ray")
_FIRST_WORD_SECONDS, _LATER_WORD_SECONDS = 15.0, 60.0


class Waiting:
    """Logs after 15 seconds, and then each minute, that something is still waiting."""

    def __init__(self, what: str, reason: Callable[[], str]) -> None:
        """Take what is being waited for, and a function that returns the reason at the time of logging."""
        self._what, self._reason = what, reason
        self._since, self._next = time.monotonic(), _FIRST_WORD_SECONDS

    def look(self, *, waits: bool) -> None:
        """Log if it is time to; call this at least every few seconds."""
        now = time.monotonic()
        if not waits:
            self._since, self._next = now, _FIRST_WORD_SECONDS
        elif now - self._since > self._next:
            self._next = now - self._since + _LATER_WORD_SECONDS
            _LOG.warning("waiting for %s for %.0f s; %s", self._what, now - self._since, self._reason())


def free_room() -> str:
    """Describe the cluster's free resources."""
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    kinds = [kind for kind in ("CPU", "GPU") if kind in total]
    return "free: " + ", ".join(f"{free.get(kind, 0):g} of {total[kind]:g} {kind}s" for kind in kinds)
