"""Checkpoints of a run: objects under a prefix; the manifest, written last, commits them.

    <run>/checkpoints/step-00001200-a0001/data/r00000-<uuid8>.safetensors        or one per rank
    <run>/checkpoints/step-00001200-a0001/MANIFEST.json

There is no pointer to the latest checkpoint that could go stale: it is found by listing. Nothing is pickled
or renamed, and no data key is used twice. The second writer of a checkpoint is refused, and so is an older
attempt at the same run. See docs/checkpoint-protocol.md.
"""

import logging
import math
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Literal, cast

from torch import Tensor

from jebm.errors import CheckpointError, StoreError
from jebm.store.fence import FencedError, put_once
from jebm.store.finite import not_finite, not_finite_line
from jebm.store.judge import MANIFEST, FoundCheckpoint, judged, objects_of
from jebm.store.layout import StoredObject
from jebm.store.manifest import MOST_ATTEMPTS, RUN_NAME, VERSION, Facts, Manifest, step_and_attempt
from jebm.store.parts import fitting_headers
from jebm.store.protocol import (
    AccessDeniedError,
    ObjectInfo,
    Store,
    in_parallel,
)
from jebm.store.shares import Share, gathered
from jebm.store.stream import MOST_PARTS, restore_tensors, upload_tensors

__all__ = ["Checkpoints", "Facts", "FencedError", "FoundCheckpoint", "Manifest"]

_PIN = "PINNED"  # an object beside the manifest, so that every listing shows it
_SHOWN = 3  # checkpoints named in an error

_logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, store: Store, run: str) -> None:
        """Manage `<run>/checkpoints/` of the store; raises CheckpointError for a name unfit for a key."""
        if not RUN_NAME.fullmatch(run):
            raise CheckpointError(f"run {run!r}: use letters, digits and . _ - = + (and / between names)")
        self._root, self._run = store, run
        self._store = store.child(f"{run}/checkpoints")

    def patient(self, seconds: float, on_retry: Callable[[], None] | None = None) -> "Checkpoints":
        """Return the same checkpoints with a different retry time, as `Store.patient`."""
        return Checkpoints(self._root.patient(seconds, on_retry), self._run)

    def save(self, tensors: Mapping[str, Tensor], facts: Facts) -> Manifest:
        """Write a checkpoint and return its manifest, once it is committed.

        Raises FencedError if another writer was first or a later attempt has begun, StoreError if the store
        refuses, CheckpointError for state that could not be read back. Then no checkpoint appears, unless the
        connection was lost at the very end; its content is then this one.
        """
        draft = self._draft(facts)
        stored = upload_tensors(self._store.child(draft.name), _data_key(0), tensors)
        return self._commit(replace(draft, objects=(stored,)))

    def save_share(
        self, tensors: Mapping[str, Tensor], facts: Facts, share: Share, patience_seconds: float
    ) -> Manifest | None:
        """Write one rank's share of a checkpoint; only rank 0 commits it and returns its manifest.

        `tensors` is the whole state; of other ranks' tensors only names, shapes and dtypes are used. Every
        rank calls this, with equal facts. Rank 0 waits for the other shares: for each next one at most
        `patience_seconds` plus the time its own share took.

        Raises as `save`; on rank 0 also StoreError if a share is not written in time, and CheckpointError if
        the shares together are not the state. Then no checkpoint appears.
        """
        draft = self._draft(facts)
        folder = self._store.child(draft.name)
        began = time.monotonic()
        most_parts = max(MOST_PARTS // share.world_size, 1)  # so that one manifest can hold all CRC32s
        # Every rank writes its share; all but rank 0 then leave a record of it.
        stored = upload_tensors(folder, _data_key(share.rank), share.of(tensors), most_parts)
        if share.rank > 0:
            put_once(folder, share.key, share.encode(draft.name, stored))
            return None
        # Rank 0 collects the records, checks that the shares are the whole state, and commits.
        others = gathered(folder, draft.name, share, patience_seconds + time.monotonic() - began)
        objects = (stored, *others)
        fitting_headers(folder, objects, tensors)
        try:
            folder.delete(share.others())
        except StoreError as error:  # harmless leftovers, deleted with the checkpoint
            _logger.warning("%s: records of shares are left: %s", folder.uri, error)
        return self._commit(replace(draft, objects=objects))

    def find(self, name: str) -> FoundCheckpoint | None:
        """Return the checkpoint of this name, whatever its state; None if nothing is there."""
        return judged(self._store, name, self._objects(name)) if step_and_attempt(name) else None

    def list(self, limit: int | None = None, *, step: int | None = None) -> Sequence[FoundCheckpoint]:
        """Return the checkpoints, newest first, each committed, partial (no manifest) or corrupt.

        With `limit`, return at most that many: each costs a request or two, so thousands take seconds. With
        `step`, return only those of that step and read no other manifest.
        """
        if step is not None:
            folders = self._folders(f"step-{step:08d}-a")[:limit]
        elif limit is None:
            folders = self._folders()
        else:
            filled = ((name, objects) for name in self._names() if (objects := self._objects(name)))
            folders = list(islice(filled, limit))
        found = in_parallel(lambda _, folder: judged(self._store, *folder), folders)
        return [item for item in found if item is not None]

    def latest(self, *, deep: bool = False) -> Manifest | None:
        """Return the newest whole checkpoint, by step and then by attempt; None if there is none.

        `judged` decides what is whole; with `deep` it reads every object. Skipped checkpoints are logged.

        Raises:
            CheckpointError: there are checkpoints but none is whole. Returning None would restart the run
                over them.
        """
        damaged: list[FoundCheckpoint] = []
        for name in self._sure_names():
            found = judged(self._store, name, self._objects(name), deep=deep)
            if found is None:
                continue
            if found.manifest is not None and found.status == "committed":
                if found.manifest.version != VERSION:
                    _logger.info("%s/%s has a manifest of version 1, without a hash", self._store.uri, name)
                # Nothing whole: distinguish damaged checkpoints from none at all.
                if damaged:
                    _logger.warning("%s/%s is the newest that can be read", self._store.uri, name)
                return found.manifest
            _logger.warning("%s/%s is passed over: %s", self._store.uri, name, found.reason)
            if found.status == "corrupt":
                damaged.append(found)
        if damaged:
            reasons = "; ".join(f"{found.name}: {found.reason}" for found in damaged[:_SHOWN])
            more = f"; and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
            raise CheckpointError(
                f"{self._store.uri}: there are checkpoints, and none that can be read ({reasons}{more}); "
                f"jebm checkpoints verify {self._root.uri}/{self._run} --deep says what is damaged"
            )
        return None

    def best(self, metric: str, mode: Literal["min", "max"] = "min") -> Manifest | None:
        """Return the whole checkpoint with the best value of a metric, the newest on ties, or None."""
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
        """Read a checkpoint's tensors into `into`, which must match in name, shape and dtype.

        Raises CheckpointError if they do not match (before anything is written), or if the data is damaged or
        holds NaN or infinity (the tensors are then partly or fully overwritten).
        """
        folder = self._store.child(manifest.name)
        restore_tensors(folder, manifest.objects, into)
        if names := not_finite(into):
            raise CheckpointError(f"{folder.uri}: {not_finite_line(names)}")

    def prune(
        self, keep_last: int, keep_every: int | None, protect: Collection[str], *, dry_run: bool = False
    ) -> Sequence[str]:
        """Delete old checkpoints and return their names; with `dry_run` only return them.

        Keeps the newest `keep_last` whole checkpoints, all with a step divisible by `keep_every`, those in
        `protect` or pinned, and folders without a manifest, which may still be uploading. Raises ValueError
        if `keep_last` is below 1.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, must be 1 or more")
        pruned = []
        whole = 0
        for name in self._names():
            if whole < keep_last:  # older manifests need not be read
                found = judged(self._store, name, self._objects(name))
                whole += found is not None and found.status == "committed"
                continue
            step = _position(name)[0]
            if name in protect or (keep_every and step % keep_every == 0):
                continue
            objects = self._objects(name)
            if MANIFEST not in objects or _PIN in objects or self._store.head(f"{name}/{_PIN}") is not None:
                continue  # the listing alone does not prove it is unpinned
            pruned.append(name)
            if dry_run:
                continue
            # The manifest first: without it the rest no longer counts as a checkpoint.
            self._store.delete([f"{name}/{MANIFEST}"])
            self._store.delete([f"{name}/{key}" for key in objects if key != MANIFEST])
        return pruned

    def pin(self, name: str) -> None:
        """Protect a checkpoint from every `prune`; raises CheckpointError if there is none of this name.

        The data is not read, so a damaged checkpoint can be pinned for inspection.
        """
        manifest, pin = f"{name}/{MANIFEST}", f"{name}/{_PIN}"
        missing = CheckpointError(f"{self._store.uri}/{name}: no such checkpoint")
        if not step_and_attempt(name) or self._store.head(manifest) is None:
            raise missing
        self._store.put(pin, b"")
        if self._store.head(manifest) is None:  # just pruned; a pin without a checkpoint would be litter
            self._store.delete([pin])
            raise missing

    def unpin(self, name: str) -> None:
        """Remove the pin, if there is one."""
        if step_and_attempt(name):
            self._store.delete([f"{name}/{_PIN}"])

    def pinned(self, names: Sequence[str] | None = None) -> frozenset[str]:
        """Return the names of all pinned checkpoints, or of those in `names`, at one request each."""
        if names is not None:
            pins = in_parallel(lambda _, name: self._store.head(f"{name}/{_PIN}"), names)
            return frozenset(name for name, pin in zip(names, pins, strict=True) if pin is not None)
        return frozenset(name for name, objects in self._folders() if _PIN in objects and MANIFEST in objects)

    def next_attempt(self) -> int:
        """Return a number above every attempt that left anything here, at least 1.

        Raises CheckpointError if a folder has the highest possible number: every save would be refused.
        """
        names = sorted(self._sure_names(), key=lambda name: _position(name)[1], reverse=True)
        for name in names:
            attempt = _position(name)[1]
            if attempt < MOST_ATTEMPTS:
                return attempt + 1
            if self._objects(name):
                raise CheckpointError(
                    f"{self._store.uri}/{name}: leaves no number for another attempt, and is none of a run's "
                    "own; delete this folder, or choose another run.name"
                )
        return 1

    def orphans(self, older_than_seconds: float) -> Sequence[str]:
        """Return the names of folders without a manifest in which nothing was written for this long.

        Killed writers leave them behind. Choose an age well above the longest save with all its retries: an
        hour or more.
        """
        border = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        return [name for name, objects in self._folders() if _is_orphan(objects, border)]

    def delete_orphans(self, older_than_seconds: float) -> Sequence[str]:
        """Delete what `orphans` names and unfinished uploads of that age; return the folders' names."""
        border = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        deleted = []
        for name in self.orphans(older_than_seconds):
            objects = self._objects(name)
            if _is_orphan(objects, border):  # still an orphan
                self._store.delete([f"{name}/{key}" for key in objects])
                deleted.append(name)
        try:
            unfinished = self._store.discard_unfinished(older_than_seconds)
        except AccessDeniedError as error:  # a separate permission that a trainer's key may lack
            _logger.warning("unfinished uploads are left to the bucket's lifecycle rule: %s", error)
        else:
            _logger.info("%s: %d unfinished uploads were discarded", self._store.uri, len(unfinished))
        return deleted

    def _draft(self, facts: Facts) -> Manifest:
        """Return the manifest as it would be read back, without its objects; raises CheckpointError."""
        draft = Manifest(
            **{field.name: getattr(facts, field.name) for field in fields(Facts)},
            run=self._run,
            created=datetime.now(UTC),
            objects=(StoredObject("data/r00000-00000000.safetensors", 1, "", 1, (0,)),),
        )
        return Manifest.decode(draft.encode())

    def _commit(self, manifest: Manifest) -> Manifest:
        """Write the manifest and return it; delete the data if another writer owns the run."""
        folder = self._store.child(manifest.name)
        try:
            if later := self._later(manifest.attempt):
                raise FencedError(
                    f"{folder.uri}: attempt {_position(later)[1]} of this run has begun since; "
                    f"stop one of the two jobs (the other has written {later})"
                )
            put_once(folder, MANIFEST, manifest.encode())
        except FencedError:
            folder.delete(stored.key for stored in manifest.objects)
            raise
        return manifest

    def _later(self, attempt: int) -> str | None:
        """Return a non-empty folder of a later attempt, or None.

        A name alone proves nothing: a bit may be flipped, and some servers still list deleted folders.
        """
        names = (name for name in self._names() if _position(name)[1] > attempt)
        return next((name for name in names if self._objects(name)), None)

    def _names(self) -> Sequence[str]:
        """Return the names of all folders, newest first; some may be empty because just deleted."""
        names = {name for name in self._store.folders() if step_and_attempt(name)}
        return sorted(names, key=_position, reverse=True)

    def _sure_names(self) -> Sequence[str]:
        """Return the union of two listings, so that a flipped bit in one hides no name."""
        return sorted({*self._names(), *self._names()}, key=_position, reverse=True)

    def _objects(self, name: str) -> dict[str, ObjectInfo]:
        """Return the objects in a checkpoint's folder, by key within it."""
        return objects_of(self._store, name)

    def _folders(self, prefix: str = "") -> Sequence[tuple[str, dict[str, ObjectInfo]]]:
        """Return names and objects (by key within the folder), newest first, from one listing."""
        folders: dict[str, dict[str, ObjectInfo]] = {}
        for info in self._store.list(prefix):
            name, _, key = info.key.partition("/")
            if key and step_and_attempt(name):
                folders.setdefault(name, {})[key] = info
        return [(name, folders[name]) for name in sorted(folders, key=_position, reverse=True)]


def _position(name: str) -> tuple[int, int]:
    """Return step and attempt of a checkpoint's name."""
    return cast(tuple[int, int], step_and_attempt(name))


def _is_orphan(objects: Mapping[str, ObjectInfo], border: datetime) -> bool:
    return MANIFEST not in objects and all(info.modified < border for info in objects.values())


def _data_key(rank: int) -> str:
    """Return a fresh key for a rank's data."""
    return f"data/r{rank:05d}-{uuid.uuid4().hex[:8]}.safetensors"
