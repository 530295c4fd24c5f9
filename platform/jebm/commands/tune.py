r"""Search for a better config: parallel trials on Ray, proposed by Optuna; then a report.

  on this machine:   jebm tune --config jobs/configs/fashion_mnist.yaml \
                       --search jobs/searches/joint.yaml --run.name joint \
                       --cluster.workers 1 --evaluation.every_steps 200
  on a cluster:      ray job submit --working-dir . -- python jobs/tune.py --config … --search … \
                       --run.storage s3://bucket/prefix
  show the plan:     … --dry-run
  only the report:   jebm tune report s3://bucket/prefix/joint --output report
  while it runs:     jebm tune watch s3://bucket/prefix/joint

All trials share the config; any key can be set on the command line. The search file names the keys that vary,
the metric to optimise, the number of trials, and whether weak trials end early (docs/sweeps.md). The sweep is
named run.name and stored in run.storage; each trial is a run of its own, in trials/ below it. The same
command resumes a sweep that was stopped or killed; with more --trials it adds to it.
"""

import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from jebm.cli import STOPPED, log_lines, tell
from jebm.evaluate.quick import check_quick_look
from jebm.parser import argument_parser, job_parser, parse, parse_arguments
from jebm.store.storage import Store, open_store
from jebm.sweep.report import make_report, write_tensorboard
from jebm.sweep.space import load_search
from jebm.sweep.study_log import run_name
from jebm.sweep.watch import Watch
from jebm.train.lease import Lease, last_holder
from jebm.train.plan import make_plan
from jebm.train.provenance import provenance
from jebm.train.runtime import first_signal
from jebm.train.status import state_of

__all__ = ["main"]


def report(arguments: list[str]) -> None:
    """Write the report of a sweep, finished or not, to a local folder."""
    parser = job_parser("Make the report of a sweep, finished or not, and best.yaml: the best config so far.")
    parser.usage = "%(prog)s report SWEEP [--output DIR] [--tensorboard]"
    parser.add_argument("sweep", help="run.storage/run.name of the sweep")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder to write to")
    parser.add_argument(
        "--tensorboard", action="store_true", help="also write what TensorBoard's HPARAMS page compares"
    )
    values = parse(parser, arguments)
    tell(str(make_report(open_store(values.sweep), values.output)))
    if values.tensorboard:
        tell(str(write_tensorboard(open_store(values.sweep), values.output)))


def watch(arguments: list[str]) -> None:
    """Serve the page of a sweep, with its progress, until Ctrl-C."""
    parser = job_parser("Show a sweep's page in a browser of this machine, refreshed while it runs.")
    parser.usage = "%(prog)s watch SWEEP"
    parser.add_argument("sweep", help="run.storage/run.name of the sweep")
    store = open_store(parse(parser, arguments).sweep)
    server = Watch(store, lambda: state_of(last_holder(store), 0, None) == "running")
    tell(f"http://127.0.0.1:{server.port}/ shows {store.uri}; Ctrl-C ends it")
    with suppress(KeyboardInterrupt), first_signal(_interrupt):
        server.serve()


def _interrupt(_: signal.Signals) -> NoReturn:
    raise KeyboardInterrupt


def store_report(store: Store) -> None:
    """Store the report and the best config beside the trials."""
    with tempfile.TemporaryDirectory(prefix="jebm-") as scratch:
        make_report(store, Path(scratch))
        for path in sorted(found for found in Path(scratch).rglob("*") if found.is_file()):
            key = path.relative_to(scratch).as_posix()
            store.put(key if key == "best.yaml" else f"report/{key}", path.read_bytes())


def search() -> int | None:
    """Parse, check, run the trials and print the best.

    Returns 1 if none finished, `STOPPED` if stopped, None if dry.
    """
    parser = argument_parser(__doc__ or "")
    parser.usage = (
        "%(prog)s --search FILE [--config FILE] [--KEY VALUE ...]\n       %(prog)s report|watch SWEEP"
    )
    parser.add_argument("--search", required=True, help="YAML file: the space, the objective, the trials")
    parser.add_argument("--trials", type=int, help="number of trials, in place of the search file's")
    parser.add_argument(
        "--dry-run", action="store_true", help="check all that a start checks, print the plan, start nothing"
    )
    config, arguments = parse_arguments(parser)
    from jebm.on_ray.cluster import check_room, runs_here  # noqa: PLC0415
    from jebm.on_ray.places import resolve_paths  # noqa: PLC0415  (neither a report nor a typo needs it)
    from jebm.on_ray.tuner import plan_sweep, tune  # noqa: PLC0415

    config = resolve_paths(config)
    # Check everything and print the plan before any trial starts.
    base = make_plan(config, read_images=runs_here(), deep=arguments.dry_run)
    check_quick_look(config, base.data, base.judging, base.images)
    plan = plan_sweep(load_search(arguments.search, config, arguments.trials), base)
    tell(plan.describe())
    if arguments.dry_run:
        Lease(open_store(config.run.storage).child(config.run.name)).check()
        check_room(config)
        return None
    # Run the trials, then print the outcome and how to train with the best config.
    ending = tune(plan, provenance(config))
    counts = ", ".join(f"{count} {status}" for status, count in sorted(ending.trials.items()))
    place = ending.place.removeprefix("file://")
    tell(f"{ending.status}: {counts}; results in {place}")
    if ending.status == "stopped":
        tell("the same command resumes it")
        return STOPPED
    store_report(open_store(ending.place))
    tell(f"report   {place}/report/report.html")
    if not ending.best:
        tell("no trial has finished: there is no best one")
        return 1
    first, *others = ending.best
    goals = zip(plan.search.objectives, first.values, strict=True)
    tell(f"best     {run_name(first.number)}: " + ", ".join(f"{goal.metric} {v:.5g}" for goal, v in goals))
    if others:
        tell(f"         unbeaten as well: {', '.join(run_name(trial.number) for trial in others)}")
    fetch = f"jebm tune report {place} && " if "://" in place else ""
    tell(f"train    {fetch}jebm train --config {'report' if fetch else place}/best.yaml")
    return 0


def main() -> int | None:
    """Search, or report on a search, or watch one."""
    log_lines()
    for name, command in (("report", report), ("watch", watch)):
        if sys.argv[1:2] == [name]:
            command(sys.argv[2:])
            return None
    return search()
