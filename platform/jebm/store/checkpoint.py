"""Checkpoints of a run: objects under a prefix, and the manifest that makes them one, written last.

    <run>/checkpoints/step-00001200-a0001/data/r00000-<uuid8>.safetensors        or one of each rank
    <run>/checkpoints/step-00001200-a0001/MANIFEST.json

There is no pointer to the latest one, so none can lie: it is found by listing. Nothing is pickled, nothing
is renamed, no data key is used twice, and of two writers of one checkpoint the second is refused. Of two
attempts at one run the older is refused. See docs/checkpoint-protocol.md.
"""

import logging
import math
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Literal

from torch import Tensor

from jebm.errors import CheckpointError, StoreError
from jebm.store.manifest import FOLDER_NAME, MANIFEST_BYTES, RUN_NAME, Facts, Manifest
from jebm.store.protocol import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    Store,
    in_parallel,
)
from jebm.store.shares import RECORD_BYTES, Share
from jebm.store.stream import (
    MOST_PARTS,
    StoredObject,
    fitting_headers,
    restore_tensors,
    upload_tensors,
    verify_object,
)

__all__ = ["Checkpoints", "Facts", "FencedError", "FoundCheckpoint", "Manifest"]

_MANIFEST = "MANIFEST.json"
_PIN = "PINNED"  # an object beside the manifest, so that every listing shows it
_FIRST_WAIT_SECONDS = 0.05  # between two looks for the other ranks' shares
_LONGEST_WAIT_SECONDS = 2.0
_SHOWN = 5  # ranks named in an error

_logger = logging.getLogger(__name__)


