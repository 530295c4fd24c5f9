"""Checkpoints brought back with nothing but the store: chosen, downloaded, verified, compared, exported.

Data travels in slices of a few MB, four parts at a time, and every byte that is kept has been checked
against the CRC32 of its part; memory does not grow with the checkpoint.
"""

import os
import shutil
import time
import uuid
import zlib
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Literal, TypeAlias

import torch

from jebm.errors import CheckpointError, StoreError
from jebm.store.checkpoint import Checkpoints, FoundCheckpoint, Manifest
from jebm.store.protocol import ObjectExistsError, Store, in_parallel
from jebm.store.storage import open_store
from jebm.store.stream import (
    StoredObject,
    TensorEntry,
    encoded_header,
    read_headers,
    restore_tensors,
    upload_tensors,
)

__all__ = [
    "Comparison",
    "Download",
    "Export",
    "Progress",
    "RunStore",
    "Throughput",
    "compare",
    "damages",
    "download",
    "export_weights",
    "measure",
    "open_checkpoint",
    "open_run",
    "read_tensors",
    "tensor_table",
]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes done since the last call (negative: they are done again), and with those of all."""

_MANIFEST = "MANIFEST.json"
_SLICE_BYTES = 4 << 20  # held by each of the four threads
_ALIGNED_BYTES = 64  # where a tensor begins in memory
_SHOWN = 10  # steps named in an error
_TRIES = 2  # of a part with a wrong CRC32: the first may have been hurt on its way


@dataclass(frozen=True)
class RunStore:
    """A run as its URI names it: the store that it lies in, its name there, its checkpoints."""

    root: Store
    name: str
    checkpoints: Checkpoints

    def folder(self, checkpoint: str) -> Store:
        """Return the store of one checkpoint, to whose keys a manifest refers."""
        return self.root.child(f"{self.name}/checkpoints/{checkpoint}")

    @property
    def uri(self) -> str:
        """Where it lies."""
        return f"{self.root.uri}/{self.name}"

    def choose(
        self, *, step: int | None = None, best: str | None = None, mode: Literal["min", "max"] = "min"
    ) -> Manifest:
        """Return the checkpoint of a step, the best by a metric, or (with neither) the latest.

        Raises CheckpointError where there is none, in a line that says what there is.
        """
        if step is not None:
            return self._of_step(step)
        found = self.checkpoints.latest() if best is None else self.checkpoints.best(best, mode)
        if found is not None:
            return found
        if best is not None and (latest := self.checkpoints.latest()):
            metrics = ", ".join(sorted(latest.metrics)) or "none"
            raise CheckpointError(f"{self.uri}: no checkpoint with a finite {best}; metrics are {metrics}")
        raise CheckpointError(self.nothing())

    def nothing(self) -> str:
        """Return the line for a run without a whole checkpoint."""
        if next(iter(self.root.list(f"{self.name}/")), None) is None:
            return f"{self.uri}: no such run; give run.storage/run.name"
        return f"{self.uri}: no whole checkpoint"

    def size(self, checkpoint: str) -> int:
        """Return the bytes of all that lies under a checkpoint's folder."""
        return sum(info.size for info in self.folder(checkpoint).list())

    def written(self, found: FoundCheckpoint) -> datetime:
        """Return when a checkpoint was committed; without a manifest, when its last object came."""
        if found.manifest is not None:
            return found.manifest.created
        moments = [info.modified for info in self.folder(found.name).list()]
        return max(moments, default=datetime.now(UTC))

    def _of_step(self, step: int) -> Manifest:
        reasons = []
        for found in self.checkpoints.list(step=step):  # of several attempts the newest comes first
            if found.manifest is not None and found.status == "committed":
                return found.manifest
            reasons.append(f"{found.name} is {found.status}: {found.reason}")
        if not reasons:
            newest = self.checkpoints.list(_SHOWN + 1)
            if not newest:
                raise CheckpointError(self.nothing())
            steps = sorted({found.step for found in newest if found.status == "committed"})
            more = "…, " if len(newest) > _SHOWN else ""
            reasons.append(f"there are {more}{', '.join(map(str, steps[-_SHOWN:])) or 'none'}")
        raise CheckpointError(f"{self.uri}: no checkpoint of step {step}; {'; '.join(reasons)}")


