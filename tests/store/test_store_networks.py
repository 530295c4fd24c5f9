"""Networks and servers that answer badly: each request ends, in one line or with the right bytes."""

import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Callable

import pytest

from jebm.errors import StoreError
from jebm.store.storage import EndpointError, ObjectMissingError, open_store

MIB = 1 << 20


@pytest.fixture
def hurry(monkeypatch) -> Callable[[float], None]:
    """From the call on: limits of so many seconds in place of those of a minute."""

    def set_limits(seconds: float) -> None:
        monkeypatch.setattr("jebm.store.s3_calls._LIMIT_SECONDS", seconds)
        monkeypatch.setattr("jebm.store.s3_calls._RETRY_LIMIT_SECONDS", seconds)

    return set_limits


def line_of(call: Callable[[], object], kind: type[StoreError] = StoreError) -> str:
    """Return the one line with which the call ends; nothing else may come out of a store."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ── Answers that drip ───────────────────────────────────────────────────────────────────────────────────

ASKS = {
    "get": lambda store: store.get("a"),
    "range": lambda store: store.read_into("a", 0, [memoryview(bytearray(100))]),
    "put": lambda store: store.put("b", b"1"),
    "upload": lambda store: store.upload("c", [[memoryview(bytearray(5 * MIB))], [memoryview(b"1")]]),
    "head": lambda store: store.head("a"),
    "list": lambda store: list(store.list()),
    "delete": lambda store: store.delete(["none"]),
}


@pytest.mark.parametrize(
    ("ask", "fault"), [*((ask, "drip") for ask in ASKS), ("get", "drop"), ("range", "drop"), ("list", "drop")]
)
def test_an_answer_that_drips_ends_in_one_line(proxy, s3_uri, hurry, ask, fault):
    store = open_store(s3_uri)
    store.put("a", bytes(100))
    store = store.patient(0)
    hurry(1.0)
    proxy.fault = lambda _method, _path: fault
    began = time.monotonic()
    text = line_of(lambda: ASKS[ask](store), EndpointError)
    assert proxy.url in text
    assert time.monotonic() - began < 60  # of the minutes that the bytes would take


def test_a_slow_answer_is_not_cut_off_as_long_as_it_moves(proxy, s3_uri, hurry):
    data = os.urandom(2 * MIB)
    store = open_store(s3_uri)
    store.put("a", data)
    store = store.patient(0)
    limit_seconds = 3.0  # ten times what 128 KiB take, and less than the whole
    hurry(limit_seconds)
    proxy.fault = lambda _method, _path: "pace"
    began = time.monotonic()
    into = bytearray(2 * MIB)
    store.read_into("a", 0, [memoryview(into)])
    assert into == data
    middle = time.monotonic()
    assert store.get("a") == data
    assert min(middle - began, time.monotonic() - middle) > limit_seconds


def test_a_server_that_takes_the_body_in_drips_is_given_up(s3_uri, hurry, monkeypatch):
    hurry(1.0)

    def serve(connection: socket.socket) -> None:
        while connection.recv(64):
            time.sleep(0.2)

    with one_server(serve) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        line_of(lambda: open_store(s3_uri).patient(0).put("a", bytes(32 * MIB)), EndpointError)


def test_a_hundred_continue_that_breaks_off_is_given_up(s3_uri, monkeypatch):
    def serve(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 100 Continue\r\n")

    with one_server(serve) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        line_of(lambda: open_store(s3_uri).patient(0).put("a", b"1"), EndpointError)


def test_after_an_early_answer_the_connection_is_not_used_again(s3_uri, monkeypatch):
    """Such a server still waits for the body, and would take the next request for it."""
    refusal = b"<Error><Code>AccessDenied</Code></Error>"
    heard: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        heard.append(connection.recv(1 << 16))
        connection.sendall(b"HTTP/1.1 403 No\r\nContent-Length: %d\r\n\r\n%b" % (len(refusal), refusal))
        while more := connection.recv(1 << 16):
            heard[-1] += more

    with one_server(serve) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        store = open_store(s3_uri).patient(0)
        for _ in range(2):
            assert "may not write" in line_of(lambda: store.put("a", b"1"))
    assert [request.count(b"HTTP/1.1\r\n") for request in heard] == [1, 1]


class one_server:  # noqa: N801
    """A server of this test alone; every connection is served in a thread."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve, self._socket = serve, socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> int:
        threading.Thread(target=self._accept, daemon=True).start()
        return self._socket.getsockname()[1]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection:
            try:
                self._serve(connection)
            except OSError:
                return

    def __exit__(self, *_: object) -> None:
        self._socket.close()


# ── Listings ────────────────────────────────────────────────────────────────────────────────────────────

TRUNCATED = rb"<IsTruncated>(true|false)</IsTruncated>"
TOKEN = rb"<NextContinuationToken>.*?</NextContinuationToken>|<NextMarker>.*?</NextMarker>"


def endless(next_token: Callable[[], bytes]) -> Callable[[str, bytes], bytes]:
    """The first page, again and again, each time with what the function says of the next one."""
    pages: list[bytes] = []

    def rewrite(_path: str, body: bytes) -> bytes:
        pages.append(re.sub(TOKEN, b"", body))
        return re.sub(TRUNCATED, b"<IsTruncated>true</IsTruncated>" + next_token(), pages[0])

    return rewrite


