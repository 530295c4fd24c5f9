"""Ports for servers that a test starts: chosen now, opened seconds later."""

import contextlib
import random
import socket

# Below those that Linux hands out to outgoing connections, and above those of Ray's workers and `scripts/s3`.
PORTS = range(22_000, 32_768)
_untried = iter(random.SystemRandom().sample(PORTS, len(PORTS)))


def free_port() -> int:
    """Return a port of 127.0.0.1 at which nobody listens; no two calls return the same."""
    for port in _untried:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError(f"no port of {PORTS} is free")
