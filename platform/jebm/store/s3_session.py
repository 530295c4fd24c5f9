"""How S3 is reached: session, credentials, endpoint, and the options of every request.

Credentials come only from AWS's provider chain (environment, profile, instance role), so none can end up in a
URI, a log or a manifest.
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
_READ_TIMEOUT_SECONDS = 20.0  # between bytes or before the first: far above a busy server's
_ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")


@dataclass(frozen=True)
class Connection:
    """A client, and the session that found its credentials.

    `custom`: the user named the endpoint. `checksums`: writes carry our CRC32, unless the user has set
    AWS_REQUEST_CHECKSUM_CALCULATION to when_required.
    """

    session: Session
    client: "S3Client"
    custom: bool
    checksums: bool

    def find_credentials(self, place: str) -> Credentials:
        """Return the credentials, renewed if necessary.

        They may come from a file, a program or a server, each of which fails in its own way.

        Raises AccessDeniedError if there are none; whatever botocore raises if their server does not answer.
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
        """Return which credentials are in use, without revealing them."""
        with contextlib.suppress(Exception):
            found = self.session.get_credentials()
            if found is not None:
                key = found.get_frozen_credentials().access_key or ""
                return f"access key {key[:4]}… (found in: {found.method})"
        return "the AWS credentials"


def connect() -> Connection:
    """Return a client configured by environment and profile; raises StoreError if that is impossible."""
    parameters = _parameters_of_environment()
    addressing = _from_environment("AWS_S3_ADDRESSING_STYLE", ("path", "virtual", "auto"))
    profile = os.environ.get("AWS_PROFILE") or "default"
    for name in ("credentials", "tokens"):  # these log a traceback for what we raise in one line
        logging.getLogger(f"botocore.{name}").setLevel(logging.ERROR)
    try:
        core = botocore_session.Session()
        # boto3 reads only AWS_DEFAULT_REGION; all other AWS clients read this variable, and first.
        session = Session(region_name=os.environ.get("AWS_REGION") or None, botocore_session=core)
        profile = session.profile_name
        client, custom = _client(session, core, addressing)
    except StoreError:
        raise
    except Exception as error:  # a broken file, a missing program, an unknown name, …
        raise _explain_session(error, profile) from error
    watch_connections(client)
    # botocore would ask for the bucket's region, be redirected again, and so on forever.
    client.meta.events.register("before-call.s3.HeadBucket", _unknown_region)  # type: ignore[arg-type]
    if parameters:  # in this one place, so that no call can forget them
        client.meta.events.register("before-parameter-build.s3", partial(_add_parameters, parameters))
    checksums = _setting(core, "request_checksum_calculation") != "when_required"
    return Connection(session, client, custom, checksums)


