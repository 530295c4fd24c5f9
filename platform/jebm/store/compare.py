"""In what the tensors of two checkpoints differ, with as little read as their CRC32s allow."""

from collections.abc import Sequence
from dataclasses import dataclass

from jebm.store.layout import StoredObject, TensorEntry
from jebm.store.manifest import Manifest
from jebm.store.parts import Parts, read_headers
from jebm.store.protocol import Store, in_parallel
from jebm.store.retrieve import RunStore

__all__ = ["Comparison", "compare"]

_WINDOW_BYTES = 2 << 20  # held of each side by each of the four threads


@dataclass(frozen=True)
class Comparison:
    """How the tensors of a second checkpoint differ from those of a first, and the bytes read to find out."""

    changed: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    equal: int
    bytes_read: int


def compare(run: RunStore, first: Manifest, second: Manifest) -> Comparison:
    """Say which tensors of `second` are other bytes than in `first`, are new there, or are gone.

    Where both lie at the same place, equal CRC32s of the parts around a tensor make it equal, and another
    one of a part within it makes it changed: neither is read. Raises CheckpointError, StoreError.
    """
    one, other = _located(run, first), _located(run, second)
    differing = {
        name
        for name in one.keys() & other.keys()
        if (one[name].entry.dtype, one[name].entry.shape)
        != (other[name].entry.dtype, other[name].entry.shape)
    }
    doubtful: list[_Pair] = []
    for name in sorted(one.keys() & other.keys() - differing):
        pairs = _doubts(name, one[name], other[name])
        if pairs is None:
            differing.add(name)
        else:
            doubtful += pairs
    folders = run.folder(first.name), run.folder(second.name)
    read = _compare_bytes(folders, doubtful, differing)
    common = one.keys() & other.keys()
    return Comparison(
        changed=tuple(sorted(differing)),
        added=tuple(sorted(other.keys() - one.keys())),
        removed=tuple(sorted(one.keys() - other.keys())),
        equal=len(common) - len(differing),
        bytes_read=read,
    )


@dataclass(frozen=True)
class _Place:
    """A tensor, and the object that it lies in."""

    stored: StoredObject
    entry: TensorEntry

    def part_size(self, number: int) -> int:
        """Return how long a part is: the last one of an object may be shorter."""
        return min(self.stored.part_size, self.stored.size - number * self.stored.part_size)


@dataclass(frozen=True)
class _Pair:
    """Two equally long ranges, of which only their bytes can say whether they are equal."""

    name: str
    one: StoredObject
    one_begin: int
    other: StoredObject
    other_begin: int
    size: int


def _located(run: RunStore, manifest: Manifest) -> dict[str, _Place]:
    headers = read_headers(run.folder(manifest.name), manifest.objects)
    return {
        name: _Place(stored, entry)
        for stored, header in zip(manifest.objects, headers, strict=True)
        for name, entry in header.items()
    }


def _doubts(name: str, one: _Place, other: _Place) -> list[_Pair] | None:
    """Return what must be read to compare a tensor, None where its CRC32s say already that it has changed."""
    size = one.entry.end - one.entry.begin
    part_size = one.stored.part_size
    if one.entry.begin != other.entry.begin or part_size != other.stored.part_size:
        return (
            [_Pair(name, one.stored, one.entry.begin, other.stored, other.entry.begin, size)] if size else []
        )
    pairs = []
    for number in range(one.entry.begin // part_size, -(-one.entry.end // part_size)):
        begin = max(one.entry.begin, number * part_size)
        end = min(one.entry.end, (number + 1) * part_size)
        if one.part_size(number) == other.part_size(number):
            if one.stored.crc32[number] == other.stored.crc32[number]:
                continue
            if end - begin == one.part_size(number):
                return None
        if begin < end:
            pairs.append(_Pair(name, one.stored, begin, other.stored, begin, end - begin))
    return pairs


def _windows(pairs: Sequence[_Pair]) -> list[list[_Pair]]:
    """Return the pairs regrouped to runs without gaps, each short enough to be held."""
    windows: list[list[_Pair]] = []
    room = 0
    for pair in sorted(pairs, key=lambda pair: (pair.one.key, pair.other.key, pair.one_begin)):
        done = 0
        while done < pair.size:
            last = windows[-1][-1] if windows else None
            begin, other_begin = pair.one_begin + done, pair.other_begin + done
            if not (
                last
                and room
                and (last.one.key, last.one_begin + last.size) == (pair.one.key, begin)
                and (last.other.key, last.other_begin + last.size) == (pair.other.key, other_begin)
            ):
                windows.append([])
                room = _WINDOW_BYTES
            size = min(pair.size - done, room)
            windows[-1].append(_Pair(pair.name, pair.one, begin, pair.other, other_begin, size))
            done, room = done + size, room - size
    return windows


def _compare_bytes(folders: tuple[Store, Store], pairs: Sequence[_Pair], differing: set[str]) -> int:
    """Add the names of the pairs that differ to `differing`; return how many bytes were read."""
    sides = {(0, pair.one) for pair in pairs} | {(1, pair.other) for pair in pairs}
    etags = {(side, stored): Parts(folders[side], stored).etag for side, stored in sides}

    def look(_index: int, window: Sequence[_Pair]) -> int:
        if all(pair.name in differing for pair in window):
            return 0
        first, size = window[0], sum(pair.size for pair in window)
        one, other = bytearray(size), bytearray(size)
        folders[0].read_into(first.one.key, first.one_begin, [memoryview(one)], etag=etags[0, first.one])
        folders[1].read_into(
            first.other.key, first.other_begin, [memoryview(other)], etag=etags[1, first.other]
        )
        begin = 0
        for pair in window:
            if one[begin : begin + pair.size] != other[begin : begin + pair.size]:
                differing.add(pair.name)
            begin += pair.size
        return 2 * size

    return sum(in_parallel(look, _windows(pairs)))