@dataclass(frozen=True)
class Download:
    """A checkpoint in a local folder: bytes that were fetched, and that were there already and are good."""

    folder: Path
    bytes_fetched: int
    bytes_kept: int


@dataclass(frozen=True)
class Export:
    """A plain safetensors file: how many tensors and bytes it holds."""

    path: Path
    tensors: int
    size: int


@dataclass(frozen=True)
class Comparison:
    """How the tensors of a second checkpoint differ from those of a first, and the bytes read to find out."""

    changed: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    equal: int
    bytes_read: int


@dataclass(frozen=True)
class Throughput:
    """What a place takes and gives: seconds of wall clock, and of this process's CPU."""

    size: int
    upload_seconds: float
    upload_cpu_seconds: float
    download_seconds: float
    download_cpu_seconds: float


def open_run(uri: str) -> RunStore:
    """Return the run of `run.storage/run.name`; calls nobody.

    Raises StoreError for a URI that names no run, CheckpointError for a name that no run can have.
    """
    if "://" not in uri and uri:
        uri = str(Path(uri).expanduser().resolve())  # `.` and `..` have names, too
    root, _, name = uri.rstrip("/").rpartition("/")
    if not name or not root or root.endswith(":/"):
        raise StoreError(f"{uri!r} names no run: give run.storage/run.name, such as s3://bucket/runs/mine")
    store = open_store(root)
    return RunStore(store, name, Checkpoints(store, name))


def open_checkpoint(uri: str) -> tuple[RunStore, Manifest]:
    """Return a run and the checkpoint that a URI names: …/checkpoints/<name>, or of a run its newest.

    Raises StoreError for a URI that names no run, CheckpointError where there is no such whole checkpoint.
    """
    place, _, name = uri.rstrip("/").partition("/checkpoints/")
    run = open_run(place)
    if not name:
        return run, run.choose()
    found = run.checkpoints.find(name)
    if found is None or found.manifest is None or found.status != "committed":
        raise CheckpointError(f"{uri}: no whole checkpoint; jobs/checkpoints.py list {place} shows them")
    return run, found.manifest


def tensor_table(folder: Store, manifest: Manifest) -> dict[str, TensorEntry]:
    """Return every tensor of a checkpoint by name, read from the headers alone; raises CheckpointError."""
    return {
        name: entry for header in read_headers(folder, manifest.objects) for name, entry in header.items()
    }


def download(run: RunStore, manifest: Manifest, target: Path, progress: Progress) -> Download:
    """Bring a checkpoint to `<target>/<run>/checkpoints/<name>`, where `open_store(target)` finds it.

    Parts that are there already and good are kept, so that a broken download goes on where it broke, and a
    damaged one is repaired. The manifest comes last: until then nobody takes the folder for a checkpoint.
    Raises CheckpointError where a part is damaged in the store, StoreError where a side cannot be reached.
    """
    source = run.folder(manifest.name)
    encoded = source.get(_MANIFEST)
    store = open_store(str(target)).child(f"{run.name}/checkpoints/{manifest.name}")
    if store.head(_MANIFEST) is not None and store.get(_MANIFEST) != encoded:
        raise _taken(target, manifest)
    folder = target.expanduser().absolute() / run.name / "checkpoints" / manifest.name
    with _os_errors(folder):
        _check_room(folder, manifest)
    count = _counter(progress, _size(manifest))
    fetched = 0
    for stored in manifest.objects:
        with _os_errors(folder / stored.key):
            fetched += _fetch_object(source, stored, folder / stored.key, count)
    try:
        store.put(_MANIFEST, encoded, if_absent=True)
    except ObjectExistsError as error:
        if store.get(_MANIFEST) != encoded:
            raise _taken(target, manifest) from error
    return Download(folder, fetched, _size(manifest) - fetched)


