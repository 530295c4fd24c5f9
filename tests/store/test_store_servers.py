"""Servers that speak S3, but not all of it: what they refuse is left out, once and with a word."""

import logging
import os
import re
import threading

import pytest

from jebm.errors import ConfigError, StoreError
from jebm.store.diagnose import examine
from jebm.store.storage import AccessDeniedError, ObjectExistsError, open_store
from jebm.train.lease import Lease

MIB = 1 << 20
NOT_IMPLEMENTED = (501, "NotImplemented", "The requested operation is not implemented.")


def is_multi_delete(method: str, path: str) -> bool:
    return method == "POST" and path.partition("?")[2].startswith("delete")


def without_checksums(method, path, headers):
    """Backblaze B2 before 2025, and others: no header of checksums, whatever it is for."""
    for name in headers:
        if name.startswith(("x-amz-checksum", "x-amz-sdk", "x-amz-trailer")):
            return 400, "InvalidArgument", f"Unsupported header '{name}' received for this API call."
    return None


def without_multi_delete(method, path, headers):
    """The XML interface of GCS."""
    return NOT_IMPLEMENTED if is_multi_delete(method, path) else None


def with_md5_only(method, path, headers):
    if is_multi_delete(method, path) and "content-md5" not in headers:
        return 400, "MissingContentMD5", "Missing required header for this request: Content-MD5"
    return None


def without_post(method, path, headers):
    return (405, "MethodNotAllowed", "no such method") if is_multi_delete(method, path) else None


def without_length_of_deletes(method, path, headers):
    return (411, "MissingContentLength", "how long?") if is_multi_delete(method, path) else None


def without_conditions(method, path, headers):
    return NOT_IMPLEMENTED if "if-none-match" in headers else None


def with_other_conditions(method, path, headers):
    return (400, "InvalidArgument", "If-None-Match: bad value") if "if-none-match" in headers else None


def with_a_bare_refusal(method, path, headers):
    return (400, "", "") if "if-none-match" in headers else None


def without_either(method, path, headers):
    return without_checksums(method, path, headers) or without_conditions(method, path, headers)


def without_anything(method, path, headers):
    return without_either(method, path, headers) or without_multi_delete(method, path, headers)


def without_listing_v2(method, path, headers):
    return (400, "InvalidArgument", "list-type") if "list-type=2" in path else None


HABITS = {
    without_checksums: {"checksums", "multi-delete"},  # DeleteObjects must have one
    without_multi_delete: {"multi-delete"},
    with_md5_only: {"multi-delete"},
    without_post: {"multi-delete"},
    without_length_of_deletes: {"multi-delete"},
    without_conditions: {"conditional writes"},
    with_other_conditions: {"conditional writes"},
    with_a_bare_refusal: {"conditional writes"},
    without_either: {"checksums", "conditional writes", "multi-delete"},
    without_anything: {"checksums", "conditional writes", "multi-delete"},
    without_listing_v2: {"listing V2"},
}
CHECK_OF = {
    "checksums": "put",
    "conditional writes": "conditional put",
    "multi-delete": "delete",
    "listing V2": "list",
}


@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.__name__)
def test_what_a_server_refuses_is_left_out_and_said_once(proxy, s3_uri, caplog, habit):
    caplog.set_level(logging.INFO)
    proxy.habit = habit
    found = open_store(s3_uri).probe()
    assert found.writable
    assert found.conditional_writes == ("conditional writes" not in HABITS[habit])

    store, data = open_store(s3_uri), memoryview(os.urandom(5 * MIB + 9))
    store.upload("big", [[data[: 5 * MIB]], [data[5 * MIB :]]])
    assert store.get("big") == data
    store = open_store(s3_uri)
    store.put("once", b"1", if_absent=True)
    with pytest.raises(ObjectExistsError):
        store.put("once", b"2", if_absent=True)
    assert store.get("once") == b"1"
    assert [info.key for info in store.list()] == ["big", "once"]
    store.delete(["big", "once", "none"])
    assert list(store.list()) == []

    assert set(store.limits) == HABITS[habit]
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([text for text in said if " here (" in text]) == len(HABITS[habit])
    assert not [record for record in caplog.records if "again in" in record.getMessage()]  # nothing waits


