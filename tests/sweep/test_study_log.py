"""study.log: what of a damaged journal is good, which search it belongs to, and when it is in the store."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.trial import TrialState
from test_study import GOAL, SPACE, finish, next_of, search, start

from jebm.errors import StoreError
from jebm.store.records import DamagedRecordError
from jebm.store.storage import ObjectMissingError, open_store
from jebm.sweep.sampler import sampler_of
from jebm.sweep.study_log import (
    Entries,
    StudyLog,
    encoded_entry,
    first_problem,
    is_of_another,
    read_entries,
    run_name,
)
from jebm.untrusted import JsonObject

OTHER = search(space=SPACE | {"energy.width": ["int", 10, 99]})


@pytest.fixture(scope="module")
def entries() -> list[JsonObject]:
    """The journal of a sweep with a finished, a pruned, a failed and a running trial."""
    store = open_store("memory://journal/sweep")
    study = start(store, search())
    done, pruned, failed, running = (next_of(study) for _ in range(4))
    finish(study, done)
    study.report(pruned.number, {"distortion": 9.0}, images=64, step=1, seconds=0.5)
    study.prune(pruned.number)
    study.end(pruned.number, "pruned", {"distortion": 9.0})
    study.end(failed.number, "failed", {}, error="no memory")
    study.report(running.number, {"distortion": 5.0}, images=64, step=1, seconds=0.5)
    study.close()
    return read_entries(store)[0]


def replayed(entries: list[JsonObject]) -> list[tuple[TrialState, Mapping[str, object]]]:
    storage = JournalStorage(Entries(entries))
    return [
        (trial.state, trial.params)
        for study in storage.get_all_studies()
        for trial in storage.get_all_trials(study._study_id)
    ]


# ── What is good of it ──────────────────────────────────────────────────────────────────────────────────


def test_a_sound_journal_has_no_problem(entries: list[JsonObject]) -> None:
    assert first_problem(entries, "sweep", search()) == (len(entries), "")
    assert first_problem([], "sweep", search()) == (0, "")


def test_every_beginning_is_sound_up_to_its_last_whole_trial(entries: list[JsonObject]) -> None:
    """A journal may be cut off anywhere; what is kept of it has all parameters of each of its trials."""
    for length in range(len(entries)):
        count, why = first_problem(entries[:length], "sweep", search())
        kept = replayed(entries[:count])
        assert all(params.keys() == SPACE.keys() for _, params in kept)
        assert (count == length) == (why == "")
        # Nothing more could have been kept: the next trial is not whole.
        assert len(replayed(entries[:length])) - len(kept) == (count < length)


@pytest.mark.parametrize(
    "wrong", [{}, {"op_code": 77}, {"op_code": 5, "worker_id": "x"}, {"op_code": "create"}]
)
def test_a_wrong_line_ends_what_is_good(entries: list[JsonObject], wrong: JsonObject) -> None:
    for place in range(0, len(entries), 7):
        count, why = first_problem([*entries[:place], wrong, *entries[place:]], "sweep", search())
        assert count <= place
        assert why.startswith(f"line {count + 1}: ")
        assert first_problem(entries[:count], "sweep", search()) == (count, "")


def test_a_trial_that_waits_is_nobodys(entries: list[JsonObject]) -> None:
    """Its values would be the next trial's, whatever is searched: a class to import, a place to read."""
    journal = Entries(entries)
    study = optuna.load_study(study_name="sweep", storage=JournalStorage(journal))
    study.enqueue_trial({"energy.class_path": "elsewhere.Mine"})
    longer = list(journal.read_logs(0))
    assert len(longer) > len(entries)
    count, why = first_problem(longer, "sweep", search())
    assert count == len(entries)
    assert "waits" in why


@pytest.mark.parametrize(("name", "what"), [("other", search()), ("sweep", OTHER)])
def test_nothing_is_good_of_another_sweeps_journal(
    entries: list[JsonObject], name: str, what: object
) -> None:
    count, why = first_problem(entries, name, what)  # type: ignore[arg-type]
    assert why
    assert replayed(entries[:count]) == []


# ── Whose it is ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_journal_is_told_by_its_objectives_and_its_first_trial(entries: list[JsonObject]) -> None:
    assert not is_of_another(entries, search())
    assert not is_of_another(entries, search(trials=100, sampler="random", seed=9))
    assert is_of_another(entries, OTHER)
    assert is_of_another(entries, search(objective=GOAL | {"metric": "loss"}))
    assert not is_of_another([], OTHER)  # an empty one says nothing
    assert not is_of_another([{"op_code": 77}], OTHER)  # nor does a damaged one


# ── Read and written ────────────────────────────────────────────────────────────────────────────────────


def test_what_is_written_is_read_again(entries: list[JsonObject]) -> None:
    store = open_store("memory://written/sweep")
    store.put("study.log", b"".join(map(encoded_entry, entries)))
    assert read_entries(store) == (entries, "")


