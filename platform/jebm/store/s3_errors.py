"""Classify responses of S3: worth a retry, a missing feature, or one of our errors.

Our errors are one line each, with the location, the cause and the remedy.
"""

import re
import ssl
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProxyConnectionError,
    SSLError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)
from botocore.parsers import ResponseParserError

from jebm.errors import StoreError
from jebm.store.protocol import (
    AccessDeniedError,
    BucketMissingError,
    EndpointError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectMissingError,
    one_line,
)

if TYPE_CHECKING:
    from jebm.store.s3_session import Connection

__all__ = [
    "MalformedAnswerError",
    "NoContinuationError",
    "TooSlowError",
    "VanishedError",
    "code_of",
    "expect",
    "explain",
    "is_bare",
    "refuses_form",
    "status_of",
    "transient",
]

_BAD_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidClientTokenId", "InvalidSecurity"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired"}
_ELSEWHERE = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_TRANSIENT = {
    "BadDigest",  # a bit flipped in transit
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
_TRANSIENT_STATUS = {408, 409, 425, 429}
_FORM_STATUS = {400, 405, 411, 415, 417, 501}
_LACKING = re.compile(
    r"not\s?(yet\s?)?(implemented|supported)|method\s?not\s?allowed|unsupported|unimplemented", re.IGNORECASE
)
_EXISTS = re.compile(r"already\s?exists?", re.IGNORECASE)
_RIGHTS = {
    "delete": "s3:DeleteObject",
    "list": "s3:ListBucket",
    "read": "s3:GetObject",
    "write": "s3:PutObject",
}


class MalformedAnswerError(ResponseParserError):
    """A response without a field that every S3 server sends."""


class NoContinuationError(MalformedAnswerError):
    """A truncated listing without a continuation token."""


class TooSlowError(Exception):
    """The request exceeded its time limit and was cut off."""


class VanishedError(Exception):
    """An object whose write succeeded is not there."""


def code_of(error: ClientError) -> str:
    """Return a response's error code; without a body, as for a HEAD, its status."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """Return a response's HTTP status, 0 if it has none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_bare(error: Exception) -> bool:
    """Return whether a refusal has no S3 code: a response to a HEAD, or one from a proxy."""
    return isinstance(error, ClientError) and code_of(error) in ("", str(status_of(error)))


def expect(answer: Mapping[str, object], name: str) -> None:
    """Raise MalformedAnswerError if a response lacks a field that every S3 server sends.

    A gateway may answer 200 with a page of its own. That is not an upload, and above all not an empty
    listing, after which a run would start over.
    """
    if name not in answer:
        raise MalformedAnswerError(f"an answer without {name}")


def transient(error: Exception) -> bool:
    """Return whether the same request may succeed a moment later."""
    if isinstance(error, ClientError):
        return _transient_answer(error)
    if isinstance(error, SSLError):
        return _broke(error)
    # A wrong checksum, which botocore verifies on request: a bit flipped in transit.
    if isinstance(error, BotoConnectionError | HTTPClientError | IncompleteReadError | FlexibleChecksumError):
        return True
    # Errors that no library wraps: half a response, an HTML page instead, a broken connection.
    return not isinstance(error, BotoCoreError | NoContinuationError | RecursionError | MemoryError)


def _transient_answer(error: ClientError) -> bool:
    code, status = code_of(error), status_of(error)
    if status == 501 or _lacking(error):
        return False
    if status in _TRANSIENT_STATUS:
        return not _EXISTS.search(code)
    return status >= 500 or code in _TRANSIENT or (status == 400 and is_bare(error))


def refuses_form(error: Exception) -> bool:
    """Return whether a server refuses a request's form, not its sender or what is stored."""
    if not isinstance(error, ClientError):
        return isinstance(error, NoContinuationError)
    others = _BAD_KEYS | _EXPIRED | _CLOCK | _ELSEWHERE | _TRANSIENT
    return _lacking(error) or (status_of(error) in _FORM_STATUS and code_of(error) not in others)


def _lacking(error: ClientError) -> bool:
    """Return whether a response's text says that the server does not support the request."""
    return bool(_LACKING.search(f"{code_of(error)} {error.response.get('Error', {}).get('Message', '')}"))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its chain of causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _broke(error: SSLError) -> bool:
    """Return whether a connection or a bit broke, as opposed to a certificate or protocol problem."""
    return any(
        isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ConnectionError | TimeoutError)
        or "BAD_RECORD_MAC" in str(cause)
        for cause in _causes(error)
    )


