"""`fetch.py`: what it brings and leaves, twice, from storages, and from buckets that a stranger filled."""

import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from jebm.commands import run_command
from jebm.store.protocol import ObjectInfo
from jebm.store.results import planned
from jebm.store.storage import open_store

FETCH = Path(__file__).resolve().parents[2] / "jobs" / "fetch.py"
Fetch = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fetch:
    """Run the job in this process; returns its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fetch.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command("fetch")
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return call


@dataclass
class Bucket:
    """A server of one bucket that any key and any content may lie in."""

    objects: dict[str, bytes]
    url: str = ""
    changing: set[str] = field(default_factory=set)
    """Keys whose objects are replaced by others when they are first read."""
    gate: threading.Event = field(default_factory=threading.Event)
    """Until it is set, answers stop in the middle of an object."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *_arguments: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if "list-type" in parse_qs(parts.query):
            self._answer(200, self._listing(parse_qs(parts.query).get("prefix", [""])[0]).encode())
            return
        key = unquote(parts.path).removeprefix("/any/")
        wanted = self.headers.get("If-Match", "").strip('"')
        if wanted and key in self.bucket.changing:
            self.bucket.changing.discard(key)
            self.bucket.objects[key] += b" and more"
        data = self.bucket.objects[key]
        if wanted not in ("", _etag(data)):
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        headers = {"ETag": f'"{_etag(data)}"', "Last-Modified": "Mon, 23 Nov 2026 05:53:43 GMT"}
        if "Range" not in self.headers:
            self._answer(200, data, headers)
            return
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._answer(206, data[first : last + 1], headers)

    def _listing(self, prefix: str) -> str:
        contents = "".join(
            f"<Contents><Key>{quote(key)}</Key><Size>{len(data)}</Size><ETag>{_etag(data)}</ETag>"
            "<LastModified>2026-11-23T05:53:43.000Z</LastModified></Contents>"
            for key, data in sorted(self.bucket.objects.items())
            if key.startswith(prefix)
        )
        head = "<EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{head}{contents}</ListBucketResult>"

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if status == 206:
                self.bucket.gate.wait(60)
            self.wfile.write(data[len(data) // 2 :])


def _etag(data: bytes) -> str:
    return md5(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket called `any` on a server of its own; the environment points there."""
    found = Bucket({})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"bucket": found}))
    server.daemon_threads = True
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", found.url)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.gate.set()
    yield found
    found.gate.set()
    server.shutdown()
    server.server_close()


def files_in(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".fetched.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def fill(uri: str, *keys: str) -> None:
    store = open_store(uri)
    for key in keys:
        store.put(key, key.encode())


RUN = ("run.json", "metrics.jsonl", "pictures/step-00000010.png", "tensorboard/events.out.tfevents.1")
CHECKPOINT = ("MANIFEST.json", "data/r00000-00000000.safetensors", "PINNED")
NOT_BROUGHT = (*(f"checkpoints/step-00000010-a0001/{name}" for name in CHECKPOINT), "lease/00000001.json")


def test_a_sweep_comes_whole_without_checkpoints_and_again_only_what_has_changed(
    fetch: Fetch, s3_uri: str, tmp_path: Path
) -> None:
    uri, folder = f"{s3_uri}/sweep", tmp_path / "results"
    trials = [f"trials/t000{number}/{key}" for number in range(3) for key in RUN]
    own = ["sweep.json", "study.log", "best.yaml", "report/report.html"]
    fill(uri, *own, *trials, *(f"trials/t000{number}/{key}" for number in range(3) for key in NOT_BROUGHT))
    fill(uri, *NOT_BROUGHT)
    code, out, err = fetch(uri, folder)
    assert (code, files_in(folder)) == (0, {key: key.encode() for key in (*own, *trials)}), err
    assert out.startswith("16 files, ")

    assert fetch(uri, folder)[1] == f"0 files, 0.0 MB from {uri} to {folder}, 16 unchanged\n"
    open_store(uri).put("study.log", b"study.lag")  # of the same size
    (folder / "best.yaml").write_bytes(b"edited here")
    (folder / "sweep.json").unlink()
    (folder / "mine.txt").write_bytes(b"not theirs")
    assert fetch(uri, folder)[1].startswith("3 files, ")
    expected = {key: key.encode() for key in (*own, *trials)} | {"study.log": b"study.lag"}
    assert files_in(folder) == expected | {"mine.txt": b"not theirs"}
    (folder / ".fetched.json").write_bytes(b'{"files": [')  # damaged: everything comes again
    assert fetch(uri, folder)[1].startswith("16 files, ")


def test_of_a_storage_it_names_what_is_there_and_brings_nothing(
    fetch: Fetch, s3_uri: str, tmp_path: Path
) -> None:
    fill(f"{s3_uri}/team/first", *RUN, *NOT_BROUGHT)
    fill(f"{s3_uri}/second", "lease/00000001.json")  # it has begun a moment ago
    fill(f"{s3_uri}/sweep", "sweep.json", *(f"trials/t0000/{key}" for key in (*RUN, *NOT_BROUGHT)))
    fill(f"{s3_uri}/duel", "comparison.json", "rows/duel-joint-1.json")
    code, _, err = fetch(s3_uri, tmp_path / "results")
    assert (code, (tmp_path / "results").exists()) == (2, False)
    names = "duel, second, sweep, team/first"
    assert (
        err == f"error: {s3_uri}: is not a run but holds {names}; give one of them, such as {s3_uri}/duel\n"
    )
    assert fetch(f"{s3_uri}/duel", tmp_path / "duel")[0] == 0
    assert set(files_in(tmp_path / "duel")) == {"comparison.json", "rows/duel-joint-1.json"}
    assert fetch(f"{s3_uri}/team/first/pictures", tmp_path / "pictures")[0] == 0  # a part of a run
    assert set(files_in(tmp_path / "pictures")) == {"step-00000010.png"}


@pytest.mark.parametrize(
    ("below", "said"),
    [
        ("nothing", "holds no results of a run; give run.storage/run.name"),
        ("new", "holds no results yet, or only checkpoints"),
        ("new/checkpoints/step-00000010-a0001", "is a checkpoint; jebm checkpoints get brings it"),
        ("new/checkpoints", "holds no results yet, or only checkpoints"),
    ],
)
def test_where_no_results_are_one_line_says_so(fetch: Fetch, tmp_path: Path, below: str, said: str) -> None:
    uri = f"memory://{uuid.uuid4().hex}"
    fill(f"{uri}/new", *NOT_BROUGHT)
    code, _, err = fetch(f"{uri}/{below}", tmp_path / "results")
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_nothing_but_a_folder_elsewhere_is_written_to(fetch: Fetch, tmp_path: Path) -> None:
    fill(str(tmp_path / "run"), *RUN)
    before = files_in(tmp_path)
    for target in (tmp_path / "run", tmp_path / "run" / "results"):
        code, _, err = fetch(tmp_path / "run", target)
        assert (code, files_in(tmp_path)) == (2, before)
        assert "give another folder" in err
    code, _, err = fetch(tmp_path / "run", "memory://elsewhere")
    assert code == 2
    assert "is no folder of this machine" in err


HOSTILE = {
    "a": "other objects lie below this name",
    "../up": "is not a key",
    "/etc/passwd": "is not a key",
    "x//y": "is not a key",
    "control\x1b]0;\x07": "is not a key",
    "line\nbreak": "is not a key",
    "n" * 300: "File name too long",
    "/".join(["m" * 200] * 6): "is not a key",  # longer than S3 allows
    ".fetched.json": "the record of what was fetched",
    "link/file": "a symbolic link at",
    "loop/file": "cannot be written here",
    "is a folder": "cannot be written here: Is a directory",
    "file/below": "cannot be written here",
}
GOOD = (
    "run.json",
    "a/b",
    "A",
    "spaces + ünïcode %2e%2e",
    "empty",
    "changing",
    "replaced link",
    "\u202etxt.exe",
)


def test_an_object_that_can_be_no_file_is_named_and_the_rest_is_there(
    fetch: Fetch, bucket: Bucket, tmp_path: Path
) -> None:
    contents = {key: b"" if key == "empty" else key.encode() for key in (*GOOD, *HOSTILE)}
    bucket.objects.update({f"runs/mine/{key}": data for key, data in contents.items()})
    bucket.changing.add("runs/mine/changing")
    folder, outside = tmp_path / "results", tmp_path / "outside"
    (folder / "is a folder").mkdir(parents=True)
    (folder / "file").write_bytes(b"mine")
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    (folder / "link").symlink_to(outside)
    (folder / "loop").symlink_to("loop")
    (folder / "replaced link").symlink_to(outside / "kept")

    code, out, err = fetch("s3://any/runs/mine", folder)
    assert code == 1
    assert out.startswith(f"{len(GOOD)} files, ")
    lines = err.splitlines()
    assert len(lines) == len(HOSTILE)
    for reason in set(HOSTILE.values()):
        assert sum(reason in line for line in lines) >= list(HOSTILE.values()).count(reason), reason
    assert all(line.isascii() and line.isprintable() and line.startswith("not brought: ") for line in lines)
    expected = {key: contents[key] for key in GOOD} | {"changing": b"changing and more", "file": b"mine"}
    assert files_in(folder) == expected
    assert not (folder / "replaced link").is_symlink()
    assert files_in(outside) == {"kept": b"kept"}
    assert {path.name for path in tmp_path.iterdir()} == {"results", "outside"}
    code, out, _ = fetch("s3://any/runs/mine", folder)
    assert (code, out.split(" from ")[0]) == (1, "0 files, 0.0 MB")
    assert f"{len(GOOD)} unchanged" in out


def test_odd_names_of_a_local_run_are_named(fetch: Fetch, tmp_path: Path) -> None:
    source = tmp_path / "run"
    fill(str(source), *RUN)
    for name in (b"not \xff utf-8", b"back\\slash", b"line\nbreak"):
        (source / os.fsdecode(name)).write_bytes(b"odd")
    code, _, err = fetch(source, tmp_path / "results")
    assert (code, set(files_in(tmp_path / "results"))) == (1, set(RUN))
    assert len(err.splitlines()) == 3
    assert "its name is not UTF-8" in err


def test_an_interrupted_fetch_leaves_no_half_file_under_a_name(
    fetch: Fetch, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.objects.update({"runs/mine/run.json": b"{}", "runs/mine/big": os.urandom(6 << 20)})
    folder = tmp_path / "results"
    for number in (signal.SIGKILL, signal.SIGINT):
        bucket.gate.clear()
        with subprocess.Popen(
            [sys.executable, FETCH, "s3://any/runs/mine", folder], stderr=subprocess.PIPE, text=True
        ) as job:
            deadline = time.monotonic() + 300
            while not list(folder.glob(".partial-*/*")):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            job.send_signal(number)
            time.sleep(0.5)
            bucket.gate.set()
            err = job.communicate(timeout=300)[1]
        # Ctrl-C may come too late to stop the download; what has the name is complete then.
        if number == signal.SIGKILL:
            assert not (folder / "big").exists()
        if (folder / "big").exists():
            assert (folder / "big").read_bytes() == bucket.objects["runs/mine/big"]
            (folder / "big").unlink()
        assert "Traceback" not in err
    assert fetch("s3://any/runs/mine", folder)[0] == 0
    assert (folder / "big").read_bytes() == bucket.objects["runs/mine/big"]


def test_memory_does_not_grow_with_a_file(fetch: Fetch, tmp_path: Path) -> None:
    source = tmp_path / "run"
    fill(str(source), "run.json")
    with (source / "big").open("wb") as file:
        file.truncate(300 << 20)
    tracemalloc.start()
    try:
        assert fetch(source, tmp_path / "results")[0] == 0
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
    finally:
        tracemalloc.stop()
    assert (tmp_path / "results" / "big").stat().st_size == 300 << 20


def test_where_case_does_not_count_of_two_names_one_is_brought() -> None:
    keys = ["a/b", "A", "pictures/One.png", "pictures/one.png", "e\u0301", "\u00e9"]
    infos = [ObjectInfo(key, 1, "e", datetime.now(UTC)) for key in keys]
    plan = planned(infos, folds_case=True, is_unchanged=lambda info: False)
    assert [info.key for info in plan.wanted] == ["a/b", "e\u0301", "pictures/One.png"]
    assert [line.partition(": ")[0] for line in plan.refused] == ["A", "pictures/one.png", "\u00e9"]
    plan = planned(infos, folds_case=False, is_unchanged=lambda info: False)
    assert {info.key for info in plan.wanted} == set(keys)
