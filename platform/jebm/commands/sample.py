r"""Draw samples from the prior of a trained model, as pictures or as arrays with their latents.

  one page of samples:    jebm sample --checkpoint s3://bucket/runs/mine --count 100
  one PNG each:           … --count 10000 --format png --output samples
  arrays to a bucket:     … --count 100000 --format npz --output s3://bucket/samples
  effect of one layer:    … --count 80 --vary z2

CHECKPOINT is a run, run.storage/run.name (its newest checkpoint is used), or one of its checkpoints,
…/checkpoints/NAME (jebm checkpoints list RUN shows them). Averaged weights are preferred.
With --vary, all samples in a row share every layer but that one, which is drawn from its prior given the
others: z1, the bottom layer, should change details, the top layer the kind of object.
By default the chains are as long as in training (--steps). Samples that change much with more steps reflect
the chain rather than the prior. The first samples of a seed are the same for any --count and --format. Each
.npz holds images (N, H, W, C), uint8, and latents z1 … zL, float32, for numpy.load.
samples.json, written last, records how the samples were made.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any, get_args

import torch
from jsonargparse import Namespace
from tqdm import tqdm

from jebm.cli import log_lines, tell
from jebm.config import Langevin, require_seed
from jebm.core.model import JointModel
from jebm.errors import ConfigError
from jebm.evaluate.export import Drawn, Format, draw, write
from jebm.evaluate.restore import restored
from jebm.parser import JobParser, add_trust, job_parser, parse, trusted_names
from jebm.rng import gaussian_noise
from jebm.store.storage import Store, open_store
from jebm.train.provenance import provenance

__all__ = ["main"]

_MOST_COLUMNS = 1000  # a row is drawn at once


def output_of(place: str | None) -> Store:
    """Return an empty store to write to: the requested one, or the first free of samples, samples-2 etc."""
    if place is None:
        names = ("samples" if number == 1 else f"samples-{number}" for number in count(1))
        place = next(name for name in names if not Path(name).is_file() and not any(Path(name).glob("*")))
    output = open_store(place)
    output.probe()
    if next(iter(output.list()), None) is not None:
        raise ConfigError(f"--output {place}: is not empty; name another place")
    return output


def build_parser() -> JobParser:
    """Return the parser of the command line."""
    parser = job_parser(__doc__ or "")
    parser.usage = "%(prog)s --checkpoint URI --count N [--output PLACE] [--format grid|png|npz] [--vary zL]"
    parser.add_argument("--checkpoint", required=True, metavar="URI", help="a run, or one of its checkpoints")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="how many samples")
    parser.add_argument(
        "--output", metavar="PLACE", help="empty folder or s3://bucket/… (default: samples, samples-2, …)"
    )
    parser.add_argument("--format", type=Format, default="grid", help=f"{', '.join(get_args(Format))}")
    parser.add_argument(
        "--vary", metavar="zL", help="the one layer that varies along a row: z1 is the bottom"
    )
    parser.add_argument("--columns", type=int, default=10, help="samples of a row")
    parser.add_argument("--steps", type=int, help="Langevin steps of a chain (default: the run's)")
    parser.add_argument("--step-size", type=float, help="standard deviation of a step (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other samples")
    add_trust(parser)
    return parser


def check_values(arguments: Namespace) -> None:
    """Raise `ConfigError`, naming the option, for a value that no model and no place could make right."""
    for key in ("count", "columns"):
        if arguments[key] < 1:
            raise ConfigError(f"--{key} {arguments[key]}: must be 1 or more")
    if arguments.columns > _MOST_COLUMNS:
        raise ConfigError(f"--columns {arguments.columns}: must be {_MOST_COLUMNS} or less")
    require_seed(arguments.seed, "--seed")
    for key, value in _chain(arguments).items():
        try:
            replace(Langevin(), **{key: value})
        except ConfigError as error:
            what = str(error).removeprefix(f"langevin.{key}: ")
            raise ConfigError(f"--{key.replace('_', '-')} {value:g}: {what}") from None


def _chain(arguments: Namespace) -> dict[str, Any]:
    """Return the command line's changes of the sampler settings."""
    return {key: arguments[key] for key in ("steps", "step_size") if arguments[key] is not None}


def chain_of(arguments: Namespace, model: JointModel, config: Langevin) -> Langevin:
    """Return the sampler settings: the run's, with the command line's changes."""
    given = _chain(arguments)
    if given and model.energy is None:
        raise ConfigError("--steps, --step-size: this model has the Gaussian prior, which needs no chain")
    return replace(config, **given)


def layer_of(name: str | None, layers: int) -> int | None:
    """Return a layer's index, from 0; None if none is named."""
    if name is None:
        return None
    if not re.fullmatch(r"z[1-9]\d?", name) or int(name[1:]) > layers:
        raise ConfigError(f"--vary {name}: this model has z1 (bottom) to z{layers} (top)")
    return int(name[1:]) - 1


def main() -> None:
    """Sample and write a few hundred images at a time."""
    log_lines()
    arguments = parse(build_parser())
    check_values(arguments)
    output = output_of(arguments.output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Restore the model and set up its sampler.
    found = restored(arguments.checkpoint, device=device, trusted=trusted_names(arguments))
    model, dims = found.model, found.config.model.latent_dims
    chain, layer = chain_of(arguments, model, found.config.langevin), layer_of(arguments.vary, len(dims))
    noise = gaussian_noise(arguments.seed, 0, device)
    batches = draw(model, chain, arguments.count, noise, columns=arguments.columns, vary=layer)

    def shown() -> Iterator[Drawn]:
        with tqdm(total=arguments.count, unit=" samples", disable=None) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch.z_ND))

    files = write(shown(), arguments.format, output, columns=arguments.columns, latent_dims=dims)
    # samples.json is written last and records how the samples were made.
    facts = {
        "checkpoint": found.uri,
        "weights": found.weights,
        "langevin": None if model.energy is None else asdict(chain),
        **{key: arguments[key] for key in ("count", "format", "vary", "columns", "seed")},
        "files": files,
        "provenance": provenance(),
    }
    output.put("samples.json", json.dumps(facts, indent=1).encode())
    tell(
        f"{arguments.count} samples in {files} file{'s' * (files > 1)}: {output.uri.removeprefix('file://')}"
    )
