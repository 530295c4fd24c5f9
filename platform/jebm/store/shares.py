"""A checkpoint written by all ranks, each writing its share of the tensors.

Shares are whole tensors, so each object is a plain safetensors file. Ranks coordinate only through small
records in the store: no collective runs beside training's own.
"""

import heapq
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from jebm.errors import CheckpointError, StoreError
from jebm.store.layout import StoredObject
from jebm.store.manifest import decoded_object
from jebm.store.protocol import ObjectInfo, Store, in_parallel
from jebm.store.sealed import READS, sealed, unsealed

__all__ = ["RECORD_BYTES", "Share", "gathered"]

RECORD_BYTES = 1 << 20
"""Limit on a record, in bytes; longer ones are not read."""

_FORMAT = "jebm-share"
_VERSION = 2
_FIRST_WAIT_SECONDS = 0.05  # between polls for the other ranks' shares
_LONGEST_WAIT_SECONDS = 2.0
_SHOWN = 5  # ranks named in an error


@dataclass(frozen=True)
class Share:
    """The share that one of `world_size` ranks writes.

    `start` is 8 hexadecimal digits, shared by all ranks of one start of a run and no others: two starts with
    the same attempt number must not accept each other's shares.
    """

    rank: int
    world_size: int
    start: str

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's tensors: whole ones, chosen so that all ranks have about equal bytes.

        The choice depends only on names, sizes and world size; across ranks each tensor occurs once.
        """
        sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in tensors.items()}
        loads = [(0, rank) for rank in range(self.world_size)]
        mine = {}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):  # largest first
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + sizes[name], rank))
            if rank == self.rank:
                mine[name] = tensors[name]
        return mine

    def others(self) -> dict[str, int]:
        """Return the keys of the other ranks' records in a checkpoint's folder, with their ranks."""
        return {self._key(rank): rank for rank in range(self.world_size) if rank != self.rank}

    @property
    def key(self) -> str:
        """The key of this rank's record."""
        return self._key(self.rank)

    def encode(self, checkpoint: str, stored: StoredObject) -> bytes:
        """Return the record that confirms this rank's share of a checkpoint."""
        return sealed(self._record(checkpoint, self.rank) | {"object": asdict(stored)})

    def decode(self, encoded: bytes, checkpoint: str, rank: int) -> StoredObject:
        """Return what another rank has written.

        Raises CheckpointError for anything that its `encode` would not write.
        """
        try:
            content = unsealed(encoded, RECORD_BYTES)
            stored = decoded_object(content.pop("object", None))
            if content != self._record(checkpoint, rank):
                raise ValueError("it is of another checkpoint, start or rank")
            if not stored.key.startswith(f"data/r{rank:05d}-"):
                raise ValueError(f"{stored.key} is no object of this rank")
        except ValueError as error:
            raise CheckpointError(
                f"{checkpoint}: the record of rank {rank} cannot be read: {error}"
            ) from error
        return stored

    def _key(self, rank: int) -> str:
        return f"shares/r{rank:05d}-{self.start}.json"

    def _record(self, checkpoint: str, rank: int) -> dict[str, object]:
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "checkpoint": checkpoint,
            "start": self.start,
            "rank": rank,
            "world_size": self.world_size,
        }


def gathered(folder: Store, checkpoint: str, share: Share, patience_seconds: float) -> list[StoredObject]:
    """Wait until all other ranks have written their shares; return them in rank order.

    Raises StoreError if none has arrived for `patience_seconds`, CheckpointError for an invalid record.
    """
    missing = share.others()
    found: dict[int, StoredObject] = {}

    def read(_: int, info: ObjectInfo) -> StoredObject:
        return _read_record(folder, checkpoint, share, missing[info.key], info)

    wait_seconds, deadline = _FIRST_WAIT_SECONDS, time.monotonic() + patience_seconds
    while True:
        arrived = [info for info in folder.list("shares/") if info.key in missing]
        for info, stored in zip(arrived, in_parallel(read, arrived), strict=True):
            found[missing.pop(info.key)] = stored
        if not missing:
            return [found[rank] for rank in sorted(found)]
        if arrived:
            deadline = time.monotonic() + patience_seconds
        elif time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing.values())[:_SHOWN]))
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise StoreError(
                f"{folder.uri}: no share of rank {ranks}{more} for {patience_seconds:.0f} s; see their logs"
            )
        # Longer each time, also after an arrival: of a thousand ranks each would otherwise cost a listing.
        time.sleep(wait_seconds)
        wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)


def _read_record(folder: Store, checkpoint: str, share: Share, rank: int, listed: ObjectInfo) -> StoredObject:
    """Return what another rank has written; a record with a wrong hash is read again."""
    problem = CheckpointError(f"{folder.uri}: the record of rank {rank} is gone")
    info: ObjectInfo | None = listed
    for _ in range(READS):
        if info is not None:
            if info.size > RECORD_BYTES:
                raise CheckpointError(f"{folder.uri}: the record of rank {rank} has {info.size} bytes")
            encoded = bytearray(info.size)  # read no more, even if the record has grown
            folder.read_into(info.key, 0, [memoryview(encoded)])
            try:
                return share.decode(bytes(encoded), checkpoint, rank)
            except CheckpointError as error:
                problem = error
        info = folder.head(listed.key)
    raise problem
