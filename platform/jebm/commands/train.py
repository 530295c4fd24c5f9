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

import signal
import threading
from contextlib import ExitStack
from dataclasses import replace

from jebm.cli import STOPPED, announce, log_lines, tell
from jebm.config import Config
from jebm.evaluate.quick import check_quick_look, quick_look
from jebm.parser import argument_parser, parse_arguments
from jebm.store.storage import open_store
from jebm.train.lease import Lease
from jebm.train.loop import Result, fit
from jebm.train.plan import make_plan
from jebm.train.provenance import provenance
from jebm.train.runtime import STOPPING, check_processes, first_signal, process_runtime, started_by_torchrun

__all__ = ["main"]


def train_here(config: Config) -> Result:
    """Train in this process, perhaps as one of torchrun's.

    The first SIGTERM or SIGINT stops after the current step; a second one has its usual effect.
    """
    asked = threading.Event()
    with process_runtime(config) as runtime, ExitStack() as stack:
        with runtime.together():
            if runtime.is_main:
                stack.enter_context(Lease(open_store(config.run.storage).child(config.run.name)))

        def stop(received: signal.Signals) -> None:
            asked.set()
            if runtime.is_main:
                announce(f"{received.name}: {STOPPING}")

        stack.enter_context(first_signal(stop))
        return fit(
            config,
            runtime,
            provenance=provenance(),
            should_stop=asked.is_set,
            measure=quick_look(config),
        )


def main() -> int:
    """Parse, check, train and report how it ended; return `STOPPED` if a signal stopped it."""
    log_lines()
    parser = argument_parser(__doc__ or "")
    parser.add_argument(
        "--dry-run", action="store_true", help="check all that a start checks, print the plan, start nothing"
    )
    config, arguments = parse_arguments(parser)
    if started_by_torchrun():
        config = replace(config, cluster=replace(config.cluster, engine="process"))
    here = config.cluster.engine == "process"
    if here:
        check_processes(config)
    else:
        # Imported only here, so that other engines do not need ray.
        from jebm.on_ray.cluster import check_room, runs_here  # noqa: PLC0415
        from jebm.on_ray.places import resolve_paths  # noqa: PLC0415
        from jebm.on_ray.trainer import train  # noqa: PLC0415

        config = resolve_paths(config)
    plan = make_plan(config, read_images=here or runs_here(), deep=arguments.dry_run)
    check_quick_look(config, plan.data, plan.judging, plan.images)
    tell(plan.describe())
    if plan.finished:
        tell(f"already finished: all {plan.total_steps:,} steps; to train further, raise train.epochs")
        return 0
    if arguments.dry_run:
        Lease(open_store(config.run.storage).child(config.run.name)).check()
        if not here:
            check_room(config)
        return 0
    result = train_here(config) if here else train(config, provenance())
    tell(f"{result.status}: step {result.step:,} of {result.total_steps:,}; results in {result.place}")
    if result.status == "stopped":
        tell("the same command resumes it")
        return STOPPED
    return 0
