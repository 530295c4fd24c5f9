"""Upload one object in parts."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from jebm.errors import StoreError
from jebm.store.protocol import crc32_of, in_parallel
from jebm.store.s3_bodies import base64_of, body_of
from jebm.store.s3_calls import Calls
from jebm.store.s3_dialect import Dialect, Feature
from jebm.store.s3_errors import code_of, expect

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import (
        CompletedPartTypeDef,
        CreateMultipartUploadRequestTypeDef,
        UploadPartRequestTypeDef,
    )

__all__ = ["MultipartUpload", "abort"]


class MultipartUpload:
    """A multipart upload: all its requests except those about the whole object."""

    def __init__(self, calls: Calls, dialect: Dialect, name: str, place: str) -> None:
        self._calls, self._dialect, self._name, self._place = calls, dialect, name, place
        self._client, self._bucket = calls.connection.client, calls.bucket
        self._features: list[Feature] = ["checksums"] if calls.connection.checksums else []

    def send(self, parts: Sequence[Sequence[memoryview]], exists: Callable[[], bool]) -> tuple[int, ...]:
        """Send all parts and return the CRC32 of each; raises StoreError, leaving nothing behind.

        `exists()` returns whether the object is there: the response to the last request may have been lost.
        """
        crc32s = [crc32_of(part) for part in parts]
        upload = self._tried(self._begin)
        try:
            etags = in_parallel(
                lambda index, part: self._tried(partial(self._part, upload, index, part, crc32s[index])),
                parts,
            )
            self._tried(partial(self._complete, upload, etags, crc32s, exists))
        except BaseException:
            # Best effort: if this fails too, the bucket's lifecycle rule collects the parts.
            with contextlib.suppress(StoreError):
                hasty = Calls(self._calls.connection, self._bucket, 0, None)
                hasty("delete", self._place, partial(abort, hasty, self._name, upload))
            raise
        return tuple(crc32s)

    def _tried(self, send: Callable[[Collection[Feature]], str]) -> str:
        return self._calls("write", self._place, lambda: self._dialect.tried(self._features, send))

    def _begin(self, features: Collection[Feature]) -> str:
        request: CreateMultipartUploadRequestTypeDef = {"Bucket": self._bucket, "Key": self._name}
        if "checksums" in features:
            request["ChecksumAlgorithm"] = "CRC32"
        answer = self._client.create_multipart_upload(**request)
        expect(answer, "UploadId")
        return answer["UploadId"]

    def _part(
        self,
        upload: str,
        index: int,
        pieces: Sequence[memoryview],
        crc32: int,
        features: Collection[Feature],
    ) -> str:
        request: UploadPartRequestTypeDef = {
            "Bucket": self._bucket,
            "Key": self._name,
            "UploadId": upload,
            "PartNumber": index + 1,
            "Body": body_of(pieces),
        }
        if "checksums" in features:
            request["ChecksumCRC32"] = base64_of(crc32)
        answer = self._client.upload_part(**request)
        expect(answer, "ETag")
        return answer["ETag"]

    def _complete(
        self,
        upload: str,
        etags: Sequence[str],
        crc32s: Sequence[int],
        exists: Callable[[], bool],
        features: Collection[Feature],
    ) -> str:
        parts: list[CompletedPartTypeDef] = []
        for index, (etag, crc32) in enumerate(zip(etags, crc32s, strict=True)):
            parts.append({"PartNumber": index + 1, "ETag": etag})
            if "checksums" in features:
                parts[-1]["ChecksumCRC32"] = base64_of(crc32)
        try:
            self._client.complete_multipart_upload(
                Bucket=self._bucket, Key=self._name, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except ClientError as error:
            # The first attempt succeeded but its response was lost. The caller compares the size.
            if code_of(error) != "NoSuchUpload" or not exists():
                raise
        return upload


def abort(calls: Calls, name: str, upload: str) -> None:
    """Abort an upload; one that has ended meanwhile is fine. Raises what botocore raises."""
    try:
        calls.connection.client.abort_multipart_upload(Bucket=calls.bucket, Key=name, UploadId=upload)
    except ClientError as error:
        if code_of(error) != "NoSuchUpload":
            raise
