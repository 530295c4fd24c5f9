"""Checkpoints of a run: objects under a prefix, and the manifest that makes them one, written last.

    <run>/checkpoints/step-00001200-a0001/data/r00000-<uuid8>.safetensors
    <run>/checkpoints/step-00001200-a0001/MANIFEST.json

There is no pointer to the latest one, so none can lie: it is found by listing. Nothing is pickled, nothing
is renamed, no data key is used twice, and of two writers of one checkpoint the second is refused. Of two
attempts at one run the older is refused. See docs/checkpoint-protocol.md.
"""

import hashlib
import json
import logging
import math
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor

from jebm.errors import CheckpointError
from jebm.store.storage import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    Store,
    in_parallel,
)
from jebm.store.stream import StoredObject, restore_tensors, upload_tensors, verify_object

__all__ = [
    "Checkpoints",
    "FencedError",
    "FoundCheckpoint",
    "JsonObject",
    "Manifest",
    "plain_json",
]

JsonObject: TypeAlias = dict[str, Any]
"""What JSON can say: dicts with string keys, lists, strings, finite numbers, booleans, None."""

_FORMAT = "jebm-checkpoint"
_VERSION = 1
_MANIFEST = "MANIFEST.json"
_PIN = "PINNED"  # an object beside the manifest, so that every listing shows it
_MANIFEST_BYTES = 1 << 20
_OBJECT_BYTES = 50 << 40  # the largest object of S3
_PART_BYTES = 5 << 30  # its largest part
_FOLDER = re.compile(r"step-(\d{8,15})-a(\d{4,9})")
_DATA_KEY = re.compile(r"data/r\d{5}-[0-9a-f]{8}\.safetensors")
_RUN = re.compile(r"\w[\w.=+-]*(/\w[\w.=+-]*)*", re.ASCII)

_logger = logging.getLogger(__name__)
_Kind = TypeVar("_Kind")


