"""Send a run's journal to experiment trackers: what they missed, or a run that they do not know yet.

  jebm track runs/fashion_mnist
  jebm track s3://bucket/runs/fashion_mnist --to '[mlflow, wandb]'

A tracker that was away when a run ended gets the rest, in the same tracker run. Sent are the journal,
pictures, run.json, the pages of its evaluations and references to its checkpoints. While the run trains, it
does this itself.

Exit code 0: everything is there; 1: a tracker is away; 2: usage error, no run there, or the storage cannot
be reached.
"""

from typing import Literal

from jebm.cli import log_lines, tell
from jebm.config import leaves
from jebm.errors import CheckpointError, ConfigError
from jebm.parser import job_parser, parse
from jebm.store.retrieve import open_run
from jebm.train.history import recorded_config
from jebm.train.status import run_status
from jebm.train.tracked import feeds_of, references_to

__all__ = ["main"]


def main() -> int:
    """Send what is missing; return 1 if a tracker did not take it."""
    log_lines()
    parser = job_parser(__doc__ or "")
    parser.add_argument("run", type=str, help="run.storage/run.name")
    parser.add_argument(
        "--to",
        type=list[Literal["wandb", "mlflow"]],
        default=None,
        help="trackers; default: the run's run.track",
    )
    arguments = parse(parser)
    run = open_run(arguments.run)
    store = run.root.child(run.name)
    values = recorded_config(store)
    own = dict(leaves(values)).get("run.track")
    names = arguments.to or (own if isinstance(own, list) else [])
    status = run_status(run.root, run.name)
    if status.state == "running":
        raise ConfigError(f"{run.uri}: is in training, and sends its journal itself")
    # All of the journal, and whatever checkpoints are left.
    feeds = feeds_of([str(name) for name in names], values, store, status.step)
    if not feeds:
        raise ConfigError(f"{run.uri}: its run.track names no tracker; give --to '[mlflow]'")
    try:
        found = [one.manifest for one in reversed(run.checkpoints.list()) if one.manifest is not None]
    except CheckpointError:
        found = []
    for feed in feeds:
        feed.checkpoints(references_to(store, found))
        feed.close("finished" if status.state == "finished" else "stopped")
    complete = all(feed.complete for feed in feeds)
    tell(f"{run.uri}: {'all sent' if complete else 'not all sent'}")
    return 0 if complete else 1
