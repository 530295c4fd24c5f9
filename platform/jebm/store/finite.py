"""Which tensors hold NaN or infinity: no run resumes from them.

Training stops before a parameter moves that way, so such a state is damage, or somebody else's.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping
from threading import Lock

import torch
from torch import Tensor

from jebm.store.layout import TensorEntry

__all__ = ["FiniteScan", "not_finite", "not_finite_line"]

_CHUNK = 1 << 22  # elements looked at at a time, so that the look takes no memory to speak of
_SHOWN = 3  # tensors named in a line
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class FiniteScan:
    """Looks at an object's bytes as they pass by, from any thread, in slices that cut tensors anywhere."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        """Look at these tensors, which do not overlap and stand in the order of their bytes."""
        self._entries = [
            (name, entry)
            for name, entry in entries.items()
            if entry.end > entry.begin and (entry.dtype.is_floating_point or entry.dtype.is_complex)
        ]
        self._ends = [entry.end for _, entry in self._entries]
        self._lock = Lock()
        self._slices: dict[int, list[str]] = {}  # by offset: one that comes again replaces what it was
        self._cut: dict[tuple[str, int], dict[int, bytes]] = {}  # elements that a slice's border cuts

    def receive(self, offset: int, piece: memoryview) -> None:
        """Look at bytes of the object."""
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
        """Return the tensors that hold NaN or infinity, in the order of the bytes."""
        found = {name for names in self._slices.values() for name in names}
        dtypes = {name: entry.dtype for name, entry in self._entries}
        for (name, _), pieces in self._cut.items():
            whole = bytearray(b"".join(pieces[begin] for begin in sorted(pieces)))
            if len(whole) == dtypes[name].itemsize and not _bytes_are_finite(whole, dtypes[name]):
                found.add(name)
        return [name for name, _ in self._entries if name in found]

    def _is_finite(self, name: str, entry: TensorEntry, offset: int, piece: memoryview) -> bool:
        """Whether a tensor's elements are that lie whole in a piece; those that it cuts are kept."""
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
    """Return these tensors and their fault as a part of a message."""
    shown = ", ".join(name[:80] for name in sorted(names)[:_SHOWN])
    if len(names) == 1:
        return f"{shown} holds NaN or infinity"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{shown}{more} hold NaN or infinity"


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(_elements(chunk).isfinite().all()) for chunk in torch.split(tensor.reshape(-1), _CHUNK))


def _bytes_are_finite(data: bytearray | memoryview, dtype: torch.dtype) -> bool:
    values = torch.frombuffer(data, dtype=torch.uint8)
    if values.data_ptr() % dtype.itemsize:  # of a file that is not ours
        values = values.clone()
    return _is_finite(values.view(dtype))


def _elements(values: Tensor) -> Tensor:
    """Return the values in a type that can be asked whether they are finite."""
    return values if values.dtype in _PLAIN or values.is_complex() else values.to(torch.float32)
