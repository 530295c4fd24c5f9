"""What rank 0 writes beside the checkpoints: a line log, JSONL metrics, TensorBoard, pictures, run.json.

Files are written to a folder. Where the run's storage is remote, the folder is a scratch one, and a thread
puts what has changed under `<run>/` in the store every 15 s, so that the log outlives the machine.
"""

import json
import logging
import math
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from jebm.config import Config, config_to_dict, leaves
from jebm.errors import StoreError
from jebm.store.storage import LocalStore, Store
from jebm.train.eta import time_left
from jebm.train.pictures import sheet

__all__ = ["Journal"]

_NOT_SHAPING = ("run.", "data.", "checkpoint.", "evaluation.", "cluster.")
_LOG = logging.getLogger("jebm.train")
_MIRROR_EVERY_SECONDS = 15.0
_LAST_PATIENCE_SECONDS = 60.0  # of the last copy: after it the scratch folder is gone


class Journal:
    """The log of one run, continued from `step`: lines of later steps, left by a crash, are dropped."""

    def __init__(self, store: Store, config: Config, *, step: int, facts: Mapping[str, Any]) -> None:
        """Open the journal of run `config.run.name` under `store` (the run's storage)."""
        self._remote = None if isinstance(store, LocalStore) else store.child(config.run.name)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if isinstance(store, LocalStore):
            self._folder = store.folder / config.run.name
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="jebm-")
            self._folder = Path(self._scratch.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._fetch("run.json", "metrics.jsonl")
        self._drop_lines_after(step)
        self._write_facts(config, step, facts)
        self._metrics = (self._folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step or None)
        self._config = config
        self._mirror = None if self._remote is None else _Mirror(self._folder, self._remote)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._board.close()
        if self._mirror is not None:
            self._mirror.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    @property
    def place(self) -> str:
        """URI or path under which the run's files are found."""
        return str(self._folder) if self._remote is None else self._remote.uri

    def metrics(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Write one report: a line to the log, a line to metrics.jsonl, scalars to TensorBoard."""
        row = {"step": step, **{name: _finite(value) for name, value in metrics.items()}}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        left = time_left(self._config, step, total_steps, metrics["time/seconds_per_step"])
        _LOG.info("%s", _line(step, total_steps, metrics, left))

    def pictures(self, step: int, grids: dict[str, Tensor]) -> None:
        """Write one sheet of pictures (PNG) and each grid to TensorBoard."""
        folder = self._folder / "pictures"
        folder.mkdir(exist_ok=True)
        sheet(grids).save(folder / f"step-{step:08d}.png")
        for caption, picture in grids.items():
            self._board.add_image(caption.replace(":", " -"), picture, step)
        self._board.flush()

    def hyperparameters(self, metrics: Mapping[str, float]) -> None:
        """Write what shapes the result beside the final metrics, for TensorBoard's HPARAMS page."""
        values = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in leaves(config_to_dict(self._config))
            if key == "run.seed" or not key.startswith(_NOT_SHAPING)
        }
        self._board.add_hparams(values, {f"final/{name}": v for name, v in metrics.items()}, run_name=".")

    def _fetch(self, *keys: str) -> None:
        for key in keys:
            if self._remote is not None and self._remote.head(key) is not None:
                (self._folder / key).write_bytes(self._remote.get(key))

    def _drop_lines_after(self, step: int) -> None:
        path = self._folder / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A crash can leave half a line at the end: only whole ones count.
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            path.write_text("".join(kept), encoding="utf-8")

    def _write_facts(self, config: Config, step: int, facts: Mapping[str, Any]) -> None:
        path = self._folder / "run.json"
        attempts = json.loads(path.read_text(encoding="utf-8"))["attempts"] if path.exists() else []
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        attempts.append({"started": now, "from_step": step, **facts})
        record = {"run": config.run.name, "config": config_to_dict(config), "attempts": attempts}
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class _Mirror:
    """A thread that copies changed files of a folder into a store.

    What fails is tried again: the log is not worth a run, and training never waits for it.
    """

    def __init__(self, folder: Path, store: Store) -> None:
        self._folder, self._store = folder, store
        self._sent: dict[str, tuple[int, int]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy what is left, and end."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(_MIRROR_EVERY_SECONDS):
            self._copy()
        self._store = self._store.patient(_LAST_PATIENCE_SECONDS)
        self._copy()

    def _copy(self) -> None:
        for path in sorted(p for p in self._folder.rglob("*") if p.is_file()):
            key = path.relative_to(self._folder).as_posix()
            stamp = (path.stat().st_size, path.stat().st_mtime_ns)
            if self._sent.get(key) == stamp:
                continue
            try:
                self._store.put(key, path.read_bytes())
            except (StoreError, OSError) as error:
                _LOG.warning("could not store %s, will try again: %s", key, error)
                return
            self._sent[key] = stamp


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _line(step: int, total_steps: int, metrics: Mapping[str, float], left: str) -> str:
    rates = " ".join(f"{value:.2f}" for name, value in metrics.items() if name.startswith("rate/"))
    measured = "".join(
        f"  {name.removeprefix('evaluation/')} {value:.4g}"
        for name, value in metrics.items()
        if name.startswith("evaluation/")
    )
    nets = f"distortion {metrics['distortion']:.2f}  rates [{rates}]  " if "distortion" in metrics else ""
    return (
        f"step {step}/{total_steps}  {nets}"
        f"f posterior {metrics['f_posterior']:+.3f} prior {metrics['f_prior']:+.3f}  "
        f"{metrics['time/images_per_second']:.0f} images/s  "
        f"chain {metrics['time/chain_share']:.0%}  data {metrics['time/data_share']:.0%}  "
        f"{left}{measured}"
    )
