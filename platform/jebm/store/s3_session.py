"""Who we are at S3 and how it is reached: session, credentials, endpoint, options of every request.

Credentials come from the provider chain of AWS (environment, profile, instance role) and from nowhere else,
so that none can end up in a URI, a log or a manifest.
"""

import contextlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from boto3.session import Session
from botocore import session as botocore_session
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from jebm.errors import StoreError
from jebm.store.protocol import PART_THREADS, one_line

if TYPE_CHECKING:
    from botocore.model import OperationModel
    from mypy_boto3_s3.client import S3Client

__all__ = ["Connection", "arrow_options", "connect"]

_CONNECT_TIMEOUT_SECONDS = 10.0
_READ_TIMEOUT_SECONDS = 20.0  # between two bytes, or before the first: far above what a busy server takes
_ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")


@dataclass(frozen=True)
class Connection:
    """A client, the session that found its credentials, and whether the user named the endpoint."""

    session: Session
    client: "S3Client"
    custom: bool

    def credentials(self) -> str:
        """Return which credentials are in use, without showing them."""
        with contextlib.suppress(BotoCoreError):
            found = self.session.get_credentials()
            if found is not None:
                key = found.get_frozen_credentials().access_key or ""
                return f"access key {key[:4]}… (found in: {found.method})"
        return "the AWS credentials"


def _from_environment(name: str, allowed: Collection[str]) -> str | None:
    """Return the variable's value, None where it is unset or empty; raises StoreError for another one."""
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


def _checksums(core: botocore_session.Session, setting: str) -> Literal["when_required"] | None:
    """Return how botocore should handle checksums: None, as it finds it, where the user has said so.

    Else we send CRC32s of our own, and compare them when we read; older servers refuse the trailers that
    botocore's own default, when_supported, would add.
    """
    named = os.environ.get(f"AWS_{setting.upper()}") or core.get_scoped_config().get(setting)
    return None if named else "when_required"


def connect() -> Connection:
    """Return a client as environment and profile want it; raises StoreError where there can be none."""
    parameters = _parameters_of_environment()
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_SECONDS,
        read_timeout=_READ_TIMEOUT_SECONDS,
        tcp_keepalive=True,
        max_pool_connections=4 * PART_THREADS,
        # One attempt: the retries are ours, since botocore's do not cover the body of an answer.
        retries={"mode": "standard", "total_max_attempts": 1},
        # Every body has a CRC32. Over plain HTTP botocore would sign its SHA-256 as well, for half of an
        # upload's CPU. We do without, as it does over TLS: what is read back over HTTP is not signed either,
        # so it would guard nothing.
        s3={"payload_signing_enabled": False},
    )
    try:
        core = botocore_session.Session()
        # boto3 reads AWS_DEFAULT_REGION only; every other client of AWS reads this one, and first.
        session = Session(region_name=os.environ.get("AWS_REGION") or None, botocore_session=core)
        checksums = Config(
            request_checksum_calculation=_checksums(core, "request_checksum_calculation"),
            response_checksum_validation=_checksums(core, "response_checksum_validation"),
        )
        config = config.merge(checksums)
        client = session.client("s3", config=config)
        endpoint = urlsplit(client.meta.endpoint_url)
        if endpoint.username or endpoint.password:
            raise StoreError("AWS_ENDPOINT_URL holds credentials; put them into AWS_ACCESS_KEY_ID and so on")
        custom = not (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
        if custom:  # a bucket's name before such a host would be a name that nobody resolves
            path_style = Config(s3={"payload_signing_enabled": False, "addressing_style": "path"})
            client = session.client("s3", config=config.merge(path_style))
    except (BotoCoreError, ValueError) as error:
        raise StoreError(f"the AWS configuration cannot be used: {one_line(error)}") from error
    if parameters:  # at this one place, so that no call can forget them
        client.meta.events.register("before-parameter-build.s3", partial(_add_parameters, parameters))
    return Connection(session, client, custom)


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
