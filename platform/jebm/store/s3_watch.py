"""No request to S3 lasts for ever: one whose bytes drip is cut off.

A socket's timeout begins anew with every byte, so that a server which sends one a second is never too late
for it. Here a request has a limit for itself, and more time only for a good many bytes. The connection is cut
by a thread that looks at all requests of this process once in a while.
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
"""What a request must move, one way or the other, to be given its limit once more."""

_LOOK_SECONDS = 0.25


class Watch:
    """One request: how long it may go on, the socket that it uses, and whether it was cut off."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._moved, self._deadline = seconds, 0, time.monotonic() + seconds
        self.socket: socket.socket | None = None
        self.late = False

    def moved(self, size: int) -> None:
        """Note bytes that were sent or received."""
        self._moved += size
        if self._moved >= MOVED_BYTES:
            self._moved, self._deadline = 0, time.monotonic() + self._seconds

    def look(self) -> None:
        """Cut the connection if the request is too late."""
        if time.monotonic() > self._deadline:
            self.late = True
            if self.socket is not None:
                with contextlib.suppress(OSError):  # closed in the meantime
                    self.socket.shutdown(socket.SHUT_RDWR)


class _Watches:
    """The requests under way in this process, by thread: each thread waits for one at a time."""

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
        if self._process != os.getpid():  # a fork, perhaps while the watcher that is not here held the lock
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
    """Cut off the requests that this thread makes inside, once one goes on for longer than that.

    Each MOVED_BYTES begin the time anew. What is raised then is whatever the cut connection leads to; look at
    `late` for the reason.
    """
    return _watches.watched(seconds)


def moved(size: int) -> None:
    """Note bytes that the request of this thread has received; those that it sends are counted here."""
    watch = _watches.current()
    if watch is not None:
        watch.moved(size)


def watch_connections(client: BaseClient) -> None:
    """Make a client use connections that tell the watch which socket they have.

    botocore has no public way to choose the class of its connections; it takes them from here.
    """
    http: Any = client._endpoint.http_session  # type: ignore[attr-defined]
    classes = {"http": _Pool, "https": _SecurePool}
    http._pool_classes_by_scheme = classes
    http._manager.pool_classes_by_scheme = classes


class _Watched:
    """What both kinds of connection do beside sending and receiving."""

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
            # The answer came before the body was sent. A server that still waits for it would take the next
            # request for it.
            self.close()  # type: ignore[attr-defined]
        return response

    def _consume_headers(self, fp: Any) -> None:  # noqa: ANN401
        """Read to the end of a `100 Continue`; botocore's own goes on for ever if the connection ends."""
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
