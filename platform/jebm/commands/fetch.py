"""Download the results of a run, sweep or comparison: pictures, TensorBoard files, metrics.jsonl, run.json.

  jebm fetch s3://bucket/runs/fashion_mnist results/fashion_mnist

Checkpoints are not included: use jebm checkpoints get. Run again, it downloads only what has changed since
(.fetched.json in the folder records what is there).
Exit code 0: all is there; 1: some objects could not be downloaded, named on stderr; 2: usage error, or the
storage cannot be reached.
"""

import sys
from collections.abc import Callable

from tqdm import tqdm

from jebm.cli import log_lines, tell, warn
from jebm.errors import ConfigError
from jebm.parser import job_parser, parse
from jebm.store.results import fetch_results
from jebm.store.storage import LocalStore, open_store

__all__ = ["main"]

_SHOWN = 20  # refused objects listed in full


def main() -> int:
    """Download what changed and print how much."""
    log_lines(stream=sys.stderr)
    parser = job_parser(__doc__ or "")
    parser.add_argument("run", type=str, help="URI of the run: its run.storage and run.name")
    parser.add_argument("folder", type=str, help="folder to write to")
    arguments = parse(parser)
    store, target = open_store(arguments.run), open_store(arguments.folder)
    if not isinstance(target, LocalStore):
        raise ConfigError(f"folder: {arguments.folder} is no folder of this machine")
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:

        def begin(size: int) -> Callable[[int], object]:
            bar.reset(total=size)
            return bar.update

        done = fetch_results(store, target.folder, begin)
    for line in done.refused[:_SHOWN]:
        warn(f"not brought: {line}")
    if more := done.refused[_SHOWN:]:
        warn(f"not brought: {len(more)} more")
    unchanged = f", {done.unchanged} unchanged" if done.unchanged else ""
    tell(f"{done.files} files, {done.bytes / 1e6:.1f} MB from {store.uri} to {target.folder}{unchanged}")
    return 1 if done.refused else 0
