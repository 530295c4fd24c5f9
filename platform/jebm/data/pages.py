"""The inflated sizes of a Parquet column's pages, read from their headers before anything is inflated.

A Parquet file's footer says what a column holds, but a reader inflates as much as each page's own header
says: up to 2 GiB per page, whatever the footer claims. A header is a Thrift struct in the compact protocol.
It is parsed so strictly that no other reader can interpret the same bytes differently: repeated fields,
out-of-range numbers and unneeded kinds of pages are refused.
"""

import mmap
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pyarrow.parquet as pq

from jebm.errors import DataError

__all__ = ["Page", "largest_page", "pages_of"]

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_DETAILS = {_DATA: (5, 2), _DICTIONARY: (7, 2), _DATA_V2: (8, 4)}
"""For each kind of page: the field that describes it, and the field with the encoding within that one."""

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 12
_DEEPEST = 4
_INFLATED_BYTES_LIMIT = 64 << 20  # for any page of an untrusted file; beyond that
_INFLATION_LIMIT = 32  # times the stored size: encoded images hardly compress

_Struct: TypeAlias = dict[int, "int | _Struct"]


@dataclass(frozen=True)
class Page:
    """The content of a page's header."""

    is_dictionary: bool
    bytes: int  # once inflated
    stored: int  # in the file
    values: int
    encoding: int  # as numbered in parquet.thrift


def pages_of(data: memoryview, column: pq.ColumnChunkMetaData) -> Iterator[Page]:
    """Yield the pages that a reader of the column would inflate, until all its values are covered.

    Raises:
        ValueError: a header violates the format, or the column has too few values.
    """
    position: int = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < position:
        position = column.dictionary_page_offset
    header = _Header(data, position)
    missing: int = column.num_values
    # Follow the headers from page to page, checking each before it is used.
    while missing > 0:
        fields = header.struct()
        kind = _number(fields, 1)
        if kind not in _DETAILS:
            raise ValueError(f"a page is of kind {kind}")
        description, encoding = _DETAILS[kind]
        details = fields.get(description)
        if not isinstance(details, dict):
            raise ValueError("a page is not described")
        inflated, stored = _number(fields, 2), _number(fields, 3)
        values, codes = _number(details, 1), _number(details, encoding)
        page = Page(kind == _DICTIONARY, inflated, stored, values, codes)
        if page.is_dictionary and missing < column.num_values:
            raise ValueError("a dictionary comes late")
        if page.values == 0 and not page.is_dictionary:  # a column of nulls has empty pages
            raise ValueError("a page is empty")
        header.skip(stored)
        yield page
        missing -= 0 if page.is_dictionary else page.values


def largest_page(path: Path, parquet: pq.ParquetFile, columns: Collection[str]) -> int:
    """Return the inflated size in bytes of the columns' largest page, a bound on any value's.

    Raises DataError if a page claims to be far larger than its stored size, or is damaged.
    """
    metadata = parquet.metadata
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    chunks = [group.column(place) for group in groups for place in range(metadata.num_columns)]
    largest = 0
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as data,
    ):
        # Reject a page that inflates far beyond its stored size.
        for chunk in chunks:
            if chunk.path_in_schema.split(".")[0] not in columns:
                continue
            try:
                for page in pages_of(data, chunk):
                    if page.bytes > max(_INFLATED_BYTES_LIMIT, _INFLATION_LIMIT * page.stored):
                        raise DataError(
                            f"{path}: a page of {page.stored} bytes claims to inflate to {page.bytes}; not a "
                            "set of images"
                        )
                    largest = max(largest, page.bytes)
            except ValueError as error:
                raise DataError(f"{path}: damaged ({error}); fetch the original file again") from error
    return largest


def _number(fields: _Struct, field: int) -> int:
    value = fields.get(field)
    if not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError("a page header lacks a number, or has one out of range")
    return value


class _Header:
    """Reads structs of Thrift's compact protocol; keeps 32-bit numbers and structs, skips the rest."""

    def __init__(self, data: memoryview, position: int) -> None:
        self._data, self._position = data, position

    def skip(self, count: int) -> None:
        if not 0 <= self._position <= self._position + count <= len(self._data):
            raise ValueError("a page lies outside the file")
        self._position += count

    def struct(self, depth: int = 0) -> _Struct:
        if depth == _DEEPEST:
            raise ValueError("a page header is nested too deeply")
        fields: _Struct = {}
        field = 0
        while start := self._byte():
            delta, kind = start >> 4, start & 0xF
            field = field + delta if delta else self._signed()
            if field in fields or not 0 < field < 2**15:
                raise ValueError("a page header names a field twice")
            if kind == _I32:
                fields[field] = self._signed()
            elif kind == _STRUCT:
                fields[field] = self.struct(depth + 1)
            elif kind in {_BYTE, _I16, _I64, _DOUBLE, _BINARY}:
                self._pass_over(kind)
            elif kind not in {_TRUE, _FALSE}:  # booleans are complete in the byte just read
                raise ValueError(f"a page header has a field of type {kind}")
        return fields

    def _pass_over(self, kind: int) -> None:
        if kind in {_I16, _I64}:
            self._signed()
        else:
            self.skip({_BYTE: 1, _DOUBLE: 8}.get(kind) or self._varint())

    def _byte(self) -> int:
        self.skip(1)
        return self._data[self._position - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a page header has a number of more than 64 bits")
        return value | byte << shift

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
