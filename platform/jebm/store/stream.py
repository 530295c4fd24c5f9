"""Tensors to an object, or to several, and back, through no file and no second copy of them.

The layout is that of safetensors: 8 bytes of header length (little-endian), a JSON header, the raw bytes.
Parts are cut over that layout, whatever tensor the cut runs through, and each has a CRC32 of its own.
"""

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from jebm.errors import CheckpointError
from jebm.store.protocol import ObjectInfo, Store, crc32_of, in_parallel

__all__ = [
    "MOST_PARTS",
    "PART_BYTES",
    "StoredObject",
    "TensorEntry",
    "encoded_header",
    "fitting_headers",
    "read_headers",
    "restore_tensors",
    "upload_tensors",
    "verify_object",
]

PART_BYTES = 16 << 20
"""Size of a part, doubled for objects that would need more parts than they may have."""

MOST_PARTS = 10_000
"""How many S3 takes for one object."""

_HEADER_BYTES = 16 << 20  # of all objects that are read together: about 100,000 tensors
_FIRST_READ_BYTES = 64 << 10  # holds the header of a usual model
_VERIFY_BYTES = 4 << 20  # held per thread while a part is read only to be checked
_SHOWN = 3  # differences named in an error
_METADATA = "__metadata__"  # the one name of the header that is not a tensor's

_DTYPE_NAMES = {
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
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredObject:
    """An object as a manifest describes it: key, size and part size in bytes, the CRC32 of every part."""

    key: str
    size: int
    etag: str
    part_size: int
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in an object: its bytes are [begin, end), counted from the object's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def upload_tensors(
    store: Store, key: str, tensors: Mapping[str, Tensor], most_parts: int = MOST_PARTS
) -> StoredObject:
    """Write the tensors as one object and return how to find and check it.

    Contiguous tensors on the CPU are sent from where they lie; of any other a copy is made first. They
    must not change until this returns. Raises CheckpointError for a tensor that has no place in the
    layout, StoreError where the store refuses; then no object appears.
    """
    ordered = _ordered(tensors)
    pieces = [memoryview(_header_of(ordered)), *(_bytes_of(tensor) for tensor in ordered.values())]
    size = sum(piece.nbytes for piece in pieces)
    part_size = PART_BYTES
    while part_size * most_parts < size:
        part_size *= 2
    uploaded = store.upload(key, _cut(pieces, part_size))
    return StoredObject(key, uploaded.info.size, uploaded.info.etag, part_size, uploaded.crc32)


def read_headers(store: Store, objects: Sequence[StoredObject]) -> list[dict[str, TensorEntry]]:
    """Return what each object holds, by name, in the order of the bytes.

    Raises CheckpointError where a header is not exactly what `upload_tensors` could have written, where two
    objects hold a tensor of one name, and where all headers together are longer than one may be.
    """
    room, lock = _HEADER_BYTES, Lock()

    def read(_index: int, stored: StoredObject) -> dict[str, TensorEntry]:
        nonlocal room
        start = bytearray(min(_FIRST_READ_BYTES, stored.size))
        store.read_into(stored.key, 0, [memoryview(start)])
        length = int.from_bytes(start[:8], "little")
        with lock:
            if stored.size < 8 or not 2 <= length <= min(room, stored.size - 8):
                raise _damaged(stored, f"a header of {length} bytes in an object of {stored.size}")
            room -= length
        header = start[8 : 8 + length]
        if len(header) < length:
            rest = bytearray(length - len(header))
            store.read_into(stored.key, len(start), [memoryview(rest)])
            header += rest
        try:
            return _parsed_header(bytes(header), stored.size)
        except (ValueError, RecursionError) as error:  # includes bad UTF-8 and bad JSON
            raise _damaged(stored, str(error)) from error

    headers = in_parallel(read, objects)
    seen: set[str] = set()
    for stored, entries in zip(objects, headers, strict=True):
        for name in entries:
            if name in seen:
                raise CheckpointError(f"{stored.key}: {name[:80]!r} is in another object, too")
        seen.update(entries)
    return headers


def fitting_headers(
    store: Store, objects: Sequence[StoredObject], tensors: Mapping[str, Tensor]
) -> list[dict[str, TensorEntry]]:
    """Return what each object holds, as `read_headers`, where together that is tensors like these.

    Else CheckpointError lists the first differences. Of `tensors` only names, shapes and dtypes matter.
    """
    headers = read_headers(store, objects)
    entries = {name: entry for header in headers for name, entry in header.items()}
    _compare(store.uri, entries, tensors)
    return headers


