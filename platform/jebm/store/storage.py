"""Objects under a URI: one small protocol, and its three keepers: S3, a local folder, this process's memory.

A key is relative to the URI of its store. An object appears whole or not at all. Credentials come from the
provider chain of AWS (environment, profile, instance role) and from nowhere else, so that none can end up in
a URI, a log or a manifest.
"""

import base64
import contextlib
import io
import logging
import math
import os
import random
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeVar
from urllib.parse import unquote, urlencode, urlsplit

import pyarrow.fs
from boto3.session import Session
from botocore import session as botocore_session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)
from botocore.parsers import ResponseParserError

from jebm.errors import StoreError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from botocore.model import OperationModel
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import (
        CompletedPartTypeDef,
        GetObjectRequestTypeDef,
        ListMultipartUploadsRequestTypeDef,
        ListObjectsV2OutputTypeDef,
        ListObjectsV2RequestTypeDef,
        PutObjectRequestTypeDef,
    )

__all__ = [
    "PART_THREADS",
    "AccessDeniedError",
    "BucketMissingError",
    "EndpointError",
    "ObjectChangedError",
    "ObjectExistsError",
    "ObjectInfo",
    "ObjectMissingError",
    "Probe",
    "Store",
    "Uploaded",
    "arrow_filesystem",
    "arrow_uri",
    "in_parallel",
    "open_store",
]

PART_THREADS = 4
"""Parts of one object that travel at a time; each has one socket buffer's worth of extra memory."""

_PATIENCE_SECONDS = 30.0  # a server restart, or a burst of SlowDown; after that a person wants to know
_PROBE_PATIENCE_SECONDS = 1.0  # at a start a wrong endpoint is likelier than a busy one
_CONNECT_TIMEOUT_SECONDS = 10.0
_READ_TIMEOUT_SECONDS = 20.0  # between two bytes, or before the first: far above what a busy server takes
_FIRST_WAIT_SECONDS = 0.25
_LONGEST_WAIT_SECONDS = 10.0
_BODY_BYTES = 1 << 16  # what a write copies at a time out of the caller's memory
_SLICE_BYTES = 1 << 18  # what a read copies at a time on its way into the caller's memory
_DELETE_BATCH = 1000  # the most that one DeleteObjects takes
_KEY_BYTES = 1024  # the longest key of S3
_PARTIAL = ".partial-"  # names of local files on their way; never a key
_ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")
_BAD_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidClientTokenId", "InvalidSecurity"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}
_TRANSIENT = {
    "BadDigest",  # a bit was flipped on the way
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}

_logger = logging.getLogger(__name__)
_RequestError: TypeAlias = BotoCoreError | ClientError | ResponseParserError
_Item = TypeVar("_Item")
_T = TypeVar("_T")


class ObjectMissingError(StoreError):
    """There is no object under this key."""


class ObjectExistsError(StoreError):
    """A conditional write found an object under its key."""


class ObjectChangedError(StoreError):
    """The object is no longer the one that the caller has seen, or shorter than the range asked for."""


class AccessDeniedError(StoreError):
    """The credentials are missing, wrong or expired, or do not allow the operation."""


class BucketMissingError(StoreError):
    """The bucket, or the local folder to read from, does not exist."""


class EndpointError(StoreError):
    """Nobody answers at the endpoint, or the connection broke for longer than we retry."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a store knows of an object: size in bytes; an etag that changes when the content does."""

    key: str
    size: int
    etag: str
    modified: datetime


@dataclass(frozen=True)
class Uploaded:
    """An object sent in parts: what the store knows of it, and the CRC32 of each part as it was sent."""

    info: ObjectInfo
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """What a store allows; without conditional writes two writers are not kept apart."""

    writable: bool
    conditional_writes: bool


class Store(Protocol):
    """Whole objects by key. Safe to share between threads; every method raises StoreError in one line."""

    @property
    def uri(self) -> str:
        """The place, without a trailing slash and without secrets."""

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> ObjectInfo:
        """Write an object; with `if_absent` raise ObjectExistsError where the key is taken."""

    def upload(self, key: str, parts: Sequence[Sequence[memoryview]]) -> Uploaded:
        """Write an object from parts, each a sequence of byte views; on failure no object appears.

        All parts but the last have one size, at least 5 MiB (the rule of S3); at most 10,000 parts.
        """

    def get(self, key: str) -> bytes:
        """Return the whole object; raise ObjectMissingError where there is none."""

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        """Fill the pieces, one after the other, with the bytes from `offset` on.

        Raises ObjectChangedError where the etag is another one, or the object ends too early.
        """

    def head(self, key: str) -> ObjectInfo | None:
        """Return what is known of an object, None where there is none."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object whose key begins with `prefix`; sort them where the order matters."""

    def folders(self, prefix: str = "") -> Iterator[str]:
        """Yield the names right below the folder `prefix` that have objects below them.

        Some servers go on naming a folder for a while after its last object is deleted.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; a key without one is fine."""

    def child(self, prefix: str) -> "Store":
        """Return the store of the folder `prefix`."""

    def patient(self, seconds: float) -> "Store":
        """Return this store with another patience: how long a request that fails is tried again."""

    def discard_unfinished(self, older_than_seconds: float) -> Sequence[str]:
        """Give up uploads that began longer ago and never ended; return their keys.

        No listing shows them, yet their bytes are stored and paid for.
        """

    def probe(self, *, write: bool = True) -> Probe:
        """Check that the place can be reached, exists, and can be read and (with `write`) written.

        Leaves nothing behind. Warns in the log where conditional writes are not honoured.
        """


