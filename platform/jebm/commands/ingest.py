r"""Turn original image files into a data set: Parquet parts and a manifest, in a folder or on S3.

  Fashion-MNIST  jebm ingest data/original/fashion-mnist --split train --validation 5000 \
                   --output data/fashion/train
  SVHN           jebm ingest train_32x32.mat --output s3://bucket/svhn/train
  CIFAR-10       jebm ingest cifar-10-binary.tar.gz --split test --output data/cifar10/test
  CelebA, 64x64  jebm ingest img_align_celeba.zip --split train --output s3://bucket/celeba/train
  pictures       jebm ingest pictures.zip --size 64 --channels 3 --output data/pictures
  Hugging Face   jebm ingest folder-of-parquet --split test --output data/set/test
  NumPy          jebm ingest images.npy --labels labels.npy --output data/set/train
  your own       jebm ingest scans/ --format mylab.Scans --output data/scans/train
  MNIST, no 4s   jebm ingest data/original/mnist-digits --without-label 4 --output data/no_4/train

Pixels are unchanged by default (--size, --channels). --validation N holds N images back, chosen by a hash of
their position, as a data set of their own: …/validation beside …/train, or OUTPUT-validation. Sweeps and
evaluations during training judge by them (data.validation). The last line of each data set reports how many
images, labels and classes there are, and what was skipped.

Safe to run twice: an existing data set of the same files and options is kept. Exit code 2 and one line on
stderr if an input cannot be used.
"""

import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from jsonargparse import Namespace
from tqdm import tqdm

from jebm.classes import full_path
from jebm.cli import tell
from jebm.data.carve import VALIDATION, carved
from jebm.data.manifest import DatasetManifest, dataset_exists, read_manifest
from jebm.data.readers import FORMATS, open_source
from jebm.data.shards import write_dataset
from jebm.data.source import Batch, Source, counted
from jebm.errors import DataError
from jebm.parser import job_parser, parse, word_or_class
from jebm.store.local import LocalStore
from jebm.store.storage import Store, open_store

__all__ = ["main"]


def arguments() -> Namespace:
    """Return the command line's arguments; raises ConfigError for a wrong one."""
    parser = job_parser(__doc__ or "")
    add = parser.add_argument
    add("source", help="original file or folder")
    add("--output", required=True, metavar="URI", help="folder or s3://bucket/prefix of the new data set")
    add("--format", default="auto", help=f"of the source: {', '.join(FORMATS)}, or your own reader's class")
    add("--labels", type=str | None, metavar="FILE", help="label file, or 'folders': class = parent folder")
    add("--factors", type=str | None, metavar="FILE", help="JSON table of factors, a row for each image")
    add("--split", type=str | None, help="train, test, val: the part to take, and its name")
    add("--size", type=int | None, metavar="N", help="resize the centre square to N pixels (LANCZOS)")
    add("--channels", type=int | None, metavar="1|3", help="convert to grey (1) or RGB (3)")
    add("--partition", type=str | None, metavar="FILE", help="CelebA's list_eval_partition.txt")
    add("--without-label", type=int | None, metavar="N", help="leave out the images of this class")
    add("--limit", type=int | None, metavar="N", help="only the first N images")
    add("--validation", type=int | None, metavar="N", help="hold N images back, as a data set of their own")
    add("--overwrite", action="store_true", help="replace the data set at the output")
    return parse(parser)


class Tally:
    """Counts the labels of a source while it is read."""

    def __init__(self) -> None:
        self.labels = 0
        self.classes: set[int] = set()

    def of(self, source: Source) -> Source:
        """Return the source, counting its labels as it is read."""

        def read() -> Iterator[Batch]:
            for batch in source.read():
                if batch.labels_N is not None:
                    known = batch.labels_N[batch.labels_N >= 0]
                    self.labels += len(known)
                    self.classes.update(np.unique(known).tolist())
                yield batch

        return replace(source, read=read)

    def __str__(self) -> str:
        return f"{counted(self.labels, 'label')}, {counted(len(self.classes), 'class', 'classes')}"


