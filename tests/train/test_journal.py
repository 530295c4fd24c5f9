"""A run survives its own journal: what is damaged there, and a storage that is full or gone for a while."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

import pytest
from helpers import exchange, tiny_config

from jebm.config import Config
from jebm.store.storage import LocalStore, StoreError, open_store
from jebm.train.history import attempts_before, rows_before, rows_between
from jebm.train.loop import Result, fit
from jebm.train.outbox import Outbox
from jebm.train.recorder import Report
from jebm.train.runtime import process_runtime
from jebm.train.status import run_status

ROW = b'{"step": 5, "loss": 1.5}\n'
DEEP = b"[" * 100_000 + b"]" * 100_000
RUNS = {  # name -> what stands in run.json
    "empty": b"",
    "cut off": b'{"run": "smoke", "attempts": [{"started": "2026',
    "not UTF-8": b'\xff\xfe{"attempts": []}',
    "not JSON": b"run: smoke\n",
    "deep": b'{"attempts": ' + DEEP + b"}",
    "a list": b"[]",
    "no attempts": b'{"run": "smoke"}',
    "attempts of another type": b'{"attempts": {"0": {}}}',
    "an attempt that is a number": b'{"attempts": [3]}',
    "a negative step": b'{"attempts": [{"started": "2026", "from_step": -5}]}',
    "a step that is true": b'{"attempts": [{"started": "2026", "from_step": true}]}',
    "a key twice": b'{"attempts": [], "attempts": []}',
    "NaN": b'{"attempts": [{"started": "2026", "from_step": 0, "x": NaN}]}',
    "a huge number": b'{"attempts": [' + b"9" * 5000 + b"]}",
    "half a character": b'{"attempts": [{"started": "\\ud800", "from_step": 0}]}',
    "long": b'{"attempts": [], "x": "' + b"x" * (17 * 2**20) + b'"}',
}
METRICS = {  # name -> what stands in metrics.jsonl, with one good row
    "not UTF-8": ROW + b"\xff\xfe\n",
    "not JSON": b"step 5: loss 1.5\n" + ROW,
    "zeros after a power cut": ROW + b"\0" * 4096,
    "deep": DEEP + b"\n" + ROW,
    "lists": ROW + b"[5, 1.5]\n",
    "no step": b'{"loss": 1.5}\n' + ROW,
    "a step that is text": b'{"step": "5"}\n' + ROW,
    "a negative step": b'{"step": -5}\n' + ROW,
    "a broken step": b'{"step": 2.5}\n' + ROW,
    "a step that is true": b'{"step": true}\n' + ROW,
    "a key twice": b'{"step": 4, "step": 5}\n' + ROW,
    "NaN": b'{"step": 5, "loss": NaN}\n' + ROW,
    "a metric that is text": b'{"step": 5, "loss": "low"}\n' + ROW,
    "cut off in the middle": b'{"step": 4, "lo' + b"\n" + ROW,
    "hosts that are no names": b'{"step": 5, "hosts": [3]}\n' + ROW,
    "a line without end": ROW + b'{"step": 5, "loss": ' + b"1" * 3 * 2**20,
}


def train(config: Config, **keywords: object) -> Result:
    with process_runtime(config) as runtime:
        return fit(config, runtime, provenance={}, **keywords)  # type: ignore[arg-type]


def rows_in(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps, to be copied."""
    place = tmp_path_factory.mktemp("begun")
    train(tiny_config(place, train__epochs=0.2))
    return place


# ── What is damaged ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("record", "metrics"),
    [
        pytest.param(RUNS.get(run), METRICS.get(rows), id=f"{run}, {rows}")
        for run, rows in zip_longest(RUNS, METRICS, fillvalue="good")
    ],
)
def test_every_damaged_journal_resumes(
    begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, record: bytes | None, metrics: bytes | None
) -> None:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "smoke"
    damaged = {"run.json": record, "metrics.jsonl": metrics}
    for name, content in damaged.items():
        if content is not None:
            (folder / name).write_bytes(content)
    result = train(tiny_config(tmp_path, train__epochs=0.24))
    assert (result.status, result.step) == ("finished", 6)
    # One line about each, the damaged bytes are there, and the journal is a good one again.
    for name, content in damaged.items():
        lines = [line for line in caplog.messages if f"{name}: is damaged (" in line]
        assert len(lines) == (content is not None)
        if content is not None:
            assert f"kept as {name}.damaged-1" in lines[0]
            assert len(lines[0]) < 700
            assert (folder / f"{name}.damaged-1").read_bytes() == content
    attempts = json.loads((folder / "run.json").read_text())["attempts"]
    assert [attempt["from_step"] for attempt in attempts] == ([0, 5] if record is None else [5])
    rows = rows_in(folder)
    assert [row["step"] for row in rows] == [5, 6]
    assert metrics is None or rows[0] == {"step": 5, "loss": 1.5}