def open_store(uri: str) -> Store:
    """Return the store of `s3://bucket/prefix`, `file:///path`, a plain path, or `memory://name/prefix`.

    Nothing is created and nobody is called: `probe()` does that. Endpoint, region and credentials of S3
    are found the way the aws tool finds them (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_PROFILE, …).
    JEBM_S3_SSE, JEBM_S3_SSE_KMS_KEY_ID and JEBM_S3_REQUEST_PAYER go with the requests that know them.
    A request to S3 that may succeed later is tried again for 30 s; `patient()` changes that.

    Raises:
        StoreError: the URI is none, or the environment or the profile cannot be used; nobody was called.
    """
    scheme, bucket, prefix = _split(uri)
    if scheme == "s3":
        return S3Store(_connect(), bucket, prefix)
    if scheme == "memory":
        return MemoryStore(bucket, prefix)
    return LocalStore(Path(prefix))


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return pyarrow's filesystem and the path on it, for Ray's storage.

    Endpoint and region are resolved here, since pyarrow does not look for them where boto3 does. Keys are
    never handed over: a filesystem is pickled with them in clear, into the bucket.
    """
    scheme, bucket, prefix = _split(uri)
    if scheme == "memory":
        raise StoreError(f"{uri}: other processes cannot see this memory; use s3://… or a path")
    if scheme == "file":
        return pyarrow.fs.LocalFileSystem(), prefix
    # Without background writes an upload through it holds one part in memory instead of all of them.
    filesystem = pyarrow.fs.S3FileSystem(background_writes=False, **_arrow_options())
    return filesystem, f"{bucket}/{prefix}".rstrip("/")


def arrow_uri(uri: str) -> str:
    """Return the URI with endpoint and region in its query, as pyarrow and Ray take it."""
    scheme, bucket, prefix = _split(uri)
    if scheme == "memory":
        raise StoreError(f"{uri}: other processes cannot see this memory; use s3://… or a path")
    if scheme == "file":
        return Path(prefix).as_uri()
    options = _arrow_options()
    return f"s3://{bucket}/{prefix}".rstrip("/") + (f"?{urlencode(options)}" if options else "")


def in_parallel(work: Callable[[int, _Item], _T], items: Sequence[_Item]) -> list[_T]:
    """Return `work(index, item)` of every item, in order; PART_THREADS at a time.

    The first failure is raised, once those that had begun have ended; no other one begins.
    """
    with ThreadPoolExecutor(PART_THREADS, thread_name_prefix="jebm-part") as pool:
        futures = [pool.submit(work, index, item) for index, item in enumerate(items)]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _split(uri: str) -> tuple[str, str, str]:
    """Return scheme, bucket or name, and prefix (for files: the absolute path)."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        if not uri:
            raise StoreError("an empty storage URI; give s3://bucket/prefix or a path")
        return "file", "", str(Path(uri).expanduser().absolute())
    if "@" in rest.split("/")[0]:
        # Not quoted: it may hold a key.
        raise StoreError(f"{scheme}://…: no credentials in a URI; put them into the environment or a profile")
    if "?" in rest or "#" in rest:
        raise StoreError(
            f"{scheme}://{rest.split('?')[0]}: no options in a URI; set AWS_ENDPOINT_URL and so on"
        )
    bucket, _, prefix = rest.partition("/")
    if scheme == "file":
        if bucket not in ("", "localhost"):
            raise StoreError(f"{uri}: a file URI has three slashes, file:///path")
        return "file", "", unquote(f"/{prefix}")
    if scheme not in ("memory", "s3"):
        raise StoreError(
            f"{uri}: unknown scheme; use s3://bucket/prefix, file:///path, a path or memory://name"
        )
    if not bucket:
        raise StoreError(f"{uri}: names no bucket; write {scheme}://bucket/prefix")
    prefix = prefix.strip("/")
    return scheme, bucket, _checked(prefix) if prefix else ""


def _checked(key: str) -> str:
    """Return the key if it stays below its store and means the same everywhere; else raise StoreError."""
    segments = key.split("/")
    if (
        any(segment in ("", ".", "..") or segment.startswith(_PARTIAL) for segment in segments)
        or any(ord(letter) < 32 or letter in "\\\x7f" for letter in key)
        or len(key.encode("utf-8", "surrogatepass")) > _KEY_BYTES
    ):
        raise StoreError(f"{key[:200]!r} is not a key: no empty, '.' or '..' segment, no control character")
    return key


def _under(prefix: str, key: str) -> str:
    return f"{prefix}/{_checked(key)}" if prefix else _checked(key)


def _folder(prefix: str) -> str:
    """Return a prefix that ends at a folder's border."""
    return f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _crc32(pieces: Sequence[memoryview]) -> int:
    value = 0
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return value


