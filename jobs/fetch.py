"""Bring the results of a run from its storage: pictures, TensorBoard files, metrics.jsonl, run.json.

  python jobs/fetch.py s3://bucket/runs/fashion_mnist results/fashion_mnist

Checkpoints are not among them: jobs/checkpoints.py get.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from jebm.cli import run, tell
from jebm.errors import StoreError
from jebm.parser import job_parser, parse
from jebm.store.storage import open_store

_LEFT_OUT = ("checkpoints/", "lease/", "ray/")


def main() -> None:
    """Copy what changed and say how much."""
    parser = job_parser(__doc__ or "")
    parser.add_argument("run", type=str, help="URI of the run: its run.storage and run.name")
    parser.add_argument("folder", type=str, help="folder to write to")
    arguments = parse(parser)
    store, folder = open_store(arguments.run), Path(arguments.folder)
    count = size = 0
    for entry in store.list():
        if entry.key.startswith(_LEFT_OUT):
            continue
        path = folder / entry.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.get(entry.key))
        count, size = count + 1, size + entry.size
    if not count:
        raise StoreError(f"{store.uri}: holds no results of a run; give run.storage/run.name")
    tell(f"{count} files, {size / 1e6:.1f} MB from {store.uri} to {folder}")


if __name__ == "__main__":
    run(main)
