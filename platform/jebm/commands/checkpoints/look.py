"""The commands that only read a run's checkpoints: text for people, a document for programs."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

from jsonargparse import Namespace

from jebm.cli import age_text, progress, size_text, table, unknown_metric
from jebm.commands.checkpoints.answer import Answer, chosen, is_chosen
from jebm.config import leaves
from jebm.errors import CheckpointError
from jebm.store.checkpoint import FoundCheckpoint
from jebm.store.compare import compare, compare_facts
from jebm.store.overview import described, listed, verified
from jebm.store.retrieve import RunStore
from jebm.untrusted import escaped

__all__ = ["diff", "list_", "show", "verify"]

_SHOWN = 30  # names of changed tensors listed


def list_(run: RunStore, arguments: Namespace) -> Answer:
    """List all checkpoints, newest first."""
    items = listed(run, arguments.limit or None, metric=arguments.metric, mode=arguments.mode)
    rows = [["step", "attempt", "age", "size", arguments.metric, "status", ""]]
    for item in items:
        value = item["metrics"].get(arguments.metric, math.nan)
        marks = [mark for mark in ("latest", "best", "pinned") if item[mark]]
        rows.append(
            [
                f"{item['step']:,}",
                str(item["attempt"]),
                age_text(datetime.fromisoformat(item["written"])),
                size_text(item["size"]),
                f"{value:.6g}" if math.isfinite(value) else "-",
                item["status"],
                " ".join([*marks, item["reason"]]).strip(),
            ]
        )
    more = f"\nthe {len(items)} newest; all: --limit 0" if len(items) == arguments.limit else ""
    names = {name for item in items for name in item["metrics"]}
    if unknown := unknown_metric(arguments.metric, names):
        more += f"\n{unknown}"
    return Answer(table(rows, right=5) + more, {"run": run.uri, "checkpoints": items})


def show(run: RunStore, arguments: Namespace) -> Answer:
    """Show one checkpoint's manifest and its tensors."""
    manifest = chosen(run, arguments)
    document = described(run, manifest)
    objects, parts = len(manifest.objects), sum(len(stored.crc32) for stored in manifest.objects)
    facts = {
        "checkpoint": manifest.name,
        "run": manifest.run,
        "step": f"{manifest.step:,}, attempt {manifest.attempt}",
        "written": f"{manifest.created:%Y-%m-%d %H:%M:%S} UTC, {age_text(manifest.created)} ago",
        "workers": str(manifest.world_size),
        "parent": manifest.parent or "-",
        "size": f"{size_text(document['size'])} in {parts} parts"
        + (f" of {objects} objects" if objects > 1 else ""),
        "config": manifest.config_sha256,
        "manifest": f"version {manifest.version}" + (", without a hash" if manifest.version == 1 else ""),
    }
    # One table each for metrics, provenance, config and tensors.
    rows = [["tensor", "dtype", "shape", "bytes"]]
    for tensor in document["tensors"]:
        shape = " x ".join(map(str, tensor["shape"])) or "()"
        rows.append([tensor["name"], tensor["dtype"], shape, f"{tensor['bytes']:,}"])
    sections: dict[str, Sequence[Sequence[str]]] = {
        "metrics": [(f"  {name}", f"{value:.6g}") for name, value in sorted(manifest.metrics.items())],
        "provenance": [(f"  {name}", value) for name, value in sorted(manifest.provenance.items())],
        "config": [(f"  {key}", json.dumps(value)) for key, value in leaves(manifest.config)],
        f"{len(rows) - 1} tensors": rows,
    }
    texts = [f"{title}\n{table(lines)}" for title, lines in sections.items()]
    return Answer("\n\n".join([table(list(facts.items())), *texts]), document)


def verify(run: RunStore, arguments: Namespace) -> Answer:
    """Check sizes and etags of all checkpoints or the chosen one; with --deep every byte."""
    if is_chosen(arguments) and arguments.step is None:
        one = run.checkpoints.find(chosen(run, arguments).name)
        found: Sequence[FoundCheckpoint] = [] if one is None else [one]
    else:  # all of a step: the damaged ones we look for cannot be chosen
        found = run.checkpoints.list(step=arguments.step)
    if not found:
        none = f"{run.uri}: no checkpoint of step {arguments.step}"
        raise CheckpointError(run.nothing() if arguments.step is None else none)
    results = verified(run, found, progress if arguments.deep else None)
    rows = [[result["name"], result["status"], "; ".join(result["problems"])] for result in results]
    damaged = sum(result["status"] == "damaged" for result in results)
    how = "every byte" if arguments.deep else "sizes and etags"
    return Answer(
        f"{table(rows)}\n{damaged} of {len(results)} damaged ({how} compared)",
        {"run": run.uri, "deep": arguments.deep, "checkpoints": results},
        1 if damaged else 0,
    )


def diff(run: RunStore, arguments: Namespace) -> Answer:
    """Show how the checkpoints of two steps differ."""
    one, other = run.choose(step=arguments.first), run.choose(step=arguments.second)
    found, facts = compare(run, one, other), compare_facts(one, other)
    counts = (
        f"{len(found.changed)} changed, {len(found.added)} added, {len(found.removed)} removed, "
        f"{found.equal} equal ({size_text(found.bytes_read)} compared)"
    )
    signs = {"-": found.removed, "+": found.added, " ": found.changed[:_SHOWN]}
    lines = [f"{sign} {escaped(name)}" for sign, names in signs.items() for name in names]
    if len(found.changed) > _SHOWN:
        lines.append(f"  … and {len(found.changed) - _SHOWN} more; --json names all")
    sections = [f"{one.name} → {other.name}", "\n".join([f"tensors: {counts}", *lines])]
    for title, pairs in facts.items():
        rows = [[f"  {name}", _brief(before), "→", _brief(after)] for name, (before, after) in pairs.items()]
        sections.append(f"{title}: " + (f"{len(rows)} differences\n{table(rows)}" if rows else "the same"))
    document = {"first": one.name, "second": other.name, "tensors": asdict(found), **facts}
    return Answer("\n\n".join(sections), document)


def _brief(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "-" if value is None else json.dumps(value)