@pytest.mark.parametrize(
    "habit",
    [without_checksums, with_md5_only, with_other_conditions, without_anything, without_listing_v2],
    ids=lambda habit: habit.__name__,
)
def test_the_doctor_says_what_is_left_out_and_fails_nothing(proxy, s3_uri, habit):
    proxy.habit = habit
    checks = {check.name: check for check in examine(s3_uri)}
    warned = {name for name, check in checks.items() if check.level == "warn"}
    assert warned == {CHECK_OF[lacking] for lacking in HABITS[habit]}
    assert not [check for check in checks.values() if check.level == "fail"]
    for lacking in HABITS[habit]:
        assert f"no {lacking} here (" in checks[CHECK_OF[lacking]].finding
    assert list(open_store(s3_uri).list()) == []


def test_a_server_of_another_kind_is_asked_once(proxy, s3_uri):
    proxy.habit = without_anything
    first, second = open_store(s3_uri), open_store(s3_uri)
    first.put("a", b"1", if_absent=True)
    first.delete(["a", "b"])
    proxy.seen.clear()
    proxy.headers.clear()
    second.put("a", b"1", if_absent=True)
    second.delete(["a", "b"])
    assert [re.sub(" .*/", " ", line) for line in proxy.seen] == [
        "HEAD a",  # in place of the condition
        "PUT a",
        "HEAD a",
        "DELETE a",
        "DELETE b",
    ]


def test_without_conditions_a_second_writer_is_still_seen(proxy, s3_uri):
    proxy.habit = without_conditions
    store = open_store(s3_uri)
    store.put("a", b"1")
    with pytest.raises(ObjectExistsError, match="exists already"):
        store.put("a", b"2", if_absent=True)
    assert store.get("a") == b"1"


def test_a_refusal_that_comes_once_is_no_habit(proxy, s3_uri):
    """Somebody on the way may answer anything once."""
    left = [2]

    def strike(method, path):
        if method == "PUT" and left[0]:
            left[0] -= 1
            return 400, "", ""
        return None

    proxy.fault = strike
    store = open_store(s3_uri)
    store.put("a", b"1", if_absent=True)
    assert not store.limits


