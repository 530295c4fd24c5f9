"""Stream tensors to objects and back, without a file or a second copy."""

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from jebm.errors import CheckpointError
from jebm.store.layout import DTYPE_NAMES, METADATA, StoredObject, cut, header_of
from jebm.store.parts import Parts, fitting_headers
from jebm.store.protocol import Store, in_parallel

__all__ = ["MOST_PARTS", "PART_BYTES", "bytes_of", "pieces_of", "restore_tensors", "upload_tensors"]

PART_BYTES = 16 << 20
"""Size of a part, doubled until an object needs no more parts than allowed."""

MOST_PARTS = 10_000
"""S3's limit for one object."""


def upload_tensors(
    store: Store, key: str, tensors: Mapping[str, Tensor], most_parts: int = MOST_PARTS
) -> StoredObject:
    """Write the tensors as one object and return how to find and check it.

    Contiguous CPU tensors are sent in place; others are copied first. They must not change until this
    returns. Raises CheckpointError for a tensor that the layout cannot hold, StoreError if the store refuses;
    then no object appears.
    """
    pieces = pieces_of(tensors, {})
    size = sum(piece.nbytes for piece in pieces)
    part_size = PART_BYTES
    while part_size * most_parts < size:
        part_size *= 2
    uploaded = store.upload(key, cut(pieces, part_size))
    info = uploaded.info
    return StoredObject(key, info.size, info.etag, part_size, uploaded.crc32, zlib.crc32(pieces[0]))


def pieces_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[memoryview]:
    """Return the bytes of a safetensors file: its header, then each tensor's memory.

    Raises CheckpointError for a tensor that the layout cannot hold.
    """
    ordered = _ordered(tensors)
    return [memoryview(header_of(ordered, metadata)), *(bytes_of(tensor) for tensor in ordered.values())]


def restore_tensors(store: Store, objects: Sequence[StoredObject], into: Mapping[str, Tensor]) -> None:
    """Read objects into the memory of these tensors, bit for bit, checking each part against its CRC32.

    `into` must have exactly the names, shapes and dtypes of the objects: CheckpointError lists the first
    differences before anything is written. A CheckpointError over a CRC32 leaves the tensors half written.
    """
    present = in_parallel(lambda _, stored: Parts(store, stored), objects)
    headers = fitting_headers(store, objects, into)
    # A tensor that is not in plain memory is read through a buffer of its size.
    staged = {
        name: torch.empty(entry.shape, dtype=entry.dtype)
        for entries in headers
        for name, entry in entries.items()
        if not _is_plain(into[name])
    }
    reads: list[tuple[Parts, int, Sequence[memoryview]]] = []
    for stored, parts, entries in zip(objects, present, headers, strict=True):
        begin = min((entry.begin for entry in entries.values()), default=stored.size)
        received = (bytes_of(staged.get(name, into[name])) for name in entries)
        pieces = cut([memoryview(bytearray(begin)), *received], stored.part_size)
        reads += [(parts, number, part) for number, part in enumerate(pieces)]
    in_parallel(lambda _, read: read[0].fill(read[1], read[2]), reads)
    with torch.no_grad():
        for name, tensor in staged.items():
            into[name].copy_(tensor)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether the tensor's bytes are in this process's memory in the order of the layout."""
    return (
        tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
    )


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a plain tensor's memory, writable."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in layout order: wide elements first, so that all are aligned."""
    for name, tensor in tensors.items():
        if name == METADATA:
            raise CheckpointError(f"no tensor can be called {METADATA}")
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{name}: cannot store a {tensor.layout} tensor of {tensor.dtype} on {tensor.device.type}"
            )
    return {
        name: tensor if _is_plain(tensor) else tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    }
