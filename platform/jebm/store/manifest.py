"""A checkpoint's manifest: JSON that is read as strictly as it is written."""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from jebm.config.names import CHECKPOINT_NAME
from jebm.errors import CheckpointError
from jebm.store.layout import StoredObject
from jebm.store.sealed import sealed, unsealed
from jebm.untrusted import JsonObject, encoded_json, parsed_object, typed, whole_number

__all__ = [
    "MANIFEST_BYTES",
    "MOST_ATTEMPTS",
    "RUN_NAME",
    "VERSION",
    "Facts",
    "Manifest",
    "checkpoint_name",
    "decoded_object",
    "plain_json",
    "step_and_attempt",
]

MANIFEST_BYTES = 1 << 20
"""Limit on a manifest, in bytes; longer ones are not read."""

MOST_ATTEMPTS = 10**9 - 1
"""The highest attempt number."""

VERSION = 2
"""The version written: with a hash over the whole manifest. Version 1, without one, is still read."""

RUN_NAME = re.compile(r"\w[\w.=+-]*(/\w[\w.=+-]*)*", re.ASCII)

_FORMAT = "jebm-checkpoint"
_MOST_STEPS = 10**15 - 1
_OBJECT_BYTES = 50 << 40  # S3's limit for an object
_PART_BYTES = 5 << 30  # S3's limit for a part
_DATA_KEY = re.compile(r"data/r\d{5}-[0-9a-f]{8}\.safetensors", re.ASCII)


def checkpoint_name(step: int, attempt: int) -> str:
    """Return the name of a checkpoint's folder: step-<step>-a<attempt>."""
    return f"step-{step:08d}-a{attempt:04d}"


def step_and_attempt(name: str) -> tuple[int, int] | None:
    """Return the step and attempt in a checkpoint's name; None for any other name or spelling."""
    match = CHECKPOINT_NAME.fullmatch(name)
    if match is None:
        return None
    found = int(match[1]), int(match[2])
    return found if checkpoint_name(*found) == name else None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a writer records about a checkpoint besides its tensors.

    `state` and `config` must be plain JSON; `parent` is the name of the checkpoint that this run resumed
    from. `metrics` may be nan if a value was not finite.
    """

    step: int
    attempt: int
    world_size: int
    config: JsonObject
    provenance: dict[str, str]
    metrics: dict[str, float]
    state: JsonObject
    parent: str | None

    @property
    def name(self) -> str:
        """The checkpoint's folder."""
        return checkpoint_name(self.step, self.attempt)


@dataclass(frozen=True, kw_only=True)
class Manifest(Facts):
    """A checkpoint's manifest: the facts, when it was made, and which objects belong to it.

    `version` is that of the text it was read from; the newest is always written.
    """

    run: str
    created: datetime
    objects: tuple[StoredObject, ...]
    version: int = VERSION

    @property
    def config_sha256(self) -> str:
        """The hash of the config, in hexadecimal; key order does not matter."""
        return hashlib.sha256(encoded_json(self.config)).hexdigest()

    def encode(self) -> bytes:
        """Return the JSON to store; raises CheckpointError if it cannot hold a value."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content |= {
            "format": _FORMAT,
            "version": VERSION,
            "created": self.created.isoformat(),
            "config_sha256": self.config_sha256,
            "metrics": {
                name: value if math.isfinite(value) else None for name, value in self.metrics.items()
            },
            "objects": [asdict(stored) for stored in self.objects],
        }
        encoded = sealed(plain_json(content, "the manifest"))
        if len(encoded) > MANIFEST_BYTES:
            raise CheckpointError(f"{self.name}: a manifest of {len(encoded)} bytes, above {MANIFEST_BYTES}")
        return encoded

    @staticmethod
    def decode(encoded: bytes) -> "Manifest":
        """Return the manifest; raises CheckpointError for anything but what `encode` writes."""
        try:
            return _decoded(encoded)
        except (ValueError, OverflowError) as error:  # includes bad UTF-8 and bad JSON
            raise CheckpointError(f"the manifest cannot be read: {error}") from error


def plain_json(value: object, where: str) -> Any:  # noqa: ANN401  # JSON has no narrower type
    """Return a deep copy with tuples as lists, equal to what JSON gives back.

    Raises CheckpointError, its message beginning with `where`, for values that would not survive a round
    trip: other objects, non-string keys, non-finite numbers.
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


