"""Decide whether a checkpoint's folder holds a whole checkpoint.

A checkpoint that looks damaged is listed and checked again: a bit flipped in a listing must not hide it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jebm.errors import CheckpointError
from jebm.store.manifest import MANIFEST_BYTES, VERSION, Manifest, step_and_attempt
from jebm.store.parts import damages
from jebm.store.protocol import ObjectChangedError, ObjectInfo, ObjectMissingError, Store
from jebm.store.sealed import READS

__all__ = ["MANIFEST", "FoundCheckpoint", "judged", "objects_of", "read_manifest"]

MANIFEST = "MANIFEST.json"
"""The object that makes a folder a checkpoint."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundCheckpoint:
    """The content of one checkpoint's folder; `reason` says why it is not committed, `size` is in bytes."""

    name: str
    step: int
    attempt: int
    status: Literal["committed", "partial", "corrupt"]
    reason: str
    size: int
    manifest: Manifest | None


def objects_of(checkpoints: Store, name: str) -> dict[str, ObjectInfo]:
    """Return the objects in a checkpoint's folder, by key within it."""
    return {info.key.removeprefix(f"{name}/"): info for info in checkpoints.list(f"{name}/")}


def judged(
    checkpoints: Store, name: str, objects: Mapping[str, ObjectInfo], *, deep: bool = False
) -> FoundCheckpoint | None:
    """Return the state of a checkpoint, or None if nothing is there.

    Whole means: the manifest is readable and belongs to this folder, and all objects have the size and etag
    that it states. If an etag differs, as in a copy, or with `deep`, all objects are read and `damages` must
    find nothing. Raises StoreError if the store cannot be reached.
    """
    found = _look(checkpoints, name, objects, deep)
    if found is not None and found.status == "committed":
        return found
    return _look(checkpoints, name, objects_of(checkpoints, name), deep)


def read_manifest(checkpoints: Store, name: str, size: int | None = None) -> tuple[bytes, Manifest]:
    """Return a checkpoint's manifest as text, of `size` bytes by the listing, and decoded.

    It is read again if it does not match its own hash. Version 1 has no hash: it is accepted once two reads
    agree. Raises CheckpointError if it cannot be read, StoreError if the store cannot be reached.
    """
    key, seen = f"{name}/{MANIFEST}", b""
    # Check the size before reading anything.
    if size is None:
        info = checkpoints.head(key)
        size = 0 if info is None else info.size  # the read reports that it is gone
    if size > MANIFEST_BYTES:
        raise CheckpointError(f"its manifest has {size} bytes, above {MANIFEST_BYTES}")
    problem = CheckpointError("its manifest was another one at each reading")
    # A bit may flip in transit, so read again until the text is proven.
    for _ in range(READS):
        encoded = bytearray(size)  # read no more, even if the object has grown
        checkpoints.read_into(key, 0, [memoryview(encoded)])
        try:
            manifest = Manifest.decode(bytes(encoded))
        except CheckpointError as error:
            problem = error
            continue
        if manifest.version == VERSION or encoded == seen:
            if manifest.name != name:
                raise CheckpointError(f"its manifest is that of {manifest.name}")
            return bytes(encoded), manifest
        seen = bytes(encoded)
    raise problem


def _look(
    checkpoints: Store, name: str, objects: Mapping[str, ObjectInfo], deep: bool
) -> FoundCheckpoint | None:
    if not objects:
        return None
    position = step_and_attempt(name)
    if position is None:
        raise CheckpointError(f"{name!r} is no checkpoint's name")
    manifest: Manifest | None = None
    status: Literal["committed", "partial", "corrupt"] = "committed"
    reason = ""
    if MANIFEST not in objects:
        status, reason = "partial", "it has no manifest: the save never ended, or is under way"
    else:
        try:
            manifest = read_manifest(checkpoints, name, objects[MANIFEST].size)[1]
            _check(checkpoints.child(name), manifest, objects, deep)
        except (CheckpointError, ObjectChangedError, ObjectMissingError) as error:
            status, reason = "corrupt", str(error)
    total = sum(info.size for info in objects.values())
    return FoundCheckpoint(name, *position, status, reason, total, manifest)


def _check(folder: Store, manifest: Manifest, objects: Mapping[str, ObjectInfo], deep: bool) -> None:
    """Raise CheckpointError if the objects do not match the manifest."""
    for stored in manifest.objects:
        found = objects.get(stored.key)
        if found is None:
            raise CheckpointError(f"{stored.key} is missing")
        if found.size != stored.size:
            raise CheckpointError(f"{stored.key} has {found.size} bytes instead of {stored.size}")
        if found.etag != stored.etag and not deep:
            _logger.info("%s: %s has another etag; reading it", folder.uri, stored.key)
            deep = True
    if deep and (problems := damages(folder, manifest.objects)):
        more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CheckpointError(f"{problems[0]}{more}")
