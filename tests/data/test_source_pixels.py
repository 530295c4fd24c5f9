"""From encoded pictures to pixels: sizes, colours, orientation, formats."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from source_files import random_images, read, refused, told, write_images

from jebm.data.readers import open_source


def test_images_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    image = random_images(20, 10, 3)
    write_images(tmp_path, {"1.png": random_images(8, 8, 3), "2.png": image})
    refused(tmp_path, "2.png", "20x10", "8x8", "size")
    source = open_source(tmp_path, size=8)
    square = Image.fromarray(image[5:15])
    expected = np.asarray(square.resize((8, 8), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(read(source)[0][1], expected)
    assert "8x8 (LANCZOS)" in source.description.transforms[0]


def test_images_of_different_colour_need_channels(tmp_path: Path) -> None:
    grey = random_images(8, 8)
    write_images(tmp_path, {"1.png": random_images(8, 8, 3), "2.png": grey})
    refused(tmp_path, "2.png", "channels")
    assert read(open_source(tmp_path, channels=3))[0].shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(read(open_source(tmp_path, channels=1))[0][1, ..., 0], grey)


def test_transparency_becomes_white_and_16_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4, 4), np.uint8), "RGBA").save(tmp_path / "1.png")
    np.testing.assert_array_equal(read(open_source(tmp_path))[0], np.full((1, 4, 4, 3), 255))
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "1.png")
    refused(tmp_path, "1.png", "8 bits")


ODD_FIELDS = {  # of types that the standard does not allow, or that hold nonsense
    "date is a rational": (0x0132, 5, 1, struct.pack("<II", 1, 2)),
    "negative rational": (0x011A, 10, 1, struct.pack("<ii", -1, 2)),
    "negative long": (0x0100, 9, 1, struct.pack("<i", -5)),
    "signed short": (0x0128, 8, 1, struct.pack("<hxx", -1)),
    "double where text belongs": (0x010F, 12, 1, struct.pack("<d", 1e300)),
    "pointer to nowhere": (0x8825, 4, 1, struct.pack("<I", 1 << 30)),
    "pointer into itself": (0x8769, 4, 1, struct.pack("<I", 8)),
    "unknown type": (0x010E, 99, 1, b"abcd"),
    "more values than there are": (0x010E, 2, 1 << 20, struct.pack("<I", 8)),
}


def exif(orientation: int, field: tuple[int, int, int, bytes]) -> bytes:
    """A TIFF directory with an orientation and one other field."""
    tag, kind, count, value = field
    offset = 8 + 2 + 2 * 12 + 4
    entry = struct.pack("<HHI", tag, kind, count) + (value if len(value) == 4 else struct.pack("<I", offset))
    entries = sorted([struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0), entry], key=lambda e: e[1::-1])
    return b"II*\0\x08\0\0\0\x02\0" + b"".join(entries) + bytes(4) + (value if len(value) > 4 else b"")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("field", ODD_FIELDS.values(), ids=ODD_FIELDS)
def test_of_exif_only_the_orientation_matters(
    tmp_path: Path, kind: str, field: tuple[int, int, int, bytes]
) -> None:
    ramp = np.tile(np.arange(0, 256, 16, dtype=np.uint8)[:, None, None], (1, 8, 3))
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(
        kind, {}
    )
    Image.fromarray(ramp).save(tmp_path / "1.png", kind, exif=b"Exif\0\0" + exif(6, field), **options)
    images, _ = read(open_source(tmp_path))
    np.testing.assert_allclose(images[0], ramp.transpose(1, 0, 2)[:, ::-1], atol=3)


@pytest.mark.parametrize("mode", ["P", "LA", "CMYK", "1"])
def test_other_colours_become_grey_or_rgb(tmp_path: Path, mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    Image.new("RGB", (4, 4), (200, 200, 200)).convert("RGBA").convert(mode).save(tmp_path / "1.tif", kind)
    assert read(open_source(tmp_path, channels=3))[0].shape == (1, 4, 4, 3)


def test_colour_of_16_bits_is_refused_like_grey(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + bytes(6 * 4) for _ in range(4))
    head = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    )
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    refused(tmp_path, "1.png", "8 bits")


def test_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (10, 20)]
    for name in ("1.gif", "2.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert told(tmp_path, channels=1)[0] == [10, 10]


@pytest.mark.parametrize(
    "head",
    [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1", b"\x8aMNG", b"\0\0\2\0", b"GRIB"],
)
def test_pillow_opens_no_format_but_ours(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "a.png").write_bytes(head + bytes(2000))
    refused(tmp_path, "a.png", "PNG")
