import http.client
import socket
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from jebm.store.storage import Store, open_store


@pytest.fixture(params=["s3", "local", "memory"])
def store(request, tmp_path) -> Store:
    """One empty store of each kind."""
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_uri"))
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    return open_store(f"memory://{uuid.uuid4().hex}/prefix")


Refusal = tuple[int, str, str]  # status, code and message


class Proxy(ThreadingHTTPServer):
    """Stands before the real server and does to a request what networks and busy servers do.

    `fault(method, path)` says what, one of
      busy     503 SlowDown
      expired  what AWS says to a session token that is too old
      garble   a page in place of the answer
      cut      half of the answer, then the end
      reset    half of the body, or of the answer where there is none, then the connection is reset
      lose     the server does it, the answer never comes
      flip     one bit of the body, or of the answer where there is none
      stall    silence in place of the server
      hush     the server does it, which sets `hushed`, then silence
      drip     the server does it, then its answer comes a byte a second
      drop     the server does it, then of its body comes a byte a second
      pace     the server does it, then 128 KiB of its body come every 0.3 s
    or the status, code and message of an error, or None. `habit` says the same of a request whose headers it
    sees, as a server of another kind would. What the server answers passes through `rewrite(path, body)`.
    Nothing passes while `gate` is not set.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.fault: Callable[[str, str], str | Refusal | None] = lambda _method, _path: None
        self.habit: Callable[[str, str, dict[str, str]], str | Refusal | None] = lambda *_: None
        self.rewrite: Callable[[str, bytes], bytes] = lambda _path, body: body
        self.gate = threading.Event()
        self.gate.set()
        self.over = threading.Event()
        self.hushed = threading.Event()
        self.seen: list[str] = []
        self.headers: list[dict[str, str]] = []  # of each request in `seen`, names in small letters

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that is gone is no news here."""


CANNED = {
    "busy": (503, b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>later</Message></Error>"),
    "expired": (
        400,
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>ExpiredToken</Code>'
        b"<Message>The provided token has expired.</Message><Token-0>IQoJb3JpZ2luX2VjE</Token-0>"
        b"<RequestId>4442587FB7D0A2F9</RequestId>"
        b"<HostId>c2F5cyBub3RoaW5n</HostId></Error>",
    ),
    "garble": (200, b"<html><body>Please sign in to the network</body></html>"),
}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments) -> None:
        pass

    def _forward(self) -> None:
        self.close_connection = True
        size = int(self.headers.get("Content-Length", 0))
        self.server.gate.wait()
        self.server.seen.append(f"{self.command} {self.path}")
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        fault = self.server.fault(self.command, self.path)
        fault = fault or self.server.habit(self.command, self.path, self.server.headers[-1])
        body = self.rfile.read(size // 2 if fault == "reset" else size)
        if fault in CANNED:
            status, answer = CANNED[fault]
            self._answer(status, {"Content-Length": str(len(answer))}, answer)
            return
        if isinstance(fault, tuple):
            status, code, message = fault
            answer = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
            answer = answer if code and self.command != "HEAD" else ""
            self._answer(status, {"Content-Length": str(len(answer))}, answer.encode())
            return
        if fault == "reset" and body:
            self._reset()
            return
        if fault == "stall":
            self.server.over.wait()
            return
        if fault == "flip" and body:
            body = flipped(body)
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            data = response.read()
        finally:
            upstream.close()
        if fault == "hush":
            self.server.hushed.set()
            self.server.over.wait()
        if fault in ("hush", "lose"):
            return
        headers = dict(response.getheaders())
        if self.command != "HEAD":
            headers = {k: v for k, v in headers.items() if k.lower() != "transfer-encoding"}
            headers["Content-Length"] = str(len(data))
        if fault == "flip" and not body:
            data = flipped(data)
        if self.command != "HEAD":
            data = self.server.rewrite(self.path, data)
            headers["Content-Length"] = str(len(data))
        if fault == "pace":
            self._answer(response.status, headers, b"")
            for begin in range(0, len(data), 1 << 17):
                self.server.over.wait(0.3)
                self.wfile.write(data[begin : begin + (1 << 17)])
            return
        if fault in ("drip", "drop"):
            self._drip(response.status, headers, data, whole=fault == "drip")
            return
        half = len(data) // 2 if fault in ("cut", "reset") else len(data)
        self._answer(response.status, headers, data[:half])
        if fault == "reset":
            self._reset()

    def _reset(self) -> None:
        """Close without a farewell: the other side sees ECONNRESET, whatever was on its way."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _drip(self, status: int, headers: dict[str, str], data: bytes, *, whole: bool) -> None:
        lines = [f"HTTP/1.1 {status} OK", *[f"{name}: {value}" for name, value in headers.items()], "", ""]
        head = "\r\n".join(lines).encode()
        self.wfile.write(b"" if whole else head)
        for byte in (head if whole else b"") + data:
            if self.server.over.wait(1):
                return
            self.wfile.write(bytes([byte]))

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        if "Date" not in headers:
            self.send_header("Date", self.date_time_string())
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = _forward


@pytest.fixture
def proxy(s3, monkeypatch) -> Iterator[Proxy]:
    """The proxy, and an environment whose endpoint it is."""
    with Proxy(s3.environment()["AWS_ENDPOINT_URL"]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.gate.set()
        server.over.set()
        server.shutdown()
        thread.join()
