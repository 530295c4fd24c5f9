"""What the ranks of a run do, as rank 0 writes it into the storage every few seconds, read strictly."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import ClassVar

from jebm.store.records import DamagedRecordError, listed_objects, read_object, understood
from jebm.store.storage import ObjectMissingError, Store
from jebm.untrusted import typed, whole_number

__all__ = ["HEARTBEAT", "Heartbeat", "Note", "last_heartbeat"]

HEARTBEAT = "heartbeat.json"

_MOST = 2**53


@dataclass
class Note:
    """What one rank does; `beat` counts its posts, so that a silent rank is seen."""

    rank: int
    host: str
    pid: int
    step: int = -1
    doing: str = "starting"
    busy: bool = True
    """Whether it may take as long as it needs: an evaluation, a save."""
    beat: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


@dataclass(frozen=True)
class Heartbeat:
    """The last word of a run's ranks, and when it was written by the storage's clock."""

    SILENCE: ClassVar = timedelta(seconds=60)
    """After this long without another, rank 0 is not there, or stands still itself."""

    ranks: Sequence[Note]
    hung: bool
    """Whether rank 0 has found that the run makes no progress."""
    written: datetime

    @property
    def silent(self) -> bool:
        """Whether there was no word for `SILENCE`, by this machine's clock and the storage's."""
        return datetime.now(UTC) - self.written > self.SILENCE

    @staticmethod
    def encoded(ranks: Sequence[Note], *, hung: bool) -> bytes:
        """Return the content of `heartbeat.json`."""
        return json.dumps({"hung": hung, "ranks": [asdict(note) for note in ranks]}).encode()


def last_heartbeat(run: Store) -> Heartbeat | None:
    """Return the last heartbeat in a run's storage; None if there is none, or it is damaged.

    Raises:
        StoreError: the store cannot be reached.
    """
    info = run.head(HEARTBEAT)
    if info is None:
        return None
    try:
        record = read_object(run, HEARTBEAT)
        with understood(run, HEARTBEAT):
            ranks = [
                Note(
                    whole_number(each, "rank", 0, _MOST),
                    typed(each, "host", str),
                    whole_number(each, "pid", 0, _MOST),
                    whole_number(each, "step", -1, _MOST),
                    typed(each, "doing", str),
                    typed(each, "busy", bool),
                    whole_number(each, "beat", 0, _MOST),
                )
                for each in listed_objects(record, "ranks")
            ]
            return Heartbeat(ranks, typed(record, "hung", bool), info.modified)
    except (DamagedRecordError, ObjectMissingError):
        return None
