"""The jobs that look after checkpoints, as people and scripts use them: what they print, and how they end."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from jebm.commands import run_command
from jebm.store.checkpoint import Facts, Manifest
from jebm.store.retrieve import RunStore, open_run
from jebm.store.shares import Share

if TYPE_CHECKING:
    from tests.conftest import S3Server


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """All of stdout, which has to be one JSON document."""
        return json.loads(self.out)


Job = Callable[..., Ended]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """Run a job in this process: `job("checkpoints", "list", uri)`; starting python takes seconds."""

    def call(name: str, *arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["jebm", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_command(name)
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Ended(caught.value.code, captured.out, captured.err)

    return call


def contents(step: int, parent: str | None = None, **metrics: float) -> tuple[dict[str, torch.Tensor], Facts]:
    weights = torch.randn(10, generator=torch.Generator().manual_seed(step))
    facts = Facts(
        step=step,
        attempt=1,
        state={},
        config={"energy": {"width": 100 + step}},
        metrics={"distortion": 100.0 - step, **metrics},
        provenance={"torch": "2"},
        world_size=2,
        parent=parent,
    )
    tensors = {"model.weight": weights, "ema.weight": weights + 1, "optimizer.step": torch.tensor(step)}
    return tensors, facts


def save(place: RunStore, step: int, parent: str | None = None, **metrics: float) -> Manifest:
    return place.checkpoints.save(*contents(step, parent, **metrics))


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A run in a local folder, with checkpoints of steps 1, 2 and 3."""
    found = str(tmp_path / "runs" / "mine")
    for step in (1, 2, 3):
        save(open_run(found), step)
    return found


def test_list_shows_states_and_marks(job: Job, uri: str) -> None:
    place = open_run(uri)
    place.folder("step-00000002-a0001").delete([place.choose(step=2).objects[0].key])
    place.folder("step-00000004-a0001").put("data/r00000-00000000.safetensors", b"half")
    save(place, 5, distortion=float("nan"))
    assert job("checkpoints", "pin", uri, "--step", "1").code == 0
    table = job("checkpoints", "list", uri)
    assert table.code == 0
    header, *lines = table.out.splitlines()
    assert header.split() == ["step", "attempt", "age", "size", "distortion", "status"]
    assert [line.split()[0] for line in lines] == ["5", "4", "3", "2", "1"]
    states = ["committed", "partial", "committed", "corrupt", "committed"]
    marks = ["latest", "it has no manifest", "best", "is missing", "pinned"]
    for line, state, mark in zip(lines, states, marks, strict=True):
        assert f"  {state}" in line
        assert mark in line
    listed = job("checkpoints", "list", uri, "--json", "--mode", "max").document["checkpoints"]
    assert [item["status"] for item in listed] == states
    assert [item["best"] for item in listed] == [False, False, False, False, True]
    assert listed[0]["metrics"] == {"distortion": None}
    assert "is missing" in listed[3]["reason"]
    short = job("checkpoints", "list", uri, "--limit", "1")
    assert short.out.splitlines()[-1] == "the 1 newest; all: --limit 0"
    other = job("checkpoints", "list", uri, "--metric", "nonsense")
    assert other.out.splitlines()[-1] == "none has the metric nonsense; metrics are distortion"


def test_show_tells_all_that_a_checkpoint_says(job: Job, uri: str) -> None:
    text = job("checkpoints", "show", uri, "--step", "2").out
    for fact in ("step-00000002-a0001", "energy.width  102", "distortion  98", "model.weight    float32  10"):
        assert fact in text
    document = job("checkpoints", "show", uri, "--best", "distortion", "--json").document
    assert document["step"] == 3
    assert document["config"] == {"energy": {"width": 103}}
    assert {"name": "optimizer.step", "dtype": "int64", "shape": [], "bytes": 8} in document["tensors"]


