"""Who we are at S3 and how it is reached: session, credentials, endpoint, options of every request.

Credentials come from the provider chain of AWS (environment, profile, instance role) and from nowhere else,
so that none can end up in a URI, a log or a manifest.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from boto3.session import Session
from botocore import session as botocore_session
from botocore.awsrequest import AWSResponse
from botocore.compat import HTTPHeaders
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    InvalidConfigError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)

from jebm.errors import StoreError
from jebm.paths import expanded
from jebm.store.protocol import PART_THREADS, AccessDeniedError, one_line
from jebm.store.s3_errors import transient
from jebm.store.s3_watch import watch_connections

if TYPE_CHECKING:
    from botocore.model import OperationModel
    from mypy_boto3_s3.client import S3Client

__all__ = ["Connection", "arrow_options", "connect"]

_CONNECT_TIMEOUT_SECONDS = 10.0
_READ_TIMEOUT_SECONDS = 20.0  # between two bytes, or before the first: far above what a busy server takes
_ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")


@dataclass(frozen=True)
class Connection:
    """A client, and the session that found its credentials.

    `custom`: the user named the endpoint. `checksums`: a CRC32 of ours goes with what is written, unless the
    user has set AWS_REQUEST_CHECKSUM_CALCULATION to when_required.
    """

    session: Session
    client: "S3Client"
    custom: bool
    checksums: bool

    def find_credentials(self, place: str) -> Credentials:
        """Return the credentials, renewed if need be.

        They may come from a file, a program or a server of their own, which fail in ways of their own.

        Raises AccessDeniedError if there are none; what botocore raises if nobody answers who knows them.
        """
        try:
            credentials = self.session.get_credentials()
            if credentials is not None:
                credentials.get_frozen_credentials()
        except (BotoConnectionError, HTTPClientError, NoCredentialsError, PartialCredentialsError):
            raise
        except Exception as error:
            if isinstance(error, ClientError) and transient(error):
                raise
            raise _explain_session(error, self.session.profile_name, f"{place}: ") from error
        if credentials is None:
            raise NoCredentialsError
        return credentials

    def credentials(self) -> str:
        """Return which credentials are in use, without showing them."""
        with contextlib.suppress(Exception):
            found = self.session.get_credentials()
            if found is not None:
                key = found.get_frozen_credentials().access_key or ""
                return f"access key {key[:4]}… (found in: {found.method})"
        return "the AWS credentials"


def connect() -> Connection:
    """Return a client as environment and profile want it; raises StoreError if there can be none."""
    parameters = _parameters_of_environment()
    addressing = _from_environment("AWS_S3_ADDRESSING_STYLE", ("path", "virtual", "auto"))
    profile = os.environ.get("AWS_PROFILE") or "default"
    for name in ("credentials", "tokens"):  # which log with a traceback what we raise in one line
        logging.getLogger(f"botocore.{name}").setLevel(logging.ERROR)
    try:
        core = botocore_session.Session()
        # boto3 reads AWS_DEFAULT_REGION only; every other client of AWS reads this one, and first.
        session = Session(region_name=os.environ.get("AWS_REGION") or None, botocore_session=core)
        profile = session.profile_name
        client, custom = _client(session, core, addressing)
    except StoreError:
        raise
    except Exception as error:  # a broken file, a program that is not there, a name that nobody knows, …
        raise _explain_session(error, profile) from error
    watch_connections(client)
    # botocore would ask for the bucket's region by a request that is redirected in its turn, without end.
    client.meta.events.register("before-call.s3.HeadBucket", _unknown_region)  # type: ignore[arg-type]
    if parameters:  # at this one place, so that no call can forget them
        client.meta.events.register("before-parameter-build.s3", partial(_add_parameters, parameters))
    checksums = _setting(core, "request_checksum_calculation") != "when_required"
    return Connection(session, client, custom, checksums)


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


# ── The client ──────────────────────────────────────────────────────────────────────────────────────────


def _client(
    session: Session, core: botocore_session.Session, addressing: str | None
) -> tuple["S3Client", bool]:
    """Return the client of a session, and whether the user named its endpoint."""
    bundle = core.get_config_variable("ca_bundle")
    if bundle and not Path(bundle).exists():
        raise StoreError(f"AWS_CA_BUNDLE: {bundle} is not there")
    named = core.get_scoped_config().get("s3")
    ours = set(named) if isinstance(named, dict) else set[str]()
    # Every body has a CRC32. Over plain HTTP botocore would sign its SHA-256 as well, for half of an upload's
    # CPU. We do without, as it does over TLS: what is read back over HTTP is not signed either, so it would
    # guard nothing.
    s3: Any = {} if "payload_signing_enabled" in ours else {"payload_signing_enabled": False}
    if addressing is not None:
        s3["addressing_style"] = addressing
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_SECONDS,
        read_timeout=_READ_TIMEOUT_SECONDS,
        tcp_keepalive=True,
        max_pool_connections=4 * PART_THREADS,
        # One attempt: the retries are ours, since botocore's do not cover the body of an answer.
        retries={"mode": "standard", "total_max_attempts": 1},
        s3=s3,
        # We send CRC32s of our own, and compare them when we read; older servers refuse the trailers that
        # botocore's own default, when_supported, would add.
        request_checksum_calculation=_unless_set(core, "request_checksum_calculation"),
        response_checksum_validation=_unless_set(core, "response_checksum_validation"),
    )
    client = session.client("s3", config=config)
    endpoint = urlsplit(client.meta.endpoint_url)
    if endpoint.username or endpoint.password:
        raise StoreError("AWS_ENDPOINT_URL holds credentials; put them into AWS_ACCESS_KEY_ID and so on")
    custom = not (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    if custom and addressing is None and "addressing_style" not in ours:
        # A bucket's name before such a host would be a name that nobody resolves.
        path_style = Config(s3=s3 | {"addressing_style": "path"})
        client = session.client("s3", config=config.merge(path_style))
    return client, custom


def _setting(core: botocore_session.Session, name: str) -> str | None:
    """Return what environment or profile say of a setting of checksums."""
    return os.environ.get(f"AWS_{name.upper()}") or core.get_scoped_config().get(name)


def _unless_set(core: botocore_session.Session, name: str) -> Any:  # noqa: ANN401  (two settings, two types)
    return None if _setting(core, name) else "when_required"


def _unknown_region(**_: object) -> tuple[AWSResponse, dict[str, Any]]:
    """Answer botocore's question for a bucket's region in place of the server: nobody knows."""
    answer = {
        "Error": {"Code": "404"},
        "ResponseMetadata": {"HTTPStatusCode": 404, "HTTPHeaders": {}},
    }
    return AWSResponse("", 404, HTTPHeaders(), None), answer


# ── What the environment adds to requests ───────────────────────────────────────────────────────────────


def _from_environment(name: str, allowed: Collection[str]) -> str | None:
    """Return the variable's value, None if it is unset or empty; raises StoreError for another one."""
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


