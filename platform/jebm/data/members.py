"""Image files in a folder, zip or tar: their names, their bytes, and what else is there.

Archives are read without extraction. Links are followed if their target exists.
"""

import hashlib
import os
import posixpath
import re
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import features

from jebm.data.source import SourceFile
from jebm.errors import DataError
from jebm.untrusted import escaped

__all__ = [
    "IMAGE_FORMATS",
    "Members",
    "SafeTarInfo",
    "files_below",
    "folder_description",
    "image_members",
    "is_folder_or_file",
    "is_label_file",
    "read_to_the_end",
]

_SUFFIXES = {
    "AVIF": {".avif"},
    "BMP": {".bmp"},
    "GIF": {".gif"},
    "JPEG": {".jfif", ".jpe", ".jpeg", ".jpg"},
    "PNG": {".apng", ".png"},
    "PPM": {".pbm", ".pgm", ".pnm", ".ppm"},
    "TIFF": {".tif", ".tiff"},
    "WEBP": {".webp"},
}
_OPTIONAL = ("AVIF", "WEBP")  # Pillow can be built without them
IMAGE_FORMATS = tuple(kind for kind in _SUFFIXES if kind not in _OPTIONAL or features.check(kind.lower()))
"""The formats Pillow may open; by default it tries all, whatever the name, some with external programs."""

_IMAGE_SUFFIXES = frozenset().union(*(_SUFFIXES[kind] for kind in IMAGE_FORMATS))
_ENCODED_BYTES_LIMIT = 64 << 20  # one PNG or JPEG; anything larger is a zip bomb, not a training image
_TAR_HEADER_BYTES_LIMIT = 1 << 20  # for one long name or one set of attributes
_TAR_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_LINK_BYTES_LIMIT = 4096
_LINKS_IN_TURN = 40
_HIDDEN, _HIDDEN_BEGIN = "hidden", (".", "__MACOSX")
_LABEL_NAME = re.compile(
    r"label|(?<![a-z])(class|categor|annot|attr|target|partition|identit|ground.?truth|gt(?![a-z]))", re.I
)
_LABEL_SUFFIXES = frozenset({"", ".csv", ".json", ".jsonl", ".mat", ".npy", ".npz", ".tsv", ".txt", ".xml"})


@dataclass(frozen=True)
class Members:
    """The images in a folder or archive, and what else it contains."""

    names: list[str]  # relative, with slashes, in reading order
    read: Callable[[Collection[str]], Iterator[tuple[str, bytes]]]  # yields name and bytes of each
    others: Counter[str] = field(default_factory=Counter)  # non-image files, by kind
    label_files: list[str] = field(default_factory=list)


def is_label_file(name: str) -> bool:
    """Return whether a file seems to hold labels for the images beside it."""
    path = PurePosixPath(name)
    return path.suffix.lower() in _LABEL_SUFFIXES and _LABEL_NAME.search(path.name) is not None


def image_members(path: Path) -> Members:
    """Return the images in a folder, zip or tar, with links resolved."""
    if path.is_dir():
        names, others = files_below(path)
        return _sorted_out(sorted(names), others, lambda chosen: _folder_images(path, chosen))
    if zipfile.is_zipfile(path):
        return _zip_members(path)
    return _tar_members(path)


def _sorted_out(
    names: list[str],
    others: Counter[str],
    read: Callable[[Collection[str]], Iterator[tuple[str, bytes]]],
    links: Mapping[str, str] | None = None,
) -> Members:
    """Separate images from other files by name, without opening them."""
    linked = {target for name, target in (links or {}).items() if _kind(name) is None}
    images, label_files = [], []
    for name in names:
        kind = _kind(name)
        if kind is None:
            images.append(name)
        elif name not in linked:
            others[kind] += 1
            if kind != _HIDDEN and is_label_file(name):
                label_files.append(name)
    return Members(images, read, others, label_files)


def _kind(name: str) -> str | None:
    """Return the kind of a non-image file by its name; None for an image."""
    path = PurePosixPath(name)
    if any(part.startswith(_HIDDEN_BEGIN) for part in path.parts):
        return _HIDDEN
    suffix = path.suffix.lower()
    return None if suffix in _IMAGE_SUFFIXES else suffix[:16] or "without a suffix"


# ------------------------------------------------------------------------------------------------ folders


