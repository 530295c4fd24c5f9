"""One copy of a data set on a node, decoded once, by whichever process lives, in little memory."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jebm.data import part_reader
from jebm.data.dataset import load_images
from jebm.data.manifest import MANIFEST, DatasetManifest
from jebm.data.shards import write_dataset
from jebm.data.source import source_from_arrays
from jebm.errors import DataError, StoreError
from jebm.store.storage import Store, open_store

HERE = Path(__file__).resolve().parent
PROCESSES = 4


def noise_set(store: Store, images: int, size: int, images_per_part: int = 8192) -> DatasetManifest:
    shape = (images, size, size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    source = source_from_arrays(pixels, np.arange(images) % 10, name="noise")
    return write_dataset(source, store, images_per_part=images_per_part)


def files_of(manifest: DatasetManifest) -> set[str]:
    return {f"{manifest.sha256}.images.u8", f"{manifest.labels_sha256}.labels.i32"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = (HERE.parents[1] / "platform", HERE.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


# --- several processes at once


@pytest.mark.parametrize("dies", [False, True], ids=["all live", "the first is killed"])
def test_a_node_fetches_and_keeps_one_copy(tmp_path: Path, dies: bool) -> None:
    place, cache, journal = (tmp_path / name for name in ("set", "cache", "journal"))
    manifest = noise_set(open_store(str(place)), 6_000, 16, images_per_part=1_000)
    python(
        *(str(HERE / "decoding_worker.py"), str(place), str(cache), str(journal)),
        *(str(PROCESSES), str(int(dies))),
    )
    lines: list[dict[str, Any]] = [json.loads(line) for line in journal.read_text().splitlines()]
    asked = [line for line in lines if "part" in line]
    decoders = list(dict.fromkeys(line["process"] for line in asked))
    # Each decoder asks for each part once, and there is one; or one more, after the first was killed.
    assert len(decoders) == 1 + dies
    last = Counter(line["part"] for line in asked if line["process"] == decoders[-1])
    assert last == {part.name: 1 for part in manifest.parts}
    # All others wait, and say for whom.
    waited = [line for line in lines if "waiting" in line]
    assert len({line["process"] for line in waited} - {decoders[0]}) == len(waited) == PROCESSES - 1
    words = rf"waiting for process {decoders[0]} on \S+, which decodes noise \(train\) into {cache}"
    assert all(re.fullmatch(words, line["waiting"]) for line in waited)
    # The disk holds one copy at any time, and nothing else in the end.
    assert max(line["bytes_in_cache"] for line in asked) <= 1.1 * manifest.images * (16 * 16 * 3 + 4)
    hashes = [line["sha256"] for line in lines if "sha256" in line]
    assert hashes == [manifest.sha256] * (PROCESSES - dies)
    assert {path.name for path in cache.iterdir()} == files_of(manifest)


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    store = open_store(str(tmp_path / "set"))
    manifest = noise_set(store, 100, 4)
    assert len(load_images(store, tmp_path / "cache").images_NHWC) == 100
    assert {path.name for path in (tmp_path / "cache").iterdir()} == files_of(manifest)


def test_a_set_without_room_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    small, huge, cache = (
        open_store(str(tmp_path / "small")),
        open_store(str(tmp_path / "huge")),
        tmp_path / "c",
    )
    kept = files_of(noise_set(small, 100, 4))
    before = load_images(small, cache).images_NHWC.copy()
    noise_set(huge, 100, 8)
    content = json.loads(huge.get(MANIFEST)) | {
        "images": 2**32,
        "height": 2**15,
        "width": 2**15,
        "channels": 1,
    }
    content["parts"][0]["images"] = 2**32
    huge.put(MANIFEST, json.dumps(content).encode())
    words = rf"^{cache}: noise \(train\) takes [\d,]+ bytes decoded, and [\d,]+ are free; set JEBM_CACHE to a"
    with pytest.raises(DataError, match=words):
        load_images(huge, cache)
    assert {path.name for path in cache.iterdir()} == kept
    np.testing.assert_array_equal(load_images(small, cache).images_NHWC, before)


# --- parts larger than one request


@dataclass
class CountedStore:
    """A store that remembers which bytes were asked for."""

    store: Store
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        self.ranges.append((offset, offset + sum(piece.nbytes for piece in pieces)))
        self.store.read_into(key, offset, pieces, etag=etag)


def test_a_part_is_read_in_ranges_each_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_reader, "_FETCH_BYTES", 100_000)
    store = CountedStore(open_store(str(tmp_path / "set")))
    manifest = noise_set(store.store, 8_000, 4)
    images = load_images(store, tmp_path / "cache").images_NHWC
    again = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    np.testing.assert_array_equal(images, again)
    ranges = sorted(store.ranges)
    assert len(ranges) >= 4
    assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == manifest.parts[0].bytes


@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.8, 0.995, 1.0])
def test_a_flipped_bit_anywhere_in_a_ranged_part_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: float
) -> None:
    monkeypatch.setattr(part_reader, "_FETCH_BYTES", 100_000)
    store = open_store(str(tmp_path / "set"))
    name = noise_set(store, 8_000, 4).parts[0].name
    data = bytearray(store.get(name))
    data[round(where * (len(data) - 1))] ^= 4
    store.put(name, bytes(data))
    with pytest.raises((DataError, StoreError), match=name):
        load_images(store, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_memory_holds_row_groups_not_parts(tmp_path: Path) -> None:
    manifest = noise_set(open_store(str(tmp_path / "large")), 8_000, 64)
    noise_set(open_store(str(tmp_path / "small")), 100, 4)
    assert len(manifest.parts) == 1
    program = """
    import re, sys
    from pathlib import Path
    from jebm.data.dataset import load_images
    from jebm.store.storage import open_store

    folder = Path(sys.argv[1])
    peaks = []
    for name in ("small", "large"):
        load_images(open_store(str(folder / name)), folder / "cache")
        peaks.append(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]))
    print((peaks[1] - peaks[0]) << 10)
    """
    grown = int(python("-c", textwrap.dedent(program), str(tmp_path)).stdout)
    assert grown < 0.6 * manifest.parts[0].bytes  # it has eight row groups
