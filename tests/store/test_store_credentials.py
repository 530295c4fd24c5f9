"""Credentials that cannot be had: one line that names the profile and the remedy, whatever is the matter."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jebm.errors import StoreError
from jebm.store.diagnose import examine
from jebm.store.storage import AccessDeniedError, open_store

ROOT = Path(__file__).parents[2]
SSO = """
[profile ours]
region = us-east-1
sso_session = here
sso_account_id = 123456789012
sso_role_name = trainer
[sso-session here]
sso_region = us-east-1
sso_start_url = https://sso.example.invalid/start
"""
ROLE = "role_arn = arn:aws:iam::123456789012:role/trainer\n"
PROFILES = {
    # kind: (the AWS config file, words of the line)
    "program missing": (
        "credential_process = /no/such/tool --json",
        ["/no/such/tool: No such file", "put it there"],
    ),
    "program that may not run": (
        "credential_process = {folder}/config",
        ["Permission denied", "put it there"],
    ),
    "program that fails": (
        "credential_process = /bin/sh -c 'echo too late >&2; exit 3'",
        ["too late", "log in again"],
    ),
    "program that prints nonsense": ("credential_process = /bin/echo hello", ["look at"]),
    "program that prints bytes": ("credential_process = /usr/bin/printf '\\377'", ["look at"]),
    "program that prints too little": (
        "credential_process = /bin/echo '{{\"Version\": 1}}'",
        ["AccessKeyId"],
    ),
    "open quotes": ("credential_process = /bin/echo 'hello", ["look at"]),
    "circle": (
        ROLE + "source_profile = other\n[profile other]\n" + ROLE + "source_profile = ours",
        ["nfinite"],
    ),
    "source missing": (ROLE + "source_profile = nobody", ["nobody", "correct it in"]),
    "role without source": (ROLE, ["source_profile", "correct it in"]),
    "token file missing": (
        ROLE + "web_identity_token_file = /no/such/token",
        ["/no/such/token: No such file"],
    ),
    "half a key": ("aws_access_key_id = AKIA", ["aws_secret_access_key"]),
    "sso without a login": (SSO.partition("[profile ours]")[2], ["log in again"]),
    "no section": (None, ["Unable to parse config file"]),
    "no text": (None, ["Unable to parse config file"]),
}


@pytest.fixture
def alone(s3_uri, monkeypatch, tmp_path):
    """Only the profile `ours` has credentials, if anything has."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "ours")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return tmp_path / "config"


@pytest.mark.parametrize("kind", PROFILES)
def test_a_profile_that_is_no_good_ends_in_one_line(alone, s3_uri, caplog, kind):
    text, words = PROFILES[kind]
    if text is not None:
        alone.write_text(f"[profile ours]\n{text.format(folder=alone.parent)}\n")
    else:
        alone.write_bytes(
            {"no section": b"region = x\n", "no text": b"[profile ours]\nregion = \xff\xfe\n"}[kind]
        )
    with pytest.raises(StoreError) as caught:
        open_store(s3_uri).patient(0).probe()
    line = str(caught.value)
    assert "\n" not in line
    assert "ours" in line
    assert "aws " not in line  # that tool is not here
    for word in words:
        assert word in line
    assert not caplog.records  # botocore's, with tracebacks
    # The doctor ends likewise, by the same line or by a check that fails.
    try:
        last = list(examine(s3_uri))[-1]
    except StoreError:
        return
    assert (last.name, last.level) == ("credentials", "fail")
    assert last.remedy


def test_a_profile_that_is_not_there_is_named_with_the_file(alone, s3_uri):
    alone.write_text("[profile other]\nregion = x\n")
    with pytest.raises(
        StoreError, match=r"profile \(ours\) could not be found; look at AWS_PROFILE and .*config"
    ):
        open_store(s3_uri)
    alone.unlink()
    alone.mkdir()
    with pytest.raises(StoreError, match="config cannot be read"):
        open_store(s3_uri)


def test_credentials_that_break_in_mid_run_say_so(alone, s3, s3_uri):
    """A program that worked at the start; its keys are out of date and must be asked for again."""
    keys = s3.environment()
    program = alone.parent / "program"
    document = {
        "Version": 1,
        "AccessKeyId": keys["AWS_ACCESS_KEY_ID"],
        "SecretAccessKey": keys["AWS_SECRET_ACCESS_KEY"],
        "Expiration": "2020-01-01T00:00:00Z",
    }
    (alone.parent / "keys").write_text(json.dumps(document | {"Expiration": "2999-01-01T00:00:00Z"}))
    program.write_text(f"#!/bin/sh\ncat {alone.parent}/keys\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    alone.write_text(f"[profile ours]\ncredential_process = {program}\n")
    store = open_store(s3_uri)
    store.put("a", b"1")
    found = store.connection.session.get_credentials()
    found._expiry_time = found._expiry_time.replace(year=2020)
    program.unlink()
    with pytest.raises(AccessDeniedError) as caught:
        store.get("a")
    assert f"{program}: No such file" in str(caught.value)
    assert "ours" in str(caught.value)


def test_the_aws_tool_is_a_remedy_only_where_it_is(alone, s3_uri, monkeypatch):
    alone.write_text(SSO)
    tool = alone.parent / "aws"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{alone.parent}:{os.environ['PATH']}")
    with pytest.raises(AccessDeniedError, match="log in again with: aws sso login --profile ours"):
        open_store(s3_uri).patient(0).probe()


def test_a_bundle_of_certificates_that_is_not_there_is_named(s3_uri, monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such/bundle.pem")
    with pytest.raises(StoreError, match=r"AWS_CA_BUNDLE: /no/such/bundle.pem is not there"):
        open_store(s3_uri)


def test_a_command_ends_with_that_line_and_code_2(alone, s3_uri):
    alone.write_text("[profile ours]\ncredential_process = /no/such/tool\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "doctor.py"), s3_uri],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[1:]) == (2, [])  # the first line is of the kernel
    assert done.stderr.startswith("error: AWS profile ours: no credentials")
    assert done.stderr.count("\n") == 1
