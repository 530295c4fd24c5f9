"""How two checkpoints differ; parts with equal CRC32s count as equal and are not read."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from jebm.config import leaves
from jebm.store.layout import StoredObject, TensorEntry
from jebm.store.manifest import Manifest
from jebm.store.parts import read_headers
from jebm.store.retrieve import RunStore, read_tensors
from jebm.untrusted import JsonObject

__all__ = ["Comparison", "compare", "compare_facts"]

_BATCH_BYTES = 64 << 20  # of tensors held per side; a larger tensor is a batch of its own
_Value = TypeVar("_Value")
_Place = tuple[StoredObject, TensorEntry]


@dataclass(frozen=True)
class Comparison:
    """How the second checkpoint's tensors differ from the first's, and how many bytes were compared."""

    changed: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    equal: int
    bytes_read: int


def compare(run: RunStore, first: Manifest, second: Manifest) -> Comparison:
    """Return which tensors of `second` differ in bytes from `first`, were added, or were removed.

    Raises CheckpointError if a part that must be read is damaged, and StoreError.
    """
    one, other = _located(run, first), _located(run, second)
    common = one.keys() & other.keys()
    changed = {name for name in common if _form(one[name]) != _form(other[name])}
    # Ask the CRC32s first, and read only what they leave open.
    verdicts = {name: _equal_by_crc32(one[name], other[name]) for name in common - changed}
    changed |= {name for name, equal in verdicts.items() if equal is False}
    doubtful = {name: one[name] for name, equal in verdicts.items() if equal is None}
    for names in _batches(doubtful):
        before, after = (read_tensors(run, each, names, finite=False) for each in (first, second))
        changed |= {name for name in names if not torch.equal(_bits(before[name]), _bits(after[name]))}
    return Comparison(
        changed=tuple(sorted(changed)),
        added=tuple(sorted(other.keys() - common)),
        removed=tuple(sorted(one.keys() - common)),
        equal=len(common) - len(changed),
        bytes_read=2 * sum(map(_size, doubtful.values())),
    )


def compare_facts(first: Manifest, second: Manifest) -> dict[str, JsonObject]:
    """Return what differs in config and metrics: both values by key, None for a missing one."""
    return {
        "config": _differences(dict(leaves(first.config)), dict(leaves(second.config))),
        "metrics": _differences(first.metrics, second.metrics),
    }


def _differences(one: Mapping[str, _Value], other: Mapping[str, _Value]) -> JsonObject:
    pairs = {name: [one.get(name), other.get(name)] for name in sorted(one.keys() | other.keys())}
    return {name: pair for name, pair in pairs.items() if str(pair[0]) != str(pair[1])}  # nan equals nan


def _located(run: RunStore, manifest: Manifest) -> dict[str, _Place]:
    headers = read_headers(run.folder(manifest.name), manifest.objects)
    return {
        name: (stored, entry)
        for stored, header in zip(manifest.objects, headers, strict=True)
        for name, entry in header.items()
    }


def _form(place: _Place) -> tuple[torch.dtype, tuple[int, ...]]:
    return place[1].dtype, tuple(place[1].shape)


def _size(place: _Place) -> int:
    return place[1].end - place[1].begin


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # -0.0 differs from 0.0


def _equal_by_crc32(one: _Place, other: _Place) -> bool | None:
    """Return whether a tensor's bytes are equal by the CRC32s of its parts; None if these cannot tell.

    Equal parts make it equal; a differing part that holds nothing else makes it changed.
    """
    if _size(one) == 0:
        return True
    (a, entry), (b, other_entry) = one, other
    size = a.part_size
    if (entry.begin, size) != (other_entry.begin, b.part_size):
        return None
    # The parts that differ, and the ends of each in both objects.
    parts = range(entry.begin // size, math.ceil(entry.end / size))
    ends = {part: {min((part + 1) * size, a.size), min((part + 1) * size, b.size)} for part in parts}
    differing = [part for part in parts if a.crc32[part] != b.crc32[part] or len(ends[part]) > 1]
    if not differing:
        return True
    within = (entry.begin <= part * size and max(ends[part]) <= entry.end for part in differing)
    return False if any(within) else None


def _batches(places: Mapping[str, _Place]) -> Iterator[list[str]]:
    """Yield names in groups that are adjacent in an object, so that few parts are read twice."""
    batch: list[str] = []
    room = _BATCH_BYTES
    for name, place in sorted(places.items(), key=lambda item: (item[1][0].key, item[1][1].begin)):
        if batch and room < _size(place):
            yield batch
            batch, room = [], _BATCH_BYTES
        batch.append(name)
        room -= _size(place)
    if batch:
        yield batch
