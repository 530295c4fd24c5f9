"""Parts of a data set that inflate beyond what the manifest says: refused before they are inflated.

Each part is real Parquet whose bytes, length and hash the manifest confirms, as whoever writes both can do.
"""

import hashlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jebm.data.dataset import load_images
from jebm.data.manifest import MANIFEST
from jebm.data.shards import write_dataset
from jebm.data.source import source_from_arrays
from jebm.store.storage import Store, open_store

ROOT = Path(__file__).resolve().parents[2]
IMAGES, WIDTH = 2_000, 784
HUGE = 1 << 30
PLAIN, DICTIONARY, DELTA_BYTE_ARRAY = 0, 8, 7


def honest(folder: Path) -> tuple[Store, pa.Table]:
    store = open_store(str(folder))
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 28, 28, 1), np.uint8)
    part = write_dataset(source_from_arrays(pixels, np.arange(IMAGES) % 10, name="honest"), store).parts[0]
    return store, pq.read_table(pa.BufferReader(store.get(part.name)))


def replace_part(store: Store, data: bytes) -> None:
    """Put other bytes in the place of the only part; the manifest names them as its own."""
    content = json.loads(store.get(MANIFEST))
    digest = hashlib.sha256(data).hexdigest()
    part = {"name": f"part-00000-{digest[:8]}.parquet", "bytes": len(data), "sha256": digest}
    content["parts"] = [content["parts"][0] | part]
    store.put(part["name"], data)
    store.put(MANIFEST, json.dumps(content).encode())


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"compression": "zstd", "use_dictionary": False, **options})
    return bytes(sink.getvalue())


def zeros(count: int) -> bytes:
    """Return so many zeros, deflated, without ever holding them."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        for _ in range(count >> 20):
            stream.write(bytes(1 << 20))
    return bytes(sink.getvalue())


def varint(value: int) -> bytes:
    return varint_bytes(value << 1)


def varint_bytes(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint_bytes(value >> 7)


def page(
    body: bytes, inflated: int, values: int, *, encoding: int = PLAIN, dictionary: bool = False
) -> bytes:
    """Return a page of Parquet with whatever its header is to say: Thrift's compact protocol."""
    details = b"\x15" + varint(values) + b"\x15" + varint(encoding)
    details += b"\x00" if dictionary else b"\x15\x06\x15\x06\x00"
    header = (
        b"\x15" + varint(2 if dictionary else 0) + b"\x15" + varint(inflated) + b"\x15" + varint(len(body))
    )
    return header + (b"\x4c" if dictionary else b"\x2c") + details + b"\x00" + body


def overwritten(table: pa.Table, column: int, *pages: bytes) -> bytes:
    """Return an honest part whose column begins with other pages: the footer knows nothing of them."""
    data = bytearray(parquet(table))
    chunk = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata.row_group(0).column(column)
    forged = b"".join(pages)
    data[chunk.data_page_offset : chunk.data_page_offset + len(forged)] = forged
    return bytes(data)


def many_rows(table: pa.Table, deflated: bytes) -> bytes:
    image = pa.array([bytes(WIDTH)] * 100_000, pa.binary(WIDTH))
    one = pa.table([image, pa.array([0] * 100_000, pa.int32())], schema=table.schema)
    return parquet(pa.concat_tables([one] * 10), use_dictionary=True)


def wide_rows(table: pa.Table, deflated: bytes) -> bytes:
    image = pa.array([bytes(500_000)] * IMAGES, pa.binary(500_000))
    fields = [pa.field("image", image.type, nullable=False), table.schema.field("label")]
    return parquet(pa.table([image, table["label"].combine_chunks()], schema=pa.schema(fields)))


def long_rows(table: pa.Table, deflated: bytes) -> bytes:
    """What Arrow takes for fixed lengths lies as values of any length, one for all rows."""
    image = pa.array([bytes(500_000)] * IMAGES, pa.binary())
    schema = pa.schema([pa.field("image", pa.binary(), nullable=False), table.schema.field("label")])
    return parquet(
        pa.table([image, table["label"].combine_chunks()], schema=schema), use_dictionary=["image"]
    )


