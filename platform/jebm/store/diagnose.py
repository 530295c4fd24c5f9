"""Try out what a storage location does with objects; report each finding with its remedy.

Everything goes through the same `Store` that training uses. Everything written is deleted again.
"""

import os
import statistics
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Literal

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

from jebm.errors import StoreError
from jebm.store.protocol import (
    AccessDeniedError,
    BucketMissingError,
    EndpointError,
    ObjectExistsError,
    Store,
    one_line,
)
from jebm.store.s3 import S3Store
from jebm.store.s3_session import Connection
from jebm.store.s3_watch import watch_connections, watched
from jebm.store.storage import open_store

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

__all__ = [
    "Check",
    "clock_check",
    "examine",
    "examine_store",
]

_PATIENCE_SECONDS = 2.0  # a user is waiting
_LIMIT_SECONDS = 20.0
_SKEW_SECONDS = 300  # S3 refuses signatures 15 minutes off; a clock 5 minutes off is drifting there
_PARTS = (5 << 20, 1 << 16)  # S3's minimum for a part that is not the last
_LATENCY_REQUESTS = 7
_CONTENT = b"jebm doctor"
_REMEDIES = {  # if the error names none
    AccessDeniedError: "look at AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_PROFILE",
    BucketMissingError: "make it, with mkdir -p",
}


_LIMITS = {  # features that a server may lack, by the check that uses them
    "list": ("listing V2",),
    "put": ("checksums",),
    "conditional put": ("conditional writes",),
    "delete": ("multi-delete",),
}


@dataclass(frozen=True)
class Check:
    """The result of one check. `unreachable`: no server answered, so nothing else could be tried."""

    name: str
    level: Literal["ok", "warn", "fail"]
    finding: str
    remedy: str = ""
    unreachable: bool = False


def examine(uri: str) -> Iterator[Check]:
    """Yield findings as they come; stop after one that makes the rest pointless.

    Raises StoreError if the URI is invalid or the profile is unusable.
    """
    store = open_store(uri).patient(_PATIENCE_SECONDS)
    if isinstance(store, S3Store):
        for check in _examine_account(store.connection, store.uri.removeprefix("s3://").partition("/")[0]):
            yield check
            if check.level == "fail":
                return
    check = _tried(store, "list", lambda: _list(store))
    yield check
    if check.level != "fail":
        yield from examine_store(store)


def examine_store(store: Store) -> Iterator[Check]:
    """Yield the checks of a location that can be listed."""
    folder = f".doctor-{uuid.uuid4().hex}"
    keys = one, once, multipart = [f"{folder}/{name}" for name in ("object", "once", "multipart")]
    try:
        check = _tried(store, "put", lambda: _put(store, one))
        yield check
        if check.level == "fail":
            return
        yield _tried(store, "get", lambda: _get(store, one))
        yield _tried(store, "conditional put", lambda: _conditional(store, once))
        yield _tried(store, "multipart", lambda: _multipart(store, multipart))
        yield _tried(store, "latency", lambda: _latency(store, one))
        yield _tried(store, "delete", lambda: _delete(store, folder, keys))
    finally:
        with suppress(StoreError):  # nothing is left even if the caller stops early
            store.delete(keys)


def _tried(store: Store, name: str, work: Callable[[], Check | str]) -> Check:
    """Return what the work finds or raised, with a warning for any feature that the server lacks."""
    try:
        found = work()
    except StoreError as error:
        return _failed(name, error)
    check = Check(name, "ok", found) if isinstance(found, str) else found
    lacking = [store.limits[limit] for limit in _LIMITS.get(name, ()) if limit in store.limits]
    if check.level != "ok" or not lacking:
        return check
    return Check(name, "warn", f"{check.finding}, but {'; '.join(lacking)}")


def _failed(name: str, error: StoreError) -> Check:
    finding, separator, remedy = str(error).rpartition("; ")
    if not separator:
        finding, remedy = remedy, ""
        for kind, usual in _REMEDIES.items():
            remedy = usual if isinstance(error, kind) else remedy
    return Check(name, "fail", finding, remedy, isinstance(error, EndpointError))


# ── The account ─────────────────────────────────────────────────────────────────────────────────────────


def _examine_account(connection: Connection, bucket: str) -> Iterator[Check]:
    """Yield endpoint, region and credentials, the source of each, and the server's verdict on them."""
    session, endpoint = connection.session, connection.client.meta.endpoint_url
    yield Check("endpoint", "ok", f"{endpoint} ({_endpoint_source(session, own=connection.custom)})")
    yield _region(session, own=connection.custom)
    # Credentials: any failure to find them ends the examination.
    try:
        credentials = connection.find_credentials(f"s3://{bucket}")
        frozen = credentials.get_frozen_credentials()
    except (NoCredentialsError, PartialCredentialsError):
        remedy = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        yield Check("credentials", "fail", "none found", remedy)
        return
    except StoreError as error:
        yield _failed("credentials", error)
        return
    except Exception as error:  # the service that holds them does not answer
        yield Check("credentials", "fail", one_line(error), "is the network there?", unreachable=True)
        return
    # Found: show only the end of the key, then let the server judge it.
    token = ", with a session token" if frozen.token else ""
    yield Check(
        "credentials",
        "ok",
        f"access key …{(frozen.access_key or '')[-4:]} (found in: {credentials.method}{token})",
    )
    yield _clock(connection.client, bucket)
    yield _identity(session, endpoint if connection.custom else None)


