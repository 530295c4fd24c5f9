r"""Push an exported model to a hub of Hugging Face's kind, through huggingface_hub.

  jebm export runs/mine --output mine
  jebm push mine hf://me/mine               a new private repository
  jebm push mine hf://me/mine --public      a new public one
  jebm.from_pretrained("hf://me/mine")      in Python: load it, also @REVISION

The token is huggingface_hub's own business (hf auth login, or HF_TOKEN): jebm neither takes nor logs one.
The folder's hashes are checked first. A repository that is there keeps its visibility, and its other files.
"""

from jebm.cli import log_lines, tell
from jebm.errors import ConfigError
from jebm.parser import job_parser, parse
from jebm.pretrained.hub import push
from jebm.store.storage import LocalStore, open_store

__all__ = ["main"]


def main() -> None:
    """Push and print the repository's address."""
    log_lines()
    parser = job_parser(__doc__ or "")
    parser.add_argument("folder", type=str, help="a folder of this machine that jebm export wrote")
    parser.add_argument("repository", type=str, metavar="hf://ORG/NAME", help="where to")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    arguments = parse(parser)
    store = open_store(arguments.folder)
    if not isinstance(store, LocalStore):
        raise ConfigError(f"folder: {arguments.folder} is no folder of this machine")
    tell(push(store.folder, arguments.repository, public=arguments.public))
