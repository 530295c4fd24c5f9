"""What an answer of S3 means: worth another try, or an error of ours in one line with its remedy."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

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

__all__ = ["RequestError", "code_of", "expect", "explain", "status_of", "transient"]

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

RequestError: TypeAlias = BotoCoreError | ClientError | ResponseParserError


def code_of(error: ClientError) -> str:
    """Return the code of an answer; of one without a body, such as that to a HEAD, its status."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """Return the HTTP status of an answer, 0 if it had none of its own."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def expect(answer: Mapping[str, object], name: str) -> None:
    """Raise ResponseParserError where an answer lacks what every S3 server puts there.

    A gateway between us and the server may say 200 with a page of its own: that is no upload, and above
    all no empty listing, from which a run would start anew.
    """
    if name not in answer:
        raise ResponseParserError(f"an answer without {name}")


def transient(error: RequestError) -> bool:
    """Whether the same request may well succeed a moment later."""
    if isinstance(error, ClientError):
        return status_of(error) >= 500 or status_of(error) == 429 or code_of(error) in _TRANSIENT
    if isinstance(error, ResponseParserError):  # half an answer, or a gateway's page in its place
        return True
    if isinstance(error, SSLError):
        return False
    # A wrong checksum, which botocore looks for where it is told to: a bit was flipped on the way.
    return isinstance(
        error, BotoConnectionError | HTTPClientError | IncompleteReadError | FlexibleChecksumError
    )


def explain(error: RequestError, what: str, place: str, bucket: str, connection: "Connection") -> StoreError:
    """Return the error to raise: one line with the place, the cause and the remedy."""
    endpoint = connection.client.meta.endpoint_url
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return AccessDeniedError(
            f"{place}: no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if isinstance(error, CredentialRetrievalError | TokenRetrievalError | SSOError):
        return AccessDeniedError(f"{place}: no AWS credentials: {one_line(error)}; log in again")
    if isinstance(error, SSLError):
        return EndpointError(f"{place}: {endpoint} is not trusted: {one_line(error)}; see AWS_CA_BUNDLE")
    if isinstance(error, BotoConnectionError | HTTPClientError | IncompleteReadError | ResponseParserError):
        return EndpointError(
            f"{place}: no good answer from {endpoint} ({type(error).__name__}); "
            "is it running, and is AWS_ENDPOINT_URL right?"
        )
    if isinstance(error, FlexibleChecksumError):
        return ObjectChangedError(f"{place}: does not have the checksum that it was stored with")
    if isinstance(error, BotoCoreError):
        return StoreError(f"{place}: cannot {what}: {one_line(error)}")
    code, status = code_of(error), status_of(error)
    if code == "NoSuchBucket":
        return BucketMissingError(
            f"{place}: bucket {bucket} does not exist at {endpoint}; create it with: aws s3 mb s3://{bucket}"
        )
    if code in _BAD_KEYS:
        wrong = "its secret key is wrong" if code == "SignatureDoesNotMatch" else "it is not known there"
        return AccessDeniedError(f"{place}: {endpoint} refuses {connection.credentials()}: {wrong} ({code})")
    if code in _EXPIRED:
        return AccessDeniedError(
            f"{place}: the session token of {connection.credentials()} has expired; log in again ({code})"
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
            f"{place}: {connection.credentials()} may not {what} here; "
            f"use others, or grant the right ({code})"
        )
    if status in (301, 307) or code in ("AuthorizationHeaderMalformed", "PermanentRedirect"):
        return StoreError(f"{place}: the bucket is in another region; set AWS_REGION ({code})")
    message = error.response.get("Error", {}).get("Message", "")
    return StoreError(f"{place}: cannot {what}: {code} {one_line(message)}")
