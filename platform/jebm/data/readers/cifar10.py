"""CIFAR-10: the official binary archive, or its folder."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from jebm.data.members import SafeTarInfo, read_to_the_end
from jebm.data.pixels import refitted
from jebm.data.source import (
    BATCH_IMAGES,
    Batch,
    Request,
    Source,
    SourceDescription,
    counted,
    damaged,
    described,
    exactly,
)
from jebm.data.splits import canonical
from jebm.errors import ConfigError, DataError

__all__ = ["is_batch", "open_cifar10"]

_ROW = 1 + 3 * 32 * 32
_MEMBERS = {"train": r"data_batch_\d+", "test": r"test_batch"}
_ANY = re.compile(rf"({'|'.join(_MEMBERS.values())})(\.bin)?")


def is_batch(name: str) -> bool:
    """Return whether a file name belongs to a batch, binary or pickled."""
    return _ANY.fullmatch(name) is not None


def open_cifar10(path: Path, request: Request) -> Source:
    """Open the batches of a split; DataError if they are damaged or pickled."""
    split = request.split or "train"
    if canonical(split) not in _MEMBERS:
        raise ConfigError(f"split: CIFAR-10 has train and test, not {split!r}")
    # Choose the split's batches, and check that they are binary and complete.
    sizes = _sizes(path)
    pattern = re.compile(rf"(.*/)?{_MEMBERS[canonical(split)]}\.bin")
    chosen = {name: size for name, size in sorted(sizes.items()) if pattern.fullmatch(name)}
    if not chosen:
        if any(not name.endswith(".bin") for name in sizes):
            raise DataError(
                f"{path}: the Python version of CIFAR-10 is pickled, and a pickle runs what code is in it;"
                " fetch the binary version, cifar-10-binary.tar.gz, from the same page"
            )
        raise DataError(f"{path}: no CIFAR-10 batch of split {split} in it; give cifar-10-binary.tar.gz")
    if len({PurePosixPath(name).name for name in chosen}) != len(chosen):
        raise DataError(f"{path}: holds a batch twice ({', '.join(chosen)}); leave one of each")
    for name, size in chosen.items():
        if size == 0 or size % _ROW:
            raise damaged(path, f"{name} has {counted(size, 'byte')}, no multiple of {_ROW}")

    def read() -> Iterator[Batch]:
        if path.is_dir():
            for name, size in chosen.items():
                with (path / name).open("rb") as file:
                    yield from _batches(file, f"{path}/{name}", size)
            return
        with tarfile.open(path, tarinfo=SafeTarInfo) as archive:
            for name, size in chosen.items():
                member = archive.extractfile(name)
                if member is not None:  # None only for folders, which are not listed
                    with member:
                        yield from _batches(member, f"{path}/{name}", size)

    files = tuple(described(path / name) for name in chosen) if path.is_dir() else (described(path),)
    images = sum(chosen.values()) // _ROW
    source = Source("cifar10", split, 32, 32, 3, images, SourceDescription(files, "cifar10"), read)
    return refitted(source, request.size, request.channels)


def _sizes(path: Path) -> dict[str, int]:
    """Return the batch files in or directly below a folder, or in an archive, with their sizes."""
    if path.is_dir():
        entries = [*path.glob("*"), *path.glob("cifar-10-batches-*/*")]
        files = [file for file in entries if is_batch(file.name) and file.is_file()]
        return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
    with tarfile.open(path, tarinfo=SafeTarInfo) as archive:
        members = archive.getmembers()
        read_to_the_end(archive)
    return {m.name: m.size for m in members if m.isreg() and is_batch(PurePosixPath(m.name).name)}


def _batches(file: IO[bytes], path: str, size: int) -> Iterator[Batch]:
    for start in range(0, size // _ROW, BATCH_IMAGES):
        count = min(BATCH_IMAGES, size // _ROW - start)
        rows = np.frombuffer(exactly(file, count * _ROW, path), np.uint8).reshape(count, _ROW)
        images_NCHW = rows[:, 1:].reshape(count, 3, 32, 32)
        labels_N = rows[:, 0].astype(np.int32)
        if labels_N.max() > 9:
            raise damaged(path, f"has label {labels_N.max()}, but CIFAR-10's are 0 to 9")
        yield Batch(np.ascontiguousarray(images_NCHW.transpose(0, 2, 3, 1)), labels_N)
