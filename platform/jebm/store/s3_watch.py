"""Time limits for requests to S3: one that trickles is cut off.

A socket's timeout restarts with every byte, so a server that sends one byte a second never exceeds it. Here
each request has a limit of its own and earns more time only by moving many bytes. A thread that checks all
requests of this process periodically cuts late connections.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)
from botocore.client import BaseClient

__all__ = ["MOVED_BYTES", "Watch", "moved", "watch_connections", "watched"]

MOVED_BYTES = 1 << 17
"""Bytes that a request must send or receive to restart its time limit."""

_LOOK_SECONDS = 0.25


class Watch:
    """One request: how long it may take, its socket, and whether it was cut off."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._moved, self._deadline = seconds, 0, time.monotonic() + seconds
        self.socket: socket.socket | None = None
        self.late = False

    def moved(self, size: int) -> None:
        """Count bytes sent or received."""
        self._moved += size
        if self._moved >= MOVED_BYTES:
            self._moved, self._deadline = 0, time.monotonic() + self._seconds

    def look(self) -> None:
        """Cut the connection if the request has exceeded its limit."""
        if time.monotonic() > self._deadline:
            self.late = True
            if self.socket is not None:
                with contextlib.suppress(OSError):  # closed meanwhile
                    self.socket.shutdown(socket.SHUT_RDWR)


class _Watches:
    """The requests in flight in this process, by thread: each thread waits for one at a time."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._by_thread: dict[int, Watch] = {}
        self._watcher: threading.Thread | None = None

    def current(self) -> Watch | None:
        return self._by_thread.get(threading.get_ident())

    @contextlib.contextmanager
    def watched(self, seconds: float) -> Iterator[Watch]:
        if self._process != os.getpid():  # forked, perhaps while the parent's watcher held the lock
            self._begin()
        thread, watch = threading.get_ident(), Watch(seconds)
        with self._lock:
            outer = self._by_thread.get(thread)
            self._by_thread[thread] = watch
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._look, name="jebm-s3-watch", daemon=True)
                self._watcher.start()
        try:
            yield watch
        finally:
            with self._lock:
                if outer is None:
                    del self._by_thread[thread]
                else:
                    self._by_thread[thread] = outer

    def _look(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            with self._lock:
                for watch in self._by_thread.values():
                    watch.look()


_watches = _Watches()


def watched(seconds: float) -> contextlib.AbstractContextManager[Watch]:
    """Cut off any request made inside by this thread that exceeds this many seconds.

    Each MOVED_BYTES restart the time. The error raised is whatever a cut connection causes; `late` gives the
    reason.
    """
    return _watches.watched(seconds)


def moved(size: int) -> None:
    """Count bytes that this thread's request received; bytes sent are counted in this module."""
    watch = _watches.current()
    if watch is not None:
        watch.moved(size)


def watch_connections(client: BaseClient) -> None:
    """Make a client use connections that report their socket to the watch.

    botocore has no public way to set its connection classes; it reads them from here.
    """
    http: Any = client._endpoint.http_session  # type: ignore[attr-defined]
    classes = {"http": _Pool, "https": _SecurePool}
    http._pool_classes_by_scheme = classes
    http._manager.pool_classes_by_scheme = classes


class _Watched:
    """What both kinds of connection add to sending and receiving."""

    sock: socket.socket | None

    def send(self, data: Any) -> None:  # noqa: ANN401  (http.client takes several kinds)
        watch = _watches.current()
        if watch is not None:
            if self.sock is None:
                self.connect()  # type: ignore[attr-defined]
            watch.socket = self.sock
        super().send(data)  # type: ignore[misc]
        if watch is not None:
            watch.moved(len(data))

    def getresponse(self) -> Any:  # noqa: ANN401
        early = self._response_received  # type: ignore[attr-defined]
        response = super().getresponse()  # type: ignore[misc]
        if early:
            # The response came before the body was sent. A server still waiting for the body would mistake
            # the next request for it.
            self.close()  # type: ignore[attr-defined]
        return response

    def _consume_headers(self, fp: Any) -> None:  # noqa: ANN401
        """Read to the end of a `100 Continue`; botocore's own loops forever if the connection ends."""
        while (line := fp.readline()) != b"\r\n":
            if not line:
                raise ConnectionResetError("the connection ended in a 100 Continue")


class _Connection(_Watched, AWSHTTPConnection):  # type: ignore[misc]
    pass


class _SecureConnection(_Watched, AWSHTTPSConnection):  # type: ignore[misc]
    pass


class _Pool(AWSHTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(AWSHTTPSConnectionPool):
    ConnectionCls = _SecureConnection