def test_a_sharded_checkpoint_looks_like_any_other(job: Job, uri: str, tmp_path: Path) -> None:
    place = open_run(uri)
    for rank in (1, 0):
        place.checkpoints.save_share(*contents(4), Share(rank, 2, "5ca1ab1e"), 0)
    assert "in 2 parts of 2 objects" in job("checkpoints", "show", uri, "--latest").out
    assert len(job("checkpoints", "show", uri, "--json").document["tensors"]) == 3
    assert job("checkpoints", "list", uri, "--json").document["checkpoints"][0]["status"] == "committed"
    verified = job("checkpoints", "verify", uri, "--latest", "--deep", "--json").document["checkpoints"]
    assert [(item["name"], item["status"]) for item in verified] == [("step-00000004-a0001", "ok")]
    assert "3 changed" in job("checkpoints", "diff", uri, "3", "4").out
    target = str(tmp_path / "target")
    assert job("checkpoints", "get", uri, "--step", "4", "--output", target).code == 0
    assert job("checkpoints", "verify", f"{target}/mine", "--deep").code == 0


def test_get_and_verify(job: Job, uri: str, tmp_path: Path) -> None:
    target = str(tmp_path / "target")
    first = job("checkpoints", "get", uri, "--output", target, "--json").document
    assert first["step"] == 3
    assert job("checkpoints", "get", uri, "--output", target, "--json").document["bytes_fetched"] == 0
    mine = f"{target}/mine"
    assert job("checkpoints", "verify", mine, "--deep").code == 0
    file = next(Path(first["folder"]).glob("data/*.safetensors"))
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    ended = job("checkpoints", "verify", mine, "--deep")
    assert ended.code == 1
    assert "step-00000003-a0001  damaged" in ended.out
    assert "does not match its CRC32" in ended.out
    assert "repaired" not in ended.out
    assert job("checkpoints", "get", uri, "--output", target).code == 0
    assert job("checkpoints", "verify", mine, "--step", "3", "--deep").code == 0


def test_verify_finds_a_flipped_bit_in_the_bucket(job: Job, s3_uri: str) -> None:
    place = open_run(f"{s3_uri}/mine")
    save(place, 1)
    manifest = save(place, 2)
    (stored,) = manifest.objects
    folder = place.folder(manifest.name)
    data = bytearray(folder.get(stored.key))
    data[-1] ^= 1
    info = folder.put(stored.key, bytes(data))
    forged = replace(manifest, objects=(replace(stored, etag=info.etag),))
    folder.put("MANIFEST.json", forged.encode())  # who can write the one can write the other
    assert job("checkpoints", "verify", place.uri).code == 0
    ended = job("checkpoints", "verify", place.uri, "--deep", "--json")
    assert ended.code == 1
    newest, older = ended.document["checkpoints"]
    assert (newest["name"], newest["status"]) == (manifest.name, "damaged")
    assert "part 1 of 1 does not match its CRC32" in newest["problems"][0]
    assert older["status"] == "ok"


def test_prune_only_says_what_it_would_do_until_told_to(job: Job, uri: str) -> None:
    assert job("checkpoints", "pin", uri, "--step", "1").code == 0
    orphan = open_run(uri).folder("step-00000009-a0001")
    orphan.put("data/r00000-00000000.safetensors", b"half")
    said = job("checkpoints", "prune", uri, "--keep-last", "1", "--orphans", "--orphan-hours", "0", "--json")
    names = ["step-00000002-a0001", "step-00000009-a0001"]
    assert [item["name"] for item in said.document["checkpoints"]] == names
    assert said.document["deleted"] is False
    assert len(job("checkpoints", "list", uri, "--json").document["checkpoints"]) == 4
    assert "would go" in job("checkpoints", "prune", uri, "--keep-last", "1").out
    done = job(
        "checkpoints", "prune", uri, "--keep-last", "1", "--orphans", "--orphan-hours", "0", "--yes", "--json"
    )
    assert done.document == said.document | {"deleted": True}
    left = job("checkpoints", "list", uri, "--json").document["checkpoints"]
    assert [item["step"] for item in left] == [3, 1]
    assert job("checkpoints", "unpin", uri, "--step", "1").code == 0
    assert job("checkpoints", "prune", uri, "--keep-last", "1", "--keep-every", "1", "--yes").out.startswith(
        "nothing to delete"
    )