def _endpoint_source(session: Session, *, own: bool) -> str:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if own and os.environ.get(name):
            return f"from {name}"
    return f"from profile {session.profile_name}" if own else "the default of AWS"


def _region(session: Session, *, own: bool) -> Check:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        if os.environ.get(name):
            return Check("region", "ok", f"{os.environ[name]} (from {name})")
    if session.region_name:
        return Check("region", "ok", f"{session.region_name} (from profile {session.profile_name})")
    if own:
        return Check("region", "ok", "none named: us-east-1, as servers of one's own expect")
    return Check("region", "warn", "none named: us-east-1", "set AWS_REGION to that of the bucket")


def _clock(client: "S3Client", bucket: str) -> Check:
    """Compare this machine's clock with the server's; refusals carry its date too."""
    began = datetime.now(UTC)
    try:
        with watched(_LIMIT_SECONDS):
            answer = client.list_objects_v2(Bucket=bucket, MaxKeys=1)
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
    except ClientError as error:
        headers = error.response["ResponseMetadata"]["HTTPHeaders"]
    except Exception as error:  # includes parser errors over an HTML page
        finding = f"no good answer from {client.meta.endpoint_url}: {one_line(error)}"
        remedy = "is it running, and is AWS_ENDPOINT_URL right?"
        return Check("connection", "fail", finding, remedy, unreachable=True)
    ended = datetime.now(UTC)
    try:
        server = parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError):
        return Check("clock", "warn", "the server does not say what time it is", "compare it yourself")
    return clock_check(server if server.tzinfo else server.replace(tzinfo=UTC), began + (ended - began) / 2)


def clock_check(server: datetime, here: datetime) -> Check:
    """Return the check on how far two clocks differ."""
    seconds = (here - server).total_seconds() - 0.5  # a Date header drops the fraction: 0.5 s on average
    if abs(seconds) < 2:
        return Check("clock", "ok", "that of the server")
    finding = f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the server's"
    if abs(seconds) > _SKEW_SECONDS:
        return Check("clock", "fail", finding, "set it, by NTP: S3 refuses what is signed 15 minutes off")
    return Check("clock", "ok", finding)


def _identity(session: Session, endpoint: str | None) -> Check:
    config = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 1})
    try:
        client = session.client("sts", config=config, endpoint_url=endpoint)
        watch_connections(client)
        with watched(_LIMIT_SECONDS):
            arn = client.get_caller_identity()["Arn"]
    except Exception as error:  # anything might answer at that address
        if endpoint is not None:
            return Check("identity", "ok", "the access key says it all: no STS at this server")
        return Check("identity", "warn", f"STS tells none: {one_line(error)}", "log in again; see below")
    return Check("identity", "ok", arn)


# ── The place ───────────────────────────────────────────────────────────────────────────────────────────


def _list(store: Store) -> str:
    store.probe(write=False)
    return f"{store.uri} exists and can be listed"


def _put(store: Store, key: str) -> str:
    store.put(key, _CONTENT)
    return "an object was written"


def _get(store: Store, key: str) -> Check | str:
    if store.get(key) != _CONTENT:
        return Check("get", "fail", "what came back is not what was written", "use another server or gateway")
    part = bytearray(4)
    store.read_into(key, 3, [memoryview(part)])
    if part != _CONTENT[3:7]:
        return Check("get", "fail", "a range came back wrong", "use another server or gateway")
    return "it came back, whole and by range"


def _conditional(store: Store, key: str) -> Check | str:
    store.put(key, b"1", if_absent=True)
    try:
        store.put(key, b"2", if_absent=True)
    except ObjectExistsError:
        return "a second writer is refused"
    return Check(
        "conditional put",
        "warn",
        "If-None-Match is not honoured: a second writer is not refused",
        "never let two jobs write one run",
    )


def _multipart(store: Store, key: str) -> Check | str:
    parts = [memoryview(os.urandom(size)) for size in _PARTS]
    began = time.perf_counter()
    uploaded = store.upload(key, [[part] for part in parts])
    sent = time.perf_counter()
    back = memoryview(bytearray(sum(_PARTS)))
    store.read_into(key, 0, [back], etag=uploaded.info.etag)
    ended = time.perf_counter()
    if zlib.crc32(back) != zlib.crc32(parts[1], zlib.crc32(parts[0])):
        return Check("multipart", "fail", "another CRC32 came back", "use another server or gateway")
    megabytes = sum(_PARTS) / 1e6
    return (
        f"{len(parts)} parts came back with their CRC32s; "
        f"{megabytes / (sent - began):.0f} MB/s up, {megabytes / (ended - sent):.0f} MB/s down"
    )


def _latency(store: Store, key: str) -> str:
    seconds = []
    for _ in range(_LATENCY_REQUESTS):
        began = time.perf_counter()
        store.head(key)
        seconds.append(time.perf_counter() - began)
    return f"{1000 * statistics.median(seconds):.1f} ms for a request, the median of {len(seconds)}"


def _delete(store: Store, folder: str, keys: Sequence[str]) -> Check | str:
    yourself = f"delete {store.uri}/{folder}/ yourself"
    try:
        store.delete(keys)
    except StoreError as error:
        failed = _failed("delete", error)
        return replace(failed, remedy=f"{failed.remedy}, and {yourself}" if failed.remedy else yourself)
    left = [info.key for info in store.list(f"{folder}/")]
    if left:
        return Check("delete", "fail", f"still there: {', '.join(left)}", yourself)
    return "nothing is left"
