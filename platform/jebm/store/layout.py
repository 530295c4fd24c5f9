"""How tensors are laid out in an object: strictly as in safetensors, both written and read.

8 bytes of header length (little-endian), a JSON header, the raw bytes. Parts are cut from that layout without
regard to tensors. Each part has a CRC32 of its own; so has the header.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from jebm.errors import CheckpointError
from jebm.untrusted import parsed_object

__all__ = [
    "DTYPE_NAMES",
    "HEADER_BYTES",
    "METADATA",
    "StoredObject",
    "TensorEntry",
    "cut",
    "header_of",
    "parsed_header",
]

HEADER_BYTES = 16 << 20
"""Limit on all headers read together, in bytes: about 100,000 tensors."""

METADATA = "__metadata__"
"""The only name in a header that is not a tensor's."""

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = (1 << 63) - 1  # sizes and strides are int64


@dataclass(frozen=True)
class StoredObject:
    """An object as described by a manifest.

    Key, size and part size in bytes, the CRC32 of every part, and that of the header with its length;
    None in a manifest of version 1.
    """

    key: str
    size: int
    etag: str
    part_size: int
    crc32: tuple[int, ...]
    header_crc32: int | None = None


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's position in an object: bytes [begin, end), counted from the object's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def cut(pieces: Iterable[memoryview], part_size: int) -> list[list[memoryview]]:
    """Return the pieces regrouped into parts of one size; the last may be shorter."""
    parts: list[list[memoryview]] = []
    room = 0
    for piece in pieces:
        begin = 0
        while begin < piece.nbytes:
            if room == 0:
                parts.append([])
                room = part_size
            step = min(room, piece.nbytes - begin)
            parts[-1].append(piece[begin : begin + step])
            begin, room = begin + step, room - step
    return parts


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the header of an object with these tensors in this order; offsets count from its end.

    Raises CheckpointError if there are more tensors than a reader would accept.
    """
    header: dict[str, object] = {METADATA: {**metadata, "format": "pt"}}  # other readers expect it
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)  # keeps the data aligned
    if 8 + len(encoded) > HEADER_BYTES:
        raise CheckpointError(f"{len(tensors)} tensors need a header above {HEADER_BYTES} bytes")
    return len(encoded).to_bytes(8, "little") + encoded


def parsed_header(encoded: bytes, size: int) -> dict[str, TensorEntry]:
    """Return the entries of an object of `size` bytes, in byte order.

    `encoded` is the JSON without the length before it. Raises ValueError if anything is malformed.
    """
    header = parsed_object(encoded, HEADER_BYTES)
    header.pop(METADATA, None)
    data = 8 + len(encoded)
    entries = {name: _parsed_entry(name, fields, data) for name, fields in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = data
    for name, entry in entries.items():
        if entry.begin != end:
            raise ValueError(f"{name[:80]!r} does not begin where the tensor before it ends")
        end = entry.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end} of {size}")
    return entries


def _parsed_entry(name: str, fields: object, data: int) -> TensorEntry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:80]!r} has other fields than dtype, shape and data_offsets")
    dtype = _DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    shape, offsets = fields["shape"], fields["data_offsets"]
    if dtype is None or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name[:80]!r} has an unknown dtype, or a shape or offsets that are no counts")
    if len(shape) > _MOST_DIMENSIONS:  # before multiplying, which is slow for very many
        raise ValueError(f"{name[:80]!r} has {len(shape)} dimensions, above {_MOST_DIMENSIONS}")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name[:80]!r} has another number of bytes than its shape and dtype say")
    if math.prod(max(count, 1) for count in shape) > _MOST_ELEMENTS:
        raise ValueError(f"{name[:80]!r} has a shape that no tensor can have")
    return TensorEntry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
