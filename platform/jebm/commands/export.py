r"""Write a trained model as a folder that anyone can load, share or push: weights, description, model card.

  newest checkpoint:   jebm export runs/mine --output mine
  another one:         jebm export runs/mine/checkpoints/step-00001200-a0001 --output s3://bucket/models/mine
  load it in Python:   jebm.from_pretrained("mine").sample(16)
  share it:            jebm push mine hf://me/mine

RUN is run.storage/run.name, or one of its checkpoints (jebm checkpoints list RUN shows them). Averaged
weights are preferred. model.safetensors holds the weights, without optimizers, for any safetensors reader;
config.json what builds the model, and the weights' sha256; README.md is a model card with the figures of the
run's newest evaluation of that checkpoint (jebm evaluate), its warnings and a sheet of samples. Paths and
URIs of the run's config are cut down to their last name. The licence is left for you to write.
"""

from jebm.cli import log_lines, size_text, tell
from jebm.commands.sample import output_of
from jebm.parser import add_trust, job_parser, parse, trusted_names
from jebm.pretrained.write import export

__all__ = ["main"]


def main() -> None:
    """Restore the model, write its folder and print where it is."""
    log_lines()
    parser = job_parser(__doc__ or "")
    parser.add_argument("run", type=str, help="a run, or one of its checkpoints")
    parser.add_argument(
        "--output", type=str, required=True, metavar="PLACE", help="empty folder or s3://bucket/…"
    )
    add_trust(parser)
    arguments = parse(parser)
    output = output_of(arguments.output)
    done = export(arguments.run, output, trusted_names(arguments))
    origin = done.origin
    tell(
        f"{output.uri.removeprefix('file://')}: {origin['weights']} weights of {origin['run']}, "
        f"{origin['checkpoint']}, {size_text(done.weights_bytes)}, sha256 {done.weights_sha256}"
    )