def test_rows_tell_when_and_the_first_of_an_attempt_where(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    folder, began = tmp_path / "smoke", time.time()
    train(tiny_config(tmp_path, train__epochs=0.6))
    rows = rows_in(folder)
    assert rows[0]["time"] < began - 0.001 < rows[1]["time"] <= rows[2]["time"] <= time.time() + 0.001
    assert [row.get("hosts") for row in rows] == [[socket.gethostname()], [socket.gethostname()], None]
    for attempt in json.loads((folder / "run.json").read_text())["attempts"]:
        assert attempt["hosts"] == [socket.gethostname()]
    # They are no metrics, and rows of older versions have none.
    run = open_store(str(folder))
    run.put("metrics.jsonl", ROW + run.get("metrics.jsonl"))
    found = rows_between(run, -1, 100)
    assert [step for step, _ in found] == [5, 5, 10, 15]
    assert found[0][1] == {"loss": 1.5}
    assert found[1][1].keys() == found[2][1].keys()
    assert not {"step", "time", "hosts"} & found[1][1].keys()
    assert not {"step", "time", "hosts"} & run_status(open_store(str(tmp_path)), "smoke").metrics.keys()


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl"])
@pytest.mark.parametrize("what", ["a folder", "a link that leads nowhere", "a link that leads away"])
def test_what_is_no_file_is_set_aside(
    begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, what: str
) -> None:
    shutil.copytree(begun, tmp_path / "a")
    path = tmp_path / "a/smoke" / file
    path.unlink()
    away = tmp_path / "away"
    away.write_text("not ours")
    if what == "a folder":
        (path / "in it").mkdir(parents=True)
    else:
        path.symlink_to(away if what.endswith("away") else tmp_path / "nowhere")
    assert train(tiny_config(tmp_path / "a", train__epochs=0.24)).step == 6
    assert caplog.text.count("damaged-1") == 1
    assert os.path.lexists(path.with_name(f"{file}.damaged-1"))
    assert away.read_text() == "not ours"
    assert path.is_file()
    assert not path.is_symlink()


def test_damage_is_counted_and_nothing_that_was_kept_is_replaced(tmp_path: Path) -> None:
    for store in (LocalStore(tmp_path), open_store("memory://damage/run")):
        for number in (1, 2, 3):
            store.put("run.json", b"%d" % number)
            store.put("metrics.jsonl", b"[%d]\n" % number)
            assert attempts_before(store) == []
            assert rows_before(store, 5).content == b""
        assert [store.get(f"run.json.damaged-{n}") for n in (1, 2, 3)] == [b"1", b"2", b"3"]
        assert [store.get(f"metrics.jsonl.damaged-{n}") for n in (1, 2, 3)] == [b"[1]\n", b"[2]\n", b"[3]\n"]
        assert store.head("run.json") is None


def test_on_s3_too(s3_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(s3_uri, train__epochs=0.2)
    train(config)
    run = open_store(f"{s3_uri}/smoke")
    good = run.get("metrics.jsonl")
    run.put("run.json", RUNS["deep"])
    run.put("metrics.jsonl", good + b"no row\n")
    assert train(tiny_config(s3_uri, train__epochs=0.24)).step == 6
    assert [line for line in caplog.messages if "is damaged" in line] == [
        line for line in caplog.messages if "damaged-1" in line
    ]
    assert run.get("run.json.damaged-1") == RUNS["deep"]
    assert run.get("metrics.jsonl.damaged-1") == good + b"no row\n"
    assert json.loads(run.get("run.json"))["attempts"][0]["from_step"] == 5
    assert run.get("metrics.jsonl").startswith(good)
    assert len(run.get("metrics.jsonl").splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"", b""),
        (ROW, ROW),
        (ROW + b'{"step": 6, "loss": 1', ROW),  # what a crash leaves
        (ROW + b'{"step": 9, "loss": 1}\n', ROW),  # of after the checkpoint
        (ROW.removesuffix(b"\n"), ROW),  # an editor's work
        (ROW + b"\n" + ROW, ROW + ROW),
        (ROW.replace(b"\n", b"\r\n"), ROW.replace(b"\n", b"\r\n")),
        (b'{"step": 5, "loss": null, "rate/1": 3}\n', b'{"step": 5, "loss": null, "rate/1": 3}\n'),
    ],
)
def test_what_is_normal_is_no_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, kept: bytes
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    rows = rows_before(LocalStore(tmp_path), 5)
    assert rows.content == kept
    assert rows.stored == (content == kept)
    assert caplog.text == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_long_journal_is_read_piece_by_piece(tmp_path: Path) -> None:
    """Rows lie across the borders of what is read at a time."""
    row = json.dumps({"step": 5, "loss": 1.25, **{f"metric/{i}": i / 7 for i in range(40)}}).encode() + b"\n"
    content = row * (20 * 2**20 // len(row))
    (tmp_path / "metrics.jsonl").write_bytes(content)
    rows = rows_before(LocalStore(tmp_path), 5)
    assert rows.content == content
    assert rows.stored


# ── A storage that is full or gone ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Write until there is no space left, to the last byte, also of what others free meanwhile."""
    with (folder / "fill").open("wb", buffering=0) as file:
        while os.statvfs(folder).f_bavail:
            for size in (2**16, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)


def wait_until(true: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trained_through(
    config: Config, at: int, break_: Callable[[], None], mend: Callable[[], None], failing: Callable[[], bool]
) -> Result:
    """Train; from step `at` on the storage is broken, until the journal has met that, ten steps later."""
    mended = False

    def on_report(report: Report) -> bool:
        nonlocal mended
        if report.step == at:
            break_()
        if report.step >= at + 10 and not mended:
            wait_until(failing)
            mend()
            mended = True
        return False

    return train(config, on_report=on_report)


def check_journal(folder: Path, steps: int) -> None:
    """All is there that an undisturbed run leaves."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert [row["step"] for row in rows_in(folder)] == list(range(5, steps + 1, 5))
    assert len(json.loads((folder / "run.json").read_text())["attempts"]) == 1
    board = EventAccumulator(str(folder / "tensorboard" / "smoke"))
    board.Reload()
    assert [event.step for event in board.Scalars("1 model/loss")] == list(range(5, steps + 1, 5))
    pictures = sorted(path.name for path in (folder / "pictures").iterdir())
    assert pictures == [f"step-{step:08d}.png" for step in range(5, steps + 1, 5)]


def test_a_full_disk_costs_nothing_of_the_journal(
    disk: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(disk, train__epochs=1.6, train__pictures_every_steps=5)
    result = trained_through(
        config,
        10,
        lambda: fill(disk),
        (disk / "fill").unlink,
        lambda: "journal cannot be written" in caplog.text,
    )
    assert (result.status, result.step) == ("finished", 40)
    check_journal(disk / "smoke", 40)
    (began,) = [line for line in caplog.messages if "journal cannot" in line]
    assert "No space left on device" in began
    assert caplog.messages.count("the journal is written again; nothing is missing") == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_disk_that_stays_full_ends_in_one_line_about_the_checkpoint(
    disk: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(disk, train__epochs=0.8, train__pictures_every_steps=5)

    def on_report(report: Report) -> bool:
        if report.step == 10:
            fill(disk)
        return False

    with pytest.raises(StoreError, match="the checkpoint of step 20 could not be written"):
        train(config, on_report=on_report)
    (left,) = [line for line in caplog.messages if "not wholly written" in line]
    assert "pictures/step-00000020.png" in left
    assert "Traceback" not in capfd.readouterr().err
    # What was on its way when the disk was full is no damage to the next start.
    (disk / "fill").unlink()
    caplog.clear()
    assert train(config).status == "finished"
    assert [row["step"] for row in rows_in(disk / "smoke")] == [5, 10, 15, 20]
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("fault", ["read-only", "a file in its place", "renamed away", "deleted"])
def test_a_folder_that_is_gone_for_a_while_costs_nothing_of_the_journal(
    disk: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    folder, away = disk / "smoke", disk / "away"

    def remount(how: str) -> bool:
        return subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=False).returncode == 0

    def break_() -> None:
        wait_until((folder / "pictures/step-00000005.png").exists)
        if fault == "read-only":
            wait_until(lambda: remount("ro"))  # not while the journal has a file open
        elif fault == "a file in its place":
            away.touch()
            exchange(folder, away)
        elif fault == "deleted":
            shutil.copytree(folder / "pictures", away)
            folder.rename(disk / "gone")
            shutil.rmtree(disk / "gone")
        else:
            folder.rename(away)

    def mend() -> None:
        if fault == "read-only":
            assert remount("rw")
        elif fault == "a file in its place":
            exchange(folder, away)
        else:  # a new one was made, and must get everything
            for path in away.rglob("*.png"):
                shutil.copy(path, folder / "pictures")

    def failing() -> bool:
        if fault in ("renamed away", "deleted"):
            return (folder / "pictures/step-00000015.png").exists()
        return "journal cannot be written" in caplog.text

    config = tiny_config(disk, train__epochs=1.2, train__pictures_every_steps=5)
    assert trained_through(config, 10, break_, mend, failing).status == "finished"
    check_journal(folder, 30)


def test_what_waits_is_bounded_and_reports_have_room_longest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "run"
    place.touch()  # where the folder should be
    outbox = Outbox(LocalStore(place))
    outbox.open("metrics.jsonl", ROW, stored=False)
    for name in ("a", "b", "c"):
        outbox.put(f"pictures/{name}.png", name.encode() * 30 * 2**20, extra=True)
    for _ in range(1000):
        outbox.append("metrics.jsonl", ROW)
    wait_until(lambda: "journal cannot be written" in caplog.text)
    assert "60 MB of the journal wait" in caplog.text
    place.unlink()
    outbox.close()
    assert (place / "metrics.jsonl").read_bytes() == ROW * 1001
    assert sorted(path.name for path in (place / "pictures").iterdir()) == ["a.png", "b.png"]
    assert "the journal is written again; 1 entries that there was no room for are missing" in caplog.messages
