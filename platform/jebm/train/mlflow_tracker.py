"""MLflow as a tracker, through its client: server and credentials come from its environment variables."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jebm.errors import ConfigError
from jebm.train.trackers import About, Ending, Reference, Row

__all__ = ["MlflowTracker"]

_TOKEN_TAG = "jebm.token"  # noqa: S105  (by which a run is found, no secret)
_COUNTED = "time/seconds_per_step"  # a metric that each report has
_ENDINGS: dict[Ending, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_MOST_METRICS, _MOST_PARAMS = 1000, 100  # of a request
_LONGEST_PARAM = 500


class MlflowTracker:
    """A run on an MLflow server, in the experiment MLFLOW_EXPERIMENT_NAME (jebm)."""

    name = "mlflow"

    def __init__(self) -> None:
        """Check the environment.

        Raises:
            ConfigError: MLFLOW_TRACKING_URI is not set: files in this process's folder would be lost.
        """
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError("run.track: mlflow needs the server's address in MLFLOW_TRACKING_URI")
        self._client: Any = None
        self._run = ""

    def open(self, token: str, about: About) -> int:
        """Find the run with this token or create it; return its last step, -1 for none."""
        # A request that waits for minutes would only delay the end of training.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it may hold a password
        from mlflow import MlflowClient  # noqa: PLC0415  (seconds, and only where it is wanted)
        from mlflow.entities import Param  # noqa: PLC0415

        self._client = client = MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jebm")
        known = client.get_experiment_by_name(experiment)
        where = client.create_experiment(experiment) if known is None else known.experiment_id
        found = client.search_runs([where], f"tags.`{_TOKEN_TAG}` = '{token}'", max_results=1)
        tags = {_TOKEN_TAG: token, "jebm.place": about.place}
        run = found[0] if found else client.create_run(where, tags=tags, run_name=about.name)
        self._run = run.info.run_id
        # Parameters cannot change: after a resume with other values run.json has the new ones.
        new = [
            Param(key, str(value)[:_LONGEST_PARAM])
            for key, value in about.config.items()
            if key not in run.data.params
        ]
        for params in _pieces(new, _MOST_PARAMS):
            client.log_batch(self._run, params=params)
        client.update_run(self._run, status="RUNNING")
        return max((point.step for point in client.get_metric_history(self._run, _COUNTED)), default=-1)

    def rows(self, rows: Sequence[Row]) -> None:
        """Log whole reports, as many as fit into a request."""
        from mlflow.entities import Metric  # noqa: PLC0415

        at_once = max(_MOST_METRICS // max(len(row.metrics) for row in rows), 1)
        for some in _pieces(rows, at_once):
            metrics = [
                Metric(name, value, round(row.time * 1000), row.step)
                for row in some
                for name, value in row.metrics.items()
            ]
            self._client.log_batch(self._run, metrics=metrics)

    def file(self, key: str, content: bytes, step: int) -> None:
        """Log an artifact under its key."""
        folder, _, name = key.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="jebm-") as here:
            path = Path(here, name)
            path.write_bytes(content)
            self._client.log_artifact(self._run, str(path), folder or None)

    def checkpoint(self, reference: Reference) -> None:
        """Log where a checkpoint lies, as a small artifact, and tag the run with the newest."""
        self._client.log_dict(self._run, reference.facts(), f"checkpoints/{reference.name}.json")
        self._client.set_tag(self._run, "jebm.checkpoint", reference.uri)

    def close(self, ending: Ending) -> None:
        """Set the run's status; a resume sets it to running again."""
        self._client.set_terminated(self._run, _ENDINGS[ending])


def _pieces(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