class _Pieces(io.RawIOBase):
    """Views that lie apart, read as one file: botocore sends them as they lie, without joining them."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = pieces
        self._size = sum(piece.nbytes for piece in pieces)
        self._rewind()

    def _rewind(self) -> None:
        self._index, self._within, self._position = 0, 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        target = min(max(start + offset, 0), self._size)
        self._rewind()
        while self._position < target:
            step = min(target - self._position, self._pieces[self._index].nbytes)
            self._position += step
            if step < self._pieces[self._index].nbytes:
                self._within = step
            else:
                self._index += 1
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        into = memoryview(buffer).cast("B")
        filled = 0
        while filled < into.nbytes and self._index < len(self._pieces):
            piece = self._pieces[self._index][self._within : self._within + into.nbytes - filled]
            into[filled : filled + piece.nbytes] = piece
            filled += piece.nbytes
            self._within += piece.nbytes
            if self._within == self._pieces[self._index].nbytes:
                self._index, self._within = self._index + 1, 0
        self._position += filled
        return filled


# ── S3 ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Connection:
    """A client, the session that found its credentials, and whether the user named the endpoint."""

    session: Session
    client: "S3Client"
    custom: bool


def _from_environment(name: str, allowed: Collection[str]) -> str | None:
    """Return the variable's value, None where it is unset or empty; raises StoreError for another one."""
    value = os.environ.get(name)
    if value and value not in allowed:
        raise StoreError(f"{name}: {value[:80]!r} is not one of {', '.join(allowed)}")
    return value or None


def _parameters_of_environment() -> dict[str, str]:
    """Return what the environment adds to every request that has a parameter of this name.

    Not for a config or a URI: how a bucket wants its requests is the machine's matter, as its keys are.

    Raises:
        StoreError: a value that S3 would refuse, or heed in no request; names the variable.
    """
    encryption = _from_environment("JEBM_S3_SSE", _ENCRYPTIONS)
    payer = _from_environment("JEBM_S3_REQUEST_PAYER", ("requester",))
    key = os.environ.get("JEBM_S3_SSE_KMS_KEY_ID") or None
    if key and encryption not in _ENCRYPTIONS[1:]:
        # S3 refuses it beside AES256, and without an encryption it would silently use another key.
        raise StoreError("JEBM_S3_SSE_KMS_KEY_ID: works with JEBM_S3_SSE=aws:kms or aws:kms:dsse only")
    if key and (not key.isascii() or not key.isprintable() or " " in key):
        raise StoreError("JEBM_S3_SSE_KMS_KEY_ID: is no key id, key ARN or alias: it holds odd characters")
    parameters = {"ServerSideEncryption": encryption, "SSEKMSKeyId": key, "RequestPayer": payer}
    return {name: value for name, value in parameters.items() if value is not None}


def _add_parameters(
    parameters: Mapping[str, str], *, params: dict[str, object], model: "OperationModel", **_: object
) -> None:
    """Add to a request those that its operation has: botocore calls this before it builds one."""
    members = model.input_shape.members if model.input_shape is not None else {}
    params.update({name: value for name, value in parameters.items() if name in members})


def _checksums(core: botocore_session.Session, setting: str) -> Literal["when_required"] | None:
    """Return how botocore should handle checksums: None, as it finds it, where the user has said so.

    Else we send CRC32s of our own, and compare them when we read; older servers refuse the trailers that
    botocore's own default, when_supported, would add.
    """
    named = os.environ.get(f"AWS_{setting.upper()}") or core.get_scoped_config().get(setting)
    return None if named else "when_required"


