"""Small real images and a small config for the training tests."""

import ctypes
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path

from jebm.config import Config
from jebm.parser import load_config

ROOT = Path(__file__).parents[2]


def stop_in(step: int) -> Callable[[], bool]:
    """A stop request in this step, from 0, of the loop in this thread; the watch of steps asks as well."""
    calls, here = itertools.count(), threading.get_ident()
    return lambda: threading.get_ident() == here and next(calls) == step


def exchange(one: Path, other: Path) -> None:
    """Swap what two names stand for, in one step: a thread that writes there finds no gap. Linux only."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), swap):
        raise OSError(ctypes.get_errno(), "cannot be exchanged", str(one))


def tiny_config(storage: Path | str, **overrides: object) -> Config:
    """The smoke config, smaller still; 1,600 real images in batches of 64, 25 steps an epoch."""
    values: dict[str, object] = {
        "run.storage": str(storage),
        "data.train": str(ROOT / "jobs/data/fashion_mnist_2000/train"),
        "data.held_out": str(ROOT / "jobs/data/fashion_mnist_2000/test"),
        "inference.channels": [4, 8],
        "inference.width": 32,
        "generator.channels": [4, 8],
        "generator.width": 32,
        "energy.width": 16,
        "langevin.steps": 5,
        "train.batch_size": 64,
        "train.epochs": 0.8,
        "train.report_every_steps": 5,
        "train.pictures_every_steps": 0,
        "cluster.workers": 1,
        "cluster.engine": "process",
    }
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(ROOT / "jobs/configs/smoke.yaml", values)