def test_a_listing_without_end_ends_in_one_line(proxy, s3_uri, monkeypatch):
    monkeypatch.setattr("jebm.store.s3_listing._EMPTY_PAGES", 5)
    token = b"<NextContinuationToken>%b</NextContinuationToken>"
    fresh = itertools.count()
    kinds = {
        "no token": lambda: b"",
        "the same token": lambda: token % b"x",
        "another token, the same page": lambda: token % str(next(fresh)).encode(),
        "nothing, for ever": lambda: token % str(next(fresh)).encode(),
    }
    for kind, next_token in kinds.items():
        store = open_store(s3_uri)
        if kind == "nothing, for ever":
            store.delete([info.key for info in store.list()])
        else:
            store.put("folder/a", b"")
        for ask in (store.list, store.folders):
            proxy.rewrite = endless(next_token)
            proxy.seen.clear()
            assert "use another server or gateway" in line_of(lambda ask=ask: list(ask())), kind
            assert len(proxy.seen) < 10, kind
            proxy.rewrite = lambda _path, body: body


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"<html><body>Sign in</body></html>",
        b"\x00\xff not XML",
        b"<ListBucketResult>" + b"<a>" * 5000,
        b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents></Contents></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key><Size>much</Size>"
        b"</Contents></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key><Size>1</Size><ETag>x</ETag>"
        b"<LastModified>yesterday</LastModified></Contents></ListBucketResult>",
        b'<!DOCTYPE a [<!ENTITY b "c">]><ListBucketResult>&b;</ListBucketResult>',
    ],
    ids=range(8),
)
def test_an_answer_that_is_none_is_named_in_one_line(proxy, s3_uri, page):
    proxy.rewrite = lambda _path, _body: page
    store = open_store(s3_uri).patient(0)
    assert proxy.url in line_of(lambda: list(store.list()), EndpointError)


def test_a_listing_that_heeds_no_prefix_gives_only_what_is_asked_for(proxy, s3_uri):
    store = open_store(s3_uri)
    for key in ("x/a", "x/b", "y/a"):
        store.put(key, b"")
    pages: list[bytes] = []
    proxy.rewrite = lambda _path, body: pages.append(body) or pages[0]
    assert len(list(store.list())) == 3
    assert [info.key for info in store.child("x").list()] == ["a", "b"]


# ── Answers with a status ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "refusal",
    [
        (409, "OperationAborted", "try again"),
        (400, "RequestTimeout", "too slow"),
        (408, "", ""),
        (425, "", ""),
        (400, "", ""),
    ],
)
def test_what_may_pass_is_asked_again_whatever_the_request(proxy, s3_uri, monkeypatch, refusal):
    monkeypatch.setattr("jebm.store.s3_calls._FIRST_WAIT_SECONDS", 0.01)
    struck: dict[str, int] = {}

    def strike(method, path):
        kind = f"{method} {path.partition('?')[2][:6]}"
        struck[kind] = struck.get(kind, 0) + 1
        return refusal if struck[kind] <= 2 else None

    proxy.fault = strike
    store = open_store(s3_uri)
    assert store.put("a", b"123").size == 3
    assert store.get("a") == b"123"
    assert [info.key for info in store.list()] == ["a"]
    store.upload("b", [[memoryview(bytearray(5 * MIB))], [memoryview(b"1")]])
    store.delete(["a", "b"])
    assert store.head("a") is None
    assert not store.limits
    assert min(struck.values()) >= 2


def test_what_is_not_to_be_seen_after_it_was_written_is_looked_for_again(proxy, s3_uri):
    left = [3]

    def strike(method, path):
        if method == "HEAD" and left[0]:
            left[0] -= 1
            return 404, "", ""
        return None

    proxy.fault = strike
    assert open_store(s3_uri).put("a", b"1").size == 1
    proxy.fault = lambda method, _path: (404, "", "") if method == "HEAD" else None
    store = open_store(s3_uri).patient(0.2)
    assert "gone right after" in line_of(lambda: store.put("b", b"1"), ObjectMissingError)


def test_a_redirect_without_a_region_is_no_journey_without_end(proxy, s3_uri):
    for status in (301, 302, 307, 308):
        proxy.fault = lambda _method, _path, status=status: (status, "TemporaryRedirect", "elsewhere")
        store = open_store(s3_uri)
        for ask in ASKS.values():
            proxy.seen.clear()
            text = line_of(lambda ask=ask, store=store: ask(store))
            assert "AWS_REGION" in text
            assert len(proxy.seen) <= 3


def test_the_region_that_an_answer_names_is_the_remedy(proxy, s3_uri):
    proxy.fault = lambda *_: (
        400,
        "AuthorizationHeaderMalformed",
        "expecting</Message><Region>eu-x-1</Region><Message>",
    )
    assert "set AWS_REGION=eu-x-1 " in line_of(lambda: open_store(s3_uri).put("a", b"1"))


@pytest.mark.parametrize("endpoint", ["https", "closed"])
def test_an_endpoint_that_speaks_no_tls_is_named(s3, s3_uri, monkeypatch, endpoint):
    url = s3.environment()["AWS_ENDPOINT_URL"]
    monkeypatch.setenv(
        "AWS_ENDPOINT_URL", url.replace("http:", "https:") if endpoint == "https" else "https://127.0.0.1:9"
    )
    began = time.monotonic()
    text = line_of(lambda: open_store(s3_uri).patient(0).put("a", b"1"), EndpointError)
    assert ("does it speak https?" in text) == (endpoint == "https")
    assert time.monotonic() - began < 40  # not the 45 s that any request may take