def test_prune_keeps_what_the_newest_was_resumed_from(job: Job, uri: str) -> None:
    save(open_run(uri), 4, parent="step-00000001-a0001")
    said = job("checkpoints", "prune", uri, "--keep-last", "1", "--json").document
    assert [item["name"] for item in said["checkpoints"]] == ["step-00000003-a0001", "step-00000002-a0001"]


def test_diff_says_what_changed(job: Job, uri: str) -> None:
    text = job("checkpoints", "diff", uri, "1", "3").out
    assert "tensors: 3 changed, 0 added, 0 removed, 0 equal" in text
    assert "energy.width  101  →  103" in text
    document = job("checkpoints", "diff", uri, "2", "2", "--json").document
    assert document["tensors"]["changed"] == []
    assert (document["config"], document["metrics"]) == ({}, {})


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["list", "RUN", "--limt", "3"], 2, "unknown option --limt; did you mean --limit?"),
        (["list"], 2, "run: is missing"),
        (["lost", "RUN"], 2, "unknown command lost; did you mean list?"),
        (["list", "ftp://host/runs/mine"], 2, "unknown scheme"),
        (["list", "s3://bucket"], 2, "names no run"),
        (["list", "FOLDER/nothing"], 1, "no such run; give run.storage/run.name"),
        (["list", "FOLDER/no/such/run"], 1, "no such run"),
        (["show", "RUN", "--step", "77"], 1, "no checkpoint of step 77; there are 1, 2, 3"),
        ([], 2, "a command is missing; there are list, show"),
        (["show", "RUN", "--step", "x"], 2, "--step: needs an integer, not 'x'"),
        (["show", "RUN", "--step", "1", "--latest"], 2, "give one of"),
        (["get", "RUN"], 2, "--output: is missing (where to)"),
        (["get", "RUN", "--output", "s3://bucket/x"], 2, "must be a local folder"),
        (["get", "RUN", "--best", "los", "--output", "x"], 1, "no checkpoint with a finite los"),
        (["prune", "RUN", "--keep-last", "0"], 2, "--keep-last 0: must be 1 or more"),
        (["unpin", "RUN", "--step", "77"], 1, "no checkpoint of step 77"),
        (["verify", "RUN", "--step", "77"], 1, "no checkpoint of step 77"),
    ],
)
def test_what_is_wrong_is_one_line(job: Job, uri: str, arguments: list[str], code: int, said: str) -> None:
    folder = str(Path(uri).parent)
    given = [word.replace("RUN", uri).replace("FOLDER", folder) for word in arguments]
    ended = job("checkpoints", *given)
    assert ended.code == code
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_a_wrong_secret_and_a_dead_endpoint_are_one_line(
    job: Job, s3: "S3Server", s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    ended = job("checkpoints", "list", f"{s3_uri}/mine", "--json")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "its secret key is wrong" in ended.document["error"]
    assert s3.environment()["AWS_SECRET_ACCESS_KEY"] not in ended.out + ended.err
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    began = time.monotonic()
    ended = job("checkpoints", "list", f"{s3_uri}/mine")
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert "is it running" in ended.err
    assert time.monotonic() - began < 25  # not the 30 s that a store is given otherwise


def test_the_doctor_says_it_by_line_document_and_exit_code(
    job: Job, s3: "S3Server", s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = job("doctor", s3_uri)
    assert ended.code == 0
    assert len(ended.out.splitlines()) == 13
    assert all(line.startswith("ok    ") for line in ended.out.splitlines())
    assert job("doctor", "ftp://host").code == 2
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    ended = job("doctor", s3_uri)
    assert ended.code == 1
    assert ended.out.splitlines()[-1].startswith("FAIL  list ")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    ended = job("doctor", s3_uri, "--json")
    assert ended.code == 2
    assert ended.document["ok"] is False
    assert ended.document["checks"][-1]["name"] == "connection"


ESCAPE = "\x1b[2J\x1b]0;title\x07"
FORGED = "real\n99,999        1   1 min  17.9 MB     0.001  committed  latest best"


def test_no_name_forges_a_row_or_reaches_the_terminal(job: Job, tmp_path: Path) -> None:
    uri = str(tmp_path / "runs" / "mine")
    for step in (1, 2):
        facts = Facts(
            step=step,
            attempt=1,
            state={},
            config={ESCAPE: {FORGED: step}, "a": f"{ESCAPE}{step}"},
            metrics={ESCAPE: 1.0 * step, FORGED: 2.0 * step},
            provenance={ESCAPE: FORGED, FORGED: ESCAPE},
            world_size=1,
            parent=None,
        )
        tensors = {
            f"model.{ESCAPE}": torch.ones(step),
            f"model.{FORGED}": torch.ones(step),
            "model.w": torch.ones(2),
        }
        open_run(uri).checkpoints.save(tensors, facts)
    commands = {
        ("list", uri, "--metric", FORGED): 3,
        ("show", uri): 9 + 2 * 4 + 2 + 2 + 2 + 1 + 3,
        ("verify", uri, "--deep"): 3,
        ("diff", uri, "1", "2"): 2 + 3 + 1 + 3 + 1 + 1 + 2,
        ("get", uri, "--output", str(tmp_path / "copy")): 1,
    }
    for command, rows in commands.items():
        ended = job("checkpoints", *command)
        assert ended.code == 0
        assert "\x1b" not in ended.out + ended.err
        assert "\x07" not in ended.out + ended.err
        assert ended.out.count("\n") == rows, ended.out
        assert not any(line.startswith("99,999") for line in ended.out.splitlines())
        assert job("checkpoints", *command, "--json").document  # one, and it says it all
    shown = job("checkpoints", "show", uri, "--json")
    assert "\x1b" not in shown.out
    assert ESCAPE in shown.document["metrics"]


def test_weights_that_are_not_finite_are_named_by_every_command(job: Job, uri: str, tmp_path: Path) -> None:
    tensors, facts = contents(4)
    tensors["model.weight"][3] = float("nan")
    open_run(uri).checkpoints.save(tensors, facts)
    words = "model.weight holds NaN or infinity"
    verified = job("checkpoints", "verify", uri, "--deep")
    assert (verified.code, verified.out.splitlines()[0]) == (1, f"step-00000004-a0001  damaged  {words}")
    got = job("checkpoints", "get", uri, "--output", str(tmp_path / "copy"))
    assert (got.code, got.err.count("\n")) == (0, 1)
    assert f"warning: step-00000004-a0001: {words}; training and evaluation refuse it" in got.err
    assert job("checkpoints", "get", uri, "--output", str(tmp_path / "copy"), "--json").document[
        "problems"
    ] == [words]


def test_a_manifest_of_version_1_is_shown_as_one(job: Job, uri: str) -> None:
    folder = open_run(uri).folder("step-00000003-a0001")
    content = json.loads(folder.get("MANIFEST.json"))
    assert "manifest    version 2\n" in job("checkpoints", "show", uri).out
    del content["sha256"]
    for stored in content["objects"]:
        del stored["header_crc32"]
    folder.put("MANIFEST.json", json.dumps(content | {"version": 1}).encode())
    assert "manifest    version 1, without a hash\n" in job("checkpoints", "show", uri).out
    document = job("checkpoints", "show", uri, "--json").document
    assert document["version"] == 1
    assert "sha256" not in document
    assert job("checkpoints", "verify", uri, "--deep").code == 0
