"""Writes reserved for one writer, and the error that a second one gets."""

from jebm.errors import CheckpointError
from jebm.store.protocol import ObjectExistsError, Store
from jebm.store.sealed import READS

__all__ = ["FencedError", "put_once"]


class FencedError(CheckpointError):
    """Another writer has committed this checkpoint: this one has lost the run and must stop."""


def put_once(folder: Store, key: str, content: bytes) -> None:
    """Write an object once; raises FencedError if another writer has written it."""
    try:
        folder.put(key, content, if_absent=True)
    except ObjectExistsError as error:
        # Ours if the response to a first try was lost; otherwise another writer's.
        for _ in range(READS):
            info = folder.head(key)
            if info is not None and info.size == len(content) and folder.get(key) == content:
                return
        raise FencedError(
            f"{folder.uri}: another writer has committed this checkpoint; stop one of the two jobs"
        ) from error