def damages(folder: Store, manifest: Manifest, progress: Progress) -> Sequence[str]:
    """Read a whole checkpoint and return a line for each part that is not as it was saved."""
    count = _counter(progress, _size(manifest))
    found = []
    for stored in manifest.objects:
        try:
            etag = _present(folder, stored)
        except CheckpointError as error:
            found.append(str(error))
            continue

        def check(number: int, _begin: int, stored: StoredObject = stored, etag: str = etag) -> str | None:
            try:
                _read_part(folder, stored, number, etag, lambda _offset, piece: count(piece.nbytes))
            except CheckpointError as error:
                return str(error)
            return None

        lines = in_parallel(check, range(0, stored.size, stored.part_size))
        found += [line for line in lines if line is not None]
    return found


def export_weights(
    run: RunStore, manifest: Manifest, output: Path, prefix: str, progress: Progress
) -> Export:
    """Write the tensors `<prefix>.…`, without the prefix, to a file that every safetensors reader opens.

    Only the parts that hold them are read. The file appears whole or not at all. Raises CheckpointError
    where there are no such tensors or a part is damaged, StoreError where the file cannot be written.
    """
    source = run.folder(manifest.name)
    exported: dict[str, TensorEntry] = {}
    end = 0
    segments: list[list[_Segment]] = []
    for header in read_headers(source, manifest.objects):
        segments.append([])
        for name, entry in header.items():
            if name.startswith(f"{prefix}."):
                begin, end = end, end + entry.end - entry.begin
                exported[name.removeprefix(f"{prefix}.")] = replace(entry, begin=begin, end=end)
                segments[-1].append(_Segment(entry.begin, entry.end, begin))
    if not exported:
        raise CheckpointError(f"{manifest.name}: holds no tensors {prefix}.*")
    facts = {"run": manifest.run, "step": str(manifest.step), "config_sha256": manifest.config_sha256}
    encoded = encoded_header(exported, facts)
    total = sum(
        min(stored.part_size, stored.size - number * stored.part_size)
        for stored, wanted in zip(manifest.objects, segments, strict=True)
        for number in _parts_of(stored, wanted)
    )
    count = _counter(progress, total)
    with _os_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_name(f".partial-{uuid.uuid4().hex}")
        try:
            with unfinished.open("xb", buffering=0) as file:
                file.write(encoded)
                file.truncate(len(encoded) + end)
                for stored, wanted in zip(manifest.objects, segments, strict=True):
                    write = partial(_write_at, file.fileno(), len(encoded))
                    _copy(source, stored, wanted, write, count)
                os.fsync(file.fileno())
            unfinished.replace(output)
        finally:
            unfinished.unlink(missing_ok=True)
    return Export(output, len(exported), len(encoded) + end)


