"""Look at the checkpoints of a run, bring them back, check them, tidy them up. Needs nothing but the store.

  python jobs/checkpoints.py list s3://bucket/runs/fashion_mnist
  python jobs/checkpoints.py get s3://bucket/runs/fashion_mnist --best distortion --output checkpoint
  python jobs/checkpoints.py export s3://bucket/runs/fashion_mnist --ema --output weights.safetensors
  python jobs/checkpoints.py verify s3://bucket/runs/fashion_mnist --deep

RUN is run.storage/run.name. Every command takes --json: one document on stdout, nothing else.
Exit code 0: fine; 1: damaged or not found; 2: wrong use, or a storage that cannot be reached.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from jsonargparse import Namespace
from tqdm import tqdm

from jebm.cli import log_lines, run, tell, tell_json, warn
from jebm.config import leaves
from jebm.errors import CheckpointError, ConfigError, JebmError
from jebm.parser import JobParser, job_parser, parse
from jebm.store.bench import measure
from jebm.store.checkpoint import FoundCheckpoint, Manifest
from jebm.store.compare import compare
from jebm.store.mirror import download
from jebm.store.retrieve import (
    Progress,
    RunStore,
    export_weights,
    open_run,
    tensor_table,
    verify_checkpoint,
)
from jebm.store.storage import LocalStore, ObjectChangedError, ObjectMissingError
from jebm.untrusted import JsonObject, escaped

_SHOWN = 30  # names of changed tensors
_LINE_SECONDS = 5.0  # between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Answer:
    """What a command says: to people, to programs, and by its exit code."""

    text: str
    document: JsonObject
    code: int = 0


def list_(place: RunStore, arguments: Namespace) -> Answer:
    """Show all checkpoints, newest first."""
    found = place.checkpoints.list(arguments.limit or None)
    if not found:
        raise CheckpointError(place.nothing())
    whole = [item for item in found if item.status == "committed"]
    latest = whole[0].name if whole else ""
    pinned = place.checkpoints.pinned([item.name for item in found])
    sign = 1 if arguments.mode == "min" else -1
    values = {item.name: value for item in whole if math.isfinite(value := _metric(item, arguments.metric))}
    best = min(values, key=lambda name: sign * values[name], default="")
    documents = []
    rows = [["step", "attempt", "age", "size", arguments.metric, "status", ""]]
    for item in found:
        written = place.written(item)
        marks = {"latest": item.name == latest, "best": item.name == best, "pinned": item.name in pinned}
        documents.append(
            {
                "name": item.name,
                "step": item.step,
                "attempt": item.attempt,
                "status": item.status,
                "reason": item.reason,
                "size": item.size,
                "written": written.isoformat(),
                "metrics": item.manifest.metrics if item.manifest else {},
                **marks,
            }
        )
        value = _metric(item, arguments.metric)
        rows.append(
            [
                f"{item.step:,}",
                str(item.attempt),
                _age(written),
                _bytes(item.size),
                f"{value:.6g}" if math.isfinite(value) else "-",
                item.status,
                " ".join([mark for mark, holds in marks.items() if holds] + [item.reason]).strip(),
            ]
        )
    more = len(found) == arguments.limit
    text = _table(rows, right=5) + (f"\nthe {len(found)} newest; all: --limit 0" if more else "")
    return Answer(text, {"run": place.uri, "checkpoints": documents})


def show(place: RunStore, arguments: Namespace) -> Answer:
    """Show what one checkpoint says of itself, and its tensors."""
    manifest = _chosen(place, arguments)
    tensors: list[JsonObject] = [
        {
            "name": name,
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shape": list(entry.shape),
            "bytes": entry.end - entry.begin,
        }
        for name, entry in sorted(tensor_table(place.folder(manifest.name), manifest).items())
    ]
    size = sum(stored.size for stored in manifest.objects)
    objects, parts = len(manifest.objects), sum(len(stored.crc32) for stored in manifest.objects)
    document = json.loads(manifest.encode()) | {"name": manifest.name, "size": size, "tensors": tensors}
    if manifest.version == 1:
        document = {name: value for name, value in document.items() if name != "sha256"} | {"version": 1}
    facts = [
        ["checkpoint", manifest.name],
        ["run", manifest.run],
        ["step", f"{manifest.step:,}, attempt {manifest.attempt}"],
        ["written", f"{manifest.created:%Y-%m-%d %H:%M:%S} UTC, {_age(manifest.created)} ago"],
        ["workers", str(manifest.world_size)],
        ["parent", manifest.parent or "-"],
        ["size", f"{_bytes(size)} in {parts} parts" + (f" of {objects} objects" if objects > 1 else "")],
        ["config", manifest.config_sha256],
        ["manifest", f"version {manifest.version}" + (", without a hash" if manifest.version == 1 else "")],
    ]
    table = [["tensor", "dtype", "shape", "bytes"]]
    for tensor in tensors:
        shape = " x ".join(map(str, tensor["shape"])) or "()"
        table.append([tensor["name"], tensor["dtype"], shape, f"{tensor['bytes']:,}"])
    sections = [
        _table(facts),
        "metrics\n"
        + _table([[f"  {name}", f"{value:.6g}"] for name, value in sorted(manifest.metrics.items())]),
        "provenance\n"
        + _table([[f"  {name}", value] for name, value in sorted(manifest.provenance.items())]),
        "config\n" + _table([[f"  {key}", json.dumps(value)] for key, value in leaves(manifest.config)]),
        f"{len(tensors)} tensors\n" + _table(table),
    ]
    return Answer("\n\n".join(sections), document)


def get(place: RunStore, arguments: Namespace) -> Answer:
    """Bring one checkpoint to a local folder."""
    if "://" in arguments.output:
        raise ConfigError(f"--output {arguments.output}: must be a local folder")
    manifest = _chosen(place, arguments)
    began = time.monotonic()
    with _progress(manifest.name) as progress:
        done = download(place, manifest, Path(arguments.output), progress)
    seconds = round(time.monotonic() - began, 3)
    problems = verify_checkpoint(LocalStore(done.folder), manifest, lambda *_: None)
    for problem in problems:  # the bytes are those in the store: somebody may want to look at them
        warn(f"warning: {manifest.name}: {problem}; training and evaluation refuse it")
    kept = f", {_bytes(done.bytes_kept)} were there already" if done.bytes_kept else ""
    return Answer(
        f"{manifest.name}: {_bytes(done.bytes_fetched)} fetched in {seconds:.1f} s{kept}; in {done.folder}",
        {
            "name": manifest.name,
            "step": manifest.step,
            "folder": str(done.folder),
            "bytes_fetched": done.bytes_fetched,
            "bytes_kept": done.bytes_kept,
            "seconds": seconds,
            "problems": problems,
        },
    )


def verify(place: RunStore, arguments: Namespace) -> Answer:
    """Check sizes and etags of all checkpoints, or of the one chosen; with --deep every byte."""
    if _is_chosen(arguments) and arguments.step is None:
        chosen = place.checkpoints.find(_chosen(place, arguments).name)
        found: Sequence[FoundCheckpoint] = [] if chosen is None else [chosen]
    else:  # of one step all: a damaged one cannot be chosen, and is what this looks for
        found = place.checkpoints.list(step=arguments.step)
    if not found:
        raise CheckpointError(
            place.nothing()
            if arguments.step is None
            else f"{place.uri}: no checkpoint of step {arguments.step}"
        )
    results: list[JsonObject] = []
    for item in found:
        problems = [item.reason] if item.status == "corrupt" else []
        if arguments.deep and item.manifest is not None and item.status == "committed":
            with _progress(item.name) as progress:
                problems += verify_checkpoint(place.folder(item.name), item.manifest, progress)
        status = "damaged" if problems else "partial" if item.status == "partial" else "ok"
        results.append({"name": item.name, "status": status, "problems": problems})
    damaged = [result for result in results if result["status"] == "damaged"]
    rows = [[result["name"], result["status"], "; ".join(result["problems"])] for result in results]
    how = "every byte" if arguments.deep else "sizes and etags"
    text = f"{_table(rows)}\n{len(damaged)} of {len(results)} damaged ({how} compared)"
    return Answer(
        text, {"run": place.uri, "deep": arguments.deep, "checkpoints": results}, 1 if damaged else 0
    )


def prune(place: RunStore, arguments: Namespace) -> Answer:
    """Delete old checkpoints; without --yes only say which."""
    if arguments.keep_last < 1:
        raise ConfigError(f"--keep-last {arguments.keep_last}: must be 1 or more")
    if arguments.keep_every is not None and arguments.keep_every < 1:
        raise ConfigError(f"--keep-every {arguments.keep_every}: must be 1 or more")
    latest = place.checkpoints.latest()
    protect = [latest.parent] if latest and latest.parent else []  # that may be needed to tell how it came
    old = place.checkpoints.prune(arguments.keep_last, arguments.keep_every, protect, dry_run=True)
    age = arguments.orphan_hours * 3600
    orphans = list(place.checkpoints.orphans(age)) if arguments.orphans else []
    sizes = {name: place.size(name) for name in [*old, *orphans]}
    if arguments.yes:
        old = place.checkpoints.prune(arguments.keep_last, arguments.keep_every, protect)
        orphans = list(place.checkpoints.delete_orphans(age)) if arguments.orphans else []
    gone = [*old, *orphans]
    total = sum(sizes.get(name, 0) for name in gone)
    rows = [[name, _bytes(sizes.get(name, 0)), "" if name in old else "orphan"] for name in gone]
    end = "deleted" if arguments.yes else "would go; to delete them: --yes"
    summary = f"{len(gone)} checkpoint{'' if len(gone) == 1 else 's'}, {_bytes(total)}: {end}"
    return Answer(
        f"{_table(rows)}\n{summary}" if rows else "nothing to delete",
        {
            "run": place.uri,
            "deleted": arguments.yes,
            "checkpoints": [
                {"name": name, "size": sizes.get(name, 0), "orphan": name not in old} for name in gone
            ],
            "bytes": total,
        },
    )


def export(place: RunStore, arguments: Namespace) -> Answer:
    """Write the weights alone to one .safetensors file."""
    manifest = _chosen(place, arguments)
    output = Path(arguments.output)
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: the name must end in .safetensors")
    with _progress(output.name) as progress:
        done = export_weights(place, manifest, output, "ema" if arguments.ema else "model", progress)
    which = "averaged weights" if arguments.ema else "weights"
    return Answer(
        f"{done.path}: {which} of {manifest.name}, {done.tensors} tensors, {_bytes(done.size)}",
        {
            "name": manifest.name,
            "step": manifest.step,
            "file": str(done.path),
            "tensors": done.tensors,
            "size": done.size,
        },
    )


def pin(place: RunStore, arguments: Namespace) -> Answer:
    """Keep a checkpoint from being pruned."""
    name = place.choose(step=arguments.step).name
    place.checkpoints.pin(name)
    return Answer(f"{name}: pinned, no prune deletes it", {"name": name, "pinned": True})


def unpin(place: RunStore, arguments: Namespace) -> Answer:
    """Let a checkpoint be pruned again."""
    names = sorted(item.name for item in place.checkpoints.list(step=arguments.step))
    if not names:
        raise CheckpointError(f"{place.uri}: no checkpoint of step {arguments.step}")
    for name in names:
        place.checkpoints.unpin(name)
    return Answer(f"{', '.join(names)}: not pinned", {"names": names, "pinned": False})


def diff(place: RunStore, arguments: Namespace) -> Answer:
    """Say in what the checkpoints of two steps differ."""
    one, other = place.choose(step=arguments.first), place.choose(step=arguments.second)
    tensors = compare(place, one, other)
    keys = _differences(dict(leaves(one.config)), dict(leaves(other.config)))
    metrics = _differences(one.metrics, other.metrics)
    lines = [f"- {escaped(name)}" for name in tensors.removed] + [
        f"+ {escaped(name)}" for name in tensors.added
    ]
    lines += [f"  {escaped(name)}" for name in tensors.changed[:_SHOWN]]
    if len(tensors.changed) > _SHOWN:
        lines.append(f"  … and {len(tensors.changed) - _SHOWN} more; --json names all")
    counts = (
        f"{len(tensors.changed)} changed, {len(tensors.added)} added, {len(tensors.removed)} removed, "
        f"{tensors.equal} equal ({_bytes(tensors.bytes_read)} read)"
    )
    sections = [f"{one.name} → {other.name}", "\n".join([f"tensors: {counts}", *lines])]
    for title, found in (("config", keys), ("metrics", metrics)):
        rows = [[f"  {name}", _brief(before), "→", _brief(after)] for name, (before, after) in found.items()]
        sections.append(f"{title}: " + (f"{len(rows)} differences\n{_table(rows)}" if rows else "the same"))
    document = {
        "first": one.name,
        "second": other.name,
        "tensors": asdict(tensors),
        "config": {name: list(pair) for name, pair in keys.items()},
        "metrics": {name: list(pair) for name, pair in metrics.items()},
    }
    return Answer("\n\n".join(sections), document)


def bench(place: RunStore, arguments: Namespace) -> Answer:
    """Measure upload and download of a synthetic state, and leave nothing behind."""
    if arguments.megabytes < 1:
        raise ConfigError(f"--megabytes {arguments.megabytes}: must be 1 or more")
    done = measure(place, arguments.megabytes * 1_000_000)
    rows = [["", "seconds", "MB/s", "client CPU s"]]
    document: JsonObject = {"place": place.uri, "bytes": done.size}
    for name, seconds, cpu in (
        ("upload", done.upload_seconds, done.upload_cpu_seconds),
        ("download", done.download_seconds, done.download_cpu_seconds),
    ):
        speed = done.size / 1e6 / seconds
        rows.append([name, f"{seconds:.2f}", f"{speed:.1f}", f"{cpu:.2f}"])
        document[name] = {"seconds": seconds, "megabytes_per_second": speed, "cpu_seconds": cpu}
    return Answer(f"{place.uri}, {_bytes(done.size)}\n{_table(rows, right=4)}", document)


_COMMANDS: dict[str, Callable[[RunStore, Namespace], Answer]] = {
    "list": list_,
    "show": show,
    "get": get,
    "verify": verify,
    "prune": prune,
    "export": export,
    "pin": pin,
    "unpin": unpin,
    "diff": diff,
    "bench": bench,
}

_EXAMPLES = {
    "list": ["", "--metric loss --mode min", "--json"],
    "show": ["", "--step 1200", "--best distortion"],
    "get": ["--output checkpoint", "--best distortion --output checkpoint"],
    "verify": ["", "--step 1200 --deep"],
    "prune": ["--keep-last 3 --keep-every 10000", "--keep-last 3 --orphans --yes"],
    "export": ["--output weights.safetensors", "--best distortion --ema --output weights.safetensors"],
    "pin": ["--step 1200"],
    "unpin": ["--step 1200"],
    "diff": ["1000 1200"],
    "bench": ["--megabytes 256"],
}

_NOTES = {
    "get": "Afterwards the folder is a storage of its own: --run.storage FOLDER. A broken download goes on\n"
    "where it broke: parts that are good are kept, damaged ones are fetched again.",
    "verify": "Exit code 1 where something is damaged. Partial ones are no damage: a save may be under way.",
    "prune": "Never deleted: the newest, what is pinned, and what the newest was resumed from.",
    "export": "A plain file for any safetensors reader: the tensors of the model, without optimizers.",
    "diff": "What equal checksums of parts show to be equal is not downloaded.",
}


def build_parser() -> JobParser:
    """Return the parser of all commands."""
    parser = job_parser(__doc__ or "")
    for name, command in _COMMANDS.items():
        summary = command.__doc__ or ""
        examples = [
            f"  python jobs/checkpoints.py {name} s3://bucket/runs/mine {example}"
            for example in _EXAMPLES[name]
        ]
        text = "\n\n".join(filter(None, [summary, "\n".join(examples), _NOTES.get(name, "")]))
        one = job_parser(text)
        one.add_argument("run", type=str, help="run.storage/run.name: s3://bucket/prefix/name or a folder")
        if name in ("show", "get", "verify", "export"):
            one.add_argument("--step", type=int | None, default=None, help="the checkpoint of this step")
            one.add_argument("--latest", action="store_true", help="the newest that is whole")
            one.add_argument(
                "--best", type=str | None, default=None, metavar="METRIC", help="the best by a metric"
            )
        if name in ("list", "show", "get", "verify", "export"):
            one.add_argument("--mode", type=Literal["min", "max"], default="min", help="what is best")
        if name == "list":
            one.add_argument(
                "--metric", type=str, default="distortion", help="to show and to mark the best by"
            )
            one.add_argument("--limit", type=int, default=100, help="how many, the newest; 0 for all")
        if name == "get":
            one.add_argument("--output", type=str, required=True, metavar="FOLDER", help="where to")
        if name == "verify":
            one.add_argument("--deep", action="store_true", help="read every byte and compare all CRC32s")
        if name == "prune":
            one.add_argument("--keep-last", type=int, required=True, help="how many of the newest stay")
            one.add_argument("--keep-every", type=int | None, default=None, help="steps divisible by it stay")
            one.add_argument("--orphans", action="store_true", help="also what killed writers left")
            one.add_argument("--orphan-hours", type=float, default=24.0, help="the age that makes an orphan")
            one.add_argument("--yes", action="store_true", help="do it")
        if name == "export":
            one.add_argument("--output", type=str, required=True, metavar="FILE.safetensors", help="where to")
            one.add_argument("--ema", action="store_true", help="the averaged weights instead")
        if name in ("pin", "unpin"):
            one.add_argument("--step", type=int, required=True, help="the checkpoint of this step")
        if name == "diff":
            one.add_argument("first", type=int, help="a step")
            one.add_argument("second", type=int, help="another step")
        if name == "bench":
            one.add_argument("--megabytes", type=int, default=256, help="size of the synthetic state")
        one.add_argument("--json", action="store_true", help="one JSON document on stdout")
        parser.add_command(name, one, summary.rstrip("."))
    return parser


def main() -> int:
    """Run one command, print its answer, return its exit code."""
    log_lines(logging.WARNING, sys.stderr)
    values = parse(build_parser())
    arguments = values[values.command]
    try:
        place = open_run(arguments.run)
        if place.uri.startswith("s3://"):
            # At the start a wrong place is likelier than a busy one: this has less patience than the rest.
            place.root.probe(write=values.command == "bench")
        answer = _COMMANDS[values.command](place, arguments)
    except JebmError as error:
        if arguments.json:
            tell_json({"error": " ".join(str(error).split())})
        if not isinstance(error, CheckpointError | ObjectChangedError | ObjectMissingError):
            raise
        warn(f"error: {error}")
        return 1  # nothing that another command line or another key would put right
    try:
        if arguments.json:
            tell_json(_plain(answer.document))
        else:
            tell(answer.text)
    except BrokenPipeError:  # `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return answer.code


def _is_chosen(arguments: Namespace) -> bool:
    given = sum([arguments.step is not None, arguments.best is not None, arguments.latest])
    if given > 1:
        raise ConfigError("give one of --step, --latest and --best")
    return bool(given)


def _chosen(place: RunStore, arguments: Namespace) -> Manifest:
    _is_chosen(arguments)
    return place.choose(step=arguments.step, best=arguments.best, mode=arguments.mode)


def _metric(item: FoundCheckpoint, name: str) -> float:
    return item.manifest.metrics.get(name, math.nan) if item.manifest else math.nan


_Value = TypeVar("_Value")


def _differences(
    one: Mapping[str, _Value], other: Mapping[str, _Value]
) -> dict[str, tuple[_Value | None, _Value | None]]:
    pairs = {name: (one.get(name), other.get(name)) for name in sorted(one.keys() | other.keys())}
    return {name: pair for name, pair in pairs.items() if str(pair[0]) != str(pair[1])}  # nan is like nan


def _brief(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "-" if value is None else json.dumps(value)


def _plain(value: object) -> object:
    """Return what strict JSON can say: null for numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _table(rows: Sequence[Sequence[str]], right: int = 0) -> str:
    """Return aligned columns, the first `right` of them to the right; no cell can forge another row."""
    rows = [[escaped(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if index < right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _age(moment: datetime) -> str:
    seconds = max((datetime.now(UTC) - moment).total_seconds(), 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


@contextmanager
def _progress(title: str) -> Iterator[Progress]:
    """Yield what shows progress on stderr: a bar with the time left on a terminal, else some lines."""
    if sys.stderr.isatty():
        with tqdm(desc=title, unit="B", unit_scale=True) as bar:

            def draw(done: int, total: int) -> None:
                bar.total = total
                bar.update(done)

            yield draw
        return
    began = said = time.monotonic()
    so_far = 0

    def say(done: int, total: int) -> None:
        nonlocal said, so_far
        so_far += done
        now = time.monotonic()
        if now - said >= _LINE_SECONDS and so_far:
            said = now
            left = (now - began) * (total - so_far) / so_far
            sys.stderr.write(f"{title}: {_bytes(so_far)} of {_bytes(total)}, {left:.0f} s left\n")

    yield say


if __name__ == "__main__":
    run(main)