def test_no_checksum_goes_out_where_the_user_wants_none(proxy, s3_uri, monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    store = open_store(s3_uri)
    store.put("a", b"1")
    store.upload("b", [[memoryview(bytearray(5 * MIB))], [memoryview(b"2")]])
    assert store.get("b")[-1:] == b"2"
    names = {name for headers in proxy.headers for name in headers}
    assert not [name for name in names if name.startswith(("x-amz-checksum", "x-amz-trailer"))]


# ── Listings of the first version ───────────────────────────────────────────────────────────────────────


def drop_token(path: str, body: bytes) -> bytes:
    """What a server of the first version answers to a request of the second, which it does not know."""
    if "list-type=2" not in path:
        return body
    return re.sub(rb"<NextContinuationToken>.*?</NextContinuationToken>", b"", body)


@pytest.mark.parametrize("kind", ["refuses", "answers with the first"])
def test_a_listing_of_the_first_version_has_all_pages(proxy, s3_uri, monkeypatch, kind):
    monkeypatch.setattr("jebm.store.s3_listing._PAGE", 3)
    store = open_store(s3_uri)
    keys = [f"{folder}/{number}" for folder in "abcde" for number in range(2)] + ["z"]
    for key in keys:
        store.put(key, b"")
    if kind == "refuses":
        proxy.habit = without_listing_v2
    else:
        proxy.rewrite = drop_token
    assert [info.key for info in store.list()] == keys
    assert list(store.folders()) == list("abcde")
    assert [info.key for info in store.list("c/")] == ["c/0", "c/1"]
    assert set(store.limits) == {"listing V2"}


# ── What has no other way ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [403, 405, 400])
def test_who_refuses_head_is_asked_by_get(proxy, s3_uri, status):
    proxy.fault = lambda method, _path: (status, "", "") if method == "HEAD" else None
    store = open_store(s3_uri)
    info = store.put("a", b"123")
    assert (info.size, store.head("none")) == (3, None)
    assert [found.etag for found in store.list()] == [info.etag]


def test_the_reason_that_a_head_cannot_give_is_found_out(proxy, s3_uri):
    store = open_store(s3_uri)
    store.put("a", b"1")
    proxy.fault = lambda method, _path: (400, "", "") if method == "HEAD" else "expired"
    proxy.seen.clear()
    with pytest.raises(AccessDeniedError, match="has expired"):
        store.head("a")
    assert len(proxy.seen) == 2


def test_what_is_not_implemented_is_not_asked_for_again(proxy, s3_uri):
    proxy.fault = lambda method, _path: NOT_IMPLEMENTED if method == "PUT" else None
    store = open_store(s3_uri)
    with pytest.raises(StoreError, match="cannot write: NotImplemented The requested operation is not"):
        store.put("a", b"1")
    assert len(proxy.seen) == 2  # with the checksum and without


@pytest.mark.parametrize("second", [NOT_IMPLEMENTED, (403, "AccessDenied", ""), (500, "InternalError", "")])
def test_the_first_error_is_the_one_reported(proxy, s3_uri, second):
    """Whatever becomes of the cleaning up after it."""

    def strike(method, path):
        return (
            (400, "InvalidBucketState", "frozen") if method == "PUT" else second if method != "GET" else None
        )

    proxy.fault = strike
    with pytest.raises(StoreError, match="cannot write: InvalidBucketState frozen"):
        open_store(s3_uri).patient(0.2).probe()
    failed = [check for check in examine(s3_uri) if check.level == "fail"]
    assert [check.name for check in failed] == ["put"]
    assert "InvalidBucketState" in failed[0].finding


def test_who_may_not_delete_is_told_so_and_no_other(proxy, s3_uri):
    def strike(refusal):
        return lambda method, path: refusal if method == "DELETE" or is_multi_delete(method, path) else None

    proxy.fault = strike((403, "AccessDenied", "no"))
    check = list(examine(s3_uri))[-1]
    assert (check.name, check.level) == ("delete", "fail")
    assert "grant the right s3:DeleteObject" in check.remedy
    assert "yourself" in check.remedy
    proxy.fault = strike((400, "InvalidBucketState", "frozen"))
    check = list(examine(s3_uri))[-1]
    assert (check.name, check.level) == ("delete", "fail")
    assert "grant" not in check.remedy
    assert "InvalidBucketState" in check.finding
    proxy.fault = lambda *_: None
    open_store(s3_uri).delete([info.key for info in open_store(s3_uri).list()])


def test_uploads_that_cannot_be_listed_are_left_alone_with_a_word(proxy, s3_uri, caplog):
    proxy.fault = lambda _method, path: NOT_IMPLEMENTED if "uploads" in path.partition("?")[2] else None
    assert list(open_store(s3_uri).discard_unfinished(0)) == []
    assert "no listing uploads here" in caplog.text


def test_addressing_by_host_name_can_be_asked_for(s3_uri, monkeypatch):
    monkeypatch.setenv("AWS_S3_ADDRESSING_STYLE", "virtual")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.example.invalid:1")
    client = open_store("s3://bucket/x")._client
    url = client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "a"})
    assert url.startswith("http://bucket.s3.example.invalid:1/a")
    monkeypatch.setenv("AWS_S3_ADDRESSING_STYLE", "house")
    with pytest.raises(
        StoreError, match="AWS_S3_ADDRESSING_STYLE: 'house' is not one of path, virtual, auto"
    ):
        open_store("s3://bucket/x")


def test_without_conditions_two_that_start_in_one_moment_see_each_other(proxy, s3_uri):
    """Both look, both see nothing, both write: the one whose object was replaced steps back."""
    first_writes, over = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)
    met = threading.Event()

    def habit(method, path, headers):
        refusal = without_conditions(method, path, headers)
        if refusal is None and method == "PUT" and "/lease/" in path and not met.is_set():
            first_writes.wait()
            met.set()
        return refusal

    proxy.habit = habit
    ended = []

    def hold(store):
        try:
            with Lease(store, beat_seconds=1):
                ended.append("holds")
                over.wait()
        except ConfigError as error:
            ended.append(str(error))
            over.wait()

    threads = [threading.Thread(target=hold, args=(open_store(s3_uri),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended.sort()
    assert ended[0] == "holds"
    assert "is in training by" in ended[1]
