"""Save checkpoints in the background: training pauses only while its tensors are copied.

One thread saves; at most two snapshots exist, in reused buffers. If both are taken, training waits: an
unbounded queue would hide that the storage is too slow until memory runs out.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from jebm.errors import StoreError
from jebm.store.checkpoint import Checkpoints, Facts, FencedError, Manifest
from jebm.store.manifest import plain_json
from jebm.store.shares import Share

__all__ = [
    "PATIENCE_SECONDS",
    "AsyncWriter",
    "WriterStats",
]

PATIENCE_SECONDS = 120.0
"""How long a background save retries a failing storage. Nothing waits for it, and outages that pass (a
restart, a failover, a flapping network) take a minute or less. After that the save fails, so that the next
one, with newer tensors, gets its buffer."""

_BUFFERS = 2  # one being saved, one being filled
_ALIGNMENT_BYTES = 64

_logger = logging.getLogger(__name__)
_Waiting: TypeAlias = "tuple[_Snapshot, Mapping[str, Tensor], Facts]"


@dataclass(frozen=True)
class WriterStats:
    """Totals since the writer was created. Training lost `stall_seconds` + `stage_seconds`, not the uploads.

    stall: waiting for a free buffer. stage: copying into it (on CUDA: starting the copy). upload: all saves,
    including failed ones. bytes: of the committed tensors. retries: repeated requests. A share's writer
    counts it as committed once written; only rank 0 counts the bytes.
    """

    submitted: int = 0
    committed: int = 0
    failures: int = 0
    stall_seconds: float = 0.0
    stage_seconds: float = 0.0
    upload_seconds: float = 0.0
    bytes_committed: int = 0
    retries: int = 0


class _Snapshot:
    """One allocation that holds a copy of every tensor, reused while their shapes stay the same."""

    def __init__(self) -> None:
        self._plan: list[tuple[str, torch.dtype, torch.Size, bool]] = []
        self._copies: dict[str, Tensor] = {}
        self._copied: list[torch.cuda.Event] = []

    def prepare(self, like: Mapping[str, Tensor]) -> None:
        """Allocate memory for tensors like these and touch it: the system provides it at first touch."""
        self._plan_for(like)
        for copy in self._copies.values():
            copy.zero_()

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors; a copy from CUDA is only started, ordered after the current streams."""
        self._plan_for(tensors)
        with torch.no_grad():
            for name, item in tensors.items():
                self._copies[name].copy_(item, non_blocking=True)
        self._copied = []
        for device in {item.device for item in tensors.values() if item.is_cuda}:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._copied.append(event)

    def _plan_for(self, tensors: Mapping[str, Tensor]) -> None:
        plan = [(name, item.dtype, item.shape, item.is_cuda) for name, item in tensors.items()]
        if plan != self._plan:
            self._plan, self._copies = [], {}  # free the old memory before allocating new
            self._copies = _allocated(tensors)
            self._plan = plan

    def tensors(self) -> dict[str, Tensor]:
        """Return the finished copies."""
        for event in self._copied:
            event.synchronize()
        return self._copies


