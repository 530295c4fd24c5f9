"""What a run tells an experiment tracker, and how far each tracker has got."""

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from jebm.store.records import DamagedRecordError, read_object, understood
from jebm.store.storage import ObjectMissingError, Store
from jebm.untrusted import typed, whole_number

__all__ = ["About", "Ending", "Progress", "Reference", "Row", "Tracker", "progress_of"]

_TOKEN = re.compile(r"[0-9a-f]{32}")
_LAST_STEP = 2**53

Ending: TypeAlias = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Row:
    """One report: its step, its finite metrics, and when it was made (seconds since 1970)."""

    step: int
    metrics: Mapping[str, float]
    time: float


@dataclass(frozen=True)
class Reference:
    """Where a checkpoint lies: its folder's URI, and the SHA-256 of its manifest, which has the CRCs."""

    name: str
    step: int
    uri: str
    manifest_sha256: str
    metrics: Mapping[str, float]

    def facts(self) -> dict[str, object]:
        """Return what trackers record of the checkpoint, as plain values."""
        return {
            "step": self.step,
            "uri": self.uri,
            "manifest_sha256": self.manifest_sha256,
            "metrics": dict(self.metrics),
        }


@dataclass(frozen=True)
class About:
    """What a tracker run begins with: the run's name and place, and its config by dotted key."""

    name: str
    place: str
    config: Mapping[str, object]


class Tracker(Protocol):
    """One experiment tracker. Any exception means that it is away; the call is repeated later."""

    name: str

    def open(self, token: str, about: About) -> int | None:
        """Resume the tracker run of this token, or begin it; return its last step, -1 for none, or None.

        None means that the tracker cannot tell.
        """

    def rows(self, rows: Sequence[Row]) -> None:
        """Add reports, in the order of their steps."""

    def file(self, key: str, content: bytes, step: int) -> None:
        """Add a file, or replace it; `key` is relative to the run, such as pictures/step-00000100.png."""

    def checkpoint(self, reference: Reference) -> None:
        """Add a reference to a checkpoint; nothing is uploaded."""

    def close(self, ending: Ending) -> None:
        """End the tracker run for now."""


@dataclass(frozen=True)
class Progress:
    """How far a tracker has got, as kept with the run."""

    token: str
    step: int = -1
    picture: int = -1
    checkpoint: str = ""


def progress_of(run: Store, key: str) -> Progress:
    """Return how far a tracker has got with the run, from the record `key`; a new token if there is none.

    Raises:
        StoreError: the store cannot be reached.
    """
    try:
        record = read_object(run, key)
        with understood(run, key):
            token = typed(record, "token", str)
            if not _TOKEN.fullmatch(token):
                raise ValueError("token has another form")
            return Progress(
                token=token,
                step=whole_number(record, "step", -1, _LAST_STEP),
                picture=whole_number(record, "picture", -1, _LAST_STEP),
                checkpoint=typed(record, "checkpoint", str),
            )
    except (DamagedRecordError, ObjectMissingError):
        return Progress(uuid.uuid4().hex)
