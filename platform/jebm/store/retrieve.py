"""Find, verify and read checkpoints with nothing but the store.

Data is read in slices of a few MB, four parts at a time, and every byte kept was checked against the CRC32 of
its part.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from jebm.config.names import RUN_FOLDERS
from jebm.errors import CheckpointError, StoreError
from jebm.store.checkpoint import Checkpoints, FoundCheckpoint, Manifest
from jebm.store.finite import not_finite, not_finite_line
from jebm.store.layout import StoredObject, TensorEntry
from jebm.store.parts import Parts, damages, read_headers
from jebm.store.protocol import Store, in_parallel
from jebm.store.storage import normalised_uri, open_store
from jebm.store.stream import bytes_of

__all__ = [
    "Progress",
    "RunStore",
    "counter",
    "open_checkpoint",
    "open_run",
    "read_tensors",
    "size_of",
    "tensor_table",
    "verify_checkpoint",
]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes done since the last call (negative if they are read again) and the total."""

_SHOWN = 10  # steps named in an error


@dataclass(frozen=True)
class RunStore:
    """A run found by its URI: its store, its name there, its checkpoints."""

    root: Store
    name: str
    checkpoints: Checkpoints

    def folder(self, checkpoint: str) -> Store:
        """Return the store of one checkpoint; a manifest's keys are relative to it."""
        return self.root.child(f"{self.name}/checkpoints/{checkpoint}")

    @property
    def uri(self) -> str:
        """The URI of the run."""
        return f"{self.root.uri}/{self.name}"

    def choose(
        self, *, step: int | None = None, best: str | None = None, mode: Literal["min", "max"] = "min"
    ) -> Manifest:
        """Return the checkpoint of a step, the best by a metric, or by default the latest.

        Raises CheckpointError if there is none, with a message that says what there is.
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
        """Return the error message for a run without a whole checkpoint."""
        run = self.root.child(self.name)
        if next(iter(run.list()), None) is None:
            return f"{self.uri}: no such run; give run.storage/run.name"
        if run.head("run.json") is None and not {*RUN_FOLDERS} & {*run.folders()}:
            return (
                f"{self.uri}: is no run, but perhaps an exported model or a storage of runs; give "
                "run.storage/run.name (jebm runs lists the runs of a storage)"
            )
        return f"{self.uri}: no whole checkpoint yet; give another run"

    def size(self, checkpoint: str) -> int:
        """Return the size of everything in a checkpoint's folder, in bytes."""
        return sum(info.size for info in self.folder(checkpoint).list())

    def written(self, found: FoundCheckpoint) -> datetime:
        """Return when a checkpoint was committed; without a manifest, when its last object was written."""
        if found.manifest is not None:
            return found.manifest.created
        moments = [info.modified for info in self.folder(found.name).list()]
        return max(moments, default=datetime.now(UTC))

    def _of_step(self, step: int) -> Manifest:
        reasons = []
        for found in self.checkpoints.list(step=step):  # of several attempts, the newest comes first
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


def open_run(uri: str) -> RunStore:
    """Return the run at `run.storage/run.name`; makes no request.

    Raises StoreError if the URI is invalid or names no run, CheckpointError if no run can have the name.
    """
    uri = normalised_uri(uri)
    if "://" not in uri:
        uri = str(Path(uri).resolve())  # `.` and `..` have names too
    root, _, name = uri.rstrip("/").rpartition("/")
    if not name or not root or root.endswith(":/"):
        raise StoreError(f"{uri!r} names no run: give run.storage/run.name, such as s3://bucket/runs/mine")
    store = open_store(root)
    return RunStore(store, name, Checkpoints(store, name))


def open_checkpoint(uri: str) -> tuple[RunStore, Manifest]:
    """Return a run and the checkpoint that a URI names: …/checkpoints/<name>, or a run's newest.

    Raises StoreError if the URI names no run, CheckpointError if there is no such whole checkpoint.
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
    """Return a checkpoint's tensors by name, read only from the headers; raises CheckpointError."""
    return {
        name: entry for header in read_headers(folder, manifest.objects) for name, entry in header.items()
    }


def size_of(manifest: Manifest) -> int:
    """Return the size of a checkpoint's data, in bytes."""
    return sum(stored.size for stored in manifest.objects)


def counter(progress: Progress, total: int) -> Callable[[int], None]:
    """Return a thread-safe function that takes the bytes each caller has done."""
    lock = Lock()

    def count(done: int) -> None:
        with lock:
            progress(done, total)

    return count


def verify_checkpoint(folder: Store, manifest: Manifest, progress: Progress) -> Sequence[str]:
    """Read a whole checkpoint and return a line for each reason why `Checkpoints.load` refuses it."""
    return damages(folder, manifest.objects, counter(progress, size_of(manifest)))


def read_tensors(
    run: RunStore,
    manifest: Manifest,
    names: Collection[str],
    progress: Progress = lambda _done, _total: None,
    *,
    finite: bool = True,
) -> dict[str, Tensor]:
    """Return the named tensors on the CPU, reading only the parts that hold them.

    Raises CheckpointError if one is missing, or a part is damaged; with `finite` also if one holds NaN or
    infinity.
    """
    names = frozenset(names)
    source = run.folder(manifest.name)
    headers = read_headers(source, manifest.objects)
    wanted = [{name: entry for name, entry in header.items() if name in names} for header in headers]
    tensors = {
        name: torch.empty(entry.shape, dtype=entry.dtype)
        for entries in wanted
        for name, entry in entries.items()
    }
    if missing := sorted(names - tensors.keys()):
        raise CheckpointError(f"{run.uri}: {manifest.name} has no tensor {missing[0]}")
    pairs = list(zip(manifest.objects, wanted, strict=True))
    count = counter(progress, sum(_size_of_parts(stored, entries) for stored, entries in pairs))
    for stored, entries in pairs:
        targets = [(entry.begin, bytes_of(tensors[name])) for name, entry in entries.items()]
        _fill(Parts(source, stored), _parts_of(stored, entries), targets, count)
    if finite and (odd := not_finite(tensors)):
        raise CheckpointError(f"{source.uri}: {not_finite_line(odd)}")
    return tensors


def _parts_of(stored: StoredObject, entries: Mapping[str, TensorEntry]) -> list[int]:
    """Return the numbers of the parts that hold any byte of the tensors."""
    size, filled = stored.part_size, [entry for entry in entries.values() if entry.begin < entry.end]
    return sorted({n for entry in filled for n in range(entry.begin // size, -(-entry.end // size))})


def _size_of_parts(stored: StoredObject, entries: Mapping[str, TensorEntry]) -> int:
    size = stored.part_size
    return sum(min(size, stored.size - number * size) for number in _parts_of(stored, entries))


def _fill(
    parts: Parts,
    numbers: Sequence[int],
    targets: Sequence[tuple[int, memoryview]],
    count: Callable[[int], None],
) -> None:
    """Read parts of an object into buffers, each given with its offset in the object."""

    def receive(offset: int, piece: memoryview) -> None:
        for begin, memory in targets:
            first, last = max(begin, offset), min(begin + memory.nbytes, offset + piece.nbytes)
            if first < last:
                memory[first - begin : last - begin] = piece[first - offset : last - offset]

    in_parallel(lambda _, number: parts.stream(number, receive, count), numbers)
