"""Objects in a bucket of S3, or of what speaks like it. Retries are ours, and so are the CRC32s.

Credentials come from the provider chain of AWS (environment, profile, instance role) and from nowhere else,
so that none can end up in a URI, a log or a manifest.
"""

import base64
import contextlib
import io
import logging
import math
import os
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar
from urllib.parse import urlsplit

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
from jebm.store.protocol import (
    PART_THREADS,
    AccessDeniedError,
    BucketMissingError,
    EndpointError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    Probe,
    Uploaded,
    crc32_of,
    folder_of,
    in_parallel,
    one_line,
    probe_writes,
    under,
)

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

__all__ = ["Connection", "S3Store", "arrow_options", "connect"]

_PATIENCE_SECONDS = 30.0  # a server restart, or a burst of SlowDown; after that a person wants to know
_PROBE_PATIENCE_SECONDS = 1.0  # at a start a wrong endpoint is likelier than a busy one
_CONNECT_TIMEOUT_SECONDS = 10.0
_READ_TIMEOUT_SECONDS = 20.0  # between two bytes, or before the first: far above what a busy server takes
_FIRST_WAIT_SECONDS = 0.25
_LONGEST_WAIT_SECONDS = 10.0
_BODY_BYTES = 1 << 16  # what a write copies at a time out of the caller's memory
_SLICE_BYTES = 1 << 18  # what a read copies at a time on its way into the caller's memory
_PAGE = 1000  # the most that one listing gives
_DELETE_BATCH = 1000  # the most that one DeleteObjects takes
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
_T = TypeVar("_T")


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


@dataclass(frozen=True)
class Connection:
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


def connect() -> Connection:
    """Return a client as environment and profile want it; raises StoreError where there can be none."""
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
        raise StoreError(f"the AWS configuration cannot be used: {one_line(error)}") from error
    if parameters:  # at this one place, so that no call can forget them
        client.meta.events.register("before-parameter-build.s3", partial(_add_parameters, parameters))
    return Connection(session, client, custom)


def arrow_options() -> dict[str, str]:
    """Return what pyarrow must be told to reach what boto3 reaches."""
    connection = connect()
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
        connection: Connection,
        bucket: str,
        prefix: str,
        patience_seconds: float = _PATIENCE_SECONDS,
        on_retry: Callable[[], None] | None = None,
    ) -> None:
        self._connection, self._bucket, self._prefix = connection, bucket, prefix
        self._client, self._patience_seconds, self._on_retry = connection.client, patience_seconds, on_retry

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
        name = under(self._prefix, key)
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
        name = under(self._prefix, key)

        def fetch() -> bytes:
            with contextlib.closing(self._client.get_object(Bucket=self._bucket, Key=name)["Body"]) as body:
                return body.read()

        return self._call("read", key, fetch)

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        name = under(self._prefix, key)
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
        name = under(self._prefix, key)

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
        skip = len(folder_of(self._prefix))
        for page in self._pages(prefix, ""):
            for entry in page.get("Contents", ()):
                key = entry["Key"][skip:]
                if key and not key.endswith("/"):  # empty objects that some tools make to show folders
                    yield ObjectInfo(key, entry["Size"], entry["ETag"].strip('"'), entry["LastModified"])

    def folders(self, prefix: str = "") -> Iterator[str]:
        folder = folder_of(prefix)
        skip = len(folder_of(self._prefix) + folder)
        for page in self._pages(folder, "/"):
            for entry in page.get("CommonPrefixes", ()):
                yield entry["Prefix"][skip:].rstrip("/")

    def delete(self, keys: Iterable[str]) -> None:
        names = (under(self._prefix, key) for key in keys)
        while batch := list(islice(names, _DELETE_BATCH)):
            self._call("delete", "", partial(self._delete, batch))

    def child(self, prefix: str) -> "S3Store":
        name = under(self._prefix, prefix.strip("/"))
        return S3Store(self._connection, self._bucket, name, self._patience_seconds, self._on_retry)

    def patient(self, seconds: float, on_retry: Callable[[], None] | None = None) -> "S3Store":
        return S3Store(self._connection, self._bucket, self._prefix, seconds, on_retry)

    def discard_unfinished(self, older_than_seconds: float) -> Sequence[str]:
        border = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        folder = folder_of(self._prefix)
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
        hasty = self.patient(min(self._patience_seconds, _PROBE_PATIENCE_SECONDS), self._on_retry)
        hasty._call("list", "", lambda: hasty._page("", "", "", 1))
        if not write:
            return Probe(writable=False, conditional_writes=False)
        return probe_writes(self)

    def _put(self, key: str, pieces: Sequence[memoryview], *, if_absent: bool) -> Uploaded:
        name = under(self._prefix, key)
        crc32 = crc32_of(pieces)
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
            crc32 = crc32_of(pieces)
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
            page = self._call("list", prefix, partial(self._page, prefix, delimiter, token, _PAGE))
            yield page
            if not page.get("IsTruncated"):
                return
            token = page["NextContinuationToken"]

    def _page(self, prefix: str, delimiter: str, token: str, limit: int) -> "ListObjectsV2OutputTypeDef":
        request: ListObjectsV2RequestTypeDef = {
            "Bucket": self._bucket,
            "Prefix": folder_of(self._prefix) + prefix,
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
                if self._on_retry is not None:
                    self._on_retry()

    def _explain(self, what: str, key: str, error: _RequestError) -> StoreError:
        """Return the error to raise: one line with the place, the cause and the remedy."""
        place = f"{self.uri}/{key}" if key else self.uri
        endpoint = self._client.meta.endpoint_url
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return AccessDeniedError(
                f"{place}: no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if isinstance(error, CredentialRetrievalError | TokenRetrievalError | SSOError):
            return AccessDeniedError(f"{place}: no AWS credentials: {one_line(error)}; log in again")
        if isinstance(error, SSLError):
            return EndpointError(f"{place}: {endpoint} is not trusted: {one_line(error)}; see AWS_CA_BUNDLE")
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
            return StoreError(f"{place}: cannot {what}: {one_line(error)}")
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
        return StoreError(f"{place}: cannot {what}: {code} {one_line(message)}")

    def _credentials(self) -> str:
        """Return which credentials are in use, without showing them."""
        with contextlib.suppress(BotoCoreError):
            found = self._connection.session.get_credentials()
            if found is not None:
                key = found.get_frozen_credentials().access_key or ""
                return f"access key {key[:4]}… (found in: {found.method})"
        return "the AWS credentials"
