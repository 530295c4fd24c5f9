"""CelebA: the aligned images in their official zip, with the official partition."""

import codecs
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from jebm.data.members import folder_description, image_members
from jebm.data.pixels import Encoded, encoded_source, fit_transforms
from jebm.data.source import (
    Batch,
    Request,
    Shape,
    Source,
    SourceDescription,
    damaged,
    described,
    passed_over,
)
from jebm.data.splits import canonical
from jebm.errors import ConfigError, DataError

__all__ = ["open_celeba"]

_CROP = 148  # of 178×218: the crop used in the generative-model literature
_SIZE = 64
_SPLITS = {"train": "0", "val": "1", "test": "2"}
_PARTITION_BYTES_LIMIT = 64 << 20  # the official file has 3 MB


def open_celeba(path: Path, request: Request) -> Source:
    """Open the images of a split; DataError if they are damaged or there is no partition file."""
    split = request.split or "train"
    if canonical(split) not in _SPLITS:
        raise ConfigError(f"split: CelebA has {', '.join(_SPLITS)}, not {split!r}")
    partition = request.partition or path.with_name("list_eval_partition.txt")
    if not partition.exists():
        raise DataError(f"{partition}: no such file; put CelebA's list_eval_partition.txt beside the archive")
    numbers = _partition(partition)
    names = [name for name, number in numbers.items() if number == _SPLITS[canonical(split)]]
    # Map names to archive paths: the partition lists names without folders.
    members = image_members(path)
    places: dict[str, str] = {}
    for place in members.names:
        name = PurePosixPath(place).name
        if name in numbers and name in places:
            raise damaged(path, f"image {name} is twice in it")
        places[name] = place
    absent = next((name for name in names if name not in places), None)
    if absent is not None:
        raise damaged(path, f"image {absent} of {partition.name} is not in it")
    left_out = Counter(members.others)
    left_out["of other splits"] = sum(number != _SPLITS[canonical(split)] for number in numbers.values())
    left_out["not in the partition"] = len(places.keys() - numbers.keys())

    def encoded() -> Iterator[Encoded]:
        for place, data in members.read(chosen):
            yield Encoded(place, data, -1)

    size = request.size or _SIZE
    transforms = (f"centre crop {_CROP}x{_CROP}", *fit_transforms(size, request.channels))
    chosen = [places[name] for name in names]
    file = folder_description(path, members.read(chosen)) if path.is_dir() else described(path)
    description = SourceDescription((file, described(partition)), "celeba", transforms)
    beside = [file.name for file in path.parent.glob("list_*") if file != partition]
    remarks = passed_over(+left_out, [*members.label_files, *beside])

    def source(shape: Shape, read: Callable[[], Iterator[Batch]]) -> Source:
        return Source("celeba", split, *shape, len(names), description, read, remarks)

    return encoded_source(path, request, source, encoded, size=size, crop=_CROP)


def _partition(path: Path) -> dict[str, str]:
    """Return each image's split number, from the official file or Kaggle's CSV."""
    text = _text(path)
    rows = [re.split(r"[,\s]+", line.strip()) for line in text.splitlines() if line.strip()]
    if rows and rows[0] == ["image_id", "partition"]:
        rows = rows[1:]
    if not rows or any(len(row) != 2 or row[1] not in _SPLITS.values() for row in rows):
        raise DataError(f"{path}: not lines like `000001.jpg 0`; give CelebA's list_eval_partition.txt")
    numbers = {row[0]: row[1] for row in rows}
    if len(numbers) != len(rows):
        twice = next(name for name, times in Counter(row[0] for row in rows).items() if times > 1)
        raise DataError(f"{path}: names {twice} twice; give CelebA's list_eval_partition.txt")
    return numbers


def _text(path: Path) -> str:
    """Return a file's text, decoded as UTF-16 if it begins with that byte-order mark, else as UTF-8."""
    with path.open("rb") as file:
        data = file.read(_PARTITION_BYTES_LIMIT + 1)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        if len(data) > _PARTITION_BYTES_LIMIT:
            raise ValueError
        return data.decode("utf-16" if wide else "utf-8-sig")
    except ValueError as error:
        raise DataError(f"{path}: not text; give CelebA's list_eval_partition.txt") from error
