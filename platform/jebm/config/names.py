"""The names in a storage that tell what a folder is, which no run can have."""

import re

__all__ = ["CHECKPOINT_NAME", "MARKERS", "RUN_FOLDERS", "is_reserved"]

RUN_FOLDERS = ("checkpoints", "lease")
"""Folders of a run that hold none of its results."""

MARKERS = ("run.json", "sweep.json", "comparison.json")
"""Objects that make a folder a run, a sweep or a comparison."""

CHECKPOINT_NAME = re.compile(r"step-(\d{8,15})-a(\d{4,9})", re.ASCII)
"""A checkpoint's folder, with its step and attempt."""


def is_reserved(name: str) -> bool:
    """Return whether a run of this name would be taken for a part of another one."""
    return name in RUN_FOLDERS or name in MARKERS or CHECKPOINT_NAME.fullmatch(name) is not None
