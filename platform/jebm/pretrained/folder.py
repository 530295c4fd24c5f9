"""The folder of an exported model: its weights, and a description that carries their hash.

    model.safetensors   the tensors of all nets, without optimizers
    config.json         what builds the model, and where it comes from; sealed, and written last
    README.md           a model card, with pictures/ beside it

All of it may come from strangers: it is read strictly, compared with its hashes, and nothing is unpickled.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import jebm
from jebm.config import PLACES, Config, Run, config_to_dict
from jebm.errors import CheckpointError
from jebm.store.finite import not_finite, not_finite_line
from jebm.store.layout import HEADER_BYTES, cut, parsed_header
from jebm.store.protocol import in_parallel
from jebm.store.sealed import READS, sealed, unsealed
from jebm.store.storage import ObjectMissingError, Store
from jebm.store.stream import PART_BYTES, bytes_of, pieces_of
from jebm.untrusted import JsonObject, typed, whole_number

__all__ = [
    "CARD",
    "DESCRIPTION",
    "PICTURES",
    "WEIGHTS",
    "Description",
    "Place",
    "read_description",
    "read_weights",
    "shareable",
    "write_folder",
]

WEIGHTS = "model.safetensors"
DESCRIPTION = "config.json"
CARD = "README.md"
PICTURES = "pictures/"

_FORMAT, _VERSION = "jebm-model", 1
_DESCRIPTION_BYTES = 1 << 20
_WEIGHTS_BYTES = 1 << 45
_AGAIN = "get it again, or export the model again"


@dataclass(frozen=True)
class Place:
    """Where a folder lies: a store, and what its keys begin with."""

    store: Store
    prefix: str = ""

    def uri(self, name: str) -> str:
        """Return the URI of a file of the folder."""
        return f"{self.store.uri}/{self.prefix}{name}"


@dataclass(frozen=True)
class Description:
    """What config.json says of a model."""

    config: JsonObject
    """The run's config, nested plain values; places without their folders (`shareable`)."""
    origin: Mapping[str, str]
    """run, step, checkpoint, weights (averaged or last), data_sha256, config_sha256, workers, created."""
    provenance: Mapping[str, str]
    """Versions and source hashes that the run was trained with, also those of its own classes."""
    weights_bytes: int
    weights_sha256: str


def shareable(config: Config) -> JsonObject:
    """Return a config as nested plain values without the run's storage, other places cut to their last name.

    So are the strings with a slash among the arguments of classes.

    A published model tells nobody the names of buckets and folders.
    """
    values: JsonObject = config_to_dict(config)
    for section, name in (key.split(".") for key in PLACES):
        if (place := values[section][name]) is not None:
            values[section][name] = _last_name(place, name)
    values["run"]["storage"] = Run().storage
    shared: JsonObject = _without_folders(values, "")
    return shared


def _without_folders(value: Any, key: str) -> Any:  # noqa: ANN401  (plain values)
    """Return a section of a config, or a value of this dotted key, with places in init_args cut down."""
    if isinstance(value, dict):
        return {name: _without_folders(each, f"{key}.{name}") for name, each in value.items()}
    if ".init_args." not in key:
        return value
    if isinstance(value, list | tuple):
        return [_without_folders(each, key) for each in value]
    return _last_name(value, key.rpartition(".")[2]) if isinstance(value, str) and "/" in value else value


def _last_name(place: str, name: str) -> str:
    """Return the last name of a path or URI; `name` for a bucket alone."""
    path = place.rpartition("://")[2]
    parent, _, last = path.rstrip("/").rpartition("/")
    return last if parent or path == place else name


