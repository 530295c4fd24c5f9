"""The commands that download, delete, pin and unpin checkpoints."""

import time
from dataclasses import asdict
from pathlib import Path

from jsonargparse import Namespace

from jebm.cli import progress, size_text, table, warn
from jebm.commands.checkpoints.answer import Answer, chosen
from jebm.errors import CheckpointError, ConfigError
from jebm.store.mirror import download
from jebm.store.overview import pruned
from jebm.store.retrieve import RunStore, verify_checkpoint
from jebm.store.storage import LocalStore

__all__ = ["get", "pin", "prune", "unpin"]


def get(run: RunStore, arguments: Namespace) -> Answer:
    """Download one checkpoint to a local folder."""
    if "://" in arguments.output:
        raise ConfigError(f"--output {arguments.output}: must be a local folder")
    manifest = chosen(run, arguments)
    began = time.monotonic()
    with progress(manifest.name) as count:
        done = download(run, manifest, Path(arguments.output), count)
    seconds = round(time.monotonic() - began, 3)
    problems = verify_checkpoint(LocalStore(done.folder), manifest, lambda *_: None)
    for problem in problems:  # keep the files: they match the store and may be worth inspecting
        warn(f"warning: {manifest.name}: {problem}; training and evaluation refuse it")
    kept = f", {size_text(done.bytes_kept)} were there already" if done.bytes_kept else ""
    fetched = f"{size_text(done.bytes_fetched)} fetched in {seconds:.1f} s{kept}"
    document = {"name": manifest.name, "step": manifest.step, "seconds": seconds, "problems": problems}
    return Answer(
        f"{manifest.name}: {fetched}; in {done.folder}",
        document | asdict(done) | {"folder": str(done.folder)},
    )


def prune(run: RunStore, arguments: Namespace) -> Answer:
    """Delete old checkpoints; without --yes only list them."""
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


def pin(run: RunStore, arguments: Namespace) -> Answer:
    """Protect a checkpoint from prune."""
    name = run.choose(step=arguments.step).name
    run.checkpoints.pin(name)
    return Answer(f"{name}: pinned, no prune deletes it", {"name": name, "pinned": True})


def unpin(run: RunStore, arguments: Namespace) -> Answer:
    """Allow prune to delete a checkpoint again."""
    names = sorted(item.name for item in run.checkpoints.list(step=arguments.step))
    if not names:
        raise CheckpointError(f"{run.uri}: no checkpoint of step {arguments.step}")
    for name in names:
        run.checkpoints.unpin(name)
    return Answer(f"{', '.join(names)}: not pinned", {"names": names, "pinned": False})
