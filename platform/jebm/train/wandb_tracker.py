"""Weights & Biases as a tracker: project, mode, folder and key come from its environment variables."""

import io
import os
from collections.abc import Sequence
from typing import Any

from PIL import Image

from jebm.train.trackers import About, Ending, Reference, Row

__all__ = ["WandbTracker"]

_STEP = "step"
_FINISH_SECONDS = 10.0
"""How long the end of a run waits for W&B: less than a feed's last patience. Its files keep the rest."""


class WandbTracker:
    """A W&B run, in the project WANDB_PROJECT (jebm); with WANDB_MODE=offline in files, for `wandb sync`."""

    name = "wandb"

    def __init__(self) -> None:
        self._wandb: Any = None
        self._run: Any = None

    def open(self, token: str, about: About) -> None:
        """Begin the run, or resume that of the same token; W&B does not say which steps it has."""
        if self._run is not None:
            return
        import wandb  # noqa: PLC0415  (seconds, and only where it is wanted)

        self._wandb = wandb
        wandb.login(prompt=False)  # no key is an error, not a question on the run's terminal
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jebm"),
            id=token,
            name=about.name,
            resume="allow",
            config=dict(about.config) | {"jebm.place": about.place},
            allow_val_change=True,
            settings=wandb.Settings(
                console="off", silent=True, finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True
            ),
        )
        # Our own axis: W&B's counts calls, and drops what comes late.
        self._run.define_metric("*", step_metric=_STEP)

    def rows(self, rows: Sequence[Row]) -> None:
        """Log each report at its step."""
        for row in rows:
            self._run.log({**row.metrics, _STEP: row.step})

    def file(self, key: str, content: bytes, step: int) -> None:
        """Log a picture at its step, any other file as an artifact."""
        if key.endswith(".png"):
            picture = self._wandb.Image(Image.open(io.BytesIO(content)))
            self._run.log({"pictures": picture, _STEP: step})
            return
        artifact = self._wandb.Artifact(f"{key.replace('/', '-')}-{self._run.id}", type="file")
        with artifact.new_file(key, mode="wb") as file:
            file.write(content)
        self._run.log_artifact(artifact)

    def checkpoint(self, reference: Reference) -> None:
        """Log a checkpoint as an artifact that refers to its folder; nothing is read or uploaded."""
        facts = reference.facts()
        artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata=facts)
        artifact.add_reference(f"{reference.uri}/MANIFEST.json", checksum=False)
        self._run.log_artifact(artifact, aliases=[reference.name, "latest"])

    def close(self, ending: Ending) -> None:
        """End the run; a resume continues it. Raises TimeoutError if W&B does not take all of it."""
        run, self._run = self._run, None
        run.finish(exit_code=1 if ending == "failed" else 0)
