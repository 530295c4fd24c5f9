"""sweep.json: what a sweep was started with, for later starts to be compared with."""

import json
from collections.abc import Mapping
from typing import Any

from jebm.config import Config, config_to_dict, leaves, present_leaves, role_of
from jebm.errors import ConfigError, StoreError
from jebm.store.records import DamagedRecordError, read_object, understood
from jebm.store.storage import ObjectMissingError, Store
from jebm.sweep.recovery import check_log
from jebm.sweep.space import Search
from jebm.untrusted import JsonObject, typed

__all__ = ["RECORD", "check_same", "encoded_record", "read_record"]

RECORD = "sweep.json"

_FORMAT, _VERSION = "jebm-sweep", 1
_FREE_SEARCH = ("trials", "max_concurrent")
"""What a start may change in a search; in a config, only where it runs. Data are compared by content."""


def read_record(store: Store) -> JsonObject | None:
    """Return the content of sweep.json; None if there is none.

    Raises:
        DamagedRecordError: it is not the record of a sweep.
        StoreError: it has another version, or the store cannot be read.
    """
    try:
        record = read_object(store, RECORD)
    except ObjectMissingError:
        return None
    with understood(store, RECORD):
        if typed(record, "format", str) != _FORMAT:
            raise ValueError("it is no record of a sweep")
        version = typed(record, "version", int)
        for name in ("search", "config", "provenance"):
            typed(record, name, dict)
        typed(record["search"], "space", dict)
        typed(record, "starts", list)
        typed(record, "data_sha256", str)
    if version != _VERSION:
        raise StoreError(f"{store.uri}/{RECORD}: is of version {version}, this one reads {_VERSION}")
    return record


def encoded_record(
    name: str,
    search: Search,
    base: Config,
    *,
    data_sha256: str,
    provenance: Mapping[str, str],
    starts: list[Any],
) -> bytes:
    """Return the bytes of sweep.json."""
    record = {
        "format": _FORMAT,
        "version": _VERSION,
        "name": name,
        "search": search.values,
        "config": config_to_dict(base),
        "data_sha256": data_sha256,
        "provenance": dict(provenance),
        "starts": starts,
    }
    return json.dumps(record, indent=2).encode() + b"\n"


def check_same(
    store: Store, name: str, search: Search, base: Config, data_sha256: str
) -> JsonObject | DamagedRecordError | None:
    """Return the record of the sweep that this start resumes; None for a new one.

    If the record is damaged, compare with study.log instead and return what is wrong with the record.

    Raises:
        ConfigError: a sweep of this name has another search, base config or data.
        StoreError: as `read_record`.
    """
    try:
        record = read_record(store)
    except DamagedRecordError as error:
        check_log(store, name, search)
        return error
    if record is None:
        check_log(store, name, search)
        return None
    # Search, space, config and data must be the same, except what may change.
    then, now = record["search"], search.values
    differences = [
        _change(key, old, new)
        for key in now
        if key not in (*_FREE_SEARCH, "space") and (old := then.get(key)) != (new := now[key])
    ]
    pairs = [
        (then["space"], now["space"]),
        (present_leaves(record["config"]), dict(leaves(config_to_dict(base)))),
    ]
    for old, new in pairs:
        differences += [
            _change(key, old.get(key), new.get(key))
            for key in {**old, **new}
            if old.get(key) != new.get(key) and role_of(key) != "where" and not key.startswith("data.")
        ]
    if record["data_sha256"] != data_sha256:
        differences.append("data.train or data.validation has other content")
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ConfigError(
            f"run.name: the sweep {name} was begun otherwise: {'; '.join(differences[:3])}{more}; "
            "put that back to go on with it, or choose a new run.name"
        )
    return record


def _change(key: str, old: object, new: object) -> str:
    return f"{key} was {json.dumps(old)}, is {json.dumps(new)}"
