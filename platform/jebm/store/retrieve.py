"""Checkpoints found and read with nothing but the store: chosen, verified, their tensors exported.

Data travels in slices of a few MB, four parts at a time, and every byte that is kept has been checked
against the CRC32 of its part; memory does not grow with the checkpoint.
"""

import os
import uuid
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Literal, TypeAlias

import torch

from jebm.errors import CheckpointError, StoreError
from jebm.store.checkpoint import Checkpoints, FoundCheckpoint, Manifest
from jebm.store.files import os_errors, write_at
from jebm.store.finite import FiniteScan, not_finite, not_finite_line
from jebm.store.layout import StoredObject, TensorEntry, encoded_header
from jebm.store.parts import Parts, damages, read_headers
from jebm.store.protocol import Store, in_parallel
from jebm.store.storage import normalised_uri, open_store

__all__ = [
    "Export",
    "Progress",
    "RunStore",
    "counter",
    "export_weights",
    "open_checkpoint",
    "open_run",
    "read_tensors",
    "size_of",
    "tensor_table",
    "verify_checkpoint",
]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes done since the last call (negative: they are done again), and with those of all."""

_ALIGNED_BYTES = 64  # where a tensor begins in memory
_SHOWN = 10  # steps named in an error


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
class Export:
    """A plain safetensors file: how many tensors and bytes it holds."""

    path: Path
    tensors: int
    size: int


def open_run(uri: str) -> RunStore:
    """Return the run of `run.storage/run.name`; calls nobody.

    Raises StoreError for a URI that is invalid or names no run, CheckpointError for a name that no run can
    have.
    """
    uri = normalised_uri(uri)
    if "://" not in uri:
        uri = str(Path(uri).resolve())  # `.` and `..` have names, too
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
        raise CheckpointError(f"{uri}: no whole checkpoint; jebm checkpoints list {place} shows them")
    return run, found.manifest


def tensor_table(folder: Store, manifest: Manifest) -> dict[str, TensorEntry]:
    """Return every tensor of a checkpoint by name, read from the headers alone; raises CheckpointError."""
    return {
        name: entry for header in read_headers(folder, manifest.objects) for name, entry in header.items()
    }


def size_of(manifest: Manifest) -> int:
    """Return the bytes of a checkpoint's data."""
    return sum(stored.size for stored in manifest.objects)


def counter(progress: Progress, total: int) -> Callable[[int], None]:
    """Return what several threads can call with the bytes that each has done."""
    lock = Lock()

    def count(done: int) -> None:
        with lock:
            progress(done, total)

    return count


def verify_checkpoint(folder: Store, manifest: Manifest, progress: Progress) -> Sequence[str]:
    """Read a whole checkpoint and return a line for each thing for which `Checkpoints.load` refuses it."""
    return damages(folder, manifest.objects, counter(progress, size_of(manifest)))


def export_weights(
    run: RunStore, manifest: Manifest, output: Path, prefix: str, progress: Progress
) -> Export:
    """Write the tensors `<prefix>.…`, without the prefix, to a file that every safetensors reader opens.

    Only the parts that hold them are read. The file appears whole or not at all. Raises CheckpointError
    where there are no such tensors, a part is damaged, or they hold NaN or infinity; StoreError where the
    file cannot be written.
    """
    source = run.folder(manifest.name)
    exported: dict[str, TensorEntry] = {}
    end = 0
    segments: list[list[_Segment]] = []
    scans: list[FiniteScan] = []
    for header in read_headers(source, manifest.objects):
        wanted = {name: entry for name, entry in header.items() if name.startswith(f"{prefix}.")}
        scans.append(FiniteScan(wanted))
        segments.append([])
        for name, entry in wanted.items():
            begin, end = end, end + entry.end - entry.begin
            exported[name.removeprefix(f"{prefix}.")] = TensorEntry(entry.dtype, entry.shape, begin, end)
            segments[-1].append(_Segment(entry.begin, entry.end, begin))
    if not exported:
        raise CheckpointError(f"{manifest.name}: holds no tensors {prefix}.*")
    facts = {"run": manifest.run, "step": str(manifest.step), "config_sha256": manifest.config_sha256}
    encoded = encoded_header(exported, facts)
    total = sum(
        min(stored.part_size, stored.size - number * stored.part_size)
        for stored, pieces in zip(manifest.objects, segments, strict=True)
        for number in _parts_of(stored, pieces)
    )
    count = counter(progress, total)
    with os_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_name(f".partial-{uuid.uuid4().hex}")
        try:
            with unfinished.open("xb", buffering=0) as file:
                file.write(encoded)
                file.truncate(len(encoded) + end)
                write = partial(write_at, file.fileno(), len(encoded))
                for stored, pieces, scan in zip(manifest.objects, segments, scans, strict=True):
                    _copy(source, stored, pieces, write, count, scan)
                if names := [name for scan in scans for name in scan.names()]:
                    raise CheckpointError(f"{source.uri}: {not_finite_line(names)}; nothing was written")
                os.fsync(file.fileno())
            unfinished.replace(output)
        finally:
            unfinished.unlink(missing_ok=True)
    return Export(output, len(exported), len(encoded) + end)


def read_tensors(run: RunStore, manifest: Manifest, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of these names, on the CPU; only the parts that hold them are read.

    Raises CheckpointError where one is not there or holds NaN or infinity, or a part is damaged.
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
        _copy(source, stored, wanted, write)
    tensors = {
        name: torch.frombuffer(
            data, dtype=entry.dtype, offset=begin, count=(entry.end - entry.begin) // entry.dtype.itemsize
        ).reshape(entry.shape)
        for name, (entry, begin) in found.items()
    }
    if odd := not_finite(tensors):
        raise CheckpointError(f"{source.uri}: {not_finite_line(odd)}")
    return tensors


# ── Parts of an object ──────────────────────────────────────────────────────────────────────────────────


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
    count: Callable[[int], None] = lambda _: None,
    scan: FiniteScan | None = None,
) -> None:
    """Write the segments of an object, in the order of their bytes, to their targets; checks each part."""
    filled = [segment for segment in segments if segment.begin < segment.end]
    ends = [segment.end for segment in filled]

    def receive(offset: int, piece: memoryview) -> None:
        for segment in islice(filled, bisect_right(ends, offset), None):
            if segment.begin >= offset + piece.nbytes:
                break
            begin, end = max(segment.begin, offset), min(segment.end, offset + piece.nbytes)
            write(segment.target + begin - segment.begin, piece[begin - offset : end - offset])
        if scan is not None:
            scan.receive(offset, piece)

    parts = Parts(source, stored)
    in_parallel(lambda _, number: parts.stream(number, receive, count), _parts_of(stored, filled))
