"""The process group that Ray Train makes for its workers, made so that it can end."""

import importlib
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

__all__ = ["GroupConfig"]


class GroupConfig(TorchConfig):
    """Has Ray make the group only once the workers have imported `jebm.train.group`, which says why."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """The class with which Ray's controller makes and ends the group."""
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:  # noqa: ANN401  (two kinds, none public)
        worker_group.execute(importlib.import_module, "jebm.train.group")
        super().on_start(worker_group, backend_config)
