"""A run's checkpoints listed, described, verified and pruned, as plain JSON values."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

from jebm.errors import CheckpointError
from jebm.store.checkpoint import FoundCheckpoint, Manifest
from jebm.store.retrieve import Progress, RunStore, size_of, tensor_table, verify_checkpoint
from jebm.untrusted import JsonObject

__all__ = ["described", "listed", "pruned", "verified"]


def listed(
    run: RunStore, limit: int | None = None, *, metric: str = "", mode: Literal["min", "max"] = "min"
) -> list[JsonObject]:
    """Return a run's checkpoints, newest first, marking the latest, the best by `metric` and the pinned.

    Raises CheckpointError if there are none.
    """
    found = run.checkpoints.list(limit)
    if not found:
        raise CheckpointError(run.nothing())
    whole = {item.name: item.manifest for item in found if item.status == "committed" and item.manifest}
    # Rank the whole checkpoints by the metric, leaving out values that are not finite.
    values = {name: manifest.metrics.get(metric, math.nan) for name, manifest in whole.items()}
    finite = {name: value if mode == "min" else -value for name, value in values.items()}
    finite = {name: value for name, value in finite.items() if math.isfinite(value)}
    latest, best = next(iter(whole), None), min(finite, key=finite.__getitem__, default=None)
    pinned = run.checkpoints.pinned([item.name for item in found])
    return [
        {
            "name": item.name,
            "step": item.step,
            "attempt": item.attempt,
            "status": item.status,
            "reason": item.reason,
            "size": item.size,
            "written": run.written(item).isoformat(),
            "metrics": item.manifest.metrics if item.manifest else {},
            "latest": item.name == latest,
            "best": item.name == best,
            "pinned": item.name in pinned,
        }
        for item in found
    ]


def described(run: RunStore, manifest: Manifest) -> JsonObject:
    """Return a checkpoint's manifest, its size in bytes, and its tensors by name."""
    tensors = [
        {
            "name": name,
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shape": list(entry.shape),
            "bytes": entry.end - entry.begin,
        }
        for name, entry in sorted(tensor_table(run.folder(manifest.name), manifest).items())
    ]
    document: JsonObject = json.loads(manifest.encode())
    if manifest.version == 1:
        del document["sha256"]
        document["version"] = 1
    return document | {"name": manifest.name, "size": size_of(manifest), "tensors": tensors}


def verified(
    run: RunStore,
    found: Sequence[FoundCheckpoint],
    progress: Callable[[str], AbstractContextManager[Progress]] | None = None,
) -> list[JsonObject]:
    """Return the state of each checkpoint (ok, partial or damaged) and why.

    Sizes and etags are compared; with `progress`, called once per checkpoint name, every byte is read.
    """
    results: list[JsonObject] = []
    for item in found:
        problems = [item.reason] if item.status == "corrupt" else []
        if progress and item.manifest is not None and item.status == "committed":
            with progress(item.name) as count:
                problems += verify_checkpoint(run.folder(item.name), item.manifest, count)
        status = "damaged" if problems else "partial" if item.status == "partial" else "ok"
        results.append({"name": item.name, "status": status, "problems": problems})
    return results


def pruned(
    run: RunStore, keep_last: int, keep_every: int | None, orphan_hours: float | None, *, delete: bool
) -> list[JsonObject]:
    """Delete old checkpoints and killed writers' leftovers of `orphan_hours`; return name and bytes of each.

    Without `delete`, nothing is deleted and the candidates are returned. The newest stays, and so does the
    one that it was resumed from, to document where it came from.
    """
    latest = run.checkpoints.latest()
    protect = [latest.parent] if latest and latest.parent else []
    seconds = (orphan_hours or 0) * 3600
    old = run.checkpoints.prune(keep_last, keep_every, protect, dry_run=True)
    orphans = [] if orphan_hours is None else list(run.checkpoints.orphans(seconds))
    sizes = {name: run.size(name) for name in [*old, *orphans]}
    if delete:
        old = run.checkpoints.prune(keep_last, keep_every, protect)
        orphans = [] if orphan_hours is None else list(run.checkpoints.delete_orphans(seconds))
    return [
        {"name": name, "size": sizes.get(name, 0), "orphan": name not in old} for name in [*old, *orphans]
    ]