def explain(error: Exception, what: str, place: str, bucket: str, connection: "Connection") -> StoreError:
    """Return the error to raise: one line with the location, the cause and the remedy."""
    if isinstance(error, ClientError):
        return _explain_answer(error, what, place, bucket, connection)
    # No response of S3: explain what went wrong in the client or on the network.
    endpoint = connection.client.meta.endpoint_url
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return AccessDeniedError(
            f"{place}: no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if isinstance(error, TooSlowError):
        return EndpointError(f"{place}: no good answer from {endpoint} ({error}); is it overloaded?")
    if isinstance(error, VanishedError):
        return ObjectMissingError(f"{place}: gone right after it was written")
    if isinstance(error, SSLError):
        cause = next((cause for cause in _causes(error) if isinstance(cause, ssl.SSLError)), error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return EndpointError(f"{place}: {endpoint} is not trusted: {one_line(cause)}; see AWS_CA_BUNDLE")
        return EndpointError(f"{place}: no TLS with {endpoint}: {one_line(cause)}; does it speak https?")
    if isinstance(error, ProxyConnectionError):
        return EndpointError(f"{place}: {one_line(error)}; see HTTPS_PROXY, HTTP_PROXY and NO_PROXY")
    if isinstance(error, FlexibleChecksumError):
        return ObjectChangedError(f"{place}: does not have the checksum that it was stored with")
    if isinstance(error, NoContinuationError):
        return StoreError(f"{place}: {endpoint} sends {error}; use another server or gateway")
    if isinstance(error, RecursionError):
        return EndpointError(
            f"{place}: {endpoint} redirects without end; set AWS_REGION and AWS_ENDPOINT_URL"
        )
    if transient(error):
        return _no_good_answer(place, endpoint, type(error).__name__)
    return StoreError(f"{place}: cannot {what}: {one_line(error) or type(error).__name__}")


def _no_good_answer(place: str, endpoint: str, what: str) -> EndpointError:
    return EndpointError(
        f"{place}: no good answer from {endpoint} ({what}); is it running, and is AWS_ENDPOINT_URL right?"
    )


def _explain_answer(
    error: ClientError, what: str, place: str, bucket: str, connection: "Connection"
) -> StoreError:
    """Return the error that explains a refusal."""
    code, status, endpoint = code_of(error), status_of(error), connection.client.meta.endpoint_url
    message = one_line(error.response.get("Error", {}).get("Message", ""))
    who = _explain_who(code, place, connection)
    if who is not None:
        return who
    # Specific codes come first, general statuses after them.
    if code == "NoSuchBucket":
        return BucketMissingError(
            f"{place}: bucket {bucket} does not exist at {endpoint}; create it with your provider's console, "
            f"or with: {_creation(bucket, connection)}"
        )
    if status == 412 or code == "PreconditionFailed" or _EXISTS.search(code):
        if what == "write":
            return ObjectExistsError(f"{place}: exists already")
        return ObjectChangedError(f"{place}: has been replaced by another object since")
    if status == 416:
        return ObjectChangedError(f"{place}: ends before the range that was asked for")
    if code == "NoSuchKey" or (status == 404 and what == "read"):
        return ObjectMissingError(f"{place}: no such object")
    if status in (401, 403) or code == "AccessDenied":
        return AccessDeniedError(
            f"{place}: {connection.credentials()} may not {what} here; "
            f"use others, or grant the right {_RIGHTS.get(what, '')} ({code})"
        )
    if 300 <= status < 400 or code in _ELSEWHERE:
        return _explain_elsewhere(error, place, endpoint)
    if code == "SecondLevelDomainForbidden" or "virtual host" in message.lower():
        return StoreError(
            f"{place}: {endpoint} wants the bucket in its name; set AWS_S3_ADDRESSING_STYLE=virtual"
        )
    if status >= 500 and is_bare(error):
        return _no_good_answer(place, endpoint, f"{status} {message}")
    return StoreError(f"{place}: cannot {what}: {code} {message}".rstrip())


def _explain_who(code: str, place: str, connection: "Connection") -> AccessDeniedError | None:
    """Return the error for wrong or expired credentials, or a wrong clock; None for other refusals."""
    if code in _BAD_KEYS:
        wrong = "its secret key is wrong" if code == "SignatureDoesNotMatch" else "it is not known there"
        endpoint = connection.client.meta.endpoint_url
        return AccessDeniedError(f"{place}: {endpoint} refuses {connection.credentials()}: {wrong} ({code})")
    if code in _EXPIRED:
        return AccessDeniedError(
            f"{place}: the session token of {connection.credentials()} has expired; log in again ({code})"
        )
    if code in _CLOCK:
        return AccessDeniedError(f"{place}: the clock of this machine is off, set it right ({code})")
    return None


def _explain_elsewhere(error: ClientError, place: str, endpoint: str) -> StoreError:
    """Return the error for a bucket in another region or on another server."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    details = error.response.get("Error", {})
    region = details.get("Region") or headers.get("x-amz-bucket-region")
    if region:
        remedy = f"set AWS_REGION={region}"
    elif headers.get("location"):
        remedy = f"it points to {headers['location']}; set AWS_REGION, or AWS_ENDPOINT_URL"
    else:
        remedy = "set AWS_REGION"
    return StoreError(
        f"{place}: the bucket is in another region than {endpoint}; {remedy} ({code_of(error)})"
    )


def _creation(bucket: str, connection: "Connection") -> str:
    """Return a command that creates a bucket, using boto3, which is always installed."""
    region = connection.client.meta.region_name
    where = ""
    if not connection.custom and region not in ("us-east-1", "aws-global", None):
        where = f", CreateBucketConfiguration={{'LocationConstraint': '{region}'}}"
    return f"""python -c "__import__('boto3').client('s3').create_bucket(Bucket='{bucket}'{where})\""""
