r"""Train a hierarchical generator with a joint EBM prior, on Ray.

  on this machine:   jebm train --config jobs/configs/fashion_mnist.yaml
  on a cluster:      ray job submit --working-dir . -- python jobs/train.py \
                       --config jobs/configs/fashion_mnist.yaml --run.storage s3://bucket/prefix
  show the plan:     … --dry-run      all keys and values: … --print_config

Any key can be set on the command line: --energy.width 50 --langevin.step_size 0.3 --cluster.workers 4.
The same run.name resumes from its newest checkpoint; a finished run says so and does nothing.
Without Ray: --cluster.engine process, or torchrun --nproc-per-node 2 -m jebm train … --cluster.workers 2.

Exit code 0: finished; 3: stopped by a signal before that, with a checkpoint; 2: a wrong value, or a place
that cannot be reached; 1: diverged.
"""

from jebm.cli import STOPPED, log_lines, tell
from jebm.parser import argument_parser, parse_arguments
from jebm.store.storage import open_store
from jebm.train.lease import Lease
from jebm.training import planned, train

__all__ = ["main"]


def main() -> int | None:
    """Parse, check, train and report how it ended; return `STOPPED` if a signal stopped it, None if dry."""
    log_lines()
    parser = argument_parser(__doc__ or "")
    parser.add_argument(
        "--dry-run", action="store_true", help="check all that a start checks, print the plan, start nothing"
    )
    config, arguments = parse_arguments(parser)
    config, plan = planned(config, deep=arguments.dry_run)
    tell(plan.describe())
    if plan.finished:
        tell(f"already finished: {plan.how_finished}")
        return 0
    if arguments.dry_run:
        Lease(open_store(config.run.storage).child(config.run.name)).check()
        if config.cluster.engine == "ray":
            from jebm.on_ray.cluster import check_room  # noqa: PLC0415  (without Ray: no ray needed)

            check_room(config)
        return None
    result = train(config)
    tell(f"{result.status}: step {result.step:,} of {result.total_steps:,}; results in {result.place}")
    if result.status == "stopped":
        tell("the same command resumes it")
        return STOPPED
    return 0
