"""Objects under a URI: one small protocol, and its three keepers: S3, a local folder, this process's memory.

A key is relative to the URI of its store. An object appears whole or not at all.
"""

from pathlib import Path
from urllib.parse import unquote, urlencode

from jebm.errors import StoreError
from jebm.store.local import LocalStore
from jebm.store.memory import MemoryStore
from jebm.store.protocol import (
    AccessDeniedError,
    BucketMissingError,
    EndpointError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    Probe,
    Store,
    Uploaded,
    checked_key,
)
from jebm.store.s3 import S3Store
from jebm.store.s3_session import arrow_options, connect

__all__ = [
    "AccessDeniedError",
    "BucketMissingError",
    "EndpointError",
    "LocalStore",
    "MemoryStore",
    "ObjectChangedError",
    "ObjectExistsError",
    "ObjectInfo",
    "ObjectMissingError",
    "Probe",
    "S3Store",
    "Store",
    "Uploaded",
    "arrow_uri",
    "open_store",
]


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
        return S3Store(connect(), bucket, prefix)
    if scheme == "memory":
        return MemoryStore(bucket, prefix)
    return LocalStore(Path(prefix))


def arrow_uri(uri: str) -> str:
    """Return the URI with endpoint and region in its query, as pyarrow and Ray take it."""
    scheme, bucket, prefix = _split(uri)
    if scheme == "memory":
        raise StoreError(f"{uri}: other processes cannot see this memory; use s3://… or a path")
    if scheme == "file":
        return Path(prefix).as_uri()
    options = arrow_options()
    return f"s3://{bucket}/{prefix}".rstrip("/") + (f"?{urlencode(options)}" if options else "")


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
    return scheme, bucket, checked_key(prefix) if prefix else ""
