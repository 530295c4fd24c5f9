"""Outputs of a sweep: the report, the best config, events for TensorBoard's HPARAMS page."""

import json
import re
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from jebm.errors import ConfigError, StoreError
from jebm.parser import config_from_dict, config_to_yaml, override
from jebm.report.findings import number
from jebm.report.write import write_report
from jebm.store.storage import LocalStore, Store
from jebm.sweep.findings import sweep_findings
from jebm.sweep.results import Sweep, Trial, read_sweep

__all__ = ["make_report", "write_tensorboard"]

_LONGEST_NAME = 100  # of a run


def make_report(folder: Store, output: Path) -> Path:
    """Write report.html, .md, .json and, once a trial has finished, best.yaml; return the page's path.

    `folder` is the sweep's; the sweep may still be running. The same sweep gives the same bytes.

    Raises:
        CheckpointError: there is no sweep, or it cannot be read.
        ConfigError: its base config is not valid in this version.
        StoreError: the store cannot be read, or `output` cannot be written.
    """
    sweep = read_sweep(folder)
    best = sweep.best()
    config = None if best is None else _best_config(sweep, best)
    findings = sweep_findings(sweep, folder)
    place = LocalStore(output.absolute())
    try:
        if config is None:
            (output / "best.yaml").unlink(missing_ok=True)  # of another sweep or of an earlier state
        else:
            place.put("best.yaml", config.encode("utf-8", "backslashreplace"))
        write_report(findings, place, "report")
    except (OSError, StoreError) as error:
        raise StoreError(f"{output}: cannot write the report: {error}") from error
    return output / "report.html"


def write_tensorboard(folder: Store, output: Path) -> Path:
    """Write the searched values and the results of all trials into `output`/tensorboard, and return it.

    TensorBoard's HPARAMS page then compares them. Replaces events of an earlier call.
    """
    sweep = read_sweep(folder)
    board = output / "tensorboard"
    try:
        for trial in sweep.trials:
            place = board / trial.name
            for old in place.glob("events.out.tfevents.*"):
                old.unlink()
            values = {
                key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
                for key, value in trial.params.items()
            }
            metrics = {"images": float(trial.images), "seconds": trial.seconds}
            for objective, value in zip(sweep.objectives, trial.values, strict=False):
                metrics[objective.metric] = value
            with SummaryWriter(str(place)) as writer:
                writer.add_hparams({**values, "status": trial.status}, metrics, run_name=".")
    except OSError as error:
        raise StoreError(f"{board}: cannot write: {error.strerror or error}") from error
    return board


def _best_config(sweep: Sweep, best: Trial) -> str:
    """Return the base config with the best trial's values, as YAML for --config; with a new run name."""
    name = f"{sweep.name[: _LONGEST_NAME - 5]}-best"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        name = "best"
    try:
        config = override(config_from_dict(sweep.config), best.params | {"run.name": name})
    except ConfigError as error:
        raise ConfigError(f"sweep.json: its config is none of this version: {error}") from error
    results = ", ".join(f"{o.metric} {number(v)}" for o, v in zip(sweep.objectives, best.values, strict=True))
    comment = f"Trial {best.name} of sweep {sweep.name}: {results} after {best.images:,} images."
    return f"# {' '.join(comment.split())}\n{config_to_yaml(config)}"
