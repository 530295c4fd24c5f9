"""Reports on their way from rank 0 to the driver, through Ray's key-value store: a few hundred bytes each."""

import json
import uuid
from contextlib import suppress
from dataclasses import dataclass, field

import ray
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from jebm.train.recorder import Report

__all__ = ["ReportBox"]

_NAMESPACE = "jebm"


@dataclass(frozen=True)
class ReportBox:
    """Holds reports until the driver takes them; visible in every process of the cluster.

    Ray Train's own reports would make all ranks wait for its controller, at every report.
    """

    key: str = field(default_factory=lambda: f"reports/{uuid.uuid4().hex}/")

    def put(self, report: Report) -> None:
        """Add a report; if the head is out of reach it is lost, and the run continues."""
        content = json.dumps({"step": report.step, "metrics": report.metrics})
        with suppress(ray.exceptions.RayError):
            _internal_kv_put(f"{self.key}{report.step:015d}", content, namespace=_NAMESPACE)

    def take(self) -> list[Report]:
        """Return the reports that have come since the last call, by step, without checkpoints."""
        if not ray.is_initialized():
            return []
        found = []
        with suppress(ray.exceptions.RayError):  # the head is briefly out of reach: the rest comes later
            for key in sorted(_internal_kv_list(self.key, namespace=_NAMESPACE)):
                content = _internal_kv_get(key, namespace=_NAMESPACE)
                _internal_kv_del(key, namespace=_NAMESPACE)
                if content is not None:
                    found.append(Report(**json.loads(content), checkpoints=()))
        return found
