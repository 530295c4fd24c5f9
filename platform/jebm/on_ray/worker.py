"""What runs in each Ray Train worker: the context becomes a `Runtime`, and `fit` does the rest."""

import dataclasses
import logging
from typing import Any

import ray.train
import ray.train.torch

from jebm.cli import log_lines
from jebm.errors import CheckpointError, ConfigError, DataError, DivergedError
from jebm.parser import config_from_dict
from jebm.train.loop import fit
from jebm.train.runtime import Runtime, prepare_process

__all__ = ["work"]


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train as one worker of the group; `arguments` holds `config` and `provenance` as plain dicts.

    Returns the `Result` as a dict, or {"error": kind, "message": text} where a restart of the group would
    meet the same again: bad values, data or checkpoint (raised on all ranks alike), or divergence.
    """
    log_lines()
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it prints every report in full
    config = config_from_dict(arguments["config"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    prepare_process(config, device)
    runtime = Runtime(context.get_world_rank(), context.get_world_size(), device)
    try:
        result = fit(config, runtime, provenance=arguments["provenance"], on_report=_report)
    except (ConfigError, DataError, CheckpointError, DivergedError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    return dataclasses.asdict(result)


def _report(step: int, metrics: dict[str, float]) -> None:
    ray.train.report({"step": step, **metrics})
