"""What the environment adds to the requests: encryption by the server, who pays, checksums."""

import json
import os
import signal
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from boto3.session import Session

from jebm.errors import StoreError
from jebm.store import stream
from jebm.store.checkpoint import Checkpoints, Facts
from jebm.store.storage import S3Store, open_store

MIB = 1 << 20
KEY_ID = "alias/jebm"  # the server's own key management makes such a one at its first use
KEY_ARN = "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"
MARK = b"a sentence that must not lie on a disk in clear"
SSE = "x-amz-server-side-encryption"
SSE_KEY = "x-amz-server-side-encryption-aws-kms-key-id"
PAYER = "x-amz-request-payer"
CREATING = {"put", "begin"}
WRITING = {"put", "begin", "part", "complete"}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(stream, "PART_BYTES", 5 * MIB)


@pytest.fixture(scope="module")
def kms(s3, tmp_path_factory):
    """The real server once more, with a key management of its own: without one it refuses to encrypt."""
    server = type(s3)(tmp_path_factory.mktemp("kms"))
    identities = json.loads((s3.folder / "identities.json").read_text())
    ours = {"type": "local", "enableOnDemandCreate": True}
    identities["kms"] = {"default_provider": "ours", "providers": {"ours": ours}}
    (server.folder / "identities.json").write_text(json.dumps(identities))
    started = server.run("start")
    assert started.returncode == 0, started.stderr
    yield server
    os.kill(int((server.folder / "server.pid").read_text()), signal.SIGKILL)


def operation(request: str) -> str:
    """Name what a line of the proxy asks for."""
    method, path = request.split(" ", 1)
    query = path.partition("?")[2]
    if method == "POST":
        return "begin" if query.startswith("uploads") else "complete" if "uploadId=" in query else "delete"
    if method == "PUT":
        return "part" if "partNumber=" in query else "put"
    if method == "GET":
        return "list" if "list-type=" in query else "uploads" if query.startswith("uploads") else "get"
    return {"HEAD": "head", "DELETE": "abort"}[method]


def sent(proxy, name: str) -> dict[str, set[str | None]]:
    """Return the values that a header had, None where it was not there, by operation."""
    found: dict[str, set[str | None]] = {}
    for request, headers in zip(proxy.seen, proxy.headers, strict=True):
        found.setdefault(operation(request), set()).add(headers.get(name))
    return found


