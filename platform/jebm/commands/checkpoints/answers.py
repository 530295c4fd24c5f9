"""What each command says of a run's checkpoints: text for people, and one document for programs."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from jsonargparse import Namespace

from jebm.cli import age_text, progress, size_text, table, warn
from jebm.config import leaves
from jebm.errors import CheckpointError, ConfigError
from jebm.store.checkpoint import FoundCheckpoint, Manifest
from jebm.store.compare import compare, compare_facts
from jebm.store.mirror import download
from jebm.store.overview import described, listed, pruned, verified
from jebm.store.retrieve import RunStore, export_weights, verify_checkpoint
from jebm.store.storage import LocalStore
from jebm.untrusted import JsonObject, escaped

__all__ = ["Answer", "diff", "export", "get", "list_", "pin", "prune", "show", "unpin", "verify"]

_SHOWN = 30  # names of changed tensors


@dataclass(frozen=True)
class Answer:
    """What a command says: to people, to programs, and by its exit code."""

    text: str
    document: JsonObject
    code: int = 0


def list_(run: RunStore, arguments: Namespace) -> Answer:
    """Show all checkpoints, newest first."""
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
    return Answer(table(rows, right=5) + more, {"run": run.uri, "checkpoints": items})


def show(run: RunStore, arguments: Namespace) -> Answer:
    """Show what one checkpoint says of itself, and its tensors."""
    manifest = _chosen(run, arguments)
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


def get(run: RunStore, arguments: Namespace) -> Answer:
    """Bring one checkpoint to a local folder."""
    if "://" in arguments.output:
        raise ConfigError(f"--output {arguments.output}: must be a local folder")
    manifest = _chosen(run, arguments)
    began = time.monotonic()
    with progress(manifest.name) as count:
        done = download(run, manifest, Path(arguments.output), count)
    seconds = round(time.monotonic() - began, 3)
    problems = verify_checkpoint(LocalStore(done.folder), manifest, lambda *_: None)
    for problem in problems:  # the bytes are those in the store: somebody may want to look at them
        warn(f"warning: {manifest.name}: {problem}; training and evaluation refuse it")
    kept = f", {size_text(done.bytes_kept)} were there already" if done.bytes_kept else ""
    fetched = f"{size_text(done.bytes_fetched)} fetched in {seconds:.1f} s{kept}"
    document = {"name": manifest.name, "step": manifest.step, "seconds": seconds, "problems": problems}
    return Answer(
        f"{manifest.name}: {fetched}; in {done.folder}",
        document | asdict(done) | {"folder": str(done.folder)},
    )


def verify(run: RunStore, arguments: Namespace) -> Answer:
    """Check sizes and etags of all checkpoints, or of the one chosen; with --deep every byte."""
    if _is_chosen(arguments) and arguments.step is None:
        chosen = run.checkpoints.find(_chosen(run, arguments).name)
        found: Sequence[FoundCheckpoint] = [] if chosen is None else [chosen]
    else:  # of one step all: a damaged one cannot be chosen, and is what this looks for
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


def prune(run: RunStore, arguments: Namespace) -> Answer:
    """Delete old checkpoints; without --yes only say which."""
    for name, count in (("--keep-last", arguments.keep_last), ("--keep-every", arguments.keep_every)):
        if count is not None and count < 1:
            raise ConfigError(f"{name} {count}: must be 1 or more")
    hours = arguments.orphan_hours if arguments.orphans else None
    gone = pruned(run, arguments.keep_last, arguments.keep_every, hours, delete=arguments.yes)
    total = sum(item["size"] for item in gone)
    rows = [[item["name"], size_text(item["size"]), "orphan" if item["orphan"] else ""] for item in gone]
    end = "deleted" if arguments.yes else "would go; to delete them: --yes"
    summary = f"{len(gone)} checkpoint{'' if len(gone) == 1 else 's'}, {size_text(total)}: {end}"
    document = {"run": run.uri, "deleted": arguments.yes, "checkpoints": gone, "bytes": total}
    return Answer(f"{table(rows)}\n{summary}" if rows else "nothing to delete", document)


def export(run: RunStore, arguments: Namespace) -> Answer:
    """Write the weights alone to one .safetensors file."""
    manifest = _chosen(run, arguments)
    output = Path(arguments.output)
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: the name must end in .safetensors")
    with progress(output.name) as count:
        done = export_weights(run, manifest, output, "ema" if arguments.ema else "model", count)
    which = "averaged weights" if arguments.ema else "weights"
    return Answer(
        f"{done.path}: {which} of {manifest.name}, {done.tensors} tensors, {size_text(done.size)}",
        {
            "name": manifest.name,
            "step": manifest.step,
            "file": str(done.path),
            "tensors": done.tensors,
            "size": done.size,
        },
    )


def pin(run: RunStore, arguments: Namespace) -> Answer:
    """Keep a checkpoint from being pruned."""
    name = run.choose(step=arguments.step).name
    run.checkpoints.pin(name)
    return Answer(f"{name}: pinned, no prune deletes it", {"name": name, "pinned": True})


def unpin(run: RunStore, arguments: Namespace) -> Answer:
    """Let a checkpoint be pruned again."""
    names = sorted(item.name for item in run.checkpoints.list(step=arguments.step))
    if not names:
        raise CheckpointError(f"{run.uri}: no checkpoint of step {arguments.step}")
    for name in names:
        run.checkpoints.unpin(name)
    return Answer(f"{', '.join(names)}: not pinned", {"names": names, "pinned": False})


def diff(run: RunStore, arguments: Namespace) -> Answer:
    """Say in what the checkpoints of two steps differ."""
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


def _is_chosen(arguments: Namespace) -> bool:
    given = sum([arguments.step is not None, arguments.best is not None, arguments.latest])
    if given > 1:
        raise ConfigError("give one of --step, --latest and --best")
    return bool(given)


def _chosen(run: RunStore, arguments: Namespace) -> Manifest:
    _is_chosen(arguments)
    return run.choose(step=arguments.step, best=arguments.best, mode=arguments.mode)


def _brief(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "-" if value is None else json.dumps(value)