def files_below(root: Path) -> tuple[list[str], Counter[str]]:
    """Return all files below a folder, following links, and counts of entries that are not files.

    A link to a folder is followed only if that folder is not read anyway, so no file comes twice and no link
    loops. A hidden folder counts as one entry.
    """
    names, others = list[str](), Counter[str]()
    here = os.path.realpath(root)
    folders: list[tuple[str, tuple[str, ...]]] = [("", (here,))]
    # Each pending folder carries the real folders that are read anyway above it.
    while folders:
        folder, read_anyway = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = posixpath.join(folder, entry.name)
                is_folder, is_file = is_folder_or_file(entry)
                if is_file:
                    names.append(name)
                elif is_folder and entry.name.startswith(_HIDDEN_BEGIN):
                    others[_HIDDEN] += 1
                elif is_folder and entry.is_symlink():
                    real = os.path.realpath(entry.path)
                    if any(_is_within(real, above) for above in read_anyway):
                        others["linked to a folder that is read anyway"] += 1
                    elif any(_is_within(above, real) for above in read_anyway):
                        others["linked to a folder above"] += 1
                    else:
                        folders.append((name, (*read_anyway, real)))
                elif is_folder:
                    folders.append((name, read_anyway))
                else:
                    others["linked to nothing" if entry.is_symlink() else "not regular"] += 1
    return names, others


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def is_folder_or_file(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Return whether a directory entry is, or links to, a folder, and whether a regular file."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself
        return False, False


def _folder_images(path: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        with (path / name).open("rb") as file:
            yield name, _limited_bytes(file, path, name)


def folder_description(path: Path, read: Iterator[tuple[str, bytes]]) -> SourceFile:
    """Describe a folder as one file: its total size, and a hash over all names and contents."""
    digest, total = hashlib.sha256(), 0
    for name, data in read:
        digest.update(os.fsencode(name) + f"\0{hashlib.sha256(data).hexdigest()}\n".encode())
        total += len(data)
    return SourceFile(escaped(path.resolve().name), total, digest.hexdigest())


def _limited_bytes(file: IO[bytes], path: Path, name: str) -> bytes:
    data = bytearray()
    while piece := file.read(1 << 20):
        data += piece
        if len(data) > _ENCODED_BYTES_LIMIT:
            raise DataError(f"{path}: image {name} has more than {_ENCODED_BYTES_LIMIT >> 20} MiB; remove it")
    return bytes(data)


# --------------------------------------------------------------------------------------------------- zips


def _zip_members(path: Path) -> Members:
    files, links, others = dict[str, zipfile.ZipInfo](), dict[str, str](), Counter[str]()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            # Some Windows programs write backslashes, against the format.
            name = info.filename.replace("\\", "/").lstrip("/")
            if name.endswith("/"):
                continue
            if name in files or name in links:
                others["replaced by a later copy"] += 1
            if stat.S_ISLNK(info.external_attr >> 16) and info.file_size <= _LINK_BYTES_LIMIT:
                target = os.fsdecode(archive.read(info))
                links[name] = posixpath.join(posixpath.dirname(name), target)
            else:
                files[name] = info
    links = _resolved(links, files, others)
    files |= {name: files[target] for name, target in links.items()}
    return _sorted_out(sorted(files), others, lambda names: _zip_images(path, names, files), links)


def _zip_images(
    path: Path, names: Collection[str], files: dict[str, zipfile.ZipInfo]
) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in names:
            try:
                with archive.open(files[name]) as file:
                    yield name, _limited_bytes(file, path, name)
            except RuntimeError as error:  # zipfile's error for encrypted members and unknown compression
                raise DataError(f"{path}: image {name} cannot be read: {error}; zip it anew") from error


# --------------------------------------------------------------------------------------------------- tars


class SafeTarInfo(tarfile.TarInfo):
    """A member of a tar, with a limit on the size of its name and attributes."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:  # the hook that tarfile documents
        if self.type in _TAR_HEADERS and self.size > _TAR_HEADER_BYTES_LIMIT:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        member: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return member


def _tar_members(path: Path) -> Members:
    """List members in archive order: every step back in a compressed tar costs another pass over it."""
    files, links, others = dict[str, int](), dict[str, str](), Counter[str]()
    with tarfile.open(path, tarinfo=SafeTarInfo) as archive:
        for place, member in enumerate(archive):
            name = posixpath.normpath(member.name).lstrip("/")
            if member.isdir():
                continue
            if name in files or name in links:
                others["replaced by a later copy"] += 1
                files.pop(name, None)
                links.pop(name, None)
            if member.isreg():
                files[name] = place
            elif member.islnk():
                links[name] = member.linkname
            elif member.issym():
                links[name] = posixpath.join(posixpath.dirname(name), member.linkname)
            else:
                others["not regular"] += 1
        read_to_the_end(archive)
    # For each member, all names of its bytes: its own first, then those of links to it.
    by_place: dict[int, list[str]] = {place: [name] for name, place in files.items()}
    links = _resolved(links, files, others)
    for name, target in links.items():
        by_place[files[target]].append(name)
    names = [name for place in sorted(by_place) for name in by_place[place]]
    return _sorted_out(names, others, lambda chosen: _tar_images(path, by_place, set(chosen)), links)


def _tar_images(path: Path, by_place: dict[int, list[str]], chosen: set[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, tarinfo=SafeTarInfo) as archive:
        for place, member in enumerate(archive):
            names = [name for name in by_place.get(place, []) if name in chosen]
            file = archive.extractfile(member) if names else None
            if file is not None:
                with file:
                    data = _limited_bytes(file, path, names[0])
                for name in names:
                    yield name, data
        read_to_the_end(archive)


def read_to_the_end(archive: tarfile.TarFile) -> None:
    """Read a compressed tar to its checksum, which lies beyond what tarfile reads."""
    if archive.fileobj is not None:
        while archive.fileobj.read(1 << 20):
            pass


def _resolved(links: dict[str, str], files: Collection[str], others: Counter[str]) -> dict[str, str]:
    """Return each link's file, also through other links; count dangling links in `others`."""
    found: dict[str, str] = {}
    folders = {posixpath.dirname(name) for name in files}
    for name in links:
        target = name
        for _ in range(_LINKS_IN_TURN):
            target = posixpath.normpath(links[target])
            if target not in links:
                break
        if target in files:
            found[name] = target
        else:
            others["linked to a folder" if target in folders else "linked to nothing in the archive"] += 1
    return found
