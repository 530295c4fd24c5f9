"""sweep.json: read as strictly as it is written, and compared key by key with another start."""

import json
from dataclasses import replace
from typing import Any

import pytest
from test_study import GOAL, SPACE, search

from jebm.config import Config, config_to_dict, leaves, role_of
from jebm.errors import ConfigError, StoreError
from jebm.store.records import DamagedRecordError
from jebm.store.storage import Store, open_store
from jebm.sweep.record import check_same, encoded_record, read_record
from jebm.sweep.space import Search, search_from_dict

KEYS = [key for key, _ in leaves(config_to_dict(Config()))]


def written(place: str, what: Search | None = None, **changes: object) -> Store:
    """A store with the record of a sweep; `changes` are made to it afterwards."""
    store = open_store(f"memory://record-{place}/sweep")
    encoded = encoded_record(
        "sweep", what or search(), Config(), data_sha256="d", provenance={"jebm": "1"}, starts=[]
    )
    store.put("sweep.json", json.dumps(json.loads(encoded) | changes).encode())
    return store


def same(store: Store, what: Search | None = None, base: Config | None = None) -> object:
    return check_same(store, "sweep", what or search(), base or Config(), "d")


def test_what_is_written_is_read_again() -> None:
    record = read_record(written("again"))
    assert record is not None
    assert record["config"] == config_to_dict(Config())
    assert record["data_sha256"] == "d"
    assert record["provenance"] == {"jebm": "1"}
    # The search of a record gives the search again, and another one gives another.
    assert search_from_dict(record["search"], Config()) == search()
    assert search_from_dict(record["search"], Config()) != search(seed=1)


def test_without_a_record_there_is_no_sweep() -> None:
    store = open_store("memory://record-none/sweep")
    assert read_record(store) is None
    assert same(store) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "jebm-run"},
        {"format": None},
        {"version": "1"},
        {"version": True},
        {"search": []},
        {"search": {}},
        {"search": {"space": []}},
        {"config": "config"},
        {"provenance": None},
        {"starts": {}},
        {"data_sha256": 7},
    ],
    ids=str,
)
def test_a_field_of_another_kind_is_damage(changes: dict[str, object]) -> None:
    store = written(str(changes), **changes)
    with pytest.raises(DamagedRecordError, match=r"sweep\.json: is damaged \(") as damaged:
        read_record(store)
    assert "\n" not in str(damaged.value)
    # It cannot be compared: then the journal is, and here is none.
    assert isinstance(same(store), DamagedRecordError)


@pytest.mark.parametrize("field", ["format", "version", "search", "config", "provenance", "starts"])
def test_a_missing_field_is_damage(field: str) -> None:
    store = written(f"missing-{field}")
    record = json.loads(store.get("sweep.json"))
    del record[field]
    store.put("sweep.json", json.dumps(record).encode())
    with pytest.raises(DamagedRecordError, match=field):
        read_record(store)


def test_a_later_version_is_refused_and_no_damage() -> None:
    store = written("later", version=2)
    with pytest.raises(StoreError, match="is of version 2, this one reads 1") as refused:
        read_record(store)
    assert not isinstance(refused.value, DamagedRecordError)


def test_the_same_sweep_goes_on() -> None:
    record: Any = same(written("same"))
    assert record["name"] == "sweep"


@pytest.mark.parametrize("key", KEYS)
def test_a_start_may_change_where_a_sweep_runs_and_nothing_else(key: str) -> None:
    config = config_to_dict(Config())
    *sections, leaf = key.split(".")
    branch = config
    for section in sections:
        branch = branch[section]
    branch[leaf] = "another"
    store = written(f"key-{key}", config=config)
    if role_of(key) == "where" or key.startswith("data."):  # data are compared by content
        assert same(store) is not None
    else:
        with pytest.raises(ConfigError, match=rf'begun otherwise: {key} was "another", is '):
            same(store)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"trials": 60}, ""),
        ({"max_concurrent": 3}, ""),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"sampler": "random"}, 'sampler was "tpe", is "random"'),
        ({"objective": GOAL | {"metric": "loss"}}, "objective was "),
        ({"scheduler": {"asha": {"grace_images": 9}}}, 'scheduler was "none", is {"asha"'),
        ({"space": SPACE | {"energy.depth": ["int", 1, 3]}}, 'energy.depth was null, is ["int", 1, 3]'),
        ({"space": {"energy.width": ["int", 10, 100]}}, "langevin.step_size was "),
        ({"space": SPACE | {"energy.width": ["int", 10, 99]}}, 'energy.width was ["int", 10, 100], is '),
    ],
    ids=str,
)
def test_more_trials_are_no_other_search(changes: dict[str, object], difference: str) -> None:
    store = written(f"search-{changes}")
    if not difference:
        assert same(store, search(**changes)) is not None
        return
    with pytest.raises(ConfigError) as refused:
        same(store, search(**changes))
    assert difference in str(refused.value)
    assert "put that back to go on with it, or choose a new run.name" in str(refused.value)


def test_of_many_differences_three_are_named() -> None:
    config = Config()
    other = replace(
        config,
        energy=replace(config.energy, width=7, depth=7),
        train=replace(config.train, epochs=7.0),
        langevin=replace(config.langevin, steps=7, step_size=0.7),
    )
    with pytest.raises(ConfigError, match=r"(;[^;]* was [^;]*){2} and 2 more; put that back") as refused:
        same(written("many"), None, other)
    assert str(refused.value).count(" was ") == 4  # "was begun otherwise" among them
