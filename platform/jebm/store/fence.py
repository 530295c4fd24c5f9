"""Writes that only one writer may do, and the error of the second one."""

from jebm.errors import CheckpointError
from jebm.store.protocol import ObjectExistsError, Store
from jebm.store.sealed import READS

__all__ = ["FencedError", "put_once"]


class FencedError(CheckpointError):
    """Another writer has committed this checkpoint: this one must stop, the run is no longer its own."""


def put_once(folder: Store, key: str, content: bytes) -> None:
    """Write an object that nobody else may have written; raises FencedError if one has."""
    try:
        folder.put(key, content, if_absent=True)
    except ObjectExistsError as error:
        # It is ours if the answer to a first try was lost, otherwise another writer's.
        for _ in range(READS):
            info = folder.head(key)
            if info is not None and info.size == len(content) and folder.get(key) == content:
                return
        raise FencedError(
            f"{folder.uri}: another writer has committed this checkpoint; stop one of the two jobs"
        ) from error