def decoded_object(content: object, version: int = VERSION) -> StoredObject:
    """Return the object that a manifest entry describes; raises ValueError if the entry is malformed."""
    names = {field.name for field in fields(StoredObject)} - ({"header_crc32"} if version == 1 else set())
    if not isinstance(content, dict) or content.keys() != names:
        raise ValueError("an object has missing or unknown fields")
    key, etag, crc32 = content["key"], content["etag"], content["crc32"]
    header_crc32 = content.get("header_crc32")
    if not isinstance(key, str) or not _DATA_KEY.fullmatch(key):
        raise ValueError(f"{str(key)[:80]!r} is no data key")
    if not isinstance(etag, str) or len(etag) > 256:
        raise ValueError(f"{key}: etag is no etag")
    size = whole_number(content, "size", 1, _OBJECT_BYTES)
    part_size = whole_number(content, "part_size", 1, _PART_BYTES)
    if not isinstance(crc32, list) or len(crc32) != -(-size // part_size):
        raise ValueError(f"{key}: crc32 has not one number for each part")
    if not all(map(_is_crc32, crc32)) or not (header_crc32 is None or _is_crc32(header_crc32)):
        raise ValueError(f"{key}: crc32 holds something else than CRC32s")
    return StoredObject(key, size, etag, part_size, tuple(crc32), header_crc32)


def _is_crc32(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


def _decoded(encoded: bytes) -> Manifest:
    """Return the manifest; raises ValueError or CheckpointError naming the field."""
    content = parsed_object(encoded, MANIFEST_BYTES)
    version = content.get("version")
    # Format, version and hash come first: they decide which fields to expect.
    if content.get("format") != _FORMAT:
        raise ValueError(f"its format is not {_FORMAT}")
    if version not in (1, VERSION) or type(version) is not int:
        raise ValueError(f"version {str(version)[:20]!r}; this program reads versions 1 and {VERSION}")
    if version == VERSION:
        content = unsealed(encoded, MANIFEST_BYTES)
    names = {field.name for field in fields(Manifest)} | {"format", "config_sha256"}
    if content.keys() != names:
        raise ValueError(f"missing or unknown fields: {sorted(content.keys() ^ names)[:5]}")
    # Then each field separately, and those that depend on one another.
    run, parent, objects = content["run"], content["parent"], content["objects"]
    if not isinstance(run, str) or not RUN_NAME.fullmatch(run):
        raise ValueError("run is no run's name")
    if parent is not None and not (isinstance(parent, str) and step_and_attempt(parent)):
        raise ValueError("parent is no checkpoint's name")
    if not isinstance(objects, list) or not objects:
        raise ValueError("objects is no list of objects")
    stored = tuple(decoded_object(item, version) for item in objects)
    if len({item.key for item in stored}) != len(stored):
        raise ValueError("objects names one object twice")
    manifest = Manifest(
        run=run,
        attempt=whole_number(content, "attempt", 0, MOST_ATTEMPTS),
        step=whole_number(content, "step", 0, _MOST_STEPS),
        world_size=whole_number(content, "world_size", 1, 10**6),
        created=_moment(content),
        config=plain_json(typed(content, "config", dict), "config"),
        provenance=_texts(content),
        metrics=_numbers(content),
        state=plain_json(typed(content, "state", dict), "state"),
        parent=parent,
        objects=stored,
        version=version,
    )
    if content["config_sha256"] != manifest.config_sha256:
        raise ValueError("config_sha256 is not the hash of config")
    return manifest


def _moment(content: JsonObject) -> datetime:
    created = datetime.fromisoformat(typed(content, "created", str))
    if created.utcoffset() != timedelta(0):
        raise ValueError("created is not in UTC")
    return created


def _texts(content: JsonObject) -> dict[str, str]:
    provenance = typed(content, "provenance", dict)
    if not all(isinstance(value, str) for value in provenance.values()):
        raise ValueError("provenance holds something else than strings")
    return provenance


def _numbers(content: JsonObject) -> dict[str, float]:
    metrics = typed(content, "metrics", dict)
    if not all(value is None or type(value) in (int, float) for value in metrics.values()):
        raise ValueError("metrics holds something else than numbers")
    return {name: math.nan if value is None else float(value) for name, value in metrics.items()}