def write_folder(
    output: Store,
    tensors: Mapping[str, Tensor],
    config: Config,
    facts: tuple[Mapping[str, str], Mapping[str, str]],
    beside: Mapping[str, bytes],
) -> Description:
    """Write a model's folder, config.json last, and return its description.

    `facts` are origin and provenance; `beside` the card and its pictures by key. Raises StoreError if the
    output cannot be written.
    """
    pieces = pieces_of(tensors, {})
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    size = sum(piece.nbytes for piece in pieces)
    found = Description(shareable(config), *facts, size, digest.hexdigest())
    model = config.model
    # Shapes and pixels follow from the config: here for readers that are not jebm.
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "jebm": jebm.__version__,
        "weights": {"file": WEIGHTS, "bytes": size, "sha256": found.weights_sha256},
        "images": {
            "shape": [model.image_channels, model.image_size, model.image_size],
            "pixels": "level / 127.5 - 1, in [-1, 1]",
        },
        "latents": list(model.latent_dims),
        "config": found.config,
        "origin": dict(found.origin),
        "provenance": dict(found.provenance),
    }
    output.upload(WEIGHTS, cut(pieces, PART_BYTES))
    for key, data in beside.items():
        output.put(key, data)
    output.put(DESCRIPTION, sealed(content))
    return found


def read_description(place: Place) -> Description:
    """Return a folder's description; raises CheckpointError if it is missing or damaged."""
    key, reason = f"{place.prefix}{DESCRIPTION}", ""
    for _ in range(READS):
        try:
            info = place.store.head(key)
            if info is not None and info.size > _DESCRIPTION_BYTES:
                raise ValueError(f"more than {_DESCRIPTION_BYTES} bytes")
            return _described(unsealed(place.store.get(key), _DESCRIPTION_BYTES))
        except ObjectMissingError as error:
            raise CheckpointError(f"{place.uri(DESCRIPTION)}: is missing; {_AGAIN}") from error
        except ValueError as error:
            reason = str(error)
    raise CheckpointError(f"{place.uri(DESCRIPTION)}: is damaged ({reason}); {_AGAIN}")


def read_weights(place: Place, description: Description) -> dict[str, Tensor]:
    """Return the tensors by name, on the CPU, if the file is the one described.

    Raises CheckpointError if it is missing, has another size or hash, or holds anything but finite tensors.
    """
    where, key, size = place.uri(WEIGHTS), f"{place.prefix}{WEIGHTS}", description.weights_bytes
    info = place.store.head(key)
    if info is None:
        raise CheckpointError(f"{where}: is missing; {_AGAIN}")
    if info.size != size:
        raise CheckpointError(f"{where}: has {info.size} bytes instead of {size}; {_AGAIN}")
    content = torch.empty(size, dtype=torch.uint8)
    memory = bytes_of(content)

    def fill(_: int, begin: int) -> None:
        place.store.read_into(key, begin, [memory[begin : begin + PART_BYTES]], etag=info.etag)

    # A damaged answer is no damaged file: read again.
    for _ in range(READS):
        in_parallel(fill, range(0, size, PART_BYTES))
        if hashlib.sha256(memory).hexdigest() == description.weights_sha256:
            break
    else:
        raise CheckpointError(f"{where}: does not match the sha256 in {DESCRIPTION}; {_AGAIN}")
    try:
        tensors = _tensors(content, memory)
    except ValueError as error:
        raise CheckpointError(f"{where}: is no safetensors file ({error}); {_AGAIN}") from error
    if odd := not_finite(tensors):
        raise CheckpointError(f"{where}: {not_finite_line(odd)}")
    return tensors


def _tensors(content: Tensor, memory: memoryview) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file's bytes, copied; ValueError if anything is malformed."""
    size = len(memory)
    end = 8 + int.from_bytes(memory[:8], "little")
    if not 8 < end <= min(size, HEADER_BYTES):
        raise ValueError("its header is longer than the file, or than any header")
    entries = parsed_header(bytes(memory[8:end]), size)
    return {
        name: content[entry.begin : entry.end].clone().view(entry.dtype).reshape(entry.shape)
        for name, entry in entries.items()
    }


def _described(content: JsonObject) -> Description:
    if typed(content, "format", str) != _FORMAT or typed(content, "version", int) != _VERSION:
        raise ValueError(f"its format is not {_FORMAT} version {_VERSION}")
    weights = typed(content, "weights", dict)
    return Description(
        typed(content, "config", dict),
        _texts(typed(content, "origin", dict)),
        _texts(typed(content, "provenance", dict)),
        whole_number(weights, "bytes", 1, _WEIGHTS_BYTES),
        typed(weights, "sha256", str),
    )


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {name: typed(values, name, str) for name in values}