def read_tensors(run: RunStore, manifest: Manifest, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of these names, on the CPU; only the parts that hold them are read.

    Raises CheckpointError where one is not there or a part is damaged.
    """
    source = run.folder(manifest.name)
    found: dict[str, tuple[TensorEntry, int]] = {}
    end = 0
    segments: list[list[_Segment]] = []
    for header in read_headers(source, manifest.objects):
        segments.append([])
        for name in header.keys() & names:
            entry = header[name]
            found[name] = entry, end
            segments[-1].append(_Segment(entry.begin, entry.end, end))
            end += -(-(entry.end - entry.begin) // _ALIGNED_BYTES) * _ALIGNED_BYTES
        segments[-1].sort(key=lambda segment: segment.begin)
    if missing := sorted(set(names) - found.keys()):
        raise CheckpointError(f"{run.uri}: {manifest.name} has no tensor {missing[0]}")
    data = bytearray(max(end, 1))

    def write(offset: int, piece: memoryview) -> None:
        data[offset : offset + piece.nbytes] = piece

    for stored, wanted in zip(manifest.objects, segments, strict=True):
        _copy(source, stored, wanted, write, lambda _: None)
    return {
        name: torch.frombuffer(
            data, dtype=entry.dtype, offset=begin, count=(entry.end - entry.begin) // entry.dtype.itemsize
        ).reshape(entry.shape)
        for name, (entry, begin) in found.items()
    }


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


def measure(run: RunStore, size: int) -> Throughput:
    """Write random tensors of `size` bytes beside the run's checkpoints, read them back, delete them.

    Raises StoreError where the place cannot be written, CheckpointError where it does not give back what it
    was given.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"bench.{number}": torch.randint(-(2**62), 2**62, (length // 8,), generator=generator)
        for number, length in enumerate(_lengths(size))
    }
    key = f"{run.name}/checkpoints/bench-{uuid.uuid4().hex}/data.safetensors"  # no checkpoint's name
    try:
        began, cpu = time.perf_counter(), time.process_time()
        stored = upload_tensors(run.root, key, tensors)
        upload_seconds, upload_cpu = time.perf_counter() - began, time.process_time() - cpu
        began, cpu = time.perf_counter(), time.process_time()
        restore_tensors(run.root, [stored], tensors)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    finally:
        run.root.delete([key])
    return Throughput(stored.size, upload_seconds, upload_cpu, seconds, cpu_seconds)


def _lengths(size: int) -> Iterator[int]:
    """Yield lengths of up to 64 MiB that come to `size`, or to the multiple of 8 below it, 8 at least."""
    left = max(size, 8)
    while left >= 8:
        yield min(left, 64 << 20)
        left -= min(left, 64 << 20)


# ── Parts ───────────────────────────────────────────────────────────────────────────────────────────────


def _present(folder: Store, stored: StoredObject) -> str:
    """Return the etag of an object as it is now; raises CheckpointError where its size is not as it was."""
    info = folder.head(stored.key)
    if info is None:
        raise CheckpointError(f"{folder.uri}/{stored.key}: the object is gone")
    if info.size != stored.size:
        raise CheckpointError(
            f"{folder.uri}/{stored.key} is damaged: {info.size} bytes instead of {stored.size}"
        )
    return info.etag


def _read_part(
    folder: Store,
    stored: StoredObject,
    number: int,
    etag: str,
    receive: Callable[[int, memoryview], None],
) -> None:
    """Read one part, handing over (offset in the object, slice); raises CheckpointError for a wrong CRC32."""
    begin = number * stored.part_size
    end = min(begin + stored.part_size, stored.size)
    buffer = memoryview(bytearray(min(_SLICE_BYTES, end - begin)))
    value = 0
    for offset in range(begin, end, _SLICE_BYTES):
        piece = buffer[: min(_SLICE_BYTES, end - offset)]
        folder.read_into(stored.key, offset, [piece], etag=etag)
        value = zlib.crc32(piece, value)
        receive(offset, piece)
    if value != stored.crc32[number]:
        raise CheckpointError(
            f"{folder.uri}/{stored.key} is damaged: "
            f"part {number + 1} of {len(stored.crc32)} does not match its CRC32"
        )


def _check_room(folder: Path, manifest: Manifest) -> None:
    """Raise StoreError where the disk has not the room for what is still to come of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(folder).free
    for stored in manifest.objects:
        with suppress(FileNotFoundError):
            room += (folder / stored.key).stat().st_blocks * 512
    if _size(manifest) > room:
        raise StoreError(f"{folder}: {_size(manifest):,} bytes do not fit into the {room:,} free ones")


def _fetch_object(source: Store, stored: StoredObject, path: Path, count: Callable[[int], None]) -> int:
    """Make `path` hold the object, and return how many bytes had to be fetched."""
    etag = _present(source, stored)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        found = os.fstat(descriptor)
        os.truncate(descriptor, stored.size)  # what is missing reads as zeros, and fails its CRC32

        def fetch(number: int, begin: int) -> int:
            size = min(stored.part_size, stored.size - begin)
            if begin < found.st_size and _local_crc32(descriptor, begin, size) == stored.crc32[number]:
                count(size)
                return 0
            for attempt in range(_TRIES):
                done = 0

                def keep(offset: int, piece: memoryview) -> None:
                    nonlocal done
                    _write_at(descriptor, 0, offset, piece)
                    done += piece.nbytes
                    count(piece.nbytes)

                try:
                    _read_part(source, stored, number, etag, keep)
                    break
                except CheckpointError:
                    count(-done)
                    if attempt + 1 == _TRIES:
                        raise
            return size

        fetched = in_parallel(fetch, range(0, stored.size, stored.part_size))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the file's name has to outlive a power cut just as the manifest's does
    finally:
        os.close(folder)
    return sum(fetched)


def _local_crc32(descriptor: int, begin: int, size: int) -> int:
    buffer = memoryview(bytearray(min(_SLICE_BYTES, size)))
    value = 0
    for offset in range(begin, begin + size, _SLICE_BYTES):
        count = os.preadv(descriptor, [buffer[: min(_SLICE_BYTES, begin + size - offset)]], offset)
        value = zlib.crc32(buffer[:count], value)
    return value


def _write_at(descriptor: int, base: int, offset: int, piece: memoryview) -> None:
    while piece.nbytes:
        count = os.pwrite(descriptor, piece, base + offset)
        piece, offset = piece[count:], offset + count


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error.strerror or error}") from error


def _counter(progress: Progress, total: int) -> Callable[[int], None]:
    """Return what several threads can call with the bytes that each has done."""
    lock = Lock()

    def count(done: int) -> None:
        with lock:
            progress(done, total)

    return count


def _size(manifest: Manifest) -> int:
    return sum(stored.size for stored in manifest.objects)


def _taken(target: Path, manifest: Manifest) -> StoreError:
    return StoreError(f"{target}: holds another checkpoint called {manifest.name}; give another folder")


# ── Weights alone ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Segment:
    """Bytes [begin, end) of an object, and where they go in the data of the exported file."""

    begin: int
    end: int
    target: int


def _parts_of(stored: StoredObject, segments: Sequence[_Segment]) -> list[int]:
    """Return the numbers of the parts that hold some byte of the segments."""
    return sorted(
        {
            number
            for segment in segments
            for number in range(segment.begin // stored.part_size, -(-segment.end // stored.part_size))
        }
    )


def _copy(
    source: Store,
    stored: StoredObject,
    segments: Sequence[_Segment],
    write: Callable[[int, memoryview], None],
    count: Callable[[int], None],
) -> None:
    """Write the segments of an object to their targets; checks every part read."""
    begins = [segment.begin for segment in segments]
    etag = _present(source, stored)

    def receive(offset: int, piece: memoryview) -> None:
        first = max(bisect_right(begins, offset) - 1, 0)
        for segment in segments[first:]:
            if segment.begin >= offset + piece.nbytes:
                break
            begin, end = max(segment.begin, offset), min(segment.end, offset + piece.nbytes)
            if begin < end:
                write(segment.target + begin - segment.begin, piece[begin - offset : end - offset])
        count(piece.nbytes)

    in_parallel(
        lambda _index, number: _read_part(source, stored, number, etag, receive), _parts_of(stored, segments)
    )


# ── Comparison ──────────────────────────────────────────────────────────────────────────────────────────


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
                room = _SLICE_BYTES // 2  # two are held: one of each side
            size = min(pair.size - done, room)
            windows[-1].append(_Pair(pair.name, pair.one, begin, pair.other, other_begin, size))
            done, room = done + size, room - size
    return windows


def _compare_bytes(folders: tuple[Store, Store], pairs: Sequence[_Pair], differing: set[str]) -> int:
    """Add the names of the pairs that differ to `differing`; return how many bytes were read."""
    etags = {(0, pair.one): "" for pair in pairs} | {(1, pair.other): "" for pair in pairs}
    for side, stored in etags:
        etags[side, stored] = _present(folders[side], stored)

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
