"""Processes of one node that load a data set at once; a file gets a line of JSON for all that they do.

python decoding_worker.py PLACE CACHE JOURNAL PROCESSES DIES: if DIES is 1, the first decoder is killed as it
asks for the last part.
"""

import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import exit_code
from jebm.data.dataset import load_images
from jebm.data.manifest import read_manifest
from jebm.store.storage import Store, open_store

LIMIT_SECONDS = 30


@dataclass(frozen=True)
class Journal:
    """A file that all processes append to."""

    path: Path

    def write(self, **what: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"process": os.getpid(), **what}) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def waiting(self) -> int:
        return len({line["process"] for line in self.lines() if "waiting" in line})


@dataclass(frozen=True)
class WatchedStore:
    """A store that writes down who asks for a part, and answers once all others wait."""

    store: Store
    cache: Path
    journal: Journal
    waiters: int
    deadly: str | None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def get(self, key: str) -> bytes:
        self.asked(key)
        return self.store.get(key)

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        self.asked(key)
        self.store.read_into(key, offset, pieces, etag=etag)

    def asked(self, key: str) -> None:
        if not key.startswith("part-"):
            return
        used = sum(path.stat().st_blocks * 512 for path in self.cache.iterdir())
        self.journal.write(part=key, bytes_in_cache=used)
        deadline = time.monotonic() + LIMIT_SECONDS
        while self.journal.waiting() < self.waiters and time.monotonic() < deadline:
            time.sleep(0.01)
        first = next(line["process"] for line in self.journal.lines() if "part" in line)
        if key == self.deadly and os.getpid() == first:
            os.kill(os.getpid(), signal.SIGKILL)


class Told(logging.Handler):
    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self.journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        self.journal.write(waiting=record.getMessage())


def load(rank: int, place: str, cache: Path, journal: Journal, processes: int, dies: bool) -> None:
    logger = logging.getLogger("jebm.data")
    logger.setLevel(logging.INFO)
    logger.addHandler(Told(journal))
    store = open_store(place)
    deadly = read_manifest(store).parts[-1].name if dies else None
    images = load_images(WatchedStore(store, cache, journal, processes - 1, deadly), cache)
    journal.write(sha256=hashlib.sha256(images.images_NHWC.tobytes()).hexdigest())


if __name__ == "__main__":
    place, cache, journal, processes, dies = sys.argv[1:]
    Path(cache).mkdir()
    work = (place, Path(cache), Journal(Path(journal)), int(processes), dies == "1")
    exit_code(load, int(processes), *work)
