"""Find tensors that hold NaN or infinity: no run resumes from them.

Training stops before a parameter becomes non-finite, so such a state is damaged or foreign.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping
from threading import Lock

import torch
from torch import Tensor

from jebm.store.layout import TensorEntry

__all__ = ["FiniteScan", "not_finite", "not_finite_line"]

_CHUNK = 1 << 22  # elements checked at a time, to keep memory use small
_SHOWN = 3  # tensors named in a line
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class FiniteScan:
    """Checks an object's bytes as they stream by, from any thread, in slices cut anywhere."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        """Check these tensors, which do not overlap and are in byte order."""
        self._entries = [
            (name, entry)
            for name, entry in entries.items()
            if entry.end > entry.begin and (entry.dtype.is_floating_point or entry.dtype.is_complex)
        ]
        self._ends = [entry.end for _, entry in self._entries]
        self._lock = Lock()
        self._slices: dict[int, list[str]] = {}  # by offset: a slice read again replaces the earlier one
        self._cut: dict[tuple[str, int], dict[int, bytes]] = {}  # elements split between slices

    def receive(self, offset: int, piece: memoryview) -> None:
        """Check bytes of the object."""
        end = offset + piece.nbytes
        found = []
        for index in range(bisect_right(self._ends, offset), len(self._entries)):
            name, entry = self._entries[index]
            if entry.begin >= end:
                break
            if not self._is_finite(name, entry, offset, piece):
                found.append(name)
        with self._lock:
            self._slices[offset] = found

    def names(self) -> list[str]:
        """Return the tensors that hold NaN or infinity, in byte order."""
        found = {name for names in self._slices.values() for name in names}
        dtypes = {name: entry.dtype for name, entry in self._entries}
        for (name, _), pieces in self._cut.items():
            whole = bytearray(b"".join(pieces[begin] for begin in sorted(pieces)))
            if len(whole) == dtypes[name].itemsize and not _bytes_are_finite(whole, dtypes[name]):
                found.add(name)
        return [name for name, _ in self._entries if name in found]

    def _is_finite(self, name: str, entry: TensorEntry, offset: int, piece: memoryview) -> bool:
        """Return whether a tensor's whole elements in a piece are finite; keep the split ones."""
        size = entry.dtype.itemsize
        begin, end = max(entry.begin, offset), min(entry.end, offset + piece.nbytes)
        first = min(begin + (entry.begin - begin) % size, end)
        last = max(end - (end - entry.begin) % size, first)
        for cut_begin, cut_end in ((begin, first), (last, end)):
            if cut_begin < cut_end:
                with self._lock:
                    element = (cut_begin - entry.begin) // size
                    kept = bytes(piece[cut_begin - offset : cut_end - offset])
                    self._cut.setdefault((name, element), {})[cut_begin] = kept
        return first == last or _bytes_are_finite(piece[first - offset : last - offset], entry.dtype)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity."""
    return [
        name
        for name, tensor in tensors.items()
        if (tensor.is_floating_point() or tensor.is_complex()) and not _is_finite(tensor.detach())
    ]


def not_finite_line(names: Collection[str]) -> str:
    """Return the part of an error message that names these tensors and what is wrong."""
    shown = ", ".join(name[:80] for name in sorted(names)[:_SHOWN])
    if len(names) == 1:
        return f"{shown} holds NaN or infinity"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{shown}{more} hold NaN or infinity"


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(_elements(chunk).isfinite().all()) for chunk in torch.split(tensor.reshape(-1), _CHUNK))


def _bytes_are_finite(data: bytearray | memoryview, dtype: torch.dtype) -> bool:
    values = torch.frombuffer(data, dtype=torch.uint8)
    if values.data_ptr() % dtype.itemsize:  # in a file that another tool wrote
        values = values.clone()
    return _is_finite(values.view(dtype))


def _elements(values: Tensor) -> Tensor:
    """Return the values in a dtype that `isfinite` accepts."""
    return values if values.dtype in _PLAIN or values.is_complex() else values.to(torch.float32)
