"""Parquet as Hugging Face writes it: columns of encoded images and labels, in one file or many."""

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jebm.data.members import files_below
from jebm.data.pages import largest_page
from jebm.data.pixels import Encoded, encoded_source, fit_transforms
from jebm.data.readers.pictures import number_order
from jebm.data.source import (
    Batch,
    Request,
    Shape,
    Source,
    SourceDescription,
    checked_labels,
    counted,
    damage_is_named,
    described,
    passed_over,
)
from jebm.data.splits import chosen_part, folder_parts, name_parts, named_split
from jebm.errors import DataError
from jebm.untrusted import escaped, parsed_object

__all__ = ["image_columns", "open_parquet", "parquet_files"]

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "class", "target")
_ROWS_AT_ONCE = 256
_BYTES_AT_ONCE = 64 << 20
_WORDS_LIMIT = 1 << 16  # distinct words in a label column
_HINT_BYTES_LIMIT = 16 << 20  # for Hugging Face's metadata in the schema


@dataclass(frozen=True)
class _Columns:
    """The columns used from a file, and those ignored."""

    image: str
    label: str | None
    words: bool  # whether labels are words
    unused: tuple[str, ...]


def open_parquet(path: Path, request: Request) -> Source:
    """Open the files of a split; DataError if they are damaged, differ, or have no image column."""
    files, others_of_set, split, remarks = _files(path, request)
    columns = _agreed([(file, _columns(file)) for file in files])
    if columns.unused:
        remarks += (f"columns seen and not used: {', '.join(map(escaped, columns.unused))}",)
    transforms = fit_transforms(request.size, request.channels)
    numbers: dict[str, int] = {}
    # Labels that are words become numbers, counted over all splits of the set.
    if columns.words and columns.label is not None:
        words = _words([*files, *others_of_set], columns.label)
        if words is None:
            remarks += (
                f"not used as labels: column {columns.label}, of over {_WORDS_LIMIT:,} different words",
            )
            columns = replace(columns, label=None)
        else:
            numbers = {word: number for number, word in enumerate(words)}
            transforms += (f"labels count the words {', '.join(map(escaped, words))}",)
    taken = [columns.image, *([columns.label] if columns.label else [])]

    def encoded() -> Iterator[Encoded]:
        for file in files:
            for batch in _batches(file, taken):
                images = batch.column(columns.image)
                labels = [-1] * len(images)
                if columns.label is not None:
                    labels = _labels(f"{file}, column {columns.label}", batch.column(columns.label), numbers)
                for image, label in zip((image.as_py() for image in images), labels, strict=True):
                    if image is None or image["bytes"] is None:
                        raise DataError(
                            f"{file}: an image without its bytes; embed the images when writing it"
                        )
                    yield Encoded(image.get("path") or file.name, image["bytes"], label)

    images = sum(pq.read_metadata(file).num_rows for file in files)
    description = SourceDescription(tuple(described(file) for file in files), "parquet", transforms)

    def source(shape: Shape, read: Callable[[], Iterator[Batch]]) -> Source:
        name = escaped(path.resolve().name.split(".")[0])
        return Source(name, split, *shape, images, description, read, remarks)

    return encoded_source(path, request, source, encoded, size=request.size)


# -------------------------------------------------------------------------------------------------- files


def parquet_files(folder: Path) -> tuple[list[str], Counter[str]]:
    """Return the Parquet files below a folder, and counts of other files by kind."""
    names, others = files_below(folder)
    found = sorted(name for name in names if name.endswith(".parquet") and "/." not in f"/{name}")
    for name in set(names).difference(found):
        others["hidden" if "/." in f"/{name}" else posixpath.splitext(name)[1] or "without a suffix"] += 1
    return found, others


def _files(path: Path, request: Request) -> tuple[list[Path], list[Path], str, tuple[str, ...]]:
    """Return the files of a split, those of other splits, the split's name, and remarks."""
    if path.is_file():
        split, remarks = named_split(request.split, path)
        return [path], [], split, remarks
    names, others = parquet_files(path)
    if not names:
        raise DataError(f"{path}: no Parquet file in it; give the folder of the original files")
    # A file's part is given by its folder, or else by its name.
    folders = folder_parts(names)
    said = name_parts(posixpath.basename(name) for name in names)
    part_of = {n: folders[posixpath.dirname(n)][0] or said.get(posixpath.basename(n)) for n in names}
    parts = Counter(part for part in part_of.values() if part is not None)
    if parts:
        part = chosen_part(request.split, parts, path, default=True)
        split, remarks = request.split or part, ()
    else:
        part, (split, remarks) = None, named_split(request.split, path)
    chosen = [name for name in names if part_of[name] == part]
    for name in names:
        if part_of[name] != part:
            others[f"of part {part_of[name]}" if part_of[name] else "of no part"] += 1
    remarks = passed_over(others) + _missing_shards(chosen) + remarks
    return [path / n for n in chosen], [path / n for n in names if n not in set(chosen)], split, remarks


