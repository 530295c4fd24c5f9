"""Files that are small and claim, or inflate to, far more: one line each, in little memory."""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from source_files import encoded, random_images

LARGE, ROOM = 300 << 20, 256 << 20  # what they inflate to, and what there is
CHILD = """
import json, os, resource, sys
from pathlib import Path
from jebm.data.readers import open_source
from jebm.errors import JebmError
open_source(sys.argv[1])  # all that is imported late
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]),) * 2)
for path in map(Path, sys.argv[3:]):
    if os.fork():  # each with memory of its own
        os.wait()
        continue
    try:
        source = open_source(path)
        said = f"read {sum(len(batch.images_NHWC) for batch in source.batches())}"
    except JebmError as error:
        said = str(error)
    print(json.dumps([path.name, said]), flush=True)
    os._exit(0)
"""


def npy_head(shape: str, order: bool = False) -> bytes:
    head = f"{{'descr': '|u1', 'fortran_order': {order}, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head


def zipped(path: Path, name: str, head: bytes, zeros: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as file:
        file.write(head)
        for _ in range(zeros >> 20):
            file.write(bytes(1 << 20))


def png(path: Path, width: int, height: int, rows: int, extra: bytes = b"") -> None:
    pixels = zlib.compress(bytes(rows * (1 + 3 * width)), 1)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", pixels),
        (b"IEND", b""),
    ]
    if extra:
        chunks.insert(1, (b"zTXt", b"a\0\0" + extra))
    path.parent.mkdir()
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
        )
    )


def animation(path: Path) -> None:
    """A WebP whose canvas is as large as the format allows, with one frame of 4x4."""
    still = io.BytesIO()
    Image.new("RGB", (4, 4)).save(still, "WEBP", lossless=True)
    frame = bytes(6) + b"\3\0\0\3\0\0" + bytes(4) + still.getvalue()[12:]
    canvas = b"\2\0\0\0" + 2 * struct.pack("<I", 16383)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame
    path.parent.mkdir()
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


def parquet(path: Path, image: bytes, rows: int = 1, **columns: list[str]) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": image, "path": "a.png"}] * rows, kind)
    options = {"compression": "zstd", "use_dictionary": rows > 1, "dictionary_pagesize_limit": 1 << 30}
    pq.write_table(pa.table({"image": images, **columns}), path, **options)


def longest_name(path: Path, kind: bytes, zeros: int) -> None:
    """A tar in which a name, or a set of attributes, claims to be large, and is."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, LARGE
    with gzip.open(path, "wb", 1) as file:
        file.write(tarfile.TarInfo("1.txt").tobuf())
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(zeros >> 20):
            file.write(bytes(1 << 20))


def test_bombs_are_one_line_in_little_memory(tmp_path: Path) -> None:
    small = encoded(random_images(4, 4, 3))
    (tmp_path / "3TB.npy").write_bytes(npy_head("(1000000, 1000, 1000, 3)"))
    zipped(tmp_path / "3TB.npz", "x.npy", npy_head("(1000000, 1000, 1000, 3)"), 0)
    zipped(tmp_path / "long head.npz", "x.npy", b"\x93NUMPY\2\0" + struct.pack("<I", LARGE), 1 << 20)
    zipped(tmp_path / "zeros.npz", "x.npy", npy_head(f"({LARGE >> 20}, 1024, 1024)"), LARGE)
    zipped(tmp_path / "zeros.zip", "1.png", b"", LARGE)
    parquet(tmp_path / "image.parquet", bytes(LARGE))
    parquet(tmp_path / "often.parquet", bytes(10 << 20), rows=256)
    parquet(tmp_path / "word.parquet", small, label=["x" * LARGE])
    longest_name(tmp_path / "name.tar.gz", tarfile.GNUTYPE_LONGNAME, LARGE)
    longest_name(tmp_path / "attributes.tar.gz", tarfile.XHDTYPE, 0)
    png(tmp_path / "pixels.folder" / "1.png", 9400, 9400, rows=1)
    png(tmp_path / "claim.folder" / "1.png", 2**31 - 1, 2**31 - 1, rows=0)
    png(tmp_path / "text.folder" / "1.png", 4, 4, rows=4, extra=zlib.compress(bytes(LARGE), 1))
    animation(tmp_path / "canvas.folder" / "1.webp")
    (tmp_path / "portable.folder").mkdir()
    (tmp_path / "portable.folder" / "1.ppm").write_bytes(b"P6 100000 100000 255\n")
    head = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 1000, 1000)
    (tmp_path / "images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(LARGE), 1))
    paths = sorted(tmp_path.iterdir())

    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "1.png").write_bytes(small)
    arguments = [str(tmp_path / "good"), str(ROOM), *map(str, paths)]
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "platform")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    said = dict(json.loads(line) for line in done.stdout.splitlines())
    assert said.keys() == {path.name for path in paths}
    # What can be read in pieces is read; of the rest none was refused only because memory ran out.
    assert said.pop("zeros.npz") == f"read {LARGE >> 20}"
    for name, message in said.items():
        assert name in message, message
        assert "\n" not in message
        assert "memory" not in message, message
