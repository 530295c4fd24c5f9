"""TensorBoard events as bytes: what torch's SummaryWriter writes, without its files and thread.

tensorboard's own writer raises from a background thread when a disk is full, and never recovers. Nothing is
written here: the caller stores the records like everything else.
"""

import io
import os
import socket
import time
from collections.abc import Mapping

from tensorboard.compat.proto.event_pb2 import (  # type: ignore[import-untyped]
    Event,
    SessionLog,
    SourceMetadata,
)
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.tensorboard import summary

__all__ = ["Board"]

_FIRST = "1 model"
_GROUPS = {
    "evaluation/": "2 evaluation",
    "chain/": "3 chain",
    "gradient_norm/": "4 gradient norm",
    "time/": "5 time",
    "checkpoint/": "6 checkpoint",
}
"""Cards in the order in which people want them, since TensorBoard sorts by name: first what the model does
(distortion, rates, f, pictures), last how the run computes."""


class Board:
    """Makes the records of one event file. Each method returns bytes to append to it."""

    def __init__(self) -> None:
        """Name the file; later files sort after it."""
        seconds, rest = divmod(time.time_ns(), 10**9)
        self.file = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{rest:09d}"
        """Its name, by which TensorBoard finds and sorts it."""

    def beginning(self, purge_step: int | None = None) -> bytes:
        """Return the file's header; TensorBoard hides earlier files' events from `purge_step` on."""
        source = SourceMetadata(writer="tensorboard.summary.writer.event_file_writer")
        head = _record(Event(file_version="brain.Event:2", source_metadata=source))
        if purge_step is None:
            return head
        begun = SessionLog(status=SessionLog.START)
        return head + b"".join(
            (
                _record(Event(step=purge_step, file_version="brain.Event:2")),
                _record(Event(step=purge_step, session_log=begun)),
            )
        )

    def scalars(self, values: Mapping[str, float], step: int) -> bytes:
        """Return one scalar per metric, in its group of cards."""
        parts = (
            summary.scalar(_card(name), value)  # type: ignore[no-untyped-call]
            for name, value in values.items()
        )
        return b"".join(_record(Event(step=step, summary=part)) for part in parts)

    def pictures(self, grids: Mapping[str, Tensor], step: int) -> bytes:
        """Return one picture (C, height, width) in [0, 1] per name."""
        parts = (
            summary.image(_card(name), picture, dataformats="CHW")  # type: ignore[no-untyped-call]
            for name, picture in grids.items()
        )
        return b"".join(_record(Event(step=step, summary=part)) for part in parts)

    def hyperparameters(
        self, values: Mapping[str, bool | float | str], metrics: Mapping[str, float]
    ) -> bytes:
        """Return the data of TensorBoard's HPARAMS page: settings and final metrics."""
        parts = summary.hparams(dict(values), dict(metrics), None)  # type: ignore[no-untyped-call]
        return b"".join(_record(Event(summary=part)) for part in parts) + b"".join(
            _record(Event(step=0, summary=summary.scalar(*item)))  # type: ignore[no-untyped-call]
            for item in metrics.items()
        )


def _card(name: str) -> str:
    prefix, slash, rest = name.partition("/")
    group = _GROUPS.get(prefix + slash)
    return f"{group}/{rest}" if group else f"{_FIRST}/{name}"


def _record(event: Event) -> bytes:
    event.wall_time = time.time()
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