class FencedError(CheckpointError):
    """Another writer has committed this checkpoint: this one must stop, the run is no longer its own."""


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint says of itself. `metrics` may be nan where a value was not finite."""

    run: str
    attempt: int
    step: int
    world_size: int
    created: datetime
    config: JsonObject
    provenance: dict[str, str]
    metrics: dict[str, float]
    state: JsonObject
    parent: str | None
    objects: tuple[StoredObject, ...]

    @property
    def name(self) -> str:
        """The checkpoint's folder: step-<step>-a<attempt>."""
        return f"step-{self.step:08d}-a{self.attempt:04d}"

    @property
    def config_sha256(self) -> str:
        """The hash of the config, in hexadecimal: equal for equal configs, whatever their order."""
        return hashlib.sha256(_encoded(self.config)).hexdigest()

    def encode(self) -> bytes:
        """Return the JSON to store; raises CheckpointError where a value has no place in it."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content |= {
            "format": _FORMAT,
            "version": _VERSION,
            "created": self.created.isoformat(),
            "config_sha256": self.config_sha256,
            "metrics": {
                name: value if math.isfinite(value) else None for name, value in self.metrics.items()
            },
            "objects": [asdict(stored) for stored in self.objects],
        }
        encoded = _encoded(plain_json(content, "the manifest"))
        if len(encoded) > _MANIFEST_BYTES:
            raise CheckpointError(f"{self.name}: a manifest of {len(encoded)} bytes, above {_MANIFEST_BYTES}")
        return encoded

    @staticmethod
    def decode(encoded: bytes) -> "Manifest":
        """Return the manifest; raises CheckpointError for anything but what `encode` writes."""
        try:
            return _decoded(encoded)
        except (ValueError, RecursionError, OverflowError) as error:  # bad UTF-8 and bad JSON among them
            raise CheckpointError(f"the manifest cannot be read: {error}") from error


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
        if not _RUN.fullmatch(run):
            raise CheckpointError(f"run {run!r}: use letters, digits and . _ - = + (and / between names)")
        self._root, self._run = store, run
        self._store = store.child(f"{run}/checkpoints")

    def patient(self, seconds: float) -> "Checkpoints":
        """Return the same with another patience of its store: how long what fails is tried again."""
        return Checkpoints(self._root.patient(seconds), self._run)

    def save(
        self,
        tensors: Mapping[str, Tensor],
        *,
        step: int,
        attempt: int,
        state: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float],
        provenance: Mapping[str, str],
        world_size: int,
        parent: str | None,
    ) -> Manifest:
        """Write a checkpoint and return its manifest, once it is committed.

        `state` and `config` must be plain JSON; `parent` is the name of the checkpoint that this run went
        on from. Raises FencedError where another writer was first or a later attempt has begun, StoreError
        where the store refuses; then no checkpoint appears. (After a lost connection at the very end it may:
        with this content.)
        """
        draft = Manifest(
            run=self._run,
            attempt=attempt,
            step=step,
            world_size=world_size,
            created=datetime.now(UTC),
            config=dict(config),
            provenance=dict(provenance),
            metrics=dict(metrics),
            state=dict(state),
            parent=parent,
            objects=(StoredObject("data/r00000-00000000.safetensors", 1, "", 1, (0,)),),
        )
        Manifest.decode(draft.encode())  # what could not be read again fails before its tensors travel
        folder = self._store.child(draft.name)
        stored = upload_tensors(folder, f"data/r00000-{uuid.uuid4().hex[:8]}.safetensors", tensors)
        encoded = replace(draft, objects=(stored,)).encode()
        newest = max(_step_and_attempt(name)[1] for name in [draft.name, *self._names()])
        if newest > attempt:
            folder.delete([stored.key])
            raise FencedError(
                f"{folder.uri}: attempt {newest} of this run has begun since; stop one of the two jobs"
            )
        try:
            folder.put(_MANIFEST, encoded, if_absent=True)
        except ObjectExistsError as error:
            # Ours after all, where the answer to a first attempt was lost; else another writer's.
            info = folder.head(_MANIFEST)
            if info is None or info.size != len(encoded) or folder.get(_MANIFEST) != encoded:
                folder.delete([stored.key])
                raise FencedError(
                    f"{folder.uri}: another writer has committed this checkpoint; stop one of the two jobs"
                ) from error
        return Manifest.decode(encoded)

    def list(self, limit: int | None = None) -> Sequence[FoundCheckpoint]:
        """Return the checkpoints, newest first, each committed, partial (no manifest) or corrupt.

        With `limit` only so many: every one costs a request or two, so that thousands take seconds.
        """
        if limit is None:
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
        (stored,) = manifest.objects
        restore_tensors(self._store.child(manifest.name), stored, into)

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
        if not _FOLDER.fullmatch(name) or self._store.head(manifest) is None:
            raise missing
        self._store.put(pin, b"")
        if self._store.head(manifest) is None:  # pruned just now; a pin alone would be litter
            self._store.delete([pin])
            raise missing

    def unpin(self, name: str) -> None:
        """Take the pin away; one that is not there is fine."""
        if _FOLDER.fullmatch(name):
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

    def _names(self) -> Sequence[str]:
        """Return the names of all folders, newest first. Some may be empty: deleted a moment ago."""
        names = (name for name in self._store.folders() if _FOLDER.fullmatch(name))
        return sorted(names, key=_step_and_attempt, reverse=True)

    def _objects(self, name: str) -> dict[str, ObjectInfo]:
        """Return what lies under a checkpoint's folder, by key within it."""
        return {info.key.removeprefix(f"{name}/"): info for info in self._store.list(f"{name}/")}

    def _folders(self) -> Sequence[tuple[str, dict[str, ObjectInfo]]]:
        """Return names and objects (by key within the folder), newest first, from one listing."""
        folders: dict[str, dict[str, ObjectInfo]] = {}
        for info in self._store.list():
            name, _, key = info.key.partition("/")
            if key and _FOLDER.fullmatch(name):
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
            if size > _MANIFEST_BYTES:
                raise CheckpointError(f"its manifest has {size} bytes, above {_MANIFEST_BYTES}")
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


def plain_json(value: object, where: str) -> Any:  # noqa: ANN401  # JSON has no narrower type
    """Return a deep copy that holds lists for tuples and is equal to what JSON gives back.

    Raises CheckpointError, beginning with `where`, for what would not come back as it was: other objects,
    keys that are no strings, numbers that are not finite.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple):
        return [plain_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{where}: the key {key!r} is no string, and JSON would make it one")
        return {key: plain_json(item, f"{where}.{key}") for key, item in value.items()}
    raise CheckpointError(f"{where}: {type(value).__name__} {str(value)[:80]!r} has no place in JSON")


def _encoded(value: object) -> bytes:
    """Return the one JSON text of a value: equal values give equal bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def _step_and_attempt(name: str) -> tuple[int, int]:
    match = _FOLDER.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name!r} is no checkpoint's name")
    return int(match[1]), int(match[2])