def _connect() -> _Connection:
    parameters = _parameters_of_environment()
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_SECONDS,
        read_timeout=_READ_TIMEOUT_SECONDS,
        tcp_keepalive=True,
        max_pool_connections=4 * PART_THREADS,
        # One attempt: the retries are ours, since botocore's do not cover the body of an answer.
        retries={"mode": "standard", "total_max_attempts": 1},
        # Every body has a CRC32. Over plain HTTP botocore would sign its SHA-256 as well, for half of an
        # upload's CPU. We do without, as it does over TLS: what is read back over HTTP is not signed either,
        # so it would guard nothing.
        s3={"payload_signing_enabled": False},
    )
    try:
        core = botocore_session.Session()
        # boto3 reads AWS_DEFAULT_REGION only; every other client of AWS reads this one, and first.
        session = Session(region_name=os.environ.get("AWS_REGION") or None, botocore_session=core)
        checksums = Config(
            request_checksum_calculation=_checksums(core, "request_checksum_calculation"),
            response_checksum_validation=_checksums(core, "response_checksum_validation"),
        )
        config = config.merge(checksums)
        client = session.client("s3", config=config)
        endpoint = urlsplit(client.meta.endpoint_url)
        if endpoint.username or endpoint.password:
            raise StoreError("AWS_ENDPOINT_URL holds credentials; put them into AWS_ACCESS_KEY_ID and so on")
        custom = not (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
        if custom:  # a bucket's name before such a host would be a name that nobody resolves
            path_style = Config(s3={"payload_signing_enabled": False, "addressing_style": "path"})
            client = session.client("s3", config=config.merge(path_style))
    except (BotoCoreError, ValueError) as error:
        raise StoreError(f"the AWS configuration cannot be used: {_one_line(error)}") from error
    if parameters:  # at this one place, so that no call can forget them
        client.meta.events.register("before-parameter-build.s3", partial(_add_parameters, parameters))
    return _Connection(session, client, custom)


def _arrow_options() -> dict[str, str]:
    """Return what pyarrow must be told to reach what boto3 reaches."""
    connection = _connect()
    options = {}
    if connection.custom:
        endpoint = urlsplit(connection.client.meta.endpoint_url)
        options = {"scheme": endpoint.scheme, "endpoint_override": endpoint.netloc}
    # Any region will do for a server of one's own, but a signature needs one.
    region = connection.session.region_name or ("us-east-1" if connection.custom else None)
    return options | ({"region": region} if region else {})


class _Body(io.BufferedReader):
    """The body of a request. botocore reads it in pieces of 1 MiB to sign it; shorter ones do as well."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None or size < 0 else min(size, _BODY_BYTES))


def _body(pieces: Sequence[memoryview]) -> _Body:
    """Return a fresh body; its buffer spares the many small reads below it from running Python."""
    return _Body(_Pieces(pieces), _BODY_BYTES)


def _base64(crc32: int) -> str:
    return base64.b64encode(crc32.to_bytes(4, "big")).decode("ascii")


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _expect(answer: Mapping[str, object], name: str) -> None:
    """Raise ResponseParserError where an answer lacks what every S3 server puts there.

    A gateway between us and the server may say 200 with a page of its own: that is no upload, and above
    all no empty listing, from which a run would start anew.
    """
    if name not in answer:
        raise ResponseParserError(f"an answer without {name}")


def _transient(error: _RequestError) -> bool:
    """Whether the same request may well succeed a moment later."""
    if isinstance(error, ClientError):
        return _status(error) >= 500 or _status(error) == 429 or _code(error) in _TRANSIENT
    if isinstance(error, ResponseParserError):  # half an answer, or a gateway's page in its place
        return True
    if isinstance(error, SSLError):
        return False
    # A wrong checksum, which botocore looks for where it is told to: a bit was flipped on the way.
    return isinstance(
        error, BotoConnectionError | HTTPClientError | IncompleteReadError | FlexibleChecksumError
    )


def _rest(pieces: Sequence[memoryview], skip: int) -> Iterator[memoryview]:
    """Yield what remains of the pieces after the first `skip` bytes."""
    for piece in pieces:
        if skip < piece.nbytes:
            yield piece[skip:]
        skip = max(skip - piece.nbytes, 0)


class S3Store:
    """A prefix of a bucket."""

    def __init__(
        self,
        connection: _Connection,
        bucket: str,
        prefix: str,
        patience_seconds: float = _PATIENCE_SECONDS,
    ) -> None:
        self._connection, self._bucket, self._prefix = connection, bucket, prefix
        self._client, self._patience_seconds = connection.client, patience_seconds

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> ObjectInfo:
        return self._put(key, [memoryview(data).cast("B")], if_absent=if_absent).info

    def upload(self, key: str, parts: Sequence[Sequence[memoryview]]) -> Uploaded:
        if len(parts) == 1:
            return self._put(key, parts[0], if_absent=False)
        name = _under(self._prefix, key)
        upload_id = self._call("write", key, lambda: self._begin(name))
        try:
            sent = self._send(key, name, upload_id, parts)
            self._call("write", key, lambda: self._complete(key, name, upload_id, [part for part, _ in sent]))
        except BaseException:
            # Best effort: where this fails too, the bucket's lifecycle rule collects the parts.
            with contextlib.suppress(BotoCoreError, ClientError, ResponseParserError):
                self._abort(name, upload_id)
            raise
        info = self._head(key)
        size = sum(piece.nbytes for part in parts for piece in part)
        if info.size != size:
            raise ObjectChangedError(f"{self.uri}/{key}: has {info.size} bytes after an upload of {size}")
        return Uploaded(info, tuple(crc32 for _, crc32 in sent))

    def get(self, key: str) -> bytes:
        name = _under(self._prefix, key)

        def fetch() -> bytes:
            with contextlib.closing(self._client.get_object(Bucket=self._bucket, Key=name)["Body"]) as body:
                return body.read()

        return self._call("read", key, fetch)

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        name = _under(self._prefix, key)
        total = sum(piece.nbytes for piece in pieces)
        done = 0

        def fetch() -> None:
            nonlocal done
            request: GetObjectRequestTypeDef = {
                "Bucket": self._bucket,
                "Key": name,
                "Range": f"bytes={offset + done}-{offset + total - 1}",
            }
            if etag is not None:
                request["IfMatch"] = f'"{etag}"'
            answer = self._client.get_object(**request)
            _expect(answer, "ContentRange")
            with contextlib.closing(answer["Body"]) as body:
                if answer["ContentLength"] != total - done:
                    raise ObjectChangedError(f"{self.uri}/{key}: ends before byte {offset + total}")
                for piece in _rest(pieces, done):
                    filled = 0
                    while filled < piece.nbytes:
                        # In slices: the library below makes a copy of what one read returns.
                        data = body.read(min(piece.nbytes - filled, _SLICE_BYTES))
                        if not data:
                            raise IncompleteReadError(actual_bytes=done, expected_bytes=total)
                        piece[filled : filled + len(data)] = data
                        filled += len(data)
                        done += len(data)  # a retry goes on from here

        if total:
            self._call("read", key, fetch, progress=lambda: done)

    def head(self, key: str) -> ObjectInfo | None:
        name = _under(self._prefix, key)

        def ask() -> ObjectInfo | None:
            try:
                answer = self._client.head_object(Bucket=self._bucket, Key=name)
            except ClientError as error:
                if _status(error) == 404:
                    return None
                raise
            _expect(answer, "ETag")
            return ObjectInfo(key, answer["ContentLength"], answer["ETag"].strip('"'), answer["LastModified"])

        return self._call("read", key, ask)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        skip = len(_folder(self._prefix))
        for page in self._pages(prefix, ""):
            for entry in page.get("Contents", ()):
                key = entry["Key"][skip:]
                if key and not key.endswith("/"):  # empty objects that some tools make to show folders
                    yield ObjectInfo(key, entry["Size"], entry["ETag"].strip('"'), entry["LastModified"])

    def folders(self, prefix: str = "") -> Iterator[str]:
        folder = _folder(prefix)
        skip = len(_folder(self._prefix) + folder)
        for page in self._pages(folder, "/"):
            for entry in page.get("CommonPrefixes", ()):
                yield entry["Prefix"][skip:].rstrip("/")

    def delete(self, keys: Iterable[str]) -> None:
        names = (_under(self._prefix, key) for key in keys)
        while batch := list(islice(names, _DELETE_BATCH)):
            self._call("delete", "", partial(self._delete, batch))

    def child(self, prefix: str) -> "S3Store":
        name = _under(self._prefix, prefix.strip("/"))
        return S3Store(self._connection, self._bucket, name, self._patience_seconds)

    def patient(self, seconds: float) -> "S3Store":
        return S3Store(self._connection, self._bucket, self._prefix, seconds)

    def discard_unfinished(self, older_than_seconds: float) -> Sequence[str]:
        border = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        folder = _folder(self._prefix)
        discarded = []
        request: ListMultipartUploadsRequestTypeDef = {"Bucket": self._bucket, "Prefix": folder}
        while True:
            page = self._call("list", "", partial(self._client.list_multipart_uploads, **request))
            for found in page.get("Uploads", ()):
                name = found["Key"]
                # Not every server heeds the prefix.
                if name.startswith(folder) and found["Initiated"] < border:
                    self._call("delete", "", partial(self._abort, name, found["UploadId"]))
                    discarded.append(name[len(folder) :])
            if not page.get("IsTruncated"):
                return discarded
            request["KeyMarker"], request["UploadIdMarker"] = (
                page["NextKeyMarker"],
                page["NextUploadIdMarker"],
            )

    def probe(self, *, write: bool = True) -> Probe:
        hasty = self.patient(min(self._patience_seconds, _PROBE_PATIENCE_SECONDS))
        hasty._call("list", "", lambda: hasty._page("", "", "", limit=1))
        if not write:
            return Probe(writable=False, conditional_writes=False)
        return _probe_writes(self)

    def _put(self, key: str, pieces: Sequence[memoryview], *, if_absent: bool) -> Uploaded:
        name = _under(self._prefix, key)
        crc32 = _crc32(pieces)
        request: PutObjectRequestTypeDef = {
            "Bucket": self._bucket,
            "Key": name,
            "ChecksumCRC32": _base64(crc32),
        }
        if if_absent:
            request["IfNoneMatch"] = "*"

        def send() -> None:
            _expect(self._client.put_object(**request | {"Body": _body(pieces)}), "ETag")

        self._call("write", key, send)
        return Uploaded(self._head(key), (crc32,))

    def _head(self, key: str) -> ObjectInfo:
        info = self.head(key)
        if info is None:
            raise ObjectMissingError(f"{self.uri}/{key}: gone right after it was written")
        return info

    def _begin(self, name: str) -> str:
        answer = self._client.create_multipart_upload(
            Bucket=self._bucket, Key=name, ChecksumAlgorithm="CRC32"
        )
        _expect(answer, "UploadId")
        return answer["UploadId"]

    def _abort(self, name: str, upload_id: str) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload_id)
        except ClientError as error:
            if _code(error) != "NoSuchUpload":  # it has ended since
                raise

    def _send(
        self, key: str, name: str, upload_id: str, parts: Sequence[Sequence[memoryview]]
    ) -> Sequence[tuple["CompletedPartTypeDef", int]]:
        """Send all parts, a few at a time; returns what completes the upload, and the CRC32s."""

        def send(index: int, pieces: Sequence[memoryview]) -> tuple["CompletedPartTypeDef", int]:
            crc32 = _crc32(pieces)
            checksum = _base64(crc32)

            def attempt() -> str:
                answer = self._client.upload_part(
                    Bucket=self._bucket,
                    Key=name,
                    UploadId=upload_id,
                    PartNumber=index + 1,
                    Body=_body(pieces),
                    ChecksumCRC32=checksum,
                )
                _expect(answer, "ETag")
                return answer["ETag"]

            etag = self._call("write", key, attempt)
            return {"PartNumber": index + 1, "ETag": etag, "ChecksumCRC32": checksum}, crc32

        return in_parallel(send, parts)

    def _complete(self, key: str, name: str, upload_id: str, sent: Sequence["CompletedPartTypeDef"]) -> None:
        try:
            self._client.complete_multipart_upload(
                Bucket=self._bucket, Key=name, UploadId=upload_id, MultipartUpload={"Parts": sent}
            )
        except ClientError as error:
            # A retry whose first attempt did it, though the answer was lost. The caller compares the size.
            if _code(error) != "NoSuchUpload" or self.head(key) is None:
                raise

    def _delete(self, names: Sequence[str]) -> None:
        answer = self._client.delete_objects(
            Bucket=self._bucket, Delete={"Objects": [{"Key": name} for name in names], "Quiet": True}
        )
        for refused in answer.get("Errors", ()):
            if refused.get("Code") != "NoSuchKey":
                code, message = refused.get("Code", ""), refused.get("Message", "")
                raise ClientError({"Error": {"Code": code, "Message": message}}, "DeleteObjects")

    def _pages(self, prefix: str, delimiter: str) -> Iterator["ListObjectsV2OutputTypeDef"]:
        token = ""
        while True:
            page = self._call("list", prefix, partial(self._page, prefix, delimiter, token))
            yield page
            if not page.get("IsTruncated"):
                return
            token = page["NextContinuationToken"]

    def _page(
        self, prefix: str, delimiter: str, token: str, limit: int = 1000
    ) -> "ListObjectsV2OutputTypeDef":
        request: ListObjectsV2RequestTypeDef = {
            "Bucket": self._bucket,
            "Prefix": _folder(self._prefix) + prefix,
            "MaxKeys": limit,
        }
        if delimiter:
            request["Delimiter"] = delimiter
        if token:
            request["ContinuationToken"] = token
        page = self._client.list_objects_v2(**request)
        _expect(page, "IsTruncated")
        return page

    def _call(
        self,
        what: str,
        key: str,
        call: Callable[[], _T],
        progress: Callable[[], int] = lambda: 0,
    ) -> _T:
        """Return what the call returns, tried again with growing random waits while that may help.

        Patience is counted in seconds, since a count of attempts says nothing of an outage: refused
        connections use it up in no time, silent ones take a timeout each. It begins with the first failure,
        and anew where `progress` grows. So a call ends at most patience + 2 timeouts after its last progress.
        """
        failures, deadline, seen = 0, math.inf, progress()
        while True:
            try:
                return call()
            except (BotoCoreError, ClientError, ResponseParserError) as error:
                failures += 1
                if failures == 1 or progress() > seen:
                    failures, seen = 1, progress()
                    deadline = time.monotonic() + self._patience_seconds
                longest = min(_FIRST_WAIT_SECONDS * 2 ** (failures - 1), _LONGEST_WAIT_SECONDS)
                # Random, so that the ranks of a job do not come back all at once.
                seconds = random.uniform(0, longest)  # noqa: S311
                if not _transient(error) or time.monotonic() + seconds > deadline:
                    raise self._explain(what, key, error) from error
                _logger.info("%s/%s: %s failed, again in %.1f s: %s", self.uri, key, what, seconds, error)
                time.sleep(seconds)

    def _explain(self, what: str, key: str, error: _RequestError) -> StoreError:
        """Return the error to raise: one line with the place, the cause and the remedy."""
        place = f"{self.uri}/{key}" if key else self.uri
        endpoint = self._client.meta.endpoint_url
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return AccessDeniedError(
                f"{place}: no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if isinstance(error, CredentialRetrievalError | TokenRetrievalError | SSOError):
            return AccessDeniedError(f"{place}: no AWS credentials: {_one_line(error)}; log in again")
        if isinstance(error, SSLError):
            return EndpointError(f"{place}: {endpoint} is not trusted: {_one_line(error)}; see AWS_CA_BUNDLE")
        if isinstance(
            error, BotoConnectionError | HTTPClientError | IncompleteReadError | ResponseParserError
        ):
            return EndpointError(
                f"{place}: no good answer from {endpoint} ({type(error).__name__}); "
                "is it running, and is AWS_ENDPOINT_URL right?"
            )
        if isinstance(error, FlexibleChecksumError):
            return ObjectChangedError(f"{place}: does not have the checksum that it was stored with")
        if isinstance(error, BotoCoreError):
            return StoreError(f"{place}: cannot {what}: {_one_line(error)}")
        code, status = _code(error), _status(error)
        if code == "NoSuchBucket":
            return BucketMissingError(
                f"{place}: bucket {self._bucket} does not exist at {endpoint}; "
                f"create it with: aws s3 mb s3://{self._bucket}"
            )
        if code in _BAD_KEYS:
            wrong = "its secret key is wrong" if code == "SignatureDoesNotMatch" else "it is not known there"
            return AccessDeniedError(f"{place}: {endpoint} refuses {self._credentials()}: {wrong} ({code})")
        if code in _EXPIRED:
            return AccessDeniedError(
                f"{place}: the session token of {self._credentials()} has expired; log in again ({code})"
            )
        if code == "RequestTimeTooSkewed":
            return AccessDeniedError(f"{place}: the clock of this machine is off, set it right ({code})")
        if status == 412 or code == "PreconditionFailed":
            if what == "write":
                return ObjectExistsError(f"{place}: exists already")
            return ObjectChangedError(f"{place}: has been replaced by another object since")
        if status == 416:
            return ObjectChangedError(f"{place}: ends before the range that was asked for")
        if code == "NoSuchKey" or (status == 404 and what == "read"):
            return ObjectMissingError(f"{place}: no such object")
        if status == 403 or code == "AccessDenied":
            return AccessDeniedError(
                f"{place}: {self._credentials()} may not {what} here; use others, or grant the right ({code})"
            )
        if status in (301, 307) or code in ("AuthorizationHeaderMalformed", "PermanentRedirect"):
            return StoreError(f"{place}: the bucket is in another region; set AWS_REGION ({code})")
        message = error.response.get("Error", {}).get("Message", "")
        return StoreError(f"{place}: cannot {what}: {code} {_one_line(message)}")

    def _credentials(self) -> str:
        """Return which credentials are in use, without showing them."""
        with contextlib.suppress(BotoCoreError):
            found = self._connection.session.get_credentials()
            if found is not None:
                key = found.get_frozen_credentials().access_key or ""
                return f"access key {key[:4]}… (found in: {found.method})"
        return "the AWS credentials"


def _probe_writes(store: Store) -> Probe:
    """Write, write again on condition that nothing is there, and clean up."""
    key = f".probe-{uuid.uuid4().hex}"
    try:
        store.put(key, b"", if_absent=True)
        try:
            store.put(key, b"", if_absent=True)
        except ObjectExistsError:
            conditional = True
        else:
            conditional = False
            _logger.warning(
                "%s: conditional writes are not honoured; never let two jobs write one run", store.uri
            )
    finally:
        with contextlib.suppress(AccessDeniedError):  # where the write was refused, there is nothing to clean
            store.delete([key])
    return Probe(writable=True, conditional_writes=conditional)


# ── A local folder ──────────────────────────────────────────────────────────────────────────────────────


class LocalStore:
    """A folder; made by the first write. Objects are files that appear by a rename or a hard link."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def __repr__(self) -> str:
        return f"LocalStore({self.uri!r})"

    @property
    def uri(self) -> str:
        return self._root.as_uri()

    @property
    def folder(self) -> Path:
        """The folder itself, for what must be appended to in place."""
        return self._root

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> ObjectInfo:
        return self._write(key, [[memoryview(data).cast("B")]], if_absent=if_absent).info

    def upload(self, key: str, parts: Sequence[Sequence[memoryview]]) -> Uploaded:
        return self._write(key, parts, if_absent=False)

    def get(self, key: str) -> bytes:
        with self._errors("read", key):
            return self._path(key).read_bytes()

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        with self._errors("read", key), self._path(key).open("rb", buffering=0) as file:
            if etag not in (None, _etag(os.fstat(file.fileno()))):
                raise ObjectChangedError(f"{self.uri}/{key}: has been replaced by another object since")
            file.seek(offset)
            for piece in pieces:
                filled = 0
                while filled < piece.nbytes:
                    count = file.readinto(piece[filled:])
                    if not count:
                        raise ObjectChangedError(
                            f"{self.uri}/{key}: ends before the range that was asked for"
                        )
                    filled += count

    def head(self, key: str) -> ObjectInfo | None:
        with self._errors("read", key):
            path = self._path(key)
            return _local_info(key, path.stat()) if path.is_file() else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        yield from sorted(self._walk(prefix), key=lambda info: info.key)

    def folders(self, prefix: str = "") -> Iterator[str]:
        folder = _folder(prefix)
        yield from sorted(
            {
                rest.partition("/")[0]
                for rest in (info.key[len(folder) :] for info in self._walk(folder))
                if "/" in rest
            }
        )

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._errors("delete", key):
                path = self._path(key)
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # a folder is there only while something is in it
                    for parent in path.parents:
                        if parent == self._root:
                            break
                        parent.rmdir()

    def child(self, prefix: str) -> "LocalStore":
        return LocalStore(self._path(prefix.strip("/")))

    def patient(self, seconds: float) -> "LocalStore":  # no failure here goes by itself
        return self

    def discard_unfinished(self, older_than_seconds: float) -> Sequence[str]:
        border = time.time() - older_than_seconds
        discarded = []
        for folder, _, names in os.walk(self._root):
            for path in (Path(folder, name) for name in names if name.startswith(_PARTIAL)):
                with self._errors("delete", ""), contextlib.suppress(FileNotFoundError):  # ended since
                    if path.stat().st_mtime < border:
                        path.unlink()
                        discarded.append(path.relative_to(self._root).as_posix())
        return discarded

    def probe(self, *, write: bool = True) -> Probe:
        if write:
            return _probe_writes(self)
        if not self._root.is_dir():
            raise BucketMissingError(f"{self.uri}: no such folder")
        with self._errors("list", ""):
            next(os.scandir(self._root), None)
        return Probe(writable=False, conditional_writes=False)

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        start = self._root / prefix.rpartition("/")[0]
        if not start.resolve().is_relative_to(self._root):
            raise StoreError(f"{self.uri}: {prefix!r} lies outside")
        for folder, _, names in os.walk(start):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix) and not name.startswith(_PARTIAL):
                    with contextlib.suppress(FileNotFoundError):  # deleted since
                        yield _local_info(key, path.stat())

    def _write(self, key: str, parts: Sequence[Sequence[memoryview]], *, if_absent: bool) -> Uploaded:
        with self._errors("write", key):
            path = self._path(key)
            while True:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial_path = path.with_name(f"{_PARTIAL}{uuid.uuid4().hex}")
                try:
                    file = partial_path.open("xb")
                    break
                except FileNotFoundError:  # the folder was empty, and a delete has just taken it away
                    continue
            try:
                with file:
                    for part in parts:
                        for piece in part:
                            file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
                    info = _local_info(key, os.fstat(file.fileno()))
                if if_absent:
                    os.link(partial_path, path)  # unlike a rename, this refuses to replace
                else:
                    partial_path.replace(path)
            finally:
                partial_path.unlink(missing_ok=True)
            _sync_folder(path.parent)
        return Uploaded(info, tuple(_crc32(part) for part in parts))

    def _path(self, key: str) -> Path:
        path = self._root / _checked(key)
        if not path.resolve().is_relative_to(self._root):
            raise StoreError(f"{self.uri}/{key}: leads out of the store by a symbolic link")
        return path

    @contextlib.contextmanager
    def _errors(self, what: str, key: str) -> Iterator[None]:
        place = f"{self.uri}/{key}" if key else self.uri
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ObjectMissingError(f"{place}: no such object") from error
        except FileExistsError as error:
            raise ObjectExistsError(f"{place}: exists already") from error
        except PermissionError as error:
            raise AccessDeniedError(f"{place}: this user may not {what} here ({error.strerror})") from error
        except OSError as error:
            raise StoreError(f"{place}: cannot {what}: {error.strerror or _one_line(error)}") from error


