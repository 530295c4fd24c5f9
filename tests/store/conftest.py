import http.client
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


class Proxy(ThreadingHTTPServer):
    """Stands before the real server and does to a request what networks and busy servers do.

    `fault(method, path)` says what: "busy" (503 SlowDown), "cut" (half of the answer, then silence), "lose"
    (the server does it, the answer never comes) or None. Nothing passes while `gate` is not set.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.fault: Callable[[str, str], str | None] = lambda _method, _path: None
        self.gate = threading.Event()
        self.gate.set()
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that is gone is no news here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments) -> None:
        pass

    def _forward(self) -> None:
        self.close_connection = True
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.gate.wait()
        self.server.seen.append(f"{self.command} {self.path}")
        fault = self.server.fault(self.command, self.path)
        if fault == "busy":
            answer = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>later</Message></Error>"
            self._answer(503, {"Content-Length": str(len(answer))}, answer)
            return
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
        if fault == "lose":
            return
        headers = dict(response.getheaders())
        if self.command != "HEAD":
            headers = {k: v for k, v in headers.items() if k.lower() != "transfer-encoding"}
            headers["Content-Length"] = str(len(data))
        self._answer(response.status, headers, data[: len(data) // 2] if fault == "cut" else data)

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
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
        server.shutdown()
        thread.join()