class FencedError(CheckpointError):
    """Another writer has committed this checkpoint: this one must stop, the run is no longer its own."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """What lies under one checkpoint's folder; `reason` says why it is not committed, `size` is in bytes."""

    name: str
    step: int
    attempt: int
    status: Literal["committed", "partial", "corrupt"]
    reason: str
    size: int
    manifest: Manifest | None


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, store: Store, run: str) -> None:
        """Look after `<run>/checkpoints/` of the store; raises CheckpointError for a name unfit for a key."""
        if not RUN_NAME.fullmatch(run):
            raise CheckpointError(f"run {run!r}: use letters, digits and . _ - = + (and / between names)")
        self._root, self._run = store, run
        self._store = store.child(f"{run}/checkpoints")

    def patient(self, seconds: float, on_retry: Callable[[], None] | None = None) -> "Checkpoints":
        """Return the same with another patience of its store, as `Store.patient`."""
        return Checkpoints(self._root.patient(seconds, on_retry), self._run)

    def save(self, tensors: Mapping[str, Tensor], facts: Facts) -> Manifest:
        """Write a checkpoint and return its manifest, once it is committed.

        Raises FencedError where another writer was first or a later attempt has begun, StoreError where the
        store refuses, CheckpointError for what could not be read again; then no checkpoint appears. (After a
        lost connection at the very end it may: with this content.)
        """
        draft = self._draft(facts)
        stored = upload_tensors(self._store.child(draft.name), _data_key(0), tensors)
        return self._commit(replace(draft, objects=(stored,)))

    def save_share(
        self, tensors: Mapping[str, Tensor], facts: Facts, share: Share, patience_seconds: float
    ) -> Manifest | None:
        """Write one rank's share of a checkpoint; rank 0 commits it, and alone returns its manifest.

        `tensors` are all of the state; those of other shares are asked for names, shapes and dtypes alone.
        Every rank calls this, with equal facts. Rank 0 waits for the others' shares: from one to the next
        for `patience_seconds`, and for as long again as its own share took.

        Raises as `save`, and on rank 0 StoreError where a share has not come in time, CheckpointError where
        the shares together are not the state. Then no checkpoint appears.
        """
        draft = self._draft(facts)
        folder = self._store.child(draft.name)
        began = time.monotonic()
        most_parts = max(MOST_PARTS // share.world_size, 1)  # so that one manifest holds all their CRC32s
        stored = upload_tensors(folder, _data_key(share.rank), share.of(tensors), most_parts)
        if share.rank > 0:
            _put_once(folder, share.key, share.encode(draft.name, stored))
            return None
        others = _gathered(folder, draft.name, share, patience_seconds + time.monotonic() - began)
        objects = (stored, *others)
        fitting_headers(folder, objects, tensors)
        try:
            folder.delete(share.others())
        except StoreError as error:  # they harm nobody, and go with the checkpoint
            _logger.warning("%s: records of shares are left: %s", folder.uri, error)
        return self._commit(replace(draft, objects=objects))

    def find(self, name: str) -> FoundCheckpoint | None:
        """Return the checkpoint of this name, in whatever state; None where nothing lies there."""
        objects = self._objects(name) if FOLDER_NAME.fullmatch(name) else {}
        return self._judge(name, objects) if objects else None

    def list(self, limit: int | None = None, *, step: int | None = None) -> Sequence[FoundCheckpoint]:
        """Return the checkpoints, newest first, each committed, partial (no manifest) or corrupt.

        With `limit` only so many: every one costs a request or two, so that thousands take seconds. With
        `step` only those of this step, and no other manifest is read.
        """
        if step is not None:
            folders = self._folders(f"step-{step:08d}-a")[:limit]
        elif limit is None:
            folders = self._folders()
        else:
            filled = ((name, objects) for name in self._names() if (objects := self._objects(name)))
            folders = list(islice(filled, limit))
        return in_parallel(lambda _, folder: self._judge(*folder), folders)

    def latest(self, *, deep: bool = False) -> Manifest | None:
        """Return the newest checkpoint that is whole, by step and then by attempt; None where there is none.

        Whole means: the manifest can be read, and its objects have the size and the etag that it says. An
        object with another etag, such as a copy, is read and counts where its CRC32s match; with `deep`
        every object is read. What is passed over is logged.
        """
        for name in self._names():
            objects = self._objects(name)
            if not objects:
                continue
            found = self._judge(name, objects, deep)
            if found.manifest is not None and found.status == "committed":
                return found.manifest
            _logger.warning("%s/%s is passed over: %s", self._store.uri, name, found.reason)
        return None

    def best(self, metric: str, mode: Literal["min", "max"] = "min") -> Manifest | None:
        """Return the whole checkpoint with the best value of a metric, the newest of equals; None without."""
        sign = 1.0 if mode == "min" else -1.0
        candidates = [
            found.manifest
            for found in self.list()
            if found.manifest is not None
            and found.status == "committed"
            and math.isfinite(found.manifest.metrics.get(metric, math.nan))
        ]
        return min(candidates, key=lambda manifest: sign * manifest.metrics[metric], default=None)

    def load(self, manifest: Manifest, into: Mapping[str, Tensor]) -> None:
        """Read a checkpoint's tensors into those given, which must match in name, shape and dtype.

        Raises CheckpointError where they do not match (before anything is written) or the data is damaged
        (the tensors are then half written).
        """
        restore_tensors(self._store.child(manifest.name), manifest.objects, into)

    def prune(
        self, keep_last: int, keep_every: int | None, protect: Collection[str], *, dry_run: bool = False
    ) -> Sequence[str]:
        """Delete old checkpoints and return their names; with `dry_run` only return them.

        Kept are the newest `keep_last` that are whole, all with a step divisible by `keep_every`, those
        named in `protect` or pinned, and what has no manifest: it may be on its way. Raises ValueError for a
        `keep_last` below 1.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, must be 1 or more")
        pruned = []
        whole = 0
        for name in self._names():
            if whole < keep_last:  # beyond those there is no need to read manifests
                whole += self._judge(name, self._objects(name)).status == "committed"
                continue
            step = _step_and_attempt(name)[0]
            if name in protect or (keep_every and step % keep_every == 0):
                continue
            objects = self._objects(name)
            if _MANIFEST not in objects or _PIN in objects:
                continue
            pruned.append(name)
            if dry_run:
                continue
            # The manifest first: from then on nobody takes the rest for a checkpoint.
            self._store.delete([f"{name}/{_MANIFEST}"])
            self._store.delete([f"{name}/{key}" for key in objects if key != _MANIFEST])
        return pruned

    def pin(self, name: str) -> None:
        """Keep a checkpoint from every `prune`; raises CheckpointError where there is none of this name.

        The data is not read: one that is damaged can be pinned, to be looked at.
        """
        manifest, pin = f"{name}/{_MANIFEST}", f"{name}/{_PIN}"
        missing = CheckpointError(f"{self._store.uri}/{name}: no such checkpoint")
        if not FOLDER_NAME.fullmatch(name) or self._store.head(manifest) is None:
            raise missing
        self._store.put(pin, b"")
        if self._store.head(manifest) is None:  # pruned just now; a pin alone would be litter
            self._store.delete([pin])
            raise missing

    def unpin(self, name: str) -> None:
        """Take the pin away; one that is not there is fine."""
        if FOLDER_NAME.fullmatch(name):
            self._store.delete([f"{name}/{_PIN}"])

    def pinned(self, names: Sequence[str] | None = None) -> frozenset[str]:
        """Return the names of all checkpoints that are pinned, or of those in `names`: a request each."""
        if names is not None:
            pins = in_parallel(lambda _, name: self._store.head(f"{name}/{_PIN}"), names)
            return frozenset(name for name, pin in zip(names, pins, strict=True) if pin is not None)
        return frozenset(
            name for name, objects in self._folders() if _PIN in objects and _MANIFEST in objects
        )

    def next_attempt(self) -> int:
        """Return a number above that of every attempt that has left anything here, at least 1."""
        return 1 + max((_step_and_attempt(name)[1] for name in self._names()), default=0)

    def orphans(self, older_than_seconds: float, attempt: int | None = None) -> Sequence[str]:
        """Return the names of folders that have no manifest and in which nothing was written for so long.

        They are what killed writers left. Spared are those of `attempt`, the one that runs now. Choose an
        age well above what a save may take with all its retries: an hour or more.
        """
        border = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        return [name for name, objects in self._folders() if _is_orphan(name, objects, border, attempt)]

    def delete_orphans(self, older_than_seconds: float, attempt: int | None = None) -> Sequence[str]:
        """Delete what `orphans` names, and uploads as old that never ended; return the folders' names."""
        border = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        deleted = []
        for name in self.orphans(older_than_seconds, attempt):
            objects = self._objects(name)
            if _is_orphan(name, objects, border, attempt):  # it still is
                self._store.delete([f"{name}/{key}" for key in objects])
                deleted.append(name)
        try:
            unfinished = self._store.discard_unfinished(older_than_seconds)
        except AccessDeniedError as error:  # a right of its own, which a trainer's key need not have
            _logger.warning("unfinished uploads are left to the bucket's lifecycle rule: %s", error)
        else:
            _logger.info("%s: %d unfinished uploads were discarded", self._store.uri, len(unfinished))
        return deleted

    def _draft(self, facts: Facts) -> Manifest:
        """Return the manifest, still without its objects, as it would be read; raises CheckpointError."""
        draft = Manifest(
            **{field.name: getattr(facts, field.name) for field in fields(Facts)},
            run=self._run,
            created=datetime.now(UTC),
            objects=(StoredObject("data/r00000-00000000.safetensors", 1, "", 1, (0,)),),
        )
        return Manifest.decode(draft.encode())

    def _commit(self, manifest: Manifest) -> Manifest:
        """Write the manifest and return it; where the run is another's, take the data back."""
        folder = self._store.child(manifest.name)
        newest = max(_step_and_attempt(name)[1] for name in [manifest.name, *self._names()])
        try:
            if newest > manifest.attempt:
                raise FencedError(
                    f"{folder.uri}: attempt {newest} of this run has begun since; stop one of the two jobs"
                )
            _put_once(folder, _MANIFEST, manifest.encode())
        except FencedError:
            folder.delete(stored.key for stored in manifest.objects)
            raise
        return manifest

    def _names(self) -> Sequence[str]:
        """Return the names of all folders, newest first. Some may be empty: deleted a moment ago."""
        names = (name for name in self._store.folders() if FOLDER_NAME.fullmatch(name))
        return sorted(names, key=_step_and_attempt, reverse=True)

    def _objects(self, name: str) -> dict[str, ObjectInfo]:
        """Return what lies under a checkpoint's folder, by key within it."""
        return {info.key.removeprefix(f"{name}/"): info for info in self._store.list(f"{name}/")}

    def _folders(self, prefix: str = "") -> Sequence[tuple[str, dict[str, ObjectInfo]]]:
        """Return names and objects (by key within the folder), newest first, from one listing."""
        folders: dict[str, dict[str, ObjectInfo]] = {}
        for info in self._store.list(prefix):
            name, _, key = info.key.partition("/")
            if key and FOLDER_NAME.fullmatch(name):
                folders.setdefault(name, {})[key] = info
        return [(name, folders[name]) for name in sorted(folders, key=_step_and_attempt, reverse=True)]

    def _judge(self, name: str, objects: Mapping[str, ObjectInfo], deep: bool = False) -> FoundCheckpoint:
        """Say whether a checkpoint is whole."""
        step, attempt = _step_and_attempt(name)
        manifest: Manifest | None = None
        status: Literal["committed", "partial", "corrupt"] = "committed"
        reason = ""
        try:
            if _MANIFEST not in objects:
                raise ObjectMissingError("it has no manifest: the save never ended, or is under way")
            size = objects[_MANIFEST].size
            if size > MANIFEST_BYTES:
                raise CheckpointError(f"its manifest has {size} bytes, above {MANIFEST_BYTES}")
            encoded = bytearray(size)  # no more is read, whatever lies there by now
            self._store.read_into(f"{name}/{_MANIFEST}", 0, [memoryview(encoded)])
            manifest = Manifest.decode(bytes(encoded))
            if manifest.name != name:
                raise CheckpointError(f"its manifest is that of {manifest.name}")
            for stored in manifest.objects:
                self._check(name, stored, objects.get(stored.key), deep)
        except ObjectMissingError as error:
            status, reason = "partial", str(error)
        except (CheckpointError, ObjectChangedError) as error:
            status, reason = "corrupt", str(error)
        total = sum(info.size for info in objects.values())
        return FoundCheckpoint(name, step, attempt, status, reason, total, manifest)

    def _check(self, name: str, stored: StoredObject, found: ObjectInfo | None, deep: bool) -> None:
        """Raise CheckpointError where an object is not the one of the manifest."""
        if found is None:
            raise CheckpointError(f"{stored.key} is missing")
        if found.size != stored.size:
            raise CheckpointError(f"{stored.key} has {found.size} bytes instead of {stored.size}")
        if found.etag != stored.etag:
            _logger.info("%s/%s: %s has another etag; reading it", self._store.uri, name, stored.key)
        if deep or found.etag != stored.etag:
            verify_object(self._store.child(name), stored)


def _step_and_attempt(name: str) -> tuple[int, int]:
    match = FOLDER_NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name!r} is no checkpoint's name")
    return int(match[1]), int(match[2])


