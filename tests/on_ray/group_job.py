"""A job that trains in Ray workers, by the keys of jobs/train.py; says what they have left of their group."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "platform"))

from jebm.cli import tell
from jebm.on_ray import trainer
from jebm.on_ray.meeting import GroupConfig
from jebm.parser import argument_parser, parse_arguments


def threads_left() -> int:
    from jebm.train.group import running_loops

    return len(running_loops())


class Backend(GroupConfig().backend_cls):  # type: ignore[misc]
    """Counts the threads once Ray has ended the group."""

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        super().on_shutdown(worker_group, backend_config)
        tell(f"threads left: {worker_group.execute(threads_left)}")


class WatchedConfig(GroupConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return Backend


def main() -> None:
    config, _ = parse_arguments(argument_parser(""))
    trainer.GroupConfig = WatchedConfig  # type: ignore[misc]
    trainer.train(config, {})


if __name__ == "__main__":
    main()