def _etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


def _local_info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, found.st_size, _etag(found), datetime.fromtimestamp(found.st_mtime, UTC))


def _sync_folder(folder: Path) -> None:
    """Make the entries of a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ── Memory ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Memory:
    """What all stores of one name share."""

    objects: dict[str, tuple[ObjectInfo, bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


_memories: dict[str, _Memory] = {}


class MemoryStore:
    """Objects that live as long as this process: a fake for tests and for runs that keep nothing."""

    def __init__(self, name: str, prefix: str) -> None:
        self._name, self._prefix = name, prefix
        self._memory = _memories.setdefault(name, _Memory())

    def __repr__(self) -> str:
        return f"MemoryStore({self.uri!r})"

    @property
    def uri(self) -> str:
        return f"memory://{self._name}/{self._prefix}".rstrip("/")

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> ObjectInfo:
        return self._write(key, bytes(data), if_absent=if_absent)

    def upload(self, key: str, parts: Sequence[Sequence[memoryview]]) -> Uploaded:
        data = b"".join(piece for part in parts for piece in part)
        return Uploaded(self._write(key, data, if_absent=False), tuple(_crc32(part) for part in parts))

    def get(self, key: str) -> bytes:
        return self._find(key)[1]

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        info, data = self._find(key)
        if etag not in (None, info.etag):
            raise ObjectChangedError(f"{self.uri}/{key}: has been replaced by another object since")
        if offset + sum(piece.nbytes for piece in pieces) > info.size:
            raise ObjectChangedError(f"{self.uri}/{key}: ends before the range that was asked for")
        for piece in pieces:
            piece[:] = memoryview(data)[offset : offset + piece.nbytes]
            offset += piece.nbytes

    def head(self, key: str) -> ObjectInfo | None:
        found = self._memory.objects.get(_under(self._prefix, key))
        return self._relative(found[0]) if found else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._memory.lock:
            items = sorted(self._memory.objects.items())
        start = _folder(self._prefix) + prefix
        yield from (self._relative(info) for name, (info, _) in items if name.startswith(start))

    def folders(self, prefix: str = "") -> Iterator[str]:
        folder = _folder(prefix)
        rests = (info.key[len(folder) :] for info in self.list(folder))
        yield from sorted({rest.partition("/")[0] for rest in rests if "/" in rest})

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._memory.lock:
                self._memory.objects.pop(_under(self._prefix, key), None)

    def child(self, prefix: str) -> "MemoryStore":
        return MemoryStore(self._name, _under(self._prefix, prefix.strip("/")))

    def patient(self, seconds: float) -> "MemoryStore":  # nothing here ever fails
        return self

    def discard_unfinished(self, older_than_seconds: float) -> Sequence[str]:
        return ()

    def probe(self, *, write: bool = True) -> Probe:
        return Probe(writable=write, conditional_writes=write)

    def _write(self, key: str, data: bytes, *, if_absent: bool) -> ObjectInfo:
        name = _under(self._prefix, key)
        info = ObjectInfo(name, len(data), f"{zlib.crc32(data):08x}-{len(data):x}", datetime.now(UTC))
        with self._memory.lock:
            if if_absent and name in self._memory.objects:
                raise ObjectExistsError(f"{self.uri}/{key}: exists already")
            self._memory.objects[name] = (info, data)
        return self._relative(info)

    def _find(self, key: str) -> tuple[ObjectInfo, bytes]:
        try:
            return self._memory.objects[_under(self._prefix, key)]
        except KeyError:
            raise ObjectMissingError(f"{self.uri}/{key}: no such object") from None

    def _relative(self, info: ObjectInfo) -> ObjectInfo:
        return replace(info, key=info.key[len(_folder(self._prefix)) :])