def _is_orphan(name: str, objects: Mapping[str, ObjectInfo], border: datetime, attempt: int | None) -> bool:
    return (
        _MANIFEST not in objects
        and _step_and_attempt(name)[1] != attempt
        and all(info.modified < border for info in objects.values())
    )


def _data_key(rank: int) -> str:
    """Return a key that was never used, for what a rank writes."""
    return f"data/r{rank:05d}-{uuid.uuid4().hex[:8]}.safetensors"


def _put_once(folder: Store, key: str, content: bytes) -> None:
    """Write an object that nobody else may have written; raises FencedError where one has."""
    try:
        folder.put(key, content, if_absent=True)
    except ObjectExistsError as error:
        # Ours after all, where the answer to a first attempt was lost; else another writer's.
        info = folder.head(key)
        if info is None or info.size != len(content) or folder.get(key) != content:
            raise FencedError(
                f"{folder.uri}: another writer has committed this checkpoint; stop one of the two jobs"
            ) from error


def _gathered(folder: Store, checkpoint: str, share: Share, patience_seconds: float) -> list[StoredObject]:
    """Wait until all other ranks have written their shares, and return those in the order of the ranks.

    Raises StoreError where none has come for `patience_seconds`, CheckpointError for a record that is none.
    """
    missing = share.others()
    found: dict[int, StoredObject] = {}
    wait_seconds, deadline = _FIRST_WAIT_SECONDS, time.monotonic() + patience_seconds
    while missing:
        arrived = [info for info in folder.list("shares/") if info.key in missing]
        for info in arrived:
            rank = missing.pop(info.key)
            found[rank] = _read_record(folder, checkpoint, share, rank, info)
        if arrived:
            wait_seconds, deadline = _FIRST_WAIT_SECONDS, time.monotonic() + patience_seconds
        elif time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing.values())[:_SHOWN]))
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise StoreError(
                f"{folder.uri}: no share of rank {ranks}{more} for {patience_seconds:.0f} s; see their logs"
            )
        else:
            time.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)
    return [found[rank] for rank in sorted(found)]


def _read_record(folder: Store, checkpoint: str, share: Share, rank: int, info: ObjectInfo) -> StoredObject:
    if info.size > RECORD_BYTES:
        raise CheckpointError(f"{folder.uri}: the record of rank {rank} has {info.size} bytes")
    encoded = bytearray(info.size)  # no more is read, whatever lies there by now
    folder.read_into(info.key, 0, [memoryview(encoded)])
    return share.decode(bytes(encoded), checkpoint, rank)