def _is_orphan(name: str, objects: Mapping[str, ObjectInfo], border: datetime, attempt: int | None) -> bool:
    return (
        _MANIFEST not in objects
        and _step_and_attempt(name)[1] != attempt
        and all(info.modified < border for info in objects.values())
    )


def _no_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it names something twice")
    return found


def _decoded(encoded: bytes) -> Manifest:
    """Return the manifest; raises ValueError or CheckpointError in a line that names the field."""
    if len(encoded) > _MANIFEST_BYTES:
        raise ValueError(f"more than {_MANIFEST_BYTES} bytes")
    content = json.loads(encoded.decode("utf-8"), object_pairs_hook=_no_duplicates)
    _encoded(content)  # what UTF-8 cannot say (escaped half characters) would fail in whoever prints it
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"its format is not {_FORMAT}")
    if content.get("version") != _VERSION:
        raise ValueError(f"version {content.get('version')!r}; this program reads version {_VERSION}")
    names = {field.name for field in fields(Manifest)} | {"format", "version", "config_sha256"}
    if content.keys() != names:
        raise ValueError(f"missing or unknown fields: {sorted(content.keys() ^ names)[:5]}")
    run, parent, objects = content["run"], content["parent"], content["objects"]
    if not isinstance(run, str) or not _RUN.fullmatch(run):
        raise ValueError("run is no run's name")
    if parent is not None and not (isinstance(parent, str) and _FOLDER.fullmatch(parent)):
        raise ValueError("parent is no checkpoint's name")
    if not isinstance(objects, list) or len(objects) != 1:
        raise ValueError("objects is no list of one object")
    created = datetime.fromisoformat(_typed(content, "created", str))
    if created.utcoffset() != timedelta(0):
        raise ValueError("created is not in UTC")
    provenance = _typed(content, "provenance", dict)
    if not all(isinstance(value, str) for value in provenance.values()):
        raise ValueError("provenance holds something else than strings")
    metrics = _typed(content, "metrics", dict)
    if not all(value is None or type(value) in (int, float) for value in metrics.values()):
        raise ValueError("metrics holds something else than numbers")
    manifest = Manifest(
        run=run,
        attempt=_count(content, "attempt", 0, 10**9 - 1),
        step=_count(content, "step", 0, 10**15 - 1),
        world_size=_count(content, "world_size", 1, 10**6),
        created=created,
        config=plain_json(_typed(content, "config", dict), "config"),
        provenance=provenance,
        metrics={name: math.nan if value is None else float(value) for name, value in metrics.items()},
        state=plain_json(_typed(content, "state", dict), "state"),
        parent=parent,
        objects=tuple(_decoded_object(item) for item in objects),
    )
    if content["config_sha256"] != manifest.config_sha256:
        raise ValueError("config_sha256 is not the hash of config")
    return manifest


def _decoded_object(content: object) -> StoredObject:
    if not isinstance(content, dict) or content.keys() != {field.name for field in fields(StoredObject)}:
        raise ValueError("an object has missing or unknown fields")
    key, etag, crc32 = content["key"], content["etag"], content["crc32"]
    if not isinstance(key, str) or not _DATA_KEY.fullmatch(key):
        raise ValueError(f"{str(key)[:80]!r} is no data key")
    if not isinstance(etag, str) or len(etag) > 256:
        raise ValueError(f"{key}: etag is no etag")
    size = _count(content, "size", 1, _OBJECT_BYTES)
    part_size = _count(content, "part_size", 1, _PART_BYTES)
    if not isinstance(crc32, list) or len(crc32) != -(-size // part_size):
        raise ValueError(f"{key}: crc32 has not one number for each part")
    if not all(type(value) is int and 0 <= value < 1 << 32 for value in crc32):
        raise ValueError(f"{key}: crc32 holds something else than CRC32s")
    return StoredObject(key, size, etag, part_size, tuple(crc32))


def _typed(content: Mapping[str, object], name: str, kind: type[_Kind]) -> _Kind:
    value = content[name]
    if not isinstance(value, kind):
        raise ValueError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _count(content: Mapping[str, object], name: str, least: int, most: int) -> int:
    value = content[name]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is no number in {least}..{most}")
    return value
