"""What a place allows is found out before a run depends on it."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from jebm.errors import StoreError
from jebm.store.diagnose import Check, clock_check, examine, examine_store
from jebm.store.storage import AccessDeniedError, ObjectInfo, Store, Uploaded, open_store

if TYPE_CHECKING:
    from tests.conftest import S3Server


class Poor:
    """A store in memory that falls short in one respect."""

    def __init__(self, fault: str) -> None:
        self.inner, self.fault = open_store(f"memory://{fault}"), fault

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> ObjectInfo:
        return self.inner.put(key, data, if_absent=if_absent and self.fault != "unconditional")

    def get(self, key: str) -> bytes:
        return self.inner.get(key)[self.fault == "forgetful" :]

    def upload(self, key: str, parts: Sequence[Sequence[memoryview]]) -> Uploaded:
        return self.inner.upload(key, parts[::-1] if self.fault == "disordered" else parts)

    def delete(self, keys: Sequence[str]) -> None:
        if self.fault == "hoarding":
            raise AccessDeniedError("memory://hoarding: may not delete here; grant the right")
        self.inner.delete(keys)


def levels(checks: Sequence[Check]) -> dict[str, str]:
    return {check.name: check.level for check in checks}


def test_the_real_server_passes_every_check(s3: "S3Server", s3_uri: str) -> None:
    checks = list(examine(s3_uri))
    assert list(levels(checks)) == [
        "endpoint",
        "region",
        "credentials",
        "clock",
        "identity",
        "list",
        "put",
        "get",
        "conditional put",
        "multipart",
        "latency",
        "delete",
    ]
    assert set(levels(checks).values()) == {"ok"}, checks
    keys = s3.environment()
    assert keys["AWS_SECRET_ACCESS_KEY"] not in str(checks)
    assert keys["AWS_ACCESS_KEY_ID"] not in str(checks)
    assert keys["AWS_ACCESS_KEY_ID"][-4:] in checks[2].finding
    assert "from AWS_ENDPOINT_URL" in checks[0].finding
    assert list(open_store(s3_uri).list()) == []


def test_a_key_that_may_only_read_is_told_so(
    s3: "S3Server", s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    last = list(examine(s3_uri))[-1]
    assert (last.name, last.level) == ("put", "fail")
    assert "may not write" in last.finding


def test_a_wrong_secret_and_a_missing_bucket_end_the_examination(
    s3: "S3Server", monkeypatch: pytest.MonkeyPatch
) -> None:
    last = list(examine("s3://no-such-bucket/runs"))[-1]
    assert (last.name, last.level, last.unreachable) == ("list", "fail", False)
    assert "create it with" in last.remedy
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    last = list(examine(s3.uri("runs")))[-1]
    assert (last.name, last.level) == ("list", "fail")
    assert "its secret key is wrong" in last.finding
    assert "AWS_SECRET_ACCESS_KEY" in last.remedy
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    last = list(examine(s3.uri("runs")))[-1]
    assert (last.name, last.finding) == ("credentials", "none found")


def test_endpoint_and_region_are_found_in_a_profile(
    s3: "S3Server", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text("[profile mine]\nregion = eu-central-1\nendpoint_url = http://127.0.0.1:1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    checks = list(examine(s3.uri("runs")))
    assert checks[0].finding == "http://127.0.0.1:1 (from profile mine)"
    assert checks[1].finding == "eu-central-1 (from profile mine)"
    assert (checks[-1].name, checks[-1].level, checks[-1].unreachable) == ("connection", "fail", True)
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(StoreError, match=r"profile \(other\) could not be found"):
        list(examine(s3.uri("runs")))


@pytest.mark.parametrize(
    ("fault", "name", "level"),
    [
        ("unconditional", "conditional put", "warn"),
        ("forgetful", "get", "fail"),
        ("disordered", "multipart", "fail"),
        ("hoarding", "delete", "fail"),
    ],
)
def test_what_a_server_does_wrong_is_found(fault: str, name: str, level: str) -> None:
    store: Store = Poor(fault)  # type: ignore[assignment]
    found = {check.name: check for check in examine_store(store)}
    assert {name for name, check in found.items() if check.level != "ok"} == {name}
    assert found[name].level == level
    assert found[name].remedy


def test_a_folder_is_examined_too(tmp_path: Path) -> None:
    assert set(levels(list(examine(str(tmp_path)))).values()) == {"ok"}
    assert list(tmp_path.iterdir()) == []
    (check,) = examine(str(tmp_path / "nothing"))
    assert (check.level, check.remedy) == ("fail", "make it, with mkdir -p")
    with pytest.raises(StoreError, match="unknown scheme"):
        list(examine("ftp://host/path"))


def test_whoever_looks_away_leaves_nothing_either(tmp_path: Path) -> None:
    checks = examine_store(open_store(str(tmp_path)))
    next(checks)
    checks.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seconds", "level"), [(0, "ok"), (-100, "ok"), (301, "fail"), (-600, "fail")])
def test_a_clock_far_off_fails(seconds: int, level: str) -> None:
    server = datetime(2026, 1, 1, tzinfo=UTC)
    check = clock_check(server, server + timedelta(seconds=seconds + 0.5))
    assert check.level == level
    assert bool(check.remedy) == (level == "fail")
