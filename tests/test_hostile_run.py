"""jobs/train.py on a storage that others have written to: it trains, or says in one line what to delete."""

import json
import logging
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from jebm.store.checkpoint import Checkpoints
from jebm.store.sealed import sealed
from jebm.store.storage import open_store

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--config", str(ROOT / "jobs/configs/smoke.yaml"), "--cluster.engine", "process"),
    *("--cluster.workers", "1", "--energy.width", "8", "--langevin.steps", "2", "--train.epochs", "0.16"),
    *("--inference.channels", "[4,8]", "--generator.channels", "[4,8]", "--train.pictures_every_steps", "0"),
    *("--train.batch_size", "64", "--evaluation.every_steps", "0", "--checkpoint.every_steps", "2"),
]
STEPS = 4


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Ended]:
    """Run the job in this process; whatever it prints is safe for a terminal, and no traceback."""
    monkeypatch.setenv("JEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    root, level = logging.getLogger(), logging.getLogger().level

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--run.storage", str(tmp_path), *arguments])
        before = list(root.handlers)
        root.handlers.clear()  # so that the job sets up its log as in a process of its own
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / "jobs/train.py"), run_name="__main__")
        finally:
            root.handlers[:] = before
            root.setLevel(level)
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err
        assert "Traceback" not in captured.out + captured.err
        return Ended(int(str(ended.value.code)), captured.out, captured.err)

    return run


DEEP = b"[" * 100_000
NINE = "\N{ARABIC-INDIC DIGIT NINE}"
ESCAPE = "\x1b[2J\x1b[31mgone"
NEIGHBOURS = {
    f"lease/0000000{NINE}.json": DEEP,
    "lease/notes.json": DEEP,
    f"lease/{ESCAPE}.json": DEEP,
    "lease/99999999.json": sealed(
        {
            "format": "jebm-lease",
            "version": 2,
            "token": "0" * 32,
            "host": "h",
            "pid": 1,
            "beat": 0,
            "since": "2026-01-01T00:00:00Z",
            "ray_job": "",
            "released": True,
        }
    ),
    "checkpoints/MANIFEST.json": DEEP,
    "checkpoints/latest": b"step-00000099-a0001",
    f"checkpoints/step-0000000{NINE}-a000{NINE}/MANIFEST.json": DEEP,
    "checkpoints/step-000000009-a0001/MANIFEST.json": DEEP,
    "checkpoints/step-00000009-a0000000001/MANIFEST.json": DEEP,
    "checkpoints/step-00000009-a-001/MANIFEST.json": DEEP,
    f"checkpoints/{ESCAPE}/MANIFEST.json": DEEP,
    f"checkpoints/step-00000099-a0001/{ESCAPE}": DEEP,
    "checkpoints/step-00000098-a0007/shares/r00001-5ca1ab1e.json": DEEP,
    "checkpoints/step-00000097-a0001/PINNED": DEEP,
}


def plant(run: Path, objects: dict[str, bytes]) -> None:
    for name, content in objects.items():
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_what_is_not_ours_keeps_no_run_from_training(train: Callable[..., Ended], tmp_path: Path) -> None:
    run = tmp_path / "smoke"
    plant(run, NEIGHBOURS)
    dry, ended = train("--dry-run"), train()
    assert (dry.code, ended.code, ended.err) == (0, 0, "")
    assert f"finished: step {STEPS} of {STEPS}" in ended.out
    assert Checkpoints(open_store(str(tmp_path)), "smoke").find("step-00000004-a0008") is not None
    assert all(
        (run / name).read_bytes() == content for name, content in NEIGHBOURS.items() if "99999999" not in name
    )
    # A newest one that nobody can read is passed over, loudly, for the one before.
    plant(run, {"checkpoints/step-00000009-a0001/MANIFEST.json": DEEP})
    dry, ended = train("--dry-run", "--train.epochs", "0.24"), train("--train.epochs", "0.24")
    assert (dry.code, ended.code) == (0, 0)
    for words in ("step-00000009-a0001 is passed over: the manifest cannot be read", "resumes at step 4"):
        assert words in dry.out
        assert words in ended.out
    assert "finished: step 6 of 6" in ended.out


BLOCKING = {
    "checkpoints/step-00000001-a999999999/data/x": "step-00000001-a999999999: leaves no number",
    "checkpoints/step-00000001-a0001/MANIFEST.json": "none that can be read (step-00000001-a0001: ",
    f"lease/{10**15 - 1}.json": f"lease/{10**15 - 1}.json leaves no number for another job",
}


@pytest.mark.parametrize("name", BLOCKING)
def test_what_blocks_a_run_is_named_before_it_starts(
    train: Callable[..., Ended], tmp_path: Path, name: str
) -> None:
    plant(tmp_path / "smoke", {name: DEEP})
    ended = train()
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert BLOCKING[name] in ended.err
    assert "delete" in ended.err
    assert "choose another run.name" in ended.err
    assert not (tmp_path / "smoke" / "run.json").exists()
    if not name.startswith("lease"):
        assert train("--dry-run").err == ended.err
    # The remedy works.
    (tmp_path / "smoke" / name).unlink()
    assert train().code == 0


def test_a_folder_of_a_later_attempt_ends_a_run_only_while_something_is_in_it(
    train: Callable[..., Ended], tmp_path: Path
) -> None:
    plant(tmp_path / "smoke", {"checkpoints/step-00000001-a0500/data/x": b"x"})
    assert train().code == 0
    names = {path.name for path in (tmp_path / "smoke/checkpoints").iterdir()}
    assert names == {"step-00000001-a0500", "step-00000002-a0501", "step-00000004-a0501"}
    manifest = json.loads((tmp_path / "smoke/checkpoints/step-00000004-a0501/MANIFEST.json").read_text())
    assert manifest["attempt"] == 501
