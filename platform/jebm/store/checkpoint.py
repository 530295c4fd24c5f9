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
            put_once(folder, share.key, share.encode(draft.name, stored))
            return None
        others = gathered(folder, draft.name, share, patience_seconds + time.monotonic() - began)
        objects = (stored, *others)
        fitting_headers(folder, objects, tensors)
        try:
            folder.delete(share.others())
        except StoreError as error:  # they harm nobody, and go with the checkpoint
            _logger.warning("%s: records of shares are left: %s", folder.uri, error)
        return self._commit(replace(draft, objects=objects))

    def find(self, name: str) -> FoundCheckpoint | None:
        """Return the checkpoint of this name, in whatever state; None where nothing lies there."""
        return judged(self._store, name, self._objects(name)) if step_and_attempt(name) else None

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
        found = in_parallel(lambda _, folder: judged(self._store, *folder), folders)
        return [item for item in found if item is not None]

    def latest(self, *, deep: bool = False) -> Manifest | None:
        """Return the newest checkpoint that is whole, by step and then by attempt; None where there is none.

        Whole is what `judged` says; with `deep` every object is read. What is passed over is logged.

        Raises:
            CheckpointError: there are checkpoints, and none is whole: whoever took that for "none" would
                begin the run anew over them.
        """
        damaged: list[FoundCheckpoint] = []
        for name in self._sure_names():
            found = judged(self._store, name, self._objects(name), deep=deep)
            if found is None:
                continue
            if found.manifest is not None and found.status == "committed":
                if found.manifest.version != VERSION:
                    _logger.info("%s/%s has a manifest of version 1, without a hash", self._store.uri, name)
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
                "delete their folders to begin anew, or choose another run.name"
            )
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
        or holds NaN or infinity (the tensors are then written, or half written).
        """
        folder = self._store.child(manifest.name)
        restore_tensors(folder, manifest.objects, into)
        if names := not_finite(into):
            raise CheckpointError(f"{folder.uri}: {not_finite_line(names)}")

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
                found = judged(self._store, name, self._objects(name))
                whole += found is not None and found.status == "committed"
                continue
            step = _position(name)[0]
            if name in protect or (keep_every and step % keep_every == 0):
                continue
            objects = self._objects(name)
            if MANIFEST not in objects or _PIN in objects or self._store.head(f"{name}/{_PIN}") is not None:
                continue  # of its pin the listing's word is not enough
            pruned.append(name)
            if dry_run:
                continue
            # The manifest first: from then on nobody takes the rest for a checkpoint.
            self._store.delete([f"{name}/{MANIFEST}"])
            self._store.delete([f"{name}/{key}" for key in objects if key != MANIFEST])
        return pruned

    def pin(self, name: str) -> None:
        """Keep a checkpoint from every `prune`; raises CheckpointError where there is none of this name.

        The data is not read: one that is damaged can be pinned, to be looked at.
        """
        manifest, pin = f"{name}/{MANIFEST}", f"{name}/{_PIN}"
        missing = CheckpointError(f"{self._store.uri}/{name}: no such checkpoint")
        if not step_and_attempt(name) or self._store.head(manifest) is None:
            raise missing
        self._store.put(pin, b"")
        if self._store.head(manifest) is None:  # pruned just now; a pin alone would be litter
            self._store.delete([pin])
            raise missing

    def unpin(self, name: str) -> None:
        """Take the pin away; one that is not there is fine."""
        if step_and_attempt(name):
            self._store.delete([f"{name}/{_PIN}"])

    def pinned(self, names: Sequence[str] | None = None) -> frozenset[str]:
        """Return the names of all checkpoints that are pinned, or of those in `names`: a request each."""
        if names is not None:
            pins = in_parallel(lambda _, name: self._store.head(f"{name}/{_PIN}"), names)
            return frozenset(name for name, pin in zip(names, pins, strict=True) if pin is not None)
        return frozenset(name for name, objects in self._folders() if _PIN in objects and MANIFEST in objects)

    def next_attempt(self) -> int:
        """Return a number above that of every attempt that has left anything here, at least 1.

        Raises CheckpointError where a folder has the last number that there is: every save would be refused.
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
        """Return the names of folders that have no manifest and in which nothing was written for so long.

        They are what killed writers left. Choose an age well above what a save may take with all its
        retries: an hour or more.
        """
        border = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        return [name for name, objects in self._folders() if _is_orphan(objects, border)]

    def delete_orphans(self, older_than_seconds: float) -> Sequence[str]:
        """Delete what `orphans` names, and uploads as old that never ended; return the folders' names."""
        border = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        deleted = []
        for name in self.orphans(older_than_seconds):
            objects = self._objects(name)
            if _is_orphan(objects, border):  # it still is
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
        """Return a folder of a later attempt that has something in it; None where there is none.

        A name alone is no proof: a bit of it may be flipped, and some servers name what is deleted.
        """
        names = (name for name in self._names() if _position(name)[1] > attempt)
        return next((name for name in names if self._objects(name)), None)

    def _names(self) -> Sequence[str]:
        """Return the names of all folders, newest first. Some may be empty: deleted a moment ago."""
        names = {name for name in self._store.folders() if step_and_attempt(name)}
        return sorted(names, key=_position, reverse=True)

    def _sure_names(self) -> Sequence[str]:
        """Return the names of two listings: a flipped bit in one of them makes none disappear."""
        return sorted({*self._names(), *self._names()}, key=_position, reverse=True)

    def _objects(self, name: str) -> dict[str, ObjectInfo]:
        """Return what lies under a checkpoint's folder, by key within it."""
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
    """Return step and attempt of a name that is a checkpoint's."""
    return cast(tuple[int, int], step_and_attempt(name))


def _is_orphan(objects: Mapping[str, ObjectInfo], border: datetime) -> bool:
    return MANIFEST not in objects and all(info.modified < border for info in objects.values())


def _data_key(rank: int) -> str:
    """Return a key that was never used, for what a rank writes."""
    return f"data/r{rank:05d}-{uuid.uuid4().hex[:8]}.safetensors"