def tensors() -> dict[str, torch.Tensor]:
    """12 MiB, three parts, the mark in each; random, since the server would compress what it can."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(0, 256, (12, MIB), dtype=torch.uint8, generator=generator)
    rows[:, : len(MARK)] = torch.frombuffer(bytearray(MARK), dtype=torch.uint8)
    return {"w": rows, "step": torch.tensor(7)}


def lies_in_clear(folder: Path) -> bool:
    return any(MARK in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def round_trip(uri: str) -> None:
    """Save a checkpoint, find it, and compare every bit."""
    keywords = {"state": {}, "config": {}, "metrics": {}, "provenance": {}, "world_size": 1, "parent": None}
    Checkpoints(open_store(uri), "run").save(tensors(), Facts(step=1, attempt=1, **keywords))
    checkpoints = Checkpoints(open_store(uri), "run")
    manifest = checkpoints.latest(deep=True)
    assert manifest is not None
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    checkpoints.load(manifest, into)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors().items())


def everything(store: S3Store) -> None:
    """Make a request of every kind."""
    mib = memoryview(bytearray(5 * MIB))
    assert store.probe().conditional_writes
    store.put("a", b"1", if_absent=True)
    store.upload("b", [[mib], [mib[:9]]])
    with pytest.raises(StoreError):
        store.patient(0).upload("refused", [[mib]] * 2)
    assert store.get("a") == b"1"
    store.read_into("b", 5 * MIB, [memoryview(bytearray(9))])
    assert [info.key for info in store.list()] == ["a", "b"]
    store.child("child").put("a", b"1")
    assert list(store.folders()) == ["child"]
    store.discard_unfinished(3600)
    store.delete(["a", "b", "child/a"])
    assert store.head("a") is None


def refuse_one(method: str, path: str) -> str | None:
    return "busy" if method == "PUT" and "refused?" in path else None


# ── Encryption ──────────────────────────────────────────────────────────────────────────────────────────


def test_checkpoints_are_encrypted_with_the_key_of_the_environment(proxy, kms, s3_uri, monkeypatch):
    proxy.upstream = urlsplit(kms.environment()["AWS_ENDPOINT_URL"]).netloc
    monkeypatch.setenv("JEBM_S3_SSE", "aws:kms")
    monkeypatch.setenv("JEBM_S3_SSE_KMS_KEY_ID", KEY_ID)
    round_trip(s3_uri)
    for header, value in ((SSE, "aws:kms"), (SSE_KEY, KEY_ID)):
        found = sent(proxy, header)
        assert found.keys() >= WRITING
        assert found == {name: {value if name in CREATING else None} for name in found}
    store, client = open_store(s3_uri), Session().client("s3")
    for info in store.list():
        key = f"{s3_uri.removeprefix('s3://jebm/')}/{info.key}"
        answer = client.head_object(Bucket="jebm", Key=key)
        assert (answer["ServerSideEncryption"], answer["SSEKMSKeyId"]) == ("aws:kms", KEY_ID)
    monkeypatch.delenv("JEBM_S3_SSE_KMS_KEY_ID")
    monkeypatch.delenv("JEBM_S3_SSE")
    assert not lies_in_clear(kms.folder / "data")
    round_trip(f"{s3_uri}/in-clear")
    assert lies_in_clear(kms.folder / "data")  # so the look before would have found it


@pytest.mark.parametrize(
    ("value", "key"), [("AES256", None), ("aws:kms", None), ("aws:kms", KEY_ARN), ("aws:kms:dsse", KEY_ARN)]
)
def test_each_encryption_is_asked_for(proxy, s3_uri, monkeypatch, value, key):
    """The server has neither key nor these encryptions, so that the proxy answers in its place."""
    monkeypatch.setenv("JEBM_S3_SSE", value)
    if key is not None:
        monkeypatch.setenv("JEBM_S3_SSE_KMS_KEY_ID", key)
    proxy.fault = lambda _method, _path: "expired"
    store = open_store(s3_uri)
    with pytest.raises(StoreError):
        store.put("a", b"1")
    with pytest.raises(StoreError):
        store.upload("a", [[memoryview(bytearray(5 * MIB))]] * 2)
    assert sent(proxy, SSE) == {"put": {value}, "begin": {value}}
    assert sent(proxy, SSE_KEY) == {"put": {key}, "begin": {key}}


# ── Who pays ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", ["requester", None])
def test_every_request_says_that_the_requester_pays_or_none_does(proxy, s3, s3_uri, monkeypatch, value):
    for name, key in s3.environment("admin").items():  # to list unfinished uploads is no trainer's right
        if name != "AWS_ENDPOINT_URL":
            monkeypatch.setenv(name, key)
    if value is not None:
        monkeypatch.setenv("JEBM_S3_REQUEST_PAYER", value)
    proxy.fault = refuse_one
    everything(open_store(s3_uri))
    operations = {"list", "put", "head", "begin", "part", "complete", "abort", "get", "uploads", "delete"}
    assert sent(proxy, PAYER) == {name: {value} for name in operations}
    assert sent(proxy, SSE) == {name: {None} for name in operations}


# ── Wrong values ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"JEBM_S3_SSE": "kms"}, "JEBM_S3_SSE: 'kms' is not one of AES256, aws:kms, aws:kms:dsse"),
        ({"JEBM_S3_SSE": "AES256\nx"}, r"JEBM_S3_SSE: 'AES256\nx' is not one of"),
        ({"JEBM_S3_REQUEST_PAYER": "me"}, "JEBM_S3_REQUEST_PAYER: 'me' is not one of requester"),
        ({"JEBM_S3_SSE_KMS_KEY_ID": KEY_ID}, "JEBM_S3_SSE_KMS_KEY_ID: works with JEBM_S3_SSE=aws:kms"),
        (
            {"JEBM_S3_SSE": "AES256", "JEBM_S3_SSE_KMS_KEY_ID": KEY_ID},
            "JEBM_S3_SSE_KMS_KEY_ID: works with JEBM_S3_SSE=aws:kms",
        ),
        (
            {"JEBM_S3_SSE": "aws:kms", "JEBM_S3_SSE_KMS_KEY_ID": "a\r\nx-amz-acl: public-read"},
            "JEBM_S3_SSE_KMS_KEY_ID: is no key",
        ),
        ({"AWS_REQUEST_CHECKSUM_CALCULATION": "never"}, "request_checksum_calculation"),
        ({"AWS_RESPONSE_CHECKSUM_VALIDATION": "never"}, "response_checksum_validation"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(s3_uri, monkeypatch, values, message):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreError) as caught:
        open_store(s3_uri)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_value_is_none(s3_uri, monkeypatch):
    names = ("SSE", "SSE_KMS_KEY_ID", "REQUEST_PAYER")
    for name in [*(f"JEBM_S3_{name}" for name in names), "AWS_REQUEST_CHECKSUM_CALCULATION"]:
        monkeypatch.setenv(name, "")
    open_store(s3_uri).put("a", b"1")


# ── Checksums ───────────────────────────────────────────────────────────────────────────────────────────


def checksum_settings(store: S3Store) -> tuple[str, str]:
    config = store._client.meta.config
    return config.request_checksum_calculation, config.response_checksum_validation


@pytest.mark.parametrize("place", ["environment", "profile"])
@pytest.mark.parametrize("value", ["when_required", "when_supported", None])
def test_checksum_settings_are_those_of_aws(proxy, s3_uri, monkeypatch, tmp_path, place, value):
    """A CRC32 of our own goes with every byte, and in no trailer, unless the user wants no checksums."""
    if value is not None and place == "environment":
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", value)
        monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", value)
    elif value is not None:
        file = tmp_path / "config"
        file.write_text(
            f"[default]\nrequest_checksum_calculation = {value}\nresponse_checksum_validation = {value}\n"
        )
        monkeypatch.setenv("AWS_CONFIG_FILE", str(file))
    assert checksum_settings(open_store(s3_uri)) == (value or "when_required",) * 2
    round_trip(s3_uri)
    checksums = sent(proxy, "x-amz-checksum-crc32")
    assert (None in checksums["put"] | checksums["part"]) == (value == "when_required")
    algorithm = None if value == "when_required" else "CRC32"
    assert sent(proxy, "x-amz-checksum-algorithm")["begin"] == {algorithm}
    for header in ("x-amz-trailer", "content-encoding", "transfer-encoding"):
        assert {value for values in sent(proxy, header).values() for value in values} == {None}
    mode = "ENABLED" if value == "when_supported" else None
    assert sent(proxy, "x-amz-checksum-mode")["get"] == {mode}


def test_one_setting_leaves_the_other_alone(s3_uri, monkeypatch):
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_supported")
    assert checksum_settings(open_store(s3_uri)) == ("when_required", "when_supported")


def test_what_botocore_finds_flipped_is_read_again(proxy, s3_uri, monkeypatch):
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_supported")
    data, store = os.urandom(MIB), open_store(s3_uri)
    store.put("a", data)
    strikes = iter(["flip"])
    proxy.fault = lambda method, _path: next(strikes, None) if method == "GET" else None
    assert store.get("a") == data
    proxy.fault = lambda method, _path: "flip" if method == "GET" else None
    with pytest.raises(StoreError, match="checksum that it was stored with"):
        store.patient(0.5).get("a")
