"""Open the store of a URI: one small protocol, three backends (S3, a local folder, process memory).

A key is relative to the URI of its store. An object appears whole or not at all.
"""

import re
from pathlib import Path
from urllib.parse import unquote, urlencode

from jebm.errors import StoreError
from jebm.paths import expanded, shipped
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
    "normalised_uri",
    "open_store",
]

_OBJECTS = ("memory", "s3")
_AZURE = ("abfs", "abfss", "adl", "az", "azure", "wasb", "wasbs")
_SCHEME = re.compile(
    r"\s*(?:"
    r"(?P<any>[A-Za-z][A-Za-z0-9+.-]*)(?=:/)"  # also with a slash missing, as in s3:/bucket
    r"|(?P<known>s3[an]?|gcs|gs|file|memory|https?|arn)(?=:)"
    r"|(?P<ours>s3|memory)(?=//)"
    r")(?P<slashes>:?/{0,2})",
    re.IGNORECASE,
)
"""The start of a URI, possibly mistyped; anything else is a path."""


def open_store(uri: str) -> Store:
    """Return the store at `s3://bucket/prefix`, `file:///path`, a path (`~` is home) or `memory://name`.

    Nothing is created and no request is made: `probe()` does that. Endpoint, region and credentials of S3 are
    found as the aws tool finds them (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_PROFILE, …). JEBM_S3_SSE,
    JEBM_S3_SSE_KMS_KEY_ID and JEBM_S3_REQUEST_PAYER go with the requests that know them. An S3 request that
    may succeed later is retried for 30 s; `patient()` changes that.

    Raises:
        StoreError: the URI is invalid, or the environment or profile is unusable.
    """
    scheme, bucket, prefix = _split(uri)
    if scheme == "s3":
        return S3Store(connect(), bucket, prefix)
    if scheme == "memory":
        return MemoryStore(bucket, prefix)
    return LocalStore(Path(prefix))


def normalised_uri(uri: str) -> str:
    """Return the URI in the normal form that all our tools read alike.

    `s3://bucket/prefix` and `memory://name/prefix` lose a trailing slash; anything local becomes a path with
    its `~` expanded, which stays relative if it was.

    Raises StoreError if the URI is invalid or the home of `~` is unknown.
    """
    scheme, bucket, prefix = _split(uri)
    return prefix if scheme == "file" else f"{scheme}://{bucket}/{prefix}".rstrip("/")


def arrow_uri(uri: str) -> str:
    """Return the URI with endpoint and region in its query, as pyarrow and Ray expect."""
    scheme, bucket, prefix = _split(uri)
    if scheme == "memory":
        raise StoreError(f"{uri}: other processes cannot see this memory; use s3://… or a path")
    if scheme == "file":
        return Path(prefix).absolute().as_uri()
    options = arrow_options()
    return f"s3://{bucket}/{prefix}".rstrip("/") + (f"?{urlencode(options)}" if options else "")


def _split(uri: str) -> tuple[str, str, str]:
    """Return scheme, bucket or name, and prefix; for files the path with its `~` expanded."""
    if not uri.strip():
        raise StoreError("an empty storage URI; give s3://bucket/prefix or a path")
    found = _SCHEME.match(uri)
    if found is None and "://" in uri:
        raise StoreError(f"{uri}: {_advice('', '')}")
    if found is None:
        return "file", "", _local(uri)
    scheme = (found["any"] or found["known"] or found["ours"]).lower()
    slashes, rest = found["slashes"], uri[found.end() :].strip()
    if scheme == "file" and ":" in slashes:
        return "file", "", _path_of_file_uri(slashes, rest)
    if scheme in _AZURE:
        remedy = "docs/checkpoints.md says under Google Cloud and Azure what to use"
        raise StoreError(f"{scheme}://…: there is no backend for Azure; {remedy}")
    if "@" in rest.split("/")[0]:
        # Not shown: it may contain a key.
        raise StoreError(f"{scheme}://…: no credentials in a URI; put them into the environment or a profile")
    if "?" in rest or "#" in rest:
        raise StoreError(
            f"{scheme}://{rest.split('?')[0]}: no options in a URI; set AWS_ENDPOINT_URL and so on"
        )
    if scheme not in _OBJECTS or slashes != "://":
        raise StoreError(f"{uri}: {_advice(scheme, rest.strip('/'))}")
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise StoreError(f"{uri}: names no bucket; write {scheme}://{prefix.strip('/') or 'bucket/prefix'}")
    prefix = prefix.strip("/")
    return scheme, bucket, checked_key(prefix) if prefix else ""


def _local(path: str) -> str:
    """Return the expanded path, or where jebm ships that file, in a form that still parses as a path."""
    try:
        found = str(shipped(expanded(path)))
    except ValueError as error:
        raise StoreError(str(error)) from None
    return f"./{found}" if _SCHEME.match(found) or found.startswith("~") else found


def _path_of_file_uri(slashes: str, rest: str) -> str:
    """Return the path of `file:///path`, `file://localhost/path` or `file:/path`."""
    host, slash, path = rest.partition("/") if slashes == "://" else ("", slashes[1:], rest)
    if host not in ("", "localhost") or not slash:
        raise StoreError(
            f"file{slashes}{rest}: a file URI has three slashes, file:///path; or write the path"
        )
    return _local(unquote(f"/{path}"))


def _advice(scheme: str, rest: str) -> str:
    """Suggest a correction for an unknown scheme, or for one of ours with a slash missing."""
    if scheme in _OBJECTS:
        return f"write {scheme}://{rest}, or ./{scheme}… for a folder of that name"
    if scheme in ("s3a", "s3n"):
        return f"write s3://{rest}"
    if scheme in ("gs", "gcs"):
        return f"write s3://{rest} and set AWS_ENDPOINT_URL=https://storage.googleapis.com (with HMAC keys)"
    if scheme in ("http", "https"):
        host, _, path = rest.partition("/")
        return f"write s3://{path or 'bucket/prefix'} and set AWS_ENDPOINT_URL={scheme}://{host}"
    return (
        "unknown scheme; use s3://bucket/prefix, file:///path, a path (./… if its name has a colon) or "
        "memory://name"
    )
