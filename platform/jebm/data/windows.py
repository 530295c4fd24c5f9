"""A data set larger than the disk: training passes over it in windows of a few parts, which a cache holds.

An epoch is a permutation of the parts, cut into windows, and a permutation of the images of each window. Both
depend on seed and epoch alone, so any step can be the first. While one window is used, the next is decoded;
the one before may still be mapped by a slower process of the node: the cache has room for three.

Shapes: N images, B images of a batch, H rows, W columns, C channels.
"""

import contextlib
import math
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from jebm.data.dataset import default_cache_directory
from jebm.data.manifest import DatasetManifest
from jebm.data.part_reader import decoded
from jebm.data.turns import sole_decoder
from jebm.errors import ConfigError, DataError
from jebm.rng import generator
from jebm.store.protocol import PART_THREADS, Store

__all__ = ["Windows", "parts_at_once"]

_PATIENCE_SECONDS = 600.0  # reading ahead retries a request for so long: nobody waits for it yet
_CLOSED = "closed"
_WINDOWS = 3  # used, decoded ahead, and not yet given up by a slower process


def parts_at_once(manifest: DatasetManifest, cache_gb: float, batch_size: int) -> int:
    """Return how many parts of a data set a window has if `cache_gb` GB hold three.

    Raises ConfigError, naming data.cache_gb and the least that will do, if a window would not hold a batch.
    """
    part_bytes = _part_bytes(manifest)
    parts = min(round(cache_gb * 1e9) // (_WINDOWS * part_bytes), len(manifest.parts))
    # A batch lies in two windows at most if any window but an epoch's last has as many images.
    sizes = accumulate(sorted(part.images for part in manifest.parts))
    least = next((count for count, size in enumerate(sizes, 1) if size >= batch_size), len(manifest.parts))
    if parts < least:
        need = math.ceil(_WINDOWS * least * part_bytes / 1e6) / 1e3
        raise ConfigError(
            f"data.cache_gb: {cache_gb:g} GB are less than {_WINDOWS * least} parts of {manifest.name}, "
            f"which its windows need; set it to ≥ {need:g}"
        )
    return parts


def _part_bytes(manifest: DatasetManifest) -> int:
    """Return the size of the largest part, decoded."""
    return max(part.images for part in manifest.parts) * manifest.image_bytes


class Windows:
    """The images of a data set in an order of windows, of which at most `cache_gb` GB lie on the disk.

    All processes of a node share the files. Raises ConfigError as `parts_at_once`, DataError if the disk has
    less room.
    """

    def __init__(
        self,
        store: Store,
        manifest: DatasetManifest,
        *,
        cache_gb: float,
        batch_size: int,
        seed: int,
        cache_directory: Path | None = None,
    ) -> None:
        directory = default_cache_directory() if cache_directory is None else cache_directory
        self.manifest = manifest
        self._store, self._seed = store.patient(_PATIENCE_SECONDS, self._go_on), seed
        self._directory = directory / f"{manifest.sha256}.parts"
        self._starts = np.array([0, *accumulate(part.images for part in manifest.parts)])
        self._parts_at_once = parts_at_once(manifest, cache_gb, batch_size)
        parts_held = min(_WINDOWS * self._parts_at_once, len(manifest.parts))
        self._check_room(parts_held * _part_bytes(manifest))
        self._windows_in_epoch = -(-len(manifest.parts) // self._parts_at_once)
        self._window = -1
        self._plan: tuple[int, list[list[int]], npt.NDArray[np.int64]] = (-1, [], np.empty(0, np.int64))
        self._closed = threading.Event()
        self._held: dict[int, Future[npt.NDArray[np.uint8]]] = {}
        self._pool = ThreadPoolExecutor(PART_THREADS, thread_name_prefix="jebm-window")

    def close(self) -> None:
        """Decode no further part; `take` and `prepare` raise DataError from now on, in any thread."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def take(self, epoch: int, start: int, rows_B: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Return images by index, (B, H, W, C): rows of `order(epoch)` in a batch that begins at `start`.

        Waits for what is not decoded yet. Raises DataError, StoreError if a part cannot be read.
        """
        parts_B = self._parts_of(epoch, start, rows_B)
        taken_BHWC = np.empty((len(rows_B), *self.manifest.shape[1:]), np.uint8)
        for part in np.unique(parts_B).tolist():
            chosen_B = parts_B == part
            taken_BHWC[chosen_B] = self._decoded(part)[rows_B[chosen_B] - self._starts[part]]
        return taken_BHWC

    def touched(self, epoch: int, start: int, count: int) -> tuple[int, int]:
        """Return the first and the last window of `count` positions of an epoch, counted from epoch 0."""
        _, ends = self._planned(epoch)
        first, last = np.searchsorted(ends, [start, start + count - 1], side="right").tolist()
        return epoch * self._windows_in_epoch + first, epoch * self._windows_in_epoch + last

    def prepare(self, epoch: int, start: int, count: int) -> None:
        """Wait for the windows that these positions touch; `take` of any of their images need not wait then.

        Raises what `take` raises.
        """
        windows, _ = self._planned(epoch)
        first, last = self.touched(epoch, start, count)
        self._move_to(epoch, first % self._windows_in_epoch)
        needed = [windows[number % self._windows_in_epoch] for number in range(first, last + 1)]
        parts = [part for window in needed for part in window]
        self._decode_ahead(parts)
        for part in parts:
            self._decoded(part)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the images of one epoch in their order, (N,), the same on every rank."""
        stream = generator(self._seed, rank=0, position=epoch, purpose="order within windows")
        shuffled = []
        for parts in self._windows(epoch):
            rows = np.concatenate([np.arange(*self._starts[part : part + 2]) for part in parts])
            shuffled.append(rows[torch.randperm(len(rows), generator=stream).numpy()])
        return np.concatenate(shuffled)

    def _windows(self, epoch: int) -> list[list[int]]:
        """Return the parts of each window of an epoch."""
        stream = generator(self._seed, rank=0, position=epoch, purpose="order of parts")
        parts: list[int] = torch.randperm(len(self.manifest.parts), generator=stream).tolist()
        return [parts[i : i + self._parts_at_once] for i in range(0, len(parts), self._parts_at_once)]

    def _planned(self, epoch: int) -> tuple[list[list[int]], npt.NDArray[np.int64]]:
        """Return the windows of an epoch, and the positions at which they end."""
        if epoch != self._plan[0]:
            windows = self._windows(epoch)
            sizes = [sum(self.manifest.parts[part].images for part in parts) for parts in windows]
            self._plan = (epoch, windows, np.cumsum(sizes))
        return self._plan[1:]

    def _parts_of(self, epoch: int, start: int, rows_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the part of each row, (B,), after moving to the window that holds position `start`."""
        self._move_to(epoch, self.touched(epoch, start, 1)[0] % self._windows_in_epoch)
        return np.searchsorted(self._starts, rows_B, side="right") - 1

    def _move_to(self, epoch: int, number: int) -> None:
        """Hold this window of an epoch, and the one after it."""
        windows, _ = self._planned(epoch)
        if self._window != epoch * self._windows_in_epoch + number:
            following = windows[number + 1] if number + 1 < len(windows) else self._windows(epoch + 1)[0]
            self._move(list(dict.fromkeys([*windows[number], *following])))
            self._window = epoch * self._windows_in_epoch + number

    def _move(self, wanted: Sequence[int]) -> None:
        """Give up the parts that are not wanted, and have the wanted ones decoded."""
        gone = self._held.keys() - set(wanted)
        wait([future for part in gone if not (future := self._held.pop(part)).cancel()])
        paths = [self._path(part) for part in gone]
        try:
            if self._window < 0:  # an earlier attempt may have left others
                paths = list({*self._directory.glob("*.u8")} - {self._path(part) for part in wanted})
            for path in paths:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        self._decode_ahead(wanted)

    def _decode_ahead(self, parts: Sequence[int]) -> None:
        for part in parts:
            held = self._held.get(part)
            # What failed ahead of its time, such as while the storage was away, is tried again.
            if held is None or (held.done() and (held.cancelled() or held.exception() is not None)):
                self._held[part] = self._submit(part)

    def _decoded(self, part: int) -> npt.NDArray[np.uint8]:
        try:
            return self._held[part].result()
        except CancelledError as error:  # another thread has called `close`
            raise DataError(_CLOSED) from error

    def _submit(self, part: int) -> Future[npt.NDArray[np.uint8]]:
        self._go_on()
        try:
            return self._pool.submit(self._mapped, part)
        except RuntimeError as error:  # another thread has called `close` since
            raise DataError(_CLOSED) from error

    def _check_room(self, need: int) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._directory).free
            for path in self._directory.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another run gives it up at this moment
                    free += path.stat().st_size
        except OSError as error:
            raise self._unusable(error) from error
        if free < need:
            raise DataError(
                f"{self._directory}: data.cache_gb asks for {need:,} bytes, and {free:,} are free; lower it, "
                "or set JEBM_CACHE to another folder"
            )

    def _path(self, part: int) -> Path:
        return self._directory / f"{self.manifest.parts[part].sha256}.u8"

    def _mapped(self, number: int) -> npt.NDArray[np.uint8]:
        """Return the images of a part, from the file that some process of the node has decoded."""
        part, path = self.manifest.parts[number], self._path(number)
        shape = (part.images, *self.manifest.shape[1:])
        try:
            while True:
                # A process that is ahead may delete the file between any two lines: it is decoded again.
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_size != part.images * self.manifest.image_bytes:
                        path.unlink()
                    return np.memmap(path, np.uint8, "r", shape=shape)
                with sole_decoder(self._directory, part.sha256, part.name, self._go_on) as stem:
                    if not path.exists():
                        self._decode(number, stem.with_suffix(".images"))
        except OSError as error:
            raise self._unusable(error) from error

    def _decode(self, number: int, unfinished: Path) -> None:
        """Write the pixels of a part to its file, which appears complete or not at all."""
        try:
            with unfinished.open("wb") as file:
                for contents in decoded(self._store, self.manifest.parts[number], self.manifest):
                    self._go_on()
                    file.write(contents["images"])
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._path(number))
        finally:
            unfinished.unlink(missing_ok=True)

    def _go_on(self) -> None:
        """Raise DataError once `close` was called: the process could not end before its threads do."""
        if self._closed.is_set():
            raise DataError(_CLOSED)

    def _unusable(self, error: OSError) -> DataError:
        return DataError(
            f"{self._directory}: the image cache cannot be used ({error.strerror or error}); set JEBM_CACHE "
            "to another folder, or data.cache_gb to less than is free there"
        )
