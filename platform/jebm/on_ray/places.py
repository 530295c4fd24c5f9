"""Paths and URIs that mean the same in the workers and in the process that starts them."""

from pathlib import Path

from jebm.config import PLACES, Config, config_to_dict, leaves
from jebm.errors import ConfigError, StoreError
from jebm.on_ray.cluster import job_environment
from jebm.parser import override
from jebm.store.storage import arrow_uri, normalised_uri

__all__ = ["everywhere", "kept_place", "resolve_paths", "shared"]


def resolve_paths(config: Config) -> Config:
    """Return the config with all paths and URIs resolved by `everywhere` and `kept_place`.

    Raises:
        ConfigError: as they do.
    """
    placed = {key: value for key, value in leaves(config_to_dict(config)) if key in PLACES and value}
    return override(
        config,
        {
            key: (kept_place if key == "run.storage" else everywhere)(key, place)
            for key, place in placed.items()
        },
    )


def everywhere(key: str, place: str) -> str:
    """Return a place that the workers read: absolute, or relative to a job's uploaded folder.

    Raises:
        ConfigError: the URI is invalid, or is memory that only this process sees; or, in a job, a relative
            path was not uploaded.
    """
    place = shared(key, place)
    if "://" not in place and not Path(place).is_absolute() and not Path(place).exists():
        raise ConfigError(
            f"{key}: {place} is not in the job's working directory: what .gitignore and .rayignore name, "
            "such as data/, is not uploaded with a job; put it into s3://… or on a path that all nodes see"
        )
    return place


def kept_place(key: str, place: str) -> str:
    """Return a place to write to; raises as `everywhere`, and for a job's temporary folder."""
    place = shared(key, place)
    if "://" in place or Path(place).is_absolute():
        return place
    raise ConfigError(
        f"{key}: {place!r} would lie in the job's temporary folder and be lost with it; "
        "give s3://bucket/prefix, or an absolute path that all nodes share"
    )


def shared(key: str, place: str) -> str:
    """Return a place in a form that means the same in all processes, whether or not it exists.

    Outside a job, paths become absolute; in a job, relative paths stay relative, since each worker has the
    uploaded folder. Raises ConfigError for an invalid URI, or memory that only this process sees.
    """
    try:
        place = normalised_uri(place)
        arrow_uri(place)  # refuses memory
    except StoreError as error:
        raise ConfigError(f"{key}: {error}") from error
    relative = "://" not in place and job_environment() is not None
    return place if relative or "://" in place else str(Path(place).absolute())