def restore_tensors(store: Store, objects: Sequence[StoredObject], into: Mapping[str, Tensor]) -> None:
    """Read objects into the memory of the given tensors, every part checked against its CRC32.

    `into` must have exactly the names, shapes and dtypes of the objects: CheckpointError lists the first
    differences before anything is written. A CheckpointError over a CRC32 leaves the tensors half written.
    """
    etags = in_parallel(lambda _, stored: _found(store, stored).etag, objects)
    headers = fitting_headers(store, objects, into)
    # A tensor elsewhere than in plain memory gets its bytes by way of a buffer of its size.
    staged = {
        name: torch.empty(entry.shape, dtype=entry.dtype)
        for entries in headers
        for name, entry in entries.items()
        if not _is_plain(into[name])
    }
    reads: list[tuple[StoredObject, str, int, Sequence[memoryview]]] = []
    for stored, etag, entries in zip(objects, etags, headers, strict=True):
        begin = min((entry.begin for entry in entries.values()), default=stored.size)
        received = (_bytes_of(staged.get(name, into[name])) for name in entries)
        parts = _cut([memoryview(bytearray(begin)), *received], stored.part_size)
        reads += [(stored, etag, number, part) for number, part in enumerate(parts)]

    def fetch(_index: int, read: tuple[StoredObject, str, int, Sequence[memoryview]]) -> None:
        stored, etag, number, part = read
        store.read_into(stored.key, number * stored.part_size, part, etag=etag)
        if (crc32 := crc32_of(part)) != stored.crc32[number]:
            # The bit may have been flipped on the way here, and be right where it lies.
            store.read_into(stored.key, number * stored.part_size, part, etag=etag)
            crc32 = crc32_of(part)
        _check_part(stored, number, crc32)

    in_parallel(fetch, reads)
    with torch.no_grad():
        for name, tensor in staged.items():
            into[name].copy_(tensor)


def verify_object(store: Store, stored: StoredObject) -> None:
    """Read the whole object and check every part; raises CheckpointError where it is not as described."""
    etag = _found(store, stored).etag

    def fetch(number: int, begin: int) -> None:
        end = min(begin + stored.part_size, stored.size)
        buffer = memoryview(bytearray(min(_VERIFY_BYTES, end - begin)))
        value = 0
        for offset in range(begin, end, _VERIFY_BYTES):
            piece = buffer[: min(_VERIFY_BYTES, end - offset)]
            store.read_into(stored.key, offset, [piece], etag=etag)
            value = zlib.crc32(piece, value)
        _check_part(stored, number, value)

    in_parallel(fetch, range(0, stored.size, stored.part_size))


def _found(store: Store, stored: StoredObject) -> ObjectInfo:
    """Return the object as it is now. Its etag may differ from the stored one: a copy has a new one."""
    info = store.head(stored.key)
    if info is None:
        raise CheckpointError(f"{store.uri}/{stored.key}: the object is gone")
    if info.size != stored.size:
        raise _damaged(stored, f"{info.size} bytes instead of {stored.size}")
    return info


def _check_part(stored: StoredObject, number: int, crc32: int) -> None:
    if crc32 != stored.crc32[number]:
        raise _damaged(stored, f"part {number + 1} of {len(stored.crc32)} does not match its CRC32")


def _damaged(stored: StoredObject, reason: str) -> CheckpointError:
    return CheckpointError(f"{stored.key} is damaged: {reason}")


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's bytes lie in this process's memory just as the layout wants them."""
    return (
        tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a plain tensor, writable."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in the order of the layout: wide elements first, so that all are aligned."""
    for name, tensor in tensors.items():
        if name == _METADATA:
            raise CheckpointError(f"no tensor can be called {_METADATA}")
        if tensor.dtype not in _DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{name}: cannot store a {tensor.layout} tensor of {tensor.dtype} on {tensor.device.type}"
            )
    return {
        name: tensor if _is_plain(tensor) else tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    }


def _cut(pieces: Iterable[memoryview], part_size: int) -> list[list[memoryview]]:
    """Return the pieces regrouped to parts of one size; the last may be shorter."""
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


def encoded_header(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """Return how an object begins that holds these tensors, whose offsets count from the end of it."""
    header: dict[str, object] = {_METADATA: {**metadata, "format": "pt"}}  # other readers ask for a format
    for name, entry in entries.items():
        header[name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)  # keeps the data aligned
    return len(encoded).to_bytes(8, "little") + encoded


def _header_of(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, TensorEntry] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.itemsize
        entries[name] = TensorEntry(tensor.dtype, tuple(tensor.shape), begin, end)
    encoded = encoded_header(entries, {})
    if len(encoded) > _HEADER_BYTES:
        raise CheckpointError(f"{len(tensors)} tensors need a header above {_HEADER_BYTES} bytes")
    return encoded


def _parsed_header(encoded: bytes, size: int) -> dict[str, TensorEntry]:
    """Return the entries in the order of their bytes; raises ValueError for anything out of order."""
    header = json.loads(encoded.decode("utf-8"), object_pairs_hook=_no_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop(_METADATA, None)
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
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name[:80]!r} has another number of bytes than its shape and dtype say")
    return TensorEntry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _no_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names something twice")
    return found


def _compare(where: str, entries: Mapping[str, TensorEntry], into: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError with the first differences between what is stored and what receives it."""
    differences = [f"{name} is missing in the checkpoint" for name in into if name not in entries]
    differences += [f"{name} is only in the checkpoint" for name in entries if name not in into]
    for name, entry in entries.items():
        if name in into:
            tensor = into[name]
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                differences.append(
                    f"{name} is {entry.dtype}{list(entry.shape)} in the checkpoint "
                    f"and {tensor.dtype}{list(tensor.shape)} in the model"
                )
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise CheckpointError(f"{where} does not fit: {'; '.join(differences[:_SHOWN])}{more}")
