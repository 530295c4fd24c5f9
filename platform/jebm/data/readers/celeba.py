"""CelebA: the aligned images in their official zip, with the official partition and attributes."""

import codecs
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from jebm.data.factors import Factor, factors_of
from jebm.data.members import folder_description, image_members
from jebm.data.pixels import Encoded, encoded_source, fit_transforms
from jebm.data.readers.factor_files import joined
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
_TEXT_BYTES_LIMIT = 64 << 20  # the official lists have 3 and 27 MB
_ATTRIBUTES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
_ANSWERS = {"-1": 0, "0": 0, "1": 1}


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
    attributes = next((each for each in map(partition.with_name, _ATTRIBUTES) if each.is_file()), None)
    file = folder_description(path, members.read(chosen)) if path.is_dir() else described(path)
    description = SourceDescription((file, described(partition)), "celeba", transforms)
    beside = [file.name for file in path.parent.glob("list_*") if file not in {partition, attributes}]
    remarks = passed_over(+left_out, [*members.label_files, *beside])

    def source(shape: Shape, read: Callable[[], Iterator[Batch]]) -> Source:
        return Source("celeba", split, *shape, len(names), description, read, remarks)

    opened = encoded_source(path, request, source, encoded, size=size, crop=_CROP)
    return opened if attributes is None else joined(opened, attributes, *_factors(attributes, names))


def _factors(path: Path, names: Sequence[str]) -> tuple[tuple[Factor, ...], npt.NDArray[np.int32]]:
    """Return the attributes of these images, 0 no and 1 yes, from the official file or Kaggle's CSV."""
    # A count may come first; then the attributes' names; then a line for each image.
    lines = iter(_text(path).splitlines())
    header = _words(next(lines, ""))
    if len(header) == 1 and header[0].isdecimal():
        header = _words(next(lines, ""))
    header = header[1:] if header[:1] == ["image_id"] else header
    try:
        entries = [{"name": name, "categories": ["no", "yes"]} for name in header]
        factors = factors_of({"factors": entries})
    except ValueError as error:
        raise DataError(f"{path}: no list of attributes ({error}); give CelebA's {_ATTRIBUTES[0]}") from error
    places = {name: index for index, name in enumerate(names)}
    rows_NF = np.full((len(names), len(factors)), -1, np.int32)
    for line in lines:
        name, *values = _words(line) or [""]
        if name not in places:
            continue
        if len(values) != len(factors) or not set(values) <= _ANSWERS.keys():
            raise DataError(
                f"{path}: {name} has no {len(factors)} answers 1 or -1; give CelebA's {_ATTRIBUTES[0]}"
            )
        rows_NF[places[name]] = [_ANSWERS[value] for value in values]
    missing = next((name for name, row in zip(names, rows_NF, strict=True) if (row < 0).any()), None)
    if missing is not None or not factors:
        raise DataError(f"{path}: says nothing of {missing or 'any image'}; give CelebA's {_ATTRIBUTES[0]}")
    return factors, rows_NF


def _words(line: str) -> list[str]:
    return re.split(r"[,\s]+", line.strip())


def _partition(path: Path) -> dict[str, str]:
    """Return each image's split number, from the official file or Kaggle's CSV."""
    text = _text(path)
    rows = [_words(line) for line in text.splitlines() if line.strip()]
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
        data = file.read(_TEXT_BYTES_LIMIT + 1)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        if len(data) > _TEXT_BYTES_LIMIT:
            raise ValueError
        return data.decode("utf-16" if wide else "utf-8-sig")
    except ValueError as error:
        raise DataError(f"{path}: not text; give CelebA's original file") from error