def arrow_options() -> dict[str, str]:
    """Return the pyarrow options that reach the same server as boto3."""
    connection = connect()
    options = {}
    if connection.custom:
        endpoint = urlsplit(connection.client.meta.endpoint_url)
        options = {"scheme": endpoint.scheme, "endpoint_override": endpoint.netloc}
    # A private server takes any region, but a signature needs one.
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
    # Every body has a CRC32. Over plain HTTP botocore would also sign its SHA-256, at half of an upload's
    # CPU. We skip that, as it does over TLS: reads over HTTP are not signed either, so it would protect
    # nothing.
    s3: Any = {} if "payload_signing_enabled" in ours else {"payload_signing_enabled": False}
    if addressing is not None:
        s3["addressing_style"] = addressing
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_SECONDS,
        read_timeout=_READ_TIMEOUT_SECONDS,
        tcp_keepalive=True,
        max_pool_connections=4 * PART_THREADS,
        # One attempt: we retry ourselves, since botocore does not cover the response body.
        retries={"mode": "standard", "total_max_attempts": 1},
        s3=s3,
        # We send our own CRC32s and compare them when reading; older servers refuse the trailers that
        # botocore's default, when_supported, would add.
        request_checksum_calculation=_unless_set(core, "request_checksum_calculation"),
        response_checksum_validation=_unless_set(core, "response_checksum_validation"),
    )
    client = session.client("s3", config=config)
    endpoint = urlsplit(client.meta.endpoint_url)
    if endpoint.username or endpoint.password:
        raise StoreError("AWS_ENDPOINT_URL holds credentials; put them into AWS_ACCESS_KEY_ID and so on")
    custom = not (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    if custom and addressing is None and "addressing_style" not in ours:
        # A bucket's name prefixed to such a host would not resolve.
        path_style = Config(s3=s3 | {"addressing_style": "path"})
        client = session.client("s3", config=config.merge(path_style))
    return client, custom


def _setting(core: botocore_session.Session, name: str) -> str | None:
    """Return a checksum setting from environment or profile."""
    return os.environ.get(f"AWS_{name.upper()}") or core.get_scoped_config().get(name)


def _unless_set(core: botocore_session.Session, name: str) -> Any:  # noqa: ANN401  (two settings, two types)
    return None if _setting(core, name) else "when_required"


def _unknown_region(**_: object) -> tuple[AWSResponse, dict[str, Any]]:
    """Answer botocore's request for a bucket's region in place of the server: unknown."""
    answer = {
        "Error": {"Code": "404"},
        "ResponseMetadata": {"HTTPStatusCode": 404, "HTTPHeaders": {}},
    }
    return AWSResponse("", 404, HTTPHeaders(), None), answer


# ── What the environment adds to requests ───────────────────────────────────────────────────────────────


def _from_environment(name: str, allowed: Collection[str]) -> str | None:
    """Return the variable's value, None if unset or empty; raises StoreError if not allowed."""
    value = os.environ.get(name)
    if value and value not in allowed:
        raise StoreError(f"{name}: {value[:80]!r} is not one of {', '.join(allowed)}")
    return value or None


def _parameters_of_environment() -> dict[str, str]:
    """Return the parameters that the environment adds to every request that knows them.

    They are not in a config or URI: what a bucket requires is up to the machine, like its keys.

    Raises:
        StoreError: S3 would refuse or ignore a value; the message names the variable.
    """
    encryption = _from_environment("JEBM_S3_SSE", _ENCRYPTIONS)
    payer = _from_environment("JEBM_S3_REQUEST_PAYER", ("requester",))
    key = os.environ.get("JEBM_S3_SSE_KMS_KEY_ID") or None
    if key and encryption not in _ENCRYPTIONS[1:]:
        # S3 refuses a key with AES256; without an encryption mode it silently uses another key.
        raise StoreError("JEBM_S3_SSE_KMS_KEY_ID: works with JEBM_S3_SSE=aws:kms or aws:kms:dsse only")
    if key and (not key.isascii() or not key.isprintable() or " " in key):
        raise StoreError("JEBM_S3_SSE_KMS_KEY_ID: is no key id, key ARN or alias: it holds odd characters")
    parameters = {"ServerSideEncryption": encryption, "SSEKMSKeyId": key, "RequestPayer": payer}
    return {name: value for name, value in parameters.items() if value is not None}


def _add_parameters(
    parameters: Mapping[str, str], *, params: dict[str, object], model: "OperationModel", **_: object
) -> None:
    """Add the parameters that the operation knows; botocore calls this before it builds a request."""
    members = model.input_shape.members if model.input_shape is not None else {}
    params.update({name: value for name, value in parameters.items() if name in members})


# ── What goes wrong before any request ──────────────────────────────────────────────────────────────────


def _explain_session(error: Exception, profile: str, place: str = "") -> StoreError:
    """Return the error for a profile, its files, or the program or server that supplies its credentials."""
    files = [
        os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config",
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials",
    ]
    where, cause = " and ".join(files), one_line(error) or type(error).__name__
    # Each kind of error has its own remedy.
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
    with contextlib.suppress(ValueError):  # no home folder: botocore does not look there
        path = expanded(os.path.expandvars(file))
        return path.exists() and (path.is_dir() or not os.access(path, os.R_OK))
    return False
