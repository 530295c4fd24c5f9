"""Objects in a bucket of S3 or a compatible server, with retries and CRC32s of our own."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from botocore.exceptions import ClientError, IncompleteReadError

from jebm.store.protocol import (
    ObjectChangedError,
    ObjectExistsError,
    ObjectInfo,
    Probe,
    Uploaded,
    crc32_of,
    folder_of,
    in_parallel,
    probe_writes,
    under,
)
from jebm.store.s3_bodies import base64_of, body_of, rest_of
from jebm.store.s3_calls import Calls
from jebm.store.s3_dialect import Feature, dialect_of
from jebm.store.s3_errors import VanishedError, code_of, expect, is_bare, refuses_form, status_of, transient
from jebm.store.s3_listing import Listing, Page, Steps
from jebm.store.s3_session import Connection
from jebm.store.s3_upload import MultipartUpload, abort
from jebm.store.s3_watch import moved

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import (
        GetObjectRequestTypeDef,
        ListMultipartUploadsOutputTypeDef,
        ListMultipartUploadsRequestTypeDef,
        MultipartUploadTypeDef,
        PutObjectRequestTypeDef,
    )

__all__ = ["S3Store"]

_PATIENCE_SECONDS = 30.0  # covers a server restart or a burst of SlowDown; then report it
_PROBE_PATIENCE_SECONDS = 1.0  # at startup a wrong endpoint is likelier than a busy one
_SLICE_BYTES = 1 << 17  # copied at a time from socket to caller's memory
_DELETE_BATCH = 1000  # S3's limit for one DeleteObjects

_T = TypeVar("_T")


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
        self._client = connection.client
        self._calls = Calls(connection, bucket, patience_seconds, on_retry)
        self._dialect = dialect_of(connection.client.meta.endpoint_url, bucket)

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def limits(self) -> Mapping[str, str]:
        return self._dialect.lacking

    @property
    def connection(self) -> Connection:
        return self._connection

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> ObjectInfo:
        return self._put(key, [memoryview(data).cast("B")], if_absent=if_absent).info

    def upload(self, key: str, parts: Sequence[Sequence[memoryview]]) -> Uploaded:
        if len(parts) == 1:
            return self._put(key, parts[0], if_absent=False)
        name = under(self._prefix, key)
        sending = MultipartUpload(self._calls, self._dialect, name, f"{self.uri}/{key}")
        crc32s = sending.send(parts, lambda: self.head(key) is not None)
        info = self._call("write", key, partial(self._written, key))
        size = sum(piece.nbytes for part in parts for piece in part)
        if info.size != size:
            raise ObjectChangedError(f"{self.uri}/{key}: has {info.size} bytes after an upload of {size}")
        return Uploaded(info, crc32s)

    def get(self, key: str) -> bytes:
        name = under(self._prefix, key)

        def fetch() -> bytes:
            with contextlib.closing(self._client.get_object(Bucket=self._bucket, Key=name)["Body"]) as body:
                slices = []
                while data := body.read(_SLICE_BYTES):
                    slices.append(data)
                    moved(len(data))
                return b"".join(slices)

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
            expect(answer, "ContentRange")
            with contextlib.closing(answer["Body"]) as body:
                if answer["ContentLength"] != total - done:
                    raise ObjectChangedError(f"{self.uri}/{key}: ends before byte {offset + total}")
                for piece in rest_of(pieces, done):
                    filled = 0
                    while filled < piece.nbytes:
                        # In slices, since the library below copies whatever one read returns.
                        data = body.read(min(piece.nbytes - filled, _SLICE_BYTES))
                        if not data:
                            raise IncompleteReadError(actual_bytes=done, expected_bytes=total)
                        piece[filled : filled + len(data)] = data
                        filled += len(data)
                        done += len(data)  # a retry resumes here
                        moved(len(data))

        if total:
            self._call("read", key, fetch, progress=lambda: done)

    def head(self, key: str) -> ObjectInfo | None:
        name = under(self._prefix, key)

        def ask() -> ObjectInfo | None:
            try:
                answer = self._client.head_object(Bucket=self._bucket, Key=name)
            except ClientError as error:
                if status_of(error) == 404:
                    return None
                if transient(error) and status_of(error) != 400:
                    raise
                return self._head_by_get(key, name, error)
            expect(answer, "ETag")
            return ObjectInfo(key, answer["ContentLength"], answer["ETag"].strip('"'), answer["LastModified"])

        return self._call("read", key, ask)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        skip = len(folder_of(self._prefix))
        for page in self._pages(prefix, by_folder=False):
            for info in page.objects:
                key = info.key[skip:]
                if key and not key.endswith("/"):  # skip the empty objects that some tools create as folders
                    yield replace(info, key=key)

    def folders(self) -> Iterator[str]:
        skip = len(folder_of(self._prefix))
        for page in self._pages("", by_folder=True):
            for name in page.folders:
                yield name[skip:].rstrip("/")

    def delete(self, keys: Iterable[str]) -> None:
        names = (under(self._prefix, key) for key in keys)
        while batch := list(islice(names, _DELETE_BATCH)):
            send = partial(self._dialect.tried, ["multi-delete"], partial(self._delete, batch))
            deleted = self._call("delete", "", send)
            in_parallel(
                lambda _, name: self._call("delete", "", partial(self._delete_one, name)), batch[deleted:]
            )

    def child(self, prefix: str) -> "S3Store":
        return self._with(under(self._prefix, prefix.strip("/")), self._calls)

    def patient(self, seconds: float, on_retry: Callable[[], None] | None = None) -> "S3Store":
        return self._with(self._prefix, replace(self._calls, patience_seconds=seconds, on_retry=on_retry))

    def discard_unfinished(self, older_than_seconds: float) -> Sequence[str]:
        border = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        folder = folder_of(self._prefix)
        discarded = []
        for found in self._uploads(folder):
            name = found["Key"]
            # Not every server honours the prefix.
            if name.startswith(folder) and found["Initiated"] < border:
                self._call("delete", "", partial(abort, self._calls, name, found["UploadId"]))
                discarded.append(name[len(folder) :])
        return discarded

    def probe(self, *, write: bool = True) -> Probe:
        patience = min(self._calls.patience_seconds, _PROBE_PATIENCE_SECONDS)
        hasty = self.patient(patience, self._calls.on_retry)
        next(hasty._pages("", by_folder=False, limit=1))
        if not write:
            return Probe(writable=False, conditional_writes=False)
        found = probe_writes(self)
        if not found.conditional_writes:
            self._dialect.learn("conditional writes", "a second one was not refused")
        return replace(found, conditional_writes=self._dialect.has("conditional writes"))

    def _with(self, prefix: str, calls: Calls) -> "S3Store":
        return S3Store(self._connection, self._bucket, prefix, calls.patience_seconds, calls.on_retry)

    def _call(
        self, what: str, key: str, call: Callable[[], _T], progress: Callable[[], int] = lambda: 0
    ) -> _T:
        return self._calls(what, f"{self.uri}/{key}" if key else self.uri, call, progress)

    def _put(self, key: str, pieces: Sequence[memoryview], *, if_absent: bool) -> Uploaded:
        name, crc32 = under(self._prefix, key), crc32_of(pieces)
        features: list[Feature] = ["checksums"] if self._connection.checksums else []
        if if_absent:
            features.append("conditional writes")

        def send(features: Collection[Feature]) -> None:
            request: PutObjectRequestTypeDef = {"Bucket": self._bucket, "Key": name, "Body": body_of(pieces)}
            if "checksums" in features:
                request["ChecksumCRC32"] = base64_of(crc32)
            if "conditional writes" in features:
                request["IfNoneMatch"] = "*"
            elif if_absent and self.head(key) is not None:
                raise ObjectExistsError(f"{self.uri}/{key}: exists already")
            expect(self._client.put_object(**request), "ETag")

        def send_and_look() -> ObjectInfo:
            self._dialect.tried(features, send)
            return self._written(key)

        return Uploaded(self._call("write", key, send_and_look), (crc32,))

    def _written(self, key: str) -> ObjectInfo:
        """Return the metadata of an object just written; raises VanishedError if it is gone."""
        info = self.head(key)
        if info is None:
            raise VanishedError
        return info

    def _head_by_get(self, key: str, name: str, refusal: ClientError) -> ObjectInfo | None:
        """Request one byte, since a refused HEAD has no body that gives the reason.

        Returns what a HEAD would; raises the reason if this is refused too.
        """
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=name, Range="bytes=0-0")
        except ClientError as error:
            if status_of(error) == 404:
                return None
            if status_of(error) == 416:  # an empty object
                raise refusal from None
            raise
        with contextlib.closing(answer["Body"]):
            expect(answer, "ContentRange")
            size = int(answer["ContentRange"].rpartition("/")[2])
            return ObjectInfo(key, size, answer["ETag"].strip('"'), answer["LastModified"])

    def _delete(self, names: Sequence[str], features: Collection[Feature]) -> int:
        """Delete the first of these objects, all if the server can do so at once; return how many."""
        if "multi-delete" not in features:
            self._delete_one(names[0])
            return 1
        answer = self._client.delete_objects(
            Bucket=self._bucket, Delete={"Objects": [{"Key": name} for name in names], "Quiet": True}
        )
        for refused in answer.get("Errors", ()):
            if refused.get("Code") != "NoSuchKey":
                code, message = refused.get("Code", ""), refused.get("Message", "")
                raise ClientError({"Error": {"Code": code, "Message": message}}, "DeleteObjects")
        return len(names)

    def _delete_one(self, name: str) -> None:
        try:
            self._client.delete_object(Bucket=self._bucket, Key=name)
        except ClientError as error:
            if status_of(error) != 404 or code_of(error) == "NoSuchBucket":
                raise

    def _pages(self, prefix: str, *, by_folder: bool, limit: int | None = None) -> Iterator[Page]:
        whole = folder_of(self._prefix) + prefix
        listing = Listing(self._client, self._dialect, self._bucket, whole, by_folder=by_folder, limit=limit)
        while not listing.ended:
            yield self._call("list", prefix, listing.page)

    def _uploads(self, prefix: str) -> Iterator["MultipartUploadTypeDef"]:
        """Yield the unfinished uploads; none if the server cannot list them."""
        request: ListMultipartUploadsRequestTypeDef = {"Bucket": self._bucket, "Prefix": prefix}
        steps = Steps(self.uri)

        def ask() -> "ListMultipartUploadsOutputTypeDef | None":
            try:
                return self._client.list_multipart_uploads(**request)
            except ClientError as error:
                if not refuses_form(error) or is_bare(error):
                    raise
                self._dialect.learn("listing uploads", error)
                return None

        while (page := self._call("list", "", ask)) is not None:
            found = page.get("Uploads", [])
            yield from found
            if not page.get("IsTruncated"):
                return
            request["KeyMarker"] = page.get("NextKeyMarker", "")
            request["UploadIdMarker"] = page.get("NextUploadIdMarker", "")
            marker = f"{request['KeyMarker']} {request['UploadIdMarker']}"
            steps.step(marker, found[0]["UploadId"] if found else "")
