"""Folders, zips and tars of pictures: the requested part, and classes from folder names."""

import contextlib
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from jebm.data.members import folder_description, image_members
from jebm.data.pixels import Encoded, encoded_source, fit_transforms
from jebm.data.source import (
    Batch,
    Request,
    Shape,
    Source,
    SourceDescription,
    counted,
    described,
    passed_over,
)
from jebm.data.splits import chosen_part, folder_parts, named_split
from jebm.errors import ConfigError, DataError
from jebm.untrusted import escaped

__all__ = ["number_order", "open_images"]


def open_images(path: Path, request: Request) -> Source:
    """Open pictures; DataError if they are damaged, ConfigError if an option does not fit."""
    if request.labels not in {None, "folders"}:
        raise ConfigError("labels: for images only `folders` (the class is the parent folder) is known")
    members = image_members(path)
    # The part: a split's folder, or all.
    folders = folder_parts(members.names)
    part, split, remarks = _part(path, request, members.names, folders)
    names = [name for name in members.names if part is None or folders[posixpath.dirname(name)][0] == part]
    left_out = Counter(members.others)
    for name in set(members.names).difference(names):
        other = folders[posixpath.dirname(name)][0]
        left_out[f"of part {other}" if other else "of no part"] += 1
    # Describe pixels and classes for the manifest.
    transforms: tuple[str, ...] = () if part is None else (f"part {escaped(part)}",)
    transforms += fit_transforms(request.size, request.channels)
    labels, classes = dict[str, int](), list[str]()
    if request.labels:
        labels, classes = _classes(path, names, folders)
        transforms += (f"labels count the folders {', '.join(map(escaped, classes))}",)
    elif len(places := {folders[posixpath.dirname(name)][1] for name in names}) > 1:
        remarks += (f"the images lie in {counted(len(places), 'folder')}: labels folders makes them classes",)
    remarks = passed_over(left_out, members.label_files) + remarks
    if not names:
        found = "; ".join(remarks) or "it is empty"
        raise DataError(f"{path}: no images in it ({found}); give a folder, zip or tar of PNG, JPEG, …")

    def encoded() -> Iterator[Encoded]:
        for name, data in members.read(names):
            yield Encoded(name, data, labels.get(posixpath.dirname(name), -1))

    file = folder_description(path, members.read(names)) if path.is_dir() else described(path)

    def source(shape: Shape, read: Callable[[], Iterator[Batch]]) -> Source:
        description = SourceDescription((file,), "images", transforms)
        name = escaped(path.resolve().name.split(".")[0])
        return Source(name, split, *shape, len(names), description, read, remarks)

    return encoded_source(path, request, source, encoded, size=request.size)


def _part(
    path: Path, request: Request, names: list[str], folders: dict[str, tuple[str | None, str]]
) -> tuple[str | None, str, tuple[str, ...]]:
    """Return the part to take (None if there are no parts), its name, and remarks."""
    sizes = Counter(folders[posixpath.dirname(name)][0] for name in names)
    outside = sizes.pop(None, 0)
    parts = {part: sizes[part] for part in sorted(part for part in sizes if part is not None)}
    if not parts:
        return None, *named_split(request.split, path)
    if request.split is None and outside:
        found = f"{counted(outside, 'image')} beside {counted(len(parts), 'part')} ({', '.join(parts)})"
        raise DataError(f"{path}: has {found}; choose one with split")
    part = chosen_part(request.split, parts, path)
    return part, request.split or named_split(None, Path(part))[0], ()


def number_order(names: set[str]) -> list[str]:
    """Return names sorted: numbers numerically, before words."""
    return sorted(
        names,
        key=lambda name: (0, int(name), name) if re.fullmatch(r"-?[0-9]{1,18}", name) else (1, 0, name),
    )


def _classes(
    path: Path, names: list[str], folders: dict[str, tuple[str | None, str]]
) -> tuple[dict[str, int], list[str]]:
    """Return each folder's label, and the class names: the folders that contain images.

    Folders of other parts count too, so a class has the same number in train and test. If all images of a
    part lie in folders of one name (`cat/images`, `dog/images`), the class is the folder above. Raises
    DataError if it is unclear which folder is the class.
    """
    of_part: dict[str | None, set[str]] = {}
    for part, folder in folders.values():
        of_part.setdefault(part, set()).add(folder)
    ours = {folders[posixpath.dirname(name)][0] for name in names}
    named = {part: _class_names(path, of_part[part]) for part in ours}
    for part in of_part.keys() - ours - {None}:
        with contextlib.suppress(DataError):  # another part without classes does not matter
            named[part] = _class_names(path, of_part[part])
    # A part with one folder says nothing about classes, unless it is the only part.
    several = [set(found.values()) for part, found in named.items() if len(set(found.values())) > 1]
    of_ours = {name for part in ours for name in named[part].values()}
    classes = number_order(set().union(*several) if several else of_ours)
    strange = sorted(of_ours.difference(classes))
    if strange:
        raise DataError(
            f"{path}: folder {strange[0]} is no class of the other parts ({', '.join(classes[:8])});"
            " leave labels out for this part"
        )
    number = {name: label for label, name in enumerate(classes)}
    labels = {folder: number[named[part][rest]] for folder, (part, rest) in folders.items() if part in ours}
    return labels, classes


def _class_names(path: Path, folders: set[str]) -> dict[str, str]:
    """Return the class name of each folder of one part."""
    steps = {folder: folder.split("/") if folder else [] for folder in folders}
    while len(folders) > 1 and len({tuple(step[-1:]) for step in steps.values()}) == 1:
        steps = {folder: step[:-1] for folder, step in steps.items()}
    names = {folder: step[-1] if step else "" for folder, step in steps.items()}
    above = {"/".join(steps[folder][:depth]) for folder in folders for depth in range(1, len(steps[folder]))}
    for folder in sorted(folders):
        place = "/".join(steps[folder])
        if not place or place in above:
            raise DataError(
                f"{path}: images lie in {folder or 'it'} itself; for labels each class needs a folder of its"
                " own, with no folder of images inside"
            )
    # The same name under several folders: either level could be the class.
    places: dict[str, set[str]] = {}
    for folder in folders:
        places.setdefault(names[folder], set()).add(posixpath.dirname("/".join(steps[folder])))
    for name, parents in sorted(places.items()):
        if len(parents) > 1:
            one, other, *_ = sorted(parents)
            raise DataError(
                f"{path}: {name} lies in {one or 'it'} and in {other}, so that it is not clear which folder"
                " is the class; move the images"
            )
    return names
