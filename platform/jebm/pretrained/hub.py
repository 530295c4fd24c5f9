"""Models on a hub of Hugging Face's kind: hf://org/name, through huggingface_hub.

It finds token and address as ever (`hf auth login`, HF_TOKEN, HF_ENDPOINT); jebm neither takes nor logs them.
"""

import contextlib
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from jebm.errors import ConfigError, StoreError
from jebm.pretrained.folder import CARD, DESCRIPTION, PICTURES, WEIGHTS, Place, read_description, read_weights
from jebm.store.protocol import one_line
from jebm.store.storage import LocalStore

__all__ = ["HUB", "downloaded", "push"]

HUB = "hf://"

_PLACE = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
_LONGEST_MESSAGE = 300


def downloaded(uri: str) -> Place:
    """Return where huggingface_hub keeps the model at hf://org/name[@revision]; what is there is not fetched.

    Raises:
        ConfigError: not such a place, or huggingface_hub is not installed.
        StoreError: there is no such model, or the hub refuses or cannot be reached.
    """
    name, revision = _named(uri)
    with _refusals(uri) as hub:
        found = hub.snapshot_download(name, revision=revision, allow_patterns=[DESCRIPTION, WEIGHTS])
    # The files may be links to others in huggingface_hub's cache: the store begins above both.
    folder = Path(found)
    cache = folder.parents[2]
    return Place(LocalStore(cache), f"{folder.relative_to(cache).as_posix()}/")


def push(folder: Path, uri: str, *, public: bool) -> str:
    """Upload an exported model to hf://org/name, a new private repository unless it is there; return its URL.

    `public` makes a new repository public; the visibility of one that is there stays as it is.

    Raises:
        CheckpointError: the folder is not a complete model.
        ConfigError, StoreError: as `downloaded`.
    """
    name, revision = _named(uri)
    place = Place(LocalStore(folder))
    read_weights(place, read_description(place))
    with _refusals(uri) as hub:
        api = hub.HfApi()
        url = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message="Upload a jebm model",
            allow_patterns=[WEIGHTS, DESCRIPTION, CARD, f"{PICTURES}*.png"],
        )
        seen = "private" if api.model_info(name).private else "public"
    return f"{url} ({seen})"


def _named(uri: str) -> tuple[str, str | None]:
    found = _PLACE.fullmatch(uri)
    if found is None:
        raise ConfigError(f"{uri}: write hf://org/name, or hf://org/name@revision")
    return found["name"], found["revision"]


@contextlib.contextmanager
def _refusals(uri: str) -> Iterator[Any]:
    """Yield huggingface_hub; what it raises becomes a StoreError of one line."""
    try:
        hub = import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise ConfigError(f"{uri}: huggingface_hub is not installed; pip install huggingface_hub") from None
    try:
        yield hub
    except Exception as error:  # whatever it and its HTTP client raise
        message = one_line(error)[:_LONGEST_MESSAGE]
        raise StoreError(f"{uri}: {message} (token: HF_TOKEN, or hf auth login)") from error
