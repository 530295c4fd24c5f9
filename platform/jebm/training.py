"""Train from Python, on Ray or in this process: what `jebm train` does, with a callback at each report."""

import signal
import threading
from contextlib import ExitStack
from dataclasses import replace

from jebm.cli import announce
from jebm.config import Config
from jebm.evaluate.quick import check_quick_look, quick_look
from jebm.store.storage import open_store
from jebm.train.lease import Lease
from jebm.train.loop import Result
from jebm.train.loop import fit as fit_here
from jebm.train.plan import Plan, make_plan
from jebm.train.provenance import provenance
from jebm.train.recorder import Enough, never
from jebm.train.runtime import STOPPING, check_processes, first_signal, process_runtime, started_by_torchrun

__all__ = ["fit", "planned", "train"]


def fit(config: Config, on_report: Enough = never) -> Result:
    """Train a config to its end, from the run's newest checkpoint if any, and return how it ended.

    `on_report` gets a `Report` (step, and metrics by name) every `train.report_every_steps` and at every
    evaluation; if it returns True the run ends with a last checkpoint. In this process it ends at that step;
    on Ray the callback runs in the driver, within a second of the report, and the run ends some steps later.
    After Ray has restarted workers, some steps are reported again. SIGTERM and SIGINT stop the run after a
    step.

    Raises:
        ConfigError, DataError, StoreError, CheckpointError: before the first step; nothing is lost.
        DivergedError: loss or gradient is not finite; the newest checkpoint predates that.
    """
    config, _ = planned(config)
    return train(config, on_report)


def planned(config: Config, *, deep: bool = False) -> tuple[Config, Plan]:
    """Return the config as it will be trained here, and its plan; starts nothing. `deep` as in `make_plan`.

    Raises:
        ConfigError, DataError, StoreError, CheckpointError: the start would raise it.
    """
    if started_by_torchrun():
        config = replace(config, cluster=replace(config.cluster, engine="process"))
    here = config.cluster.engine == "process"
    if here:
        check_processes(config)
    else:
        # Imported only here, so that other engines do not need ray.
        from jebm.on_ray.cluster import runs_here  # noqa: PLC0415
        from jebm.on_ray.places import resolve_paths  # noqa: PLC0415

        config = resolve_paths(config)
    plan = make_plan(config, read_images=here or runs_here(), deep=deep)
    check_quick_look(config, plan.data, plan.judging, plan.images)
    return config, plan


def train(config: Config, on_report: Enough = never) -> Result:
    """Train a config that `planned` returned; otherwise as `fit`."""
    if config.cluster.engine == "process":
        return _train_here(config, on_report)
    from jebm.on_ray.trainer import train as train_on_ray  # noqa: PLC0415  (without Ray: no ray needed)

    return train_on_ray(config, provenance(config), on_report)


def _train_here(config: Config, on_report: Enough) -> Result:
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
        return fit_here(
            config,
            runtime,
            provenance=provenance(config),
            should_stop=asked.is_set,
            enough=on_report,
            measure=quick_look(config),
        )