def main() -> None:
    """Read the source, write the data sets and report the result."""
    warnings.filterwarnings("ignore", module="PIL")  # warnings about irrelevant image metadata
    wanted = arguments()
    store = open_store(wanted.output)
    check_apart(wanted.source, store)
    named = word_or_class(wanted.format, "format", FORMATS)
    own = {} if isinstance(named, str) else named
    file_format = named if isinstance(named, str) else full_path(named["class_path"], "format")
    keys = ("split", "labels", "factors", "partition", "size", "channels", "without_label", "limit")
    options = {key: wanted[key] for key in keys}
    source = open_source(wanted.source, file_format, **options, init_args=own.get("init_args") or {})
    # The images that are held back are written first, so that no set to train on is without its other part.
    sets = [(source, store)]
    if wanted.validation is not None:
        rest, held = carved(source, wanted.validation)
        sets = [(held, open_store(validation_place(wanted.output))), (rest, store)]
    made = [is_made(part, place, overwrite=wanted.overwrite) for part, place in sets]
    for (part, place), done in zip(sets, made, strict=True):
        words = known(place) if done else make(part, place, overwrite=wanted.overwrite)
        tell("; ".join([f"{words}  {place.uri}", *remarks(part)]))


def validation_place(output: str) -> str:
    """Return where the images that are held back go: validation beside train, or OUTPUT-validation.

    Raises DataError if the output is itself called validation.
    """
    above, slash, name = output.rstrip("/").rpartition("/")
    if name == VALIDATION:
        raise DataError(f"--output {output}: is the place of what --validation holds back; give another one")
    return f"{above}{slash}{VALIDATION if name == 'train' else f'{name}-{VALIDATION}'}"


def is_made(source: Source, store: Store, *, overwrite: bool) -> bool:
    """Return whether the data set is there already, of the same files and options.

    Raises DataError if another one is, and is not to be overwritten.
    """
    if overwrite or not dataset_exists(store):
        return False
    found = read_manifest(store)
    if (found.source, found.split) != (source.description, source.split):
        what = f"{found.name}, {found.split}, of other files or options"
        raise DataError(f"{store.uri}: holds a data set already ({what}); --overwrite replaces it")
    return True


def known(store: Store) -> str:
    """Return a line on a data set that is there already."""
    found = read_manifest(store)
    labels = "with labels" if found.labels_sha256 else "no labels"
    return f"already there: {counted(found.images, 'image')}, {labels}, sha256 {found.sha256[:12]}"


def make(source: Source, store: Store, *, overwrite: bool) -> str:
    """Write a data set and return a line on it."""
    begun, tally = time.monotonic(), Tally()
    manifest = write(tally.of(source), store, overwrite=overwrite)
    shape = "x".join(str(length) for length in manifest.shape[1:])
    size = sum(part.bytes for part in manifest.parts) / 1e6
    rate = counted(round(manifest.images / (time.monotonic() - begun)), "image") + "/s"
    factors = f"{counted(len(manifest.factors), 'factor')}, " if manifest.factors else ""
    made = f"{counted(manifest.images, 'image')} of {shape}, {tally}, {factors}{size:.1f} MB, {rate}"
    return f"{made}, sha256 {manifest.sha256[:12]}"


def check_apart(source: str, store: Store) -> None:
    """Raise DataError if the data set would be inside its source, where the next ingest would read it."""
    if not isinstance(store, LocalStore):
        return
    try:
        original, output = Path(source).expanduser().resolve(), Path(store.folder).resolve()
        is_folder = original.is_dir()
    except (OSError, RuntimeError):
        return  # open_source reports what is wrong with it
    if is_folder and output.is_relative_to(original):
        raise DataError(f"--output {output} lies in the source {original}; give a folder outside of it")
    if output == original:
        raise DataError(f"--output {output} is the source itself; give a folder")
    if is_folder and dataset_exists(LocalStore(original)):
        raise DataError(f"{source}: is a data set already; train on it, or give the original files")


def remarks(source: Source) -> list[str]:
    """Return remarks for people on a source, besides its numbers."""
    found = list(source.remarks)
    if source.height != source.width:
        shape = f"{source.height}x{source.width}"
        found.append(f"no model takes images that are not square ({shape}): --size N cuts and resizes them")
    return found


def write(source: Source, store: Store, *, overwrite: bool) -> DatasetManifest:
    """Write the data set with a progress bar, or without a terminal with occasional lines."""
    said = time.monotonic()
    with tqdm(total=source.images, unit=" images", disable=not sys.stderr.isatty()) as bar:

        def progress(images: int) -> None:
            nonlocal said
            bar.update(images - bar.n)
            if bar.disable and time.monotonic() - said > 5:
                said = time.monotonic()
                tell(f"{images:,} of {source.images or '?'} images")

        return write_dataset(source, store, overwrite=overwrite, progress=progress)
