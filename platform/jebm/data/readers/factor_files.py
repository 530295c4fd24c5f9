"""A table of factors beside a source: one JSON file, a row for each image in the source's order.

    {"format": "jebm-factors",
     "factors": [{"name": "hair", "categories": ["long", "short"]}, …],
     "rows": [[0, …], [1, …], …]}

A number is an index into its factor's categories.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jebm.data.factors import Factor, factors_of
from jebm.data.source import LABELS_LIMIT, Batch, Source, described
from jebm.errors import DataError
from jebm.untrusted import parsed_object, typed

__all__ = ["joined", "with_factors"]

_FORMAT = "jebm-factors"


def with_factors(source: Source, path: Path) -> Source:
    """Return the source with the factors of a file.

    Raises DataError if the file is no table of factors; when read, if it has not a row for each image.
    """
    return joined(source, path, *_table(path))


def joined(source: Source, path: Path, factors: tuple[Factor, ...], rows_NF: npt.NDArray[np.int32]) -> Source:
    """Return the source with a row of factors, from a file, for each image; raises as `with_factors`."""
    if source.images not in {None, len(rows_NF)}:
        raise _unequal(path, len(rows_NF), f"{source.images}")

    def read() -> Iterator[Batch]:
        start = 0
        for batch in source.read():
            stop = start + len(batch.images_NHWC)
            if stop > len(rows_NF):
                raise _unequal(path, len(rows_NF), f"{stop} or more")
            yield replace(batch, factors_NF=rows_NF[start:stop])
            start = stop
        if start < len(rows_NF):
            raise _unequal(path, len(rows_NF), f"{start}")

    description = replace(source.description, files=(*source.description.files, described(path)))
    return replace(source, factors=factors, description=description, read=read)


def _unequal(path: Path, rows: int, images: str) -> DataError:
    return DataError(f"{path}: {rows} rows of factors for {images} images; give the matching file")


def _table(path: Path) -> tuple[tuple[Factor, ...], npt.NDArray[np.int32]]:
    """Return the factors and rows of a file, all numbers checked."""
    if not path.is_file():
        raise DataError(f"{path}: no such file of factors")
    try:
        with path.open("rb") as file:
            content = parsed_object(file.read(LABELS_LIMIT + 1), LABELS_LIMIT)
        if typed(content, "format", str) != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        factors, rows = factors_of(content), typed(content, "rows", list)
        if not factors or not rows:
            raise ValueError("it has no factors, or no rows")
        for index, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != len(factors) or not all(type(n) is int for n in row):
                raise ValueError(f"rows[{index}] is no list of {len(factors)} whole numbers")
            if not all(0 <= n < len(each.categories) for n, each in zip(row, factors, strict=True)):
                raise ValueError(f"rows[{index}] has a number that is no category's index")
    except ValueError as error:
        raise DataError(f"{path}: no table of factors ({error}); docs/data.md shows one") from error
    return factors, np.array(rows, np.int32)
