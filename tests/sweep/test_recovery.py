"""What of a sweep stands in its runs and in a damaged journal, and comes back from there."""

from pathlib import Path

import pytest
from test_damaged_sweep import checkpoint
from test_study import SPACE, finish, next_of, search, start

from jebm.errors import ConfigError
from jebm.store.storage import Store, open_store
from jebm.sweep.recovery import check_log, good_entries, lost_trials
from jebm.sweep.study_log import encoded_entry, read_entries

GOOD = {"langevin.step_size": 0.25, "energy.width": 50}


def store_of(tmp_path: Path, *numbers: int, **changes: object) -> Store:
    """A sweep's folder with the runs of some trials, and nothing else."""
    store = open_store(str(tmp_path / "sweep"))
    for number in numbers:
        checkpoint(store, number, GOOD | changes)
    return store


# ── Trials from their runs ──────────────────────────────────────────────────────────────────────────────


def test_a_run_tells_the_parameters_of_its_trial(tmp_path: Path) -> None:
    assert lost_trials(store_of(tmp_path, 0, 1), search(), known=0) == [GOOD, GOOD]


@pytest.mark.parametrize(("known", "count"), [(0, 3), (2, 1), (3, 0), (9, 0)])
def test_only_what_the_journal_does_not_know_is_lost(tmp_path: Path, known: int, count: int) -> None:
    assert len(lost_trials(store_of(tmp_path, 0, 1, 2), search(), known)) == count


def test_a_trial_between_them_that_left_no_checkpoint_keeps_its_number(tmp_path: Path) -> None:
    assert lost_trials(store_of(tmp_path, 0, 3), search(), known=0) == [GOOD, None, None, GOOD]


@pytest.mark.parametrize(
    "numbers", [(999_999_999,), (0, 5_000), (0, 1, 40)], ids=["alone", "after one", "after two"]
)
def test_a_number_far_beyond_the_others_is_nobodys(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    store = store_of(tmp_path, *(number for number in numbers if number < 40))
    store.child("trials").put(f"t{numbers[-1]:04d}/run.json", b"{}")
    assert lost_trials(store, search(), known=0) == [GOOD] * (len(numbers) - 1)


@pytest.mark.parametrize(
    "changes",
    [{"langevin.step_size": 1.5}, {"energy.width": 101}, {"energy.width": 9}],
    ids=["above", "above a whole number", "below"],
)
def test_a_run_with_values_that_are_not_searched_is_another_searchs(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    assert lost_trials(store_of(tmp_path, 0, **changes), search(), known=0) == []


def test_lists_and_whole_numbers_come_back_as_optuna_has_them(tmp_path: Path) -> None:
    space = {
        "model.latent_dims": ["choice", [[2, 2, 10], [4, 4, 8]]],
        "optimizer.energy.clip_norm": ["choice", [None, 10]],
        "train.epochs": ["uniform", 1, 3],
        "run.seed": ["int", 0, 9],
    }
    drawn = {
        "model.latent_dims": "[4, 4, 8]",
        "optimizer.energy.clip_norm": None,
        "train.epochs": 2.0,
        "run.seed": 7,
    }
    store = open_store(str(tmp_path / "sweep"))
    checkpoint(store, 0, drawn)
    (found,) = lost_trials(store, search(space=space), known=0)
    assert found == drawn
    assert found is not None
    assert {key: type(value) for key, value in found.items()} == {k: type(v) for k, v in drawn.items()}


def test_without_runs_nothing_is_lost(tmp_path: Path) -> None:
    assert lost_trials(store_of(tmp_path), search(), known=0) == []


# ── Entries from the journal ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def begun(tmp_path: Path) -> Store:
    """A sweep with a finished trial and one that runs."""
    store = open_store(str(tmp_path / "begun"))
    study = start(store, search())
    finish(study, next_of(study))
    next_of(study)
    study.close()
    return store


def test_a_sound_journal_stays_as_it_is(begun: Store) -> None:
    before = begun.get("study.log")
    entries, damage = good_entries(begun, "sweep", search())
    assert damage == ""
    assert b"".join(map(encoded_entry, entries)) == before == begun.get("study.log")
    assert not [info.key for info in begun.list("") if "damaged" in info.key]


def test_a_new_sweep_has_no_entries(tmp_path: Path) -> None:
    assert good_entries(open_store(str(tmp_path / "new")), "sweep", search()) == ([], "")


@pytest.mark.parametrize("tail", [b"no entry\n", b'{"op_code": 77}\n', b"\xff\n"])
def test_a_damaged_end_is_set_aside_with_the_rest_kept(begun: Store, tail: bytes) -> None:
    sound = begun.get("study.log")
    for time in (1, 2):  # a second damage is kept beside the first
        begun.put("study.log", sound + tail)
        entries, damage = good_entries(begun, "sweep", search())
        assert b"".join(map(encoded_entry, entries)) == sound == begun.get("study.log")
        assert begun.get(f"study.log.damaged-{time}") == sound + tail
        assert f"kept as study.log.damaged-{time}, its first {len(entries)} lines stay" in damage
        assert "\n" not in damage


def test_a_journal_without_a_good_line_is_empty_afterwards(begun: Store) -> None:
    begun.put("study.log", b"\xff" * 100)
    entries, damage = good_entries(begun, "sweep", search())
    assert entries == read_entries(begun)[0] == []
    assert "kept as study.log.damaged-1" in damage


def test_only_another_searchs_journal_is_refused(begun: Store, tmp_path: Path) -> None:
    check_log(begun, "sweep", search())
    check_log(open_store(str(tmp_path / "none")), "sweep", search())
    other = search(space=SPACE | {"energy.width": ["int", 10, 99]})
    with pytest.raises(ConfigError, match="was begun with another search"):
        check_log(begun, "sweep", other)
    begun.put("study.log", b"\xff" * 100)
    check_log(begun, "sweep", other)  # it tells nothing
