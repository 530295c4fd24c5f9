"""idx files, the format of MNIST and its variants: images, and labels beside them."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jebm.data.members import is_folder_or_file, is_label_file
from jebm.data.pixels import refitted
from jebm.data.readers.label_files import idx_file, idx_header, label_file
from jebm.data.source import (
    Batch,
    Request,
    Source,
    SourceDescription,
    damaged,
    described,
    exactly,
    images_per_batch,
    passed_over,
)
from jebm.data.splits import chosen_part, name_parts, named_split
from jebm.errors import DataError
from jebm.untrusted import escaped

__all__ = ["idx_images", "open_idx"]

_IMAGES = re.compile(r"images[^a-z]?idx[34]", re.I)


def idx_images(folder: Path) -> list[Path]:
    """Return the idx image files in a folder, or else those in the folders directly below.

    Some archives unpack into folders named like the file; such a folder is not a file.
    """
    found, below = _listed(folder)
    for inner in [] if found else below:
        found += _listed(inner)[0]
    return sorted(found)


def _listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the idx image files in a folder, and its subfolders."""
    files, folders = list[Path](), list[Path]()
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder, is_file = is_folder_or_file(entry)
            if is_folder and not entry.name.startswith("."):
                folders.append(folder / entry.name)
            elif is_file and _IMAGES.search(entry.name):
                files.append(folder / entry.name)
    return files, folders


def open_idx(path: Path, request: Request) -> Source:
    """Open a split's images and labels; DataError if they are damaged or missing."""
    left_out: Counter[str] = Counter()
    if path.is_dir():
        images_path, split, left_out = _in_folder(path, request.split)
        remarks: tuple[str, ...] = ()
    else:
        images_path = path
        split, remarks = named_split(request.split, path)
    with idx_file(images_path) as file:
        dtype, (images, *dimensions) = idx_header(file, images_path)
    if len(dimensions) not in {2, 3}:
        raise DataError(f"{images_path}: holds no images but labels; give the images file")
    if dtype != np.uint8:
        raise DataError(f"{images_path}: not an idx file of unsigned bytes, but of {dtype}")
    # Labels: the file given, or the one named like the images file but for "labels".
    beside = _label_files_beside(images_path)
    labels_path = Path(request.labels) if request.labels is not None else _labels_of(images_path, beside)
    labels_N = None if labels_path is None else label_file(labels_path, images)
    unused = [file.name for file in beside if _same_split(file, images_path) and file != labels_path]
    if labels_path is not None:  # ignore copies of the same labels in another form
        unused = [name for name in unused if _labelled(name) != _labelled(labels_path.name)]

    shape = (*dimensions, 1)[:3]
    height, width, channels = shape

    def read() -> Iterator[Batch]:
        step = images_per_batch((height, width, channels))
        with idx_file(images_path) as file:
            idx_header(file, images_path)
            for start in range(0, images, step):
                stop = min(images, start + step)
                data = exactly(file, (stop - start) * math.prod(shape), images_path)
                images_NHWC = np.frombuffer(data, np.uint8).reshape(-1, *shape)
                yield Batch(images_NHWC, None if labels_N is None else labels_N[start:stop])
            if file.read(1):
                raise damaged(images_path, "longer than its header says")

    files = tuple(described(file) for file in (images_path, labels_path) if file is not None)
    description = SourceDescription(files, "idx")
    name = escaped(images_path.resolve().parent.name)
    remarks = passed_over(left_out, unused) + remarks
    source = Source(name, split, height, width, channels, images, description, read, remarks)
    return refitted(source, request.size, request.channels)


def _in_folder(path: Path, asked: str | None) -> tuple[Path, str, Counter[str]]:
    """Return a split's images file in a folder, the split, and counts of other splits' files."""
    found = idx_images(path)
    if not found:
        raise DataError(f"{path}: no idx images in it; give the folder of the original files")
    meanings = name_parts(file.name for file in found)
    parts = Counter(meanings.get(file.name, "train") for file in found)
    part = chosen_part(asked, parts, path, default=True)
    matching = [file for file in found if meanings.get(file.name, "train") == part]
    # Copies of one set (gzipped or not, dots or dashes) count once; different sets are ambiguous.
    if len({_plain(file.name) for file in matching}) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in matching[:6])
        raise DataError(f"{path}: several sets of split {part} in it ({names}); give the file of one of them")
    left_out = Counter({f"of part {name}": number for name, number in parts.items() if name != part})
    return matching[0], asked or part, left_out


def _plain(name: str) -> str:
    """Return a file name without what differs between copies: case, separators, the .gz suffix."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\.gz$", "", name.lower()))


def _labelled(name: str) -> str:
    return re.sub(r"images-idx\d", "labels-idx1", _plain(name))


def _label_files_beside(images: Path) -> list[Path]:
    """Return the files that may hold labels, in the images' folder or in folders beside it."""
    folders = [images.parent]
    if _IMAGES.search(images.parent.name):  # a folder named like the file in it
        folders += [entry for entry in sorted(images.parent.parent.iterdir()) if entry.is_dir()]
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    named = [file for file in files if is_label_file(file.name) or "labels" in file.name.lower()]
    return [file for file in dict.fromkeys(named) if file.is_file()]


def _labels_of(images: Path, beside: Sequence[Path]) -> Path | None:
    """Return the label file that matches the images' name, preferably in the same spelling."""
    spelled = re.sub(r"\.gz$", "", re.sub(r"images(.)idx\d", r"labels\1idx1", images.name))
    alike = [file for file in beside if _plain(file.name) == _labelled(images.name) and file != images]
    order = {spelled: 0, f"{spelled}.gz": 1}
    return min(alike, key=lambda file: order.get(file.name, 2), default=None)


def _same_split(file: Path, images: Path) -> bool:
    meanings = name_parts([file.name, images.name])
    return meanings.get(file.name) in {None, meanings.get(images.name)}