def prefixes(table: pa.Table, deflated: bytes) -> bytes:
    return parquet(table, column_encoding={"image": "DELTA_BYTE_ARRAY", "label": "PLAIN"})


BOMBS: dict[str, Callable[[pa.Table, bytes], bytes]] = {
    "many rows": many_rows,
    "wide rows": wide_rows,
    "long rows": long_rows,
    "prefixes": prefixes,
    "one page": lambda table, deflated: overwritten(table, 0, page(deflated, HUGE, IMAGES)),
    "two pages": lambda table, deflated: overwritten(
        table, 0, page(deflated, HUGE, IMAGES // 2), page(deflated, HUGE, IMAGES // 2)
    ),
    "dictionary": lambda table, deflated: overwritten(
        table, 0, page(deflated, HUGE, HUGE // WIDTH, dictionary=True)
    ),
    "dictionary of many": lambda table, _: overwritten(table, 0, page(b"", 8, 2**31 - 1, dictionary=True)),
    "more values": lambda table, _: overwritten(
        table, 0, page(zeros(1 << 20), 1 << 20, 2**31 - 1, encoding=DICTIONARY)
    ),
    "page of labels": lambda table, deflated: overwritten(
        table.set_column(1, "label", pa.array(np.random.default_rng(0).permutation(IMAGES), pa.int32())),
        1,
        page(deflated[:4_000], HUGE, IMAGES),
    ),
    "empty pages": lambda table, _: overwritten(table, 0, *[page(b"", 0, 0)] * 50_000),
    "page beyond the file": lambda table, _: overwritten(table, 0, page(b"", 0, 1)[:-1] + b"\x15\xff\xff"),
}


@dataclass(frozen=True)
class Outcome:
    """How a load ended in a process that may take 300 MB more than it has."""

    error: str
    message: str
    grown_mb: int


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Load all bombs in one process, smallest need of memory first or not: none is to take any."""
    folder = tmp_path_factory.mktemp("bombs")
    deflated = zeros(HUGE)
    for name, make in BOMBS.items():
        store, table = honest(folder / name)
        replace_part(store, make(table, deflated))
    program = """
    import json, resource, sys
    from pathlib import Path
    from jebm.data.dataset import load_images
    from jebm.store.storage import open_store

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    load_images(open_store("jobs/data/fashion_mnist_2000/train"), Path(sys.argv[1]) / "cache")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (300 << 20),) * 2)
    for name in sys.argv[2:]:
        before = peak()
        try:
            load_images(open_store(f"{sys.argv[1]}/{name}"), Path(sys.argv[1]) / name / "cache")
            error = ("", "")
        except BaseException as raised:
            error = (type(raised).__name__, str(raised))
        print(json.dumps([name, *error, (peak() - before) >> 10]), flush=True)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(folder), *BOMBS],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return {name: Outcome(*rest) for name, *rest in map(json.loads, ended.stdout.splitlines())}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_part_that_inflates_is_refused_before_it_does(outcomes: dict[str, Outcome], bomb: str) -> None:
    outcome = outcomes[bomb]
    assert outcome.error == "DataError", outcome
    assert "/part-00000-" in outcome.message
    assert "ingest the data set again" in outcome.message
    assert "malloc" not in outcome.message
    assert "\n" not in outcome.message
    assert outcome.grown_mb < 60


@pytest.mark.parametrize(
    "options",
    [
        {"use_dictionary": True},
        {"row_group_size": IMAGES},
        {"row_group_size": 50},
        {"data_page_version": "2.0"},
        {"data_page_size": 1},
        {"compression": "gzip"},
        {"compression": "none", "write_page_index": True},
        {"write_statistics": False, "version": "1.0"},
    ],
    ids=str,
)
def test_parts_that_others_would_write_are_read(tmp_path: Path, options: dict[str, Any]) -> None:
    store, table = honest(tmp_path / "set")
    before = load_images(store, tmp_path / "before")
    replace_part(store, parquet(table, **options))
    after = load_images(store, tmp_path / "after")
    np.testing.assert_array_equal(after.images_NHWC, before.images_NHWC)
    assert after.labels_N is not None
    np.testing.assert_array_equal(after.labels_N, np.arange(IMAGES) % 10)
