"""What only S3 has: credentials, buckets, endpoints, a network that fails."""

import os
import signal
import subprocess

import pytest
from boto3.session import Session
from pyarrow.fs import FileSystem

from jebm.errors import StoreError
from jebm.store.storage import (
    AccessDeniedError,
    BucketMissingError,
    EndpointError,
    Probe,
    arrow_uri,
    open_store,
)

MIB = 1 << 20


def message_of(error: pytest.ExceptionInfo) -> str:
    """The message, which is one line and holds no secret."""
    text = str(error.value)
    assert "\n" not in text
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "?") not in text
    return text


def test_a_wrong_secret_is_named(s3_uri, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(AccessDeniedError) as caught:
        open_store(s3_uri).probe()
    assert "secret key is wrong" in message_of(caught)
    assert "found in: env" in message_of(caught)


def test_an_unknown_key_is_named(s3_uri, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOBODYKNOWSTHISKEY")
    with pytest.raises(AccessDeniedError) as caught:
        open_store(s3_uri).probe()
    assert "access key NOBO… " in message_of(caught)
    assert "not known there" in message_of(caught)


def test_missing_credentials_are_named(s3_uri, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDeniedError) as caught:
        open_store(s3_uri).probe()
    assert "AWS_PROFILE" in message_of(caught)


def test_a_missing_bucket_comes_with_the_way_to_make_it(s3, monkeypatch):
    with pytest.raises(BucketMissingError) as caught:
        open_store("s3://no-such-bucket/x").probe()
    command = message_of(caught).rpartition(" with: ")[2]
    assert (
        command == """python -c "__import__('boto3').client('s3').create_bucket(Bucket='no-such-bucket')\""""
    )


def test_a_read_only_key_reads_and_says_that_it_may_not_write(s3, s3_uri, monkeypatch):
    open_store(s3_uri).put("a", b"1")
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    store = open_store(s3_uri)
    assert store.get("a") == b"1"
    assert store.probe(write=False) == Probe(writable=False, conditional_writes=False)
    with pytest.raises(AccessDeniedError, match="may not write here"):
        store.probe()
    with pytest.raises(AccessDeniedError, match="may not delete here"):
        store.delete(["a"])


def test_a_silent_endpoint_is_named(s3_uri, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(EndpointError) as caught:
        open_store(s3_uri).probe()
    assert "http://127.0.0.1:9" in message_of(caught)


@pytest.mark.parametrize("value", ["nonsense", "http://user:password@localhost:1"])
def test_an_unusable_endpoint_is_refused(s3_uri, monkeypatch, value):
    monkeypatch.setenv("AWS_ENDPOINT_URL", value)
    with pytest.raises(StoreError) as caught:
        open_store(s3_uri)
    assert "password" not in message_of(caught)


def test_no_name_holds_a_secret(s3_uri):
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert not any(secret in text for text in (repr(open_store(s3_uri)), arrow_uri(s3_uri)))


def test_the_endpoint_may_stand_in_a_profile(s3_uri, monkeypatch, tmp_path):
    config = tmp_path / "config"
    config.write_text(f"[profile ours]\nregion = eu-x-1\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "ours")
    open_store(s3_uri).put("a", b"1")
    assert "region=eu-x-1" in arrow_uri(s3_uri)
    filesystem, path = FileSystem.from_uri(arrow_uri(s3_uri))
    with filesystem.open_input_stream(f"{path}/a") as stream:
        assert stream.read() == b"1"


def test_the_region_of_the_environment_wins(s3_uri, monkeypatch):
    monkeypatch.setenv("AWS_REGION", "eu-y-2")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-z-3")
    assert "region=eu-y-2" in arrow_uri(s3_uri)


def once(method: str, name: str, fault: str, times: int = 1):
    """A fault that strikes the first requests whose path holds `name`."""
    left = [times]

    def strike(seen_method, path):
        if seen_method == method and name in path and left[0]:
            left[0] -= 1
            return fault
        return None

    return strike


def test_a_busy_server_is_asked_again(proxy, s3_uri):
    proxy.fault = once("PUT", "/a", "busy", times=2)
    store = open_store(s3_uri)
    store.put("a", b"1")
    assert store.get("a") == b"1"


def test_a_cut_download_goes_on_where_it_stopped(proxy, s3_uri):
    data = os.urandom(4 * MIB)
    store = open_store(s3_uri)
    store.put("a", data)
    proxy.fault = once("GET", "/a", "cut")
    into = bytearray(len(data))
    store.read_into("a", 0, [memoryview(into)])
    assert into == data
    proxy.fault = once("GET", "/a", "cut")
    assert store.get("a") == data


def test_a_lost_answer_to_the_last_request_of_an_upload_is_no_failure(proxy, s3_uri):
    data = memoryview(os.urandom(11 * MIB))
    proxy.fault = once("POST", "uploadId=", "lose")
    store = open_store(s3_uri)
    store.upload("a", [[data[: 10 * MIB]], [data[10 * MIB :]]])
    assert store.get("a") == data


def test_a_failed_upload_leaves_nothing(proxy, s3, s3_uri, monkeypatch):
    data = memoryview(bytearray(11 * MIB))
    store = open_store(s3_uri)
    proxy.fault = once("PUT", "partNumber=2", "busy", times=100)
    with pytest.raises(StoreError, match="SlowDown"):
        store.patient(0.5).upload("a", [[data[: 10 * MIB]], [data[10 * MIB :]]])
    assert store.head("a") is None
    for name, value in s3.environment("admin").items():
        monkeypatch.setenv(name, value)
    uploads = Session().client("s3").list_multipart_uploads(Bucket="jebm").get("Uploads", [])
    assert not [upload for upload in uploads if upload["Key"] in s3_uri]


def test_starting_twice_says_so(s3):
    again = s3.run("start")
    assert (again.returncode, "already running" in again.stdout) == (0, True)
    assert s3.run("status").returncode == 0
    assert s3.run("start", "--port", "60000").returncode == 2
    assert (s3.folder / "identities.json").stat().st_mode & 0o777 == 0o600


def test_a_stale_process_id_harms_no_stranger(s3, tmp_path):
    elsewhere = type(s3)(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        (tmp_path / "server.pid").write_text(str(stranger.pid))
        assert elsewhere.run("status").returncode == 1
        assert elsewhere.run("env").returncode == 1
        assert elsewhere.run("stop").returncode == 0
        assert stranger.poll() is None
        stranger.send_signal(signal.SIGKILL)