# ── What goes wrong before anybody is asked ─────────────────────────────────────────────────────────────


def _explain_session(error: Exception, profile: str, place: str = "") -> StoreError:
    """Return the error of a profile, of its files or of the program or server that has its credentials."""
    files = [
        os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config",
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials",
    ]
    where, cause = " and ".join(files), one_line(error) or type(error).__name__
    if isinstance(error, ProfileNotFound):
        unreadable = [file for file in files if _cannot_be_read(file)]
        remedy = f"{unreadable[0]} cannot be read" if unreadable else f"look at AWS_PROFILE and {where}"
        return StoreError(f"{place}the AWS configuration cannot be used: {cause}; {remedy}")
    if isinstance(error, SSOError | TokenRetrievalError):
        login = f"log in again with: aws sso login --profile {profile}"
        if not shutil.which("aws"):
            login = "log in again where you did, or set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and so on"
        return AccessDeniedError(f"{place}AWS profile {profile}: {cause}; {login}")
    if isinstance(error, CredentialRetrievalError | InvalidConfigError | PartialCredentialsError):
        return AccessDeniedError(
            f"{place}AWS profile {profile}: {cause}; correct it in {where} or in AWS_*, or log in again"
        )
    if isinstance(error, OSError) and not isinstance(error, BotoCoreError):
        what = f"{error.filename}: {error.strerror}" if error.filename else cause
        return AccessDeniedError(
            f"{place}AWS profile {profile}: no credentials, since a program or file that it names cannot be "
            f"used ({what}); put it there, or correct {where}"
        )
    return StoreError(
        f"{place}the AWS configuration cannot be used (profile {profile}): {cause}; look at {where}, "
        "and at the variables AWS_*"
    )


def _cannot_be_read(file: str) -> bool:
    with contextlib.suppress(ValueError):  # no home: botocore does not look there
        path = expanded(os.path.expandvars(file))
        return path.exists() and (path.is_dir() or not os.access(path, os.R_OK))
    return False
