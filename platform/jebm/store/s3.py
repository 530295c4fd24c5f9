"""Objects in a bucket of S3, or of what speaks like it. Retries are ours, and so are the CRC32s."""

import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
)
from botocore.parsers import ResponseParserError

from jebm.store.protocol import (
    ObjectChangedError,
    ObjectInfo,
    ObjectMissingError,
    Probe,
    Uploaded,
    crc32_of,
    folder_of,
    in_parallel,
    probe_writes,
    under,
)
from jebm.store.s3_bodies import base64_of, body_of, rest_of
from jebm.store.s3_errors import code_of, expect, explain, status_of, transient
from jebm.store.s3_session import Connection

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import (
        CompletedPartTypeDef,
        GetObjectRequestTypeDef,
        ListMultipartUploadsRequestTypeDef,
        ListObjectsV2OutputTypeDef,
        ListObjectsV2RequestTypeDef,
        PutObjectRequestTypeDef,
    )

__all__ = ["S3Store"]

_PATIENCE_SECONDS = 30.0  # a server restart, or a burst of SlowDown; after that a person wants to know
_PROBE_PATIENCE_SECONDS = 1.0  # at a start a wrong endpoint is likelier than a busy one
_FIRST_WAIT_SECONDS = 0.25
_LONGEST_WAIT_SECONDS = 10.0
_SLICE_BYTES = 1 << 18  # what a read copies at a time on its way into the caller's memory
_PAGE = 1000  # the most that one listing gives
_DELETE_BATCH = 1000  # the most that one DeleteObjects takes


_logger = logging.getLogger(__name__)
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
            expect(answer, "ContentRange")
            with contextlib.closing(answer["Body"]) as body:
                if answer["ContentLength"] != total - done:
                    raise ObjectChangedError(f"{self.uri}/{key}: ends before byte {offset + total}")
                for piece in rest_of(pieces, done):
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
                if status_of(error) == 404:
                    return None
                raise
            expect(answer, "ETag")
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
            "ChecksumCRC32": base64_of(crc32),
        }
        if if_absent:
            request["IfNoneMatch"] = "*"

        def send() -> None:
            expect(self._client.put_object(**request | {"Body": body_of(pieces)}), "ETag")

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
        expect(answer, "UploadId")
        return answer["UploadId"]

    def _abort(self, name: str, upload_id: str) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload_id)
        except ClientError as error:
            if code_of(error) != "NoSuchUpload":  # it has ended since
                raise

    def _send(
        self, key: str, name: str, upload_id: str, parts: Sequence[Sequence[memoryview]]
    ) -> Sequence[tuple["CompletedPartTypeDef", int]]:
        """Send all parts, a few at a time; returns what completes the upload, and the CRC32s."""

        def send(index: int, pieces: Sequence[memoryview]) -> tuple["CompletedPartTypeDef", int]:
            crc32 = crc32_of(pieces)
            checksum = base64_of(crc32)

            def attempt() -> str:
                answer = self._client.upload_part(
                    Bucket=self._bucket,
                    Key=name,
                    UploadId=upload_id,
                    PartNumber=index + 1,
                    Body=body_of(pieces),
                    ChecksumCRC32=checksum,
                )
                expect(answer, "ETag")
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
            if code_of(error) != "NoSuchUpload" or self.head(key) is None:
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
        expect(page, "IsTruncated")
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
                if not transient(error) or time.monotonic() + seconds > deadline:
                    place = f"{self.uri}/{key}" if key else self.uri
                    raise explain(error, what, place, self._bucket, self._connection) from error
                _logger.info("%s/%s: %s failed, again in %.1f s: %s", self.uri, key, what, seconds, error)
                time.sleep(seconds)
                if self._on_retry is not None:
                    self._on_retry()
