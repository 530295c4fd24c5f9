"""The pages of a listing of S3, which must come to an end."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jebm.errors import StoreError
from jebm.store.protocol import ObjectInfo
from jebm.store.s3_dialect import Dialect, Feature
from jebm.store.s3_errors import NoContinuationError, expect

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import (
        ListObjectsOutputTypeDef,
        ListObjectsV2OutputTypeDef,
    )

__all__ = ["Listing", "Page", "Steps"]

_PAGE = 1000  # the most that one listing gives
_EMPTY_PAGES = 1000  # so many in a row and it will not end: S3 gives some where much was deleted


@dataclass(frozen=True)
class Page:
    """What one request found, with whole names; the first and the last of all, heeding no prefix."""

    objects: list[ObjectInfo]
    folders: list[str]
    first: str
    last: str
    truncated: bool


class Steps:
    """Where a listing has been, so that it does not go in circles."""

    def __init__(self, place: str) -> None:
        self._place, self._seen, self._empty = place, set[tuple[str, str]](), 0

    def step(self, *names: str) -> None:
        """Note where the next page begins, and what this one begins with.

        Raises StoreError if that was so before, or nothing has come for long.
        """
        new = {(str(index), name) for index, name in enumerate(names) if name}
        self._empty = 0 if names[-1] else self._empty + 1
        if new & self._seen or self._empty >= _EMPTY_PAGES:
            raise StoreError(
                f"{self._place}: the server's listing does not end: it sends the same page again and again; "
                "use another server or gateway"
            )
        self._seen |= new


class Listing:
    """One listing, page by page; a `page` that fails may be asked for again."""

    def __init__(
        self,
        client: "S3Client",
        dialect: Dialect,
        bucket: str,
        prefix: str,
        *,
        by_folder: bool,
        limit: int | None = None,
    ) -> None:
        self._client, self._dialect, self._limit = client, dialect, limit
        self._bucket, self._prefix, self._by_folder = bucket, prefix, by_folder
        self._steps = Steps(f"s3://{bucket}/{prefix}")
        self._token, self._marker = "", ""
        self.ended = False

    def page(self) -> Page:
        """Return the next page; raises what botocore raises, StoreError if the listing does not end."""
        page, token, marker = self._dialect.tried(["listing V2"], self._fetch)
        self.ended = not marker and not token
        if not self.ended:
            self._steps.step(token or marker, page.first)
        self._token, self._marker = token, marker
        return page

    def _fetch(self, features: Collection[Feature]) -> tuple[Page, str, str]:
        """Return a page; of the next one the token, and the last name before it, by which V1 finds it."""
        if "listing V2" in features:
            second = self._client.list_objects_v2(**self._request(ContinuationToken=self._token))
            page, token = self._page(second), second.get("NextContinuationToken", "")
            marker = page.last or self._marker
            follows = bool(token)
        else:
            first = self._client.list_objects(**self._request(Marker=self._marker))
            page, token = self._page(first), ""
            marker = first.get("NextMarker") or page.last
            follows = bool(marker)
        if not page.truncated:
            return page, "", ""
        if not follows:  # for a listing V2 perhaps an answer of the first version
            raise NoContinuationError("a listing that goes on, but not where")
        return page, token, marker

    def _request(self, **begin: str) -> Any:  # noqa: ANN401  (of two operations)
        """Return what to ask for; on the first page that does not say where to begin."""
        request = {"Bucket": self._bucket, "Prefix": self._prefix, "MaxKeys": self._limit or _PAGE}
        optional = begin | {"Delimiter": "/" if self._by_folder else ""}
        return request | {name: value for name, value in optional.items() if value}

    def _page(self, answer: "ListObjectsOutputTypeDef | ListObjectsV2OutputTypeDef") -> Page:
        expect(answer, "IsTruncated")
        objects = [
            ObjectInfo(entry["Key"], entry["Size"], entry["ETag"].strip('"'), entry["LastModified"])
            for entry in answer.get("Contents", ())
        ]
        folders = [entry["Prefix"] for entry in answer.get("CommonPrefixes", ())]
        names = [info.key for info in objects] + folders
        return Page(
            # Not every server heeds the prefix.
            [info for info in objects if info.key.startswith(self._prefix)],
            [name for name in folders if name.startswith(self._prefix)],
            min(names, default=""),
            max(names, default=""),
            answer["IsTruncated"],
        )