def _allocated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return CPU tensors like these, pinned if any is on CUDA: asynchronous copies need that."""
    offsets: dict[str, int] = {}
    size = 0
    for name, item in tensors.items():
        offsets[name] = size
        size += -(-item.numel() * item.itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    pinned = any(item.is_cuda for item in tensors.values())
    memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    return {
        name: memory[offsets[name] : offsets[name] + item.numel() * item.itemsize]
        .view(item.dtype)
        .view(item.shape)
        for name, item in tensors.items()
    }


class AsyncWriter:
    """Saves checkpoints in its own thread and prunes old ones after each."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        keep_last: int,
        protect: Collection[str] = (),
        tolerate_failures: int = 3,
        patience_seconds: float = PATIENCE_SECONDS,
        like: Mapping[str, Tensor] | None = None,
        share: Share | None = None,
    ) -> None:
        """Write to `checkpoints`, with the retention of `Checkpoints.prune`.

        `protect` names checkpoints never to prune, above all the one that the run was resumed from. A failing
        request is retried for `patience_seconds`; then its save has failed. More than `tolerate_failures`
        failed saves in a row are an error; fewer are logged and counted. With tensors `like` those to come,
        the first buffer is prepared in the background: first touching fresh memory takes several times as
        long as a copy. With a `share`, only that is copied and written, as `Checkpoints.save_share`: then
        every rank needs a writer, and only rank 0's prunes.
        """
        self._checkpoints = checkpoints.patient(patience_seconds, self._count_retry)
        self._share, self._patience_seconds = share, patience_seconds
        self._keep_last, self._protect = keep_last, protect
        self._tolerate_failures = tolerate_failures
        self._changed = threading.Condition()
        # Guards everything below.
        self._free: list[_Snapshot] = []
        if like is None:
            self._free = [_Snapshot() for _ in range(_BUFFERS)]
        self._waiting: deque[_Waiting] = deque()
        self._busy = False
        self._closed = False
        self._failures_in_a_row = 0
        self._error: Exception | None = None
        self._kept: deque[Manifest] = deque(maxlen=keep_last)
        self._stats = WriterStats()
        # A daemon, so that an interpreter exiting without close() does not wait for a storage that is down.
        self._thread = threading.Thread(target=self._run, args=(like,), name="jebm-checkpoints", daemon=True)
        self._thread.start()

    @property
    def last_committed(self) -> Manifest | None:
        """The newest checkpoint this writer has committed."""
        return self.kept[-1] if self.kept else None

    @property
    def kept(self) -> Sequence[Manifest]:
        """The committed checkpoints that retention keeps: the newest `keep_last`, oldest first."""
        with self._changed:
            return tuple(self._kept)

    @property
    def stats(self) -> WriterStats:
        """Work done so far, and its cost."""
        with self._changed:
            return self._stats

    def submit(self, tensors: Mapping[str, Tensor], facts: Facts) -> None:
        """Copy the present state and save it in the background, as `Checkpoints.save` would.

        Waits if two snapshots are already pending. Raises CheckpointError at once if JSON cannot hold the
        state; the last error of earlier saves if too many failed; FencedError if another writer has taken
        over the run. Call it from one thread.
        """
        facts = replace(
            facts,
            state=plain_json(facts.state, "state"),
            config=plain_json(facts.config, "config"),
            metrics=dict(facts.metrics),
            provenance=dict(facts.provenance),
        )
        mine = self._mine(tensors)
        others = {name: tensor for name, tensor in tensors.items() if name not in mine}
        # Wait for a free buffer.
        began = time.monotonic()
        with self._changed:
            if self._closed:
                raise StoreError("this writer is closed")
            self._changed.wait_for(lambda: self._free or self._fatal())
            self._raise_fatal()
            snapshot = self._free.pop()  # the last one used, so that a fast storage needs only one
        # Copy into it without the lock; the saver works on the other buffer meanwhile.
        stalled = time.monotonic()
        try:
            snapshot.take(mine)
        except BaseException:
            with self._changed:
                self._free.append(snapshot)
            raise
        staged = time.monotonic()
        with self._changed:
            self._waiting.append((snapshot, others, facts))
            self._stats = replace(
                self._stats,
                submitted=self._stats.submitted + 1,
                stall_seconds=self._stats.stall_seconds + stalled - began,
                stage_seconds=self._stats.stage_seconds + staged - stalled,
            )
            self._changed.notify_all()

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Wait until every submitted save is committed or has failed; return False on timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_seconds)

    def close(self) -> None:
        """Drain and end the thread; raises what `submit` would raise for failed saves. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            self._raise_fatal()

    def _mine(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors if self._share is None else self._share.of(tensors)

    def _save(self, tensors: Mapping[str, Tensor], facts: Facts) -> Manifest | None:
        if self._share is None:
            return self._checkpoints.save(tensors, facts)
        return self._checkpoints.save_share(tensors, facts, self._share, self._patience_seconds)

    def _count_retry(self) -> None:
        with self._changed:
            self._stats = replace(self._stats, retries=self._stats.retries + 1)

    def _fatal(self) -> bool:
        return isinstance(self._error, FencedError) or self._failures_in_a_row > self._tolerate_failures

    def _raise_fatal(self) -> None:
        if self._error is not None and self._fatal():
            raise self._error

    def _run(self, like: Mapping[str, Tensor] | None) -> None:
        if like is not None:
            snapshots = [_Snapshot() for _ in range(_BUFFERS)]
            try:
                snapshots[-1].prepare(self._mine(like))  # the last one is used first
            except Exception as error:  # the save itself will hit it, and raise it to the caller
                _logger.warning("no buffer was made ready: %s", error)
            with self._changed:
                self._free = snapshots
                self._changed.notify_all()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                snapshot, others, facts = self._waiting.popleft()
                self._busy = True
            if self._committed(snapshot, others, facts):
                self._prune()
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _committed(self, snapshot: _Snapshot, others: Mapping[str, Tensor], facts: Facts) -> bool:
        """Save one snapshot, free its buffer, record the outcome; return whether a checkpoint was committed.

        `others` are the tensors that other ranks write; only their names, shapes and dtypes matter.
        """
        began = time.monotonic()
        outcome: Manifest | Exception | None
        try:
            outcome = self._save({**others, **snapshot.tensors()}, facts)
        except Exception as error:  # the training thread must learn of any error
            outcome = error
        # Account for the outcome, and wake the threads that wait for a buffer or the end.
        with self._changed:
            stats = self._stats
            stats = replace(stats, upload_seconds=stats.upload_seconds + time.monotonic() - began)
            if isinstance(outcome, Exception):
                self._failures_in_a_row, self._error = self._failures_in_a_row + 1, outcome
                self._stats = replace(stats, failures=stats.failures + 1)
                if isinstance(outcome, FencedError):  # another writer owns the run: write nothing more
                    self._free += [waiting for waiting, _, _ in self._waiting]
                    self._waiting.clear()
                _logger.error(
                    "the checkpoint of step %s was not saved (failure %d in a row): %s",
                    facts.step,
                    self._failures_in_a_row,
                    outcome,
                )
            else:
                self._failures_in_a_row, self._error = 0, None
                size = 0 if outcome is None else sum(stored.size for stored in outcome.objects)
                self._stats = replace(
                    stats, committed=stats.committed + 1, bytes_committed=stats.bytes_committed + size
                )
                if outcome is not None:
                    self._kept.append(outcome)
            self._free.append(snapshot)
            self._changed.notify_all()
        return isinstance(outcome, Manifest)

    def _prune(self) -> None:
        try:
            # Later steps may exist with damage that only reading finds: ours is the one to resume from.
            protected = {*self._protect, *(manifest.name for manifest in self.kept[-1:])}
            pruned = self._checkpoints.prune(self._keep_last, None, protected)
        except Exception as error:  # the next commit tries again; one extra checkpoint is harmless
            _logger.warning("old checkpoints were not pruned: %s", error)
        else:
            if pruned:
                _logger.info("pruned %s", ", ".join(pruned))