@pytest.mark.parametrize(
    ("content", "count", "wrong"),
    [
        (b'{"a":1}\n{"b":2}\n', 2, ""),
        (b'{"a":1}\n{"b":', 1, ""),  # a crash within the last line is no damage
        (b'{"a":1}\n{"b":\n{"c":3}\n', 1, "line 2: "),
        (b'{"a":1}\n[2]\n', 1, "line 2: "),
        (b"\xff\n", 0, "line 1: "),
        (b'{"a":NaN}\n', 0, "line 1: "),
        (b"", 0, ""),
    ],
)
def test_reading_stops_at_the_first_line_that_is_no_entry(content: bytes, count: int, wrong: str) -> None:
    store = open_store(f"memory://lines-{len(content)}-{count}/sweep")
    store.put("study.log", content)
    entries, why = read_entries(store)
    assert len(entries) == count
    assert why.startswith(wrong)
    assert bool(why) == bool(wrong)


def test_a_missing_journal_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissingError):
        read_entries(open_store(str(tmp_path)))
    (tmp_path / "study.log").mkdir()
    with pytest.raises(DamagedRecordError, match="not a file"):
        read_entries(open_store(str(tmp_path)))


def test_the_copy_in_the_store_begins_with_what_was_there() -> None:
    store = open_store("memory://copy/sweep")
    log = StudyLog(store, [{"op_code": 0}], every_seconds=0.0)
    assert log.flush(0)  # the store is believed to have it
    log.append_logs([{"op_code": 1}, {"op_code": 2}])
    assert log.flush(10)
    assert store.get("study.log") == b'{"op_code":0}\n{"op_code":1}\n{"op_code":2}\n'
    assert list(log.read_logs(1)) == [{"op_code": 1}, {"op_code": 2}]
    log.close()


def test_what_is_appended_is_kept_as_it_was() -> None:
    """Optuna may change a dictionary that it has handed over."""
    log = StudyLog(open_store("memory://kept/sweep"))
    entry = {"op_code": 0, "values": [1.0]}
    log.append_logs([entry])
    entry["values"].append(2.0)  # type: ignore[attr-defined]
    assert list(log.read_logs(0)) == [{"op_code": 0, "values": [1.0]}]
    log.close()


def test_a_closed_log_has_stored_everything(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    log = StudyLog(store, every_seconds=60.0)
    log.append_logs([{"op_code": number} for number in range(5)])
    log.close()
    lines = store.get("study.log").splitlines()
    assert [json.loads(line)["op_code"] for line in lines] == list(range(5))


def test_an_outage_that_ends_is_made_up_for(tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    log = StudyLog(open_store(str(place)), every_seconds=0.0)
    place.touch()  # a file where the folder should be
    log.append_logs([{"op_code": 0}])
    assert not log.flush(0.2)
    place.unlink()
    assert log.flush(20)
    log.close()


def test_a_store_that_stays_away_is_an_error_at_the_end(tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    log = StudyLog(open_store(str(place)))
    place.touch()
    log.append_logs([{"op_code": 0}])
    with pytest.raises(StoreError, match="sweep"):
        log.close(seconds=0.3)


def test_what_belongs_together_arrives_together(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    log = StudyLog(store, every_seconds=0.0)
    with log.together():
        log.append_logs([{"op_code": 0}])
        time.sleep(0.3)
        assert store.head("study.log") is None
        log.append_logs([{"op_code": 1}])
    assert log.flush(10)
    assert store.get("study.log") == b'{"op_code":0}\n{"op_code":1}\n'
    log.close()


def test_names_of_runs_sort_as_their_numbers() -> None:
    names = [run_name(number) for number in (0, 7, 42, 999, 9999)]
    assert names == sorted(names)
    assert names[1] == "t0007"
    assert run_name(12345) == "t12345"


# ── What is drawn ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_what_is_drawn_is_a_function_of_seed_number_and_the_trials_before(sampler: str) -> None:
    def first(seed: int, name: str) -> Mapping[str, object]:
        study = start(open_store(f"memory://{name}/sweep"), search(sampler=sampler, seed=seed))
        suggestion = next_of(study)
        study.close()
        return suggestion.parameters

    assert first(1, f"{sampler}-a") == first(1, f"{sampler}-b")
    assert first(1, f"{sampler}-a2") != first(2, f"{sampler}-c")


def test_a_grid_gives_its_first_point_that_is_not_among_those_before() -> None:
    grid = search(space={"energy.width": ["choice", [10, 20, 50]]}, sampler="grid", trials=3)
    points = [{"energy.width": width} for width in (10, 20, 50)]
    for before, expected in (([], 10), (points[:1], 20), ([points[0], points[2]], 20), (points[1:], 10)):
        sampler = sampler_of(grid, 0, before)
        axis = grid.space["energy.width"]
        assert sampler.sample_independent(None, None, "energy.width", axis) == expected  # type: ignore[arg-type]


def test_a_result_that_is_not_finite_is_never_in_the_journal() -> None:
    store = open_store("memory://finite/sweep")
    study = start(store, search())
    suggestion = next_of(study)
    for images, value in ((64, math.nan), (128, math.inf), (192, 3.0)):
        study.report(suggestion.number, {"distortion": value}, images=images, step=1, seconds=1.0)
    study.end(suggestion.number, "finished", {"distortion": -math.inf})
    study.close()
    entries, wrong = read_entries(store)
    assert wrong == ""
    assert first_problem(entries, "sweep", search()) == (len(entries), "")
    (trial,) = start(store, search()).trials
    assert trial.intermediate_values == {192: 3.0}
    assert (trial.state, trial.user_attrs["status"]) == (TrialState.PRUNED, "diverged")
