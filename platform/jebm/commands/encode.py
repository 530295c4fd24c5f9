r"""Write the codes of a data set's images: means, samples and rates of each latent layer, for other tools.

  a table:             jebm encode exported jobs/data/fashion_mnist_2000/test --output codes.parquet
  arrays, for numpy:   … --output codes.npz
  your own images:     jebm ingest photos --size 28 --channels 1 --output data/photos, then encode data/photos

MODEL is what jebm.from_pretrained loads: a folder of jebm export, hf://org/name, a run or a checkpoint.
DATA is a data set of jebm ingest, with images of the model's shape. Columns: mean_z1 (bottom) … sample_zL,
rate_z1 … in nats, the label, and factor_NAME where the data set has factors. The same seed gives the same
samples.
"""

from collections.abc import Iterator

from tqdm import tqdm

from jebm.cli import log_lines, tell
from jebm.config import require_seed
from jebm.data.dataset import load_images
from jebm.errors import ConfigError
from jebm.parser import add_trust, job_parser, parse, trusted_names
from jebm.pretrained.codes import FORMS, Columns, coded, write_codes
from jebm.pretrained.model import from_pretrained
from jebm.store.local import LocalStore
from jebm.store.storage import open_store

__all__ = ["main"]


def main() -> None:
    """Load, encode and write, with a progress bar."""
    log_lines()
    parser = job_parser(__doc__ or "")
    parser.add_argument(
        "model", type=str, help="a folder of jebm export, hf://org/name, a run or a checkpoint"
    )
    parser.add_argument("data", type=str, help="a data set of jebm ingest")
    parser.add_argument("--output", type=str, required=True, metavar="FILE", help="….parquet or ….npz")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    add_trust(parser)
    arguments = parse(parser)
    require_seed(arguments.seed, "--seed")
    # Refuse the output before anything is loaded.
    if not arguments.output.endswith(FORMS):
        raise ConfigError(f"--output {arguments.output}: the name must end in .parquet or .npz")
    folder, slash, key = arguments.output.rpartition("/")
    output = open_store(folder or slash or ".")
    output.probe()
    if output.head(key) is not None:
        raise ConfigError(f"--output {arguments.output}: is there already; name another file")
    if isinstance(output, LocalStore) and (output.folder / key).is_dir():
        raise ConfigError(f"--output {arguments.output}: is a folder; name a file")
    found = from_pretrained(arguments.model, trusted_names(arguments))
    images = load_images(open_store(arguments.data))
    facts = {**found.origin, "data": images.manifest.sha256, "seed": str(arguments.seed)}

    def shown() -> Iterator[Columns]:
        with tqdm(total=len(images.images_NHWC), unit=" images", disable=None) as bar:
            for columns in coded(found, images, arguments.seed):
                yield columns
                bar.update(len(columns["rate_z1"]))

    write_codes(shown(), output, key, facts)
    tell(f"{len(images.images_NHWC):,} images: {arguments.output}")
