"""A run's checkpoints as training sees them: snapshot now, save in the background."""

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from typing import cast

from jebm.config import config_to_dict
from jebm.errors import JebmError, StoreError
from jebm.store.checkpoint import Facts, Manifest
from jebm.store.shares import Share
from jebm.store.writer import AsyncWriter
from jebm.train.start import Start

__all__ = ["Saver"]


class Saver:
    """Saves checkpoints in the background, under this start's own attempt number.

    Rank 0 writes them; with `checkpoint.sharded`, each rank writes its share. Ranks that write nothing do
    nothing.
    """

    def __init__(self, start: Start, provenance: Mapping[str, str]) -> None:
        config, runtime, state, parent = start.config, start.runtime, start.state, start.parent
        self._state, self._is_main = state, runtime.is_main
        self._parent = () if parent is None else (parent,)
        # A number above all earlier attempts, and a token to distinguish two starts with the same number.
        with runtime.together():
            own = (start.checkpoints.next_attempt(), uuid.uuid4().hex[:8]) if runtime.is_main else None
        attempt, token = cast(tuple[int, str], runtime.from_main(own))
        self._facts = Facts(
            step=state.step,
            attempt=attempt,
            world_size=runtime.world_size,
            config=config_to_dict(config),
            provenance=dict(provenance),
            metrics={},
            state={"data_sha256": start.images.manifest.sha256, "init_from": config.run.init_from},
            parent=None if parent is None else parent.name,
        )
        # Rank 0 writes everything, or each rank its share.
        share: Share | None = None
        if config.checkpoint.sharded and runtime.world_size > 1:
            share = Share(runtime.rank, runtime.world_size, token)
        self._writer: AsyncWriter | None = None
        if runtime.is_main or share is not None:
            self._writer = AsyncWriter(
                start.checkpoints,
                keep_last=config.checkpoint.keep_last,
                like=state.tensors(),
                protect=[manifest.name for manifest in self._parent],
                share=share,
            )
        self.failure: JebmError | None = None
        """Why checkpoints can no longer be written: too many failures in a row, or another writer's fence."""

    def save(self, metrics: Mapping[str, float]) -> None:
        """Snapshot the state now and save it in the background."""
        if self._writer is None:
            return
        facts = dataclasses.replace(self._facts, step=self._state.step, metrics=dict(metrics))
        try:
            self._writer.submit(self._state.tensors(), facts)
        except JebmError as error:
            self.failure = error

    def kept(self) -> Sequence[Manifest]:
        """Return the checkpoint that the run resumed from, then this attempt's newest; only on rank 0."""
        if self._writer is None or not self._is_main:
            return ()
        return [*self._parent, *self._writer.kept]

    def metrics(self) -> dict[str, float]:
        """Return the cost of saving on this rank so far: seconds lost and spent, bytes, retries."""
        stats = {} if self._writer is None else dataclasses.asdict(self._writer.stats)
        return {f"checkpoint/{name}": float(value) for name, value in stats.items()}

    def close(self) -> None:
        """Wait for pending saves; raises the failure, even if only the last save failed."""
        if self._writer is None:
            return
        self._writer.close()
        if self.failure is not None:
            raise self.failure
        newest = self._writer.last_committed
        saved = self._facts.step if newest is None else newest.step  # at first that of the start
        if self._is_main and saved < self._state.step:
            raise StoreError(
                f"the checkpoint of step {self._state.step} could not be written (the log says why); "
                "the run goes on from an earlier one when it is started again"
            )

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        # After an error too: earlier snapshots are worth keeping.
        if self._writer is not None:
            self._writer.close()
