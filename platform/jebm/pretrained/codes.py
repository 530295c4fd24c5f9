"""A data set's codes as a table: Parquet or .npz, written a batch at a time.

Columns: label (−1: none) and factor_NAME (the category) where the data set has them; of each layer mean_zI
and sample_zI, float32, and rate_zI in nats. Shapes: N images, D width of a layer.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from jebm.data.dataset import ImageSet
from jebm.evaluate.share import ALONE
from jebm.pretrained.model import Pretrained
from jebm.store.layout import cut
from jebm.store.protocol import os_errors
from jebm.store.storage import Store
from jebm.store.stream import PART_BYTES

__all__ = ["FORMS", "Columns", "coded", "write_codes"]

Columns: TypeAlias = dict[str, npt.NDArray[Any]]

FORMS = (".parquet", ".npz")


def coded(found: Pretrained, images: ImageSet, seed: int) -> Iterator[Columns]:
    """Yield the columns of the images' codes, some hundred rows at a time; raises as `Pretrained.encode`."""
    batches = found.encoded(images.images_NHWC, seed)
    dims = np.cumsum(found.model.latent_dims)[:-1]
    for codes, (_, rows) in zip(batches, ALONE.batches(len(images.images_NHWC)), strict=True):
        columns: Columns = {}
        if images.labels_N is not None:
            columns["label"] = np.asarray(images.labels_N[rows])
        if images.factors_NF is not None:
            for index, factor in enumerate(images.manifest.factors):
                columns[f"factor_{factor.name}"] = np.array(factor.categories)[images.factors_NF[rows, index]]
        for name, values_ND in (("mean", codes.mean_ND), ("sample", codes.sample_ND)):
            for layer, values in enumerate(np.split(values_ND.cpu().numpy(), dims, axis=1), 1):
                columns[f"{name}_z{layer}"] = values
        for layer, rate_N in enumerate(codes.rate_NL.T.cpu().numpy(), 1):
            columns[f"rate_z{layer}"] = rate_N
        yield columns


def write_codes(batches: Iterable[Columns], output: Store, key: str, facts: Mapping[str, str]) -> None:
    """Write columns under a key that ends in one of `FORMS`; the file appears complete or not at all.

    `facts` become the metadata of the Parquet file, or the text `facts` (JSON) in the .npz, which is put
    together in memory. Raises StoreError if it cannot be written.
    """
    write = _parquet if key.endswith(".parquet") else _npz
    with os_errors(f"{output.uri}/{key}: cannot write"), tempfile.TemporaryFile(prefix="jebm-") as file:
        write(batches, file, facts)
        file.seek(0)
        output.upload(key, cut([memoryview(file.read())], PART_BYTES))


def _parquet(batches: Iterable[Columns], file: Any, facts: Mapping[str, str]) -> None:  # noqa: ANN401
    writer: pq.ParquetWriter | None = None
    for columns in batches:
        table = pa.table({name: _arrow(values) for name, values in columns.items()})
        if writer is None:
            writer = pq.ParquetWriter(file, table.schema.with_metadata(facts), compression="zstd")
        writer.write_table(table.replace_schema_metadata(facts))
    if writer is not None:
        writer.close()


def _arrow(values: npt.NDArray[Any]) -> pa.Array:
    """Return a column, a matrix as lists of its width."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _npz(batches: Iterable[Columns], file: Any, facts: Mapping[str, str]) -> None:  # noqa: ANN401
    parts = list(batches)
    arrays: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    np.savez(file, facts=np.array(json.dumps(facts)), **arrays)