def _missing_shards(names: Sequence[str]) -> tuple[str, ...]:
    """Return remarks if names imply missing files (train-00000-of-00004), or folders disagree."""
    shards: dict[tuple[str, int], int] = Counter()
    for name in names:
        if (found := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(-\w+)?\.parquet", name)) is not None:
            shards[found[1], int(found[2])] += 1
    missing = sum(max(0, number - there) for (_, number), there in shards.items())
    places = sorted({posixpath.dirname(name) for name in names})
    remarks = (f"{counted(missing, 'file')} of the set {'is' if missing == 1 else 'are'} not here",)
    unlike = (f"files of {len(places)} folders: {', '.join(map(escaped, places[:4]))}",)
    return (remarks if missing else ()) + (unlike if len(places) > 1 else ())


# ------------------------------------------------------------------------------------------------ columns


def image_columns(schema: pa.Schema) -> list[str]:
    """Return the columns that hold encoded images, as a struct of bytes and path."""
    return [
        column.name
        for column in schema
        if pa.types.is_struct(column.type)
        and any(part.name == "bytes" and _is_binary(part.type) for part in column.type)
    ]


def _is_binary(kind: pa.DataType) -> bool:
    return any(
        is_one(kind) for is_one in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    )


def _columns(file: Path) -> _Columns:
    """Choose a file's columns by name; DataError if that is ambiguous."""
    with damage_is_named(file):
        schema = pq.read_schema(file)
    twice = [name for name, times in Counter(schema.names).items() if times > 1]
    if twice:
        raise DataError(f"{file}: has two columns {twice[0]}; leave one")
    images = image_columns(schema)
    if not images:
        found = ", ".join(schema.names)
        raise DataError(f"{file}: no image column (struct of bytes and path) among {found}")
    image = images[0] if len(images) == 1 else next((name for name in _IMAGE_NAMES if name in images), None)
    if image is None:
        raise DataError(f"{file}: columns {' and '.join(images)} hold images; call the right one image")
    # Labels: by the usual name or Hugging Face's declaration, never just because a column holds integers.
    usable = {c.name: _value_type(c.type) for c in schema if _is_label(_value_type(c.type))}
    named = [name for name in _LABEL_NAMES if name in usable] or _declared_labels(schema, usable)
    if len(named) > 1 and named[0] != "label":
        raise DataError(f"{file}: columns {' and '.join(named)} may be labels; call the right one label")
    label = named[0] if named else None
    unused = tuple(name for name in schema.names if name not in {image, label})
    return _Columns(image, label, label is not None and _is_word(usable[label]), unused)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_word(kind: pa.DataType) -> bool:
    return any(
        is_one(kind) for is_one in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def _is_label(kind: pa.DataType) -> bool:
    numbers = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating)
    return any(is_one(kind) for is_one in numbers) or _is_word(kind)


def _declared_labels(schema: pa.Schema, usable: dict[str, pa.DataType]) -> list[str]:
    """Return the column that Hugging Face's metadata declares as a class label, if there is exactly one."""
    try:
        said = parsed_object((schema.metadata or {}).get(b"huggingface", b"{}"), _HINT_BYTES_LIMIT)
        features = said["info"]["features"]
        declared = [name for name in usable if features.get(name, {}).get("_type") == "ClassLabel"]
    except (ValueError, KeyError, TypeError, AttributeError):  # not in their form
        return []
    return declared if len(declared) == 1 else []


def _agreed(of_files: Sequence[tuple[Path, _Columns]]) -> _Columns:
    """Return the columns that all files share; DataError names the first file that differs."""
    first_file, first = of_files[0]
    for file, columns in of_files:
        for what, ours, theirs in (
            ("image", first.image, columns.image),
            ("label", first.label, columns.label),
        ):
            if ours != theirs:
                raise DataError(
                    f"{file}: its {what} column is {theirs or 'missing'}, but {ours or 'missing'} in"
                    f" {first_file.name}; write all files of a set alike"
                )
        if columns.words != first.words:
            kinds = ("words", "numbers") if columns.words else ("numbers", "words")
            raise DataError(
                f"{file}: column {columns.label} holds {kinds[0]}, but {kinds[1]} in {first_file.name};"
                " write all files of a set alike"
            )
    return first


# ------------------------------------------------------------------------------------------------- values


def _batches(file: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield some rows at a time, few enough to fit in memory were each as large as the largest page."""
    with damage_is_named(file), pq.ParquetFile(file) as parquet:
        longest = largest_page(file, parquet, columns)
        rows = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // max(1, longest)))
        yield from parquet.iter_batches(batch_size=rows, columns=list(columns))


def _decoded(values: pa.Array) -> list[Any]:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    found: list[Any] = values.to_pylist()
    return found


def _labels(place: str, values: pa.Array, numbers: dict[str, int]) -> list[int]:
    decoded = [numbers[value] if isinstance(value, str) else value for value in _decoded(values)]
    labels: list[int] = checked_labels([-1 if v is None else v for v in decoded], place).tolist()
    return labels


def _words(files: Sequence[Path], column: str) -> list[str] | None:
    """Return the distinct words in a column over all files, numbers in numeric order.

    Returns None if there are too many to be classes.
    """
    found: set[str] = set()
    for file in files:
        if column in pq.read_schema(file).names:
            for batch in _batches(file, [column]):
                found.update(word for word in _decoded(batch.column(column)) if isinstance(word, str))
                if len(found) > _WORDS_LIMIT:
                    return None
    return number_order(found)
