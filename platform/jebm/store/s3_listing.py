"""The pages of an S3 listing, guarded against listings that never end."""

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

_PAGE = 1000  # S3's limit for one page
_EMPTY_PAGES = 1000  # in a row: endless; S3 sends some after large deletions


@dataclass(frozen=True)
class Page:
    """One request's results, with full names; the first and last of all, whatever their prefix."""

    objects: list[ObjectInfo]
    folders: list[str]
    first: str
    last: str
    truncated: bool


class Steps:
    """The positions that a listing has visited, to detect cycles."""

    def __init__(self, place: str) -> None:
        self._place, self._seen, self._empty = place, set[tuple[str, str]](), 0

    def step(self, *names: str) -> None:
        """Record where the next page begins and what this one begins with.

        Raises StoreError if either repeats, or too many pages were empty.
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
    """One listing, page by page; a failed `page` may be retried."""

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
        """Return a page, the next page's token, and the last name before it, by which V1 finds it."""
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
        if not follows:  # perhaps a V1 response to a V2 listing
            raise NoContinuationError("a listing that goes on, but not where")
        return page, token, marker

    def _request(self, **begin: str) -> Any:  # noqa: ANN401  (of two operations)
        """Return the request; the first page's has no start position."""
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
            # Not every server honours the prefix.
            [info for info in objects if info.key.startswith(self._prefix)],
            [name for name in folders if name.startswith(self._prefix)],
            min(names, default=""),
            max(names, default=""),
            answer["IsTruncated"],
        )
