"""A sweep whose sweep.json or study.log is damaged resumes: what is good stays, runs keep their trials."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from test_study import finish, next_of, search, start

from jebm.config import Config, config_to_dict
from jebm.errors import ConfigError, StoreError
from jebm.parser import override
from jebm.store.checkpoint import Checkpoints, Facts
from jebm.store.storage import Store, open_store
from jebm.sweep.record import check_same
from jebm.sweep.study import SweepStudy
from jebm.sweep.study_log import run_name

DEEP = b"[" * 100_000 + b"]" * 100_000


def checkpoint(store: Store, number: int, parameters: dict[str, object]) -> None:
    """Leave what the run of a trial leaves."""
    facts = Facts(
        step=10,
        attempt=1,
        world_size=1,
        config=config_to_dict(override(Config(), parameters)),
        provenance={},
        metrics={"distortion": 1.0},
        state={},
        parent=None,
    )
    Checkpoints(store.child("trials"), run_name(number)).save({"a": torch.zeros(3)}, facts)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of six trials: two have finished, one has failed, one runs, two are to come."""
    folder = tmp_path_factory.mktemp("sweep")
    store = open_store(str(folder))
    study = start(store, search())
    for number in range(4):
        suggestion = next_of(study)
        checkpoint(store, number, suggestion.parameters)
        if number in (0, 2):
            finish(study, suggestion)
        elif number == 1:
            study.end(suggestion.number, "failed", {}, error="no memory")
    study.close()
    return folder


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Store:
    """A copy of it."""
    return open_store(str(shutil.copytree(original, tmp_path / "sweep")))


@pytest.fixture(scope="module")
def parameters(original: Path) -> list[dict[str, object]]:
    """The parameters of its trials."""
    journal = JournalStorage(JournalFileBackend(str(original / "study.log")))
    return [trial.params for trial in optuna.load_study(study_name="sweep", storage=journal).trials]


def states(study: SweepStudy) -> list[TrialState]:
    return [trial.state for trial in study.trials]


COMPLETE, FAIL, RUNNING = TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe{}",
        b'{"format": "jebm-sweep", "version": 1}',
        b'{"format": "jebm-sweep", "version": true}',
        b'{"format": ' + DEEP + b"}",
        b'{"format": "jebm-sweep", "version": 1, "search": [], "config": {}, "provenance": {}, "starts": []}',
        b'{"format": "jebm-sweep", "format": "jebm-sweep"}',
        b'{"a": "' + b"x" * (17 * 2**20) + b'"}',
    ],
)
def test_a_damaged_record_is_set_aside(
    store: Store, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    store.put("sweep.json", content)
    study = start(store, search())
    assert states(study) == [COMPLETE, FAIL, COMPLETE, RUNNING]
    (line,) = caplog.messages
    assert "sweep.json: is damaged (" in line
    assert "kept as sweep.json.damaged-1" in line
    assert len(line) < 700
    assert store.get("sweep.json.damaged-1") == content
    assert len(json.loads(store.get("sweep.json"))["starts"]) == 1
    study.close()


def test_without_its_record_a_sweep_is_told_from_another_by_its_journal(store: Store) -> None:
    journal = store.get("study.log")
    store.put("sweep.json", b"{")
    other = search(space={"langevin.step_size": ["loguniform", 0.05, 1.5], "energy.width": ["int", 10, 100]})
    for what in (other, search(objective={"metric": "loss", "direction": "minimize"})):
        with pytest.raises(ConfigError, match=r"run\.name: the sweep sweep was begun with another search"):
            start(store, what)
        assert store.get("sweep.json") == b"{"  # nothing is changed
        assert store.get("study.log") == journal
    # A record of a later version is no damage.
    record = {"format": "jebm-sweep", "version": 2, "search": {"space": {}}, "config": {}, "provenance": {}}
    store.put("sweep.json", json.dumps(record | {"starts": [], "data_sha256": "d"}).encode())
    with pytest.raises(StoreError, match="is of version 2"):
        check_same(store, "sweep", search(), Config(), "d")


VALUE, REPORT = '"param_value_internal":', '"intermediate_value":'


def replaced(old: str, new: str) -> Callable[[bytes], bytes]:
    def change(journal: bytes) -> bytes:
        changed = re.sub(old.encode(), new.encode(), journal, count=1)
        assert changed != journal
        return changed

    return change


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda journal: b"", id="empty"),
        pytest.param(lambda journal: journal[: len(journal) // 2] + b"\n", id="cut off within a line"),
        pytest.param(
            lambda journal: b"".join(journal.splitlines(keepends=True)[:4]), id="cut off within a trial"
        ),
        pytest.param(lambda journal: journal.replace(b"{", b"\0", 9), id="zeros"),
        pytest.param(lambda journal: b"\xff" + journal, id="not UTF-8"),
        pytest.param(lambda journal: DEEP + b"\n" + journal, id="deep"),
        pytest.param(lambda journal: b"[3]\n" + journal, id="no object"),
        pytest.param(lambda journal: b'{"op_code": 77}\n' + journal, id="no operation"),
        pytest.param(lambda journal: b'{"op_code": 5, "worker_id": "x"}\n' + journal, id="half an operation"),
        pytest.param(replaced('"study_name":"sweep"', '"study_name":"other"'), id="another study"),
        pytest.param(replaced('"directions":.1.', '"directions":[2]'), id="another direction"),
        pytest.param(replaced(f"{VALUE}[0-9.]+", f"{VALUE}1e9"), id="value outside"),
        pytest.param(replaced(f"{VALUE}[0-9.]+", f'{VALUE}"x"'), id="value that is text"),
        pytest.param(replaced(f"{REPORT}[0-9.]+", f'{REPORT}"x"'), id="report of text"),
        pytest.param(replaced(f"{REPORT}[0-9.]+", f"{REPORT}NaN"), id="report of NaN"),
        pytest.param(replaced('"seconds":[0-9.]+', '"seconds":"long"'), id="seconds of text"),
        pytest.param(replaced('"attempts":1', '"attempts":-1'), id="negative attempts"),
        pytest.param(replaced('"status":"finished"', '"status":"great"'), id="unknown status"),
        pytest.param(replaced('"values":.[0-9.]+.', '"values":["x"]'), id="result of text"),
    ],
)
def test_a_damaged_journal_keeps_its_beginning_and_its_runs(
    store: Store,
    parameters: list[dict[str, object]],
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:
    content = damage(store.get("study.log"))
    store.put("study.log", content)
    study = start(store, search())
    # All four trials are there, each with the parameters of its run, and those without a result come first.
    assert [trial.params for trial in study.trials] == parameters
    assert all(state in (COMPLETE, FAIL, RUNNING) for state in states(study))
    assert states(study)[3] == RUNNING
    again = [number for number, state in enumerate(states(study)) if state == RUNNING]
    for number in again:
        suggestion = study.suggest(60)
        assert suggestion is not None
        assert (suggestion.number, suggestion.interrupted) == (number, True)
        finish(study, suggestion)
    assert next_of(study).number == 4
    (line,) = [message for message in caplog.messages if "study.log" in message]
    assert len(line) < 900
    if content:
        assert "study.log: is damaged (" in line
        assert "kept as study.log.damaged-1" in line
        assert store.get("study.log.damaged-1") == content
    study.close()
    # And the journal is a good one again.
    caplog.clear()
    assert len(start(store, search()).trials) == 5
    assert caplog.messages == []


def test_a_journal_that_is_gone_is_made_of_the_runs(
    store: Store, parameters: list[dict[str, object]], caplog: pytest.LogCaptureFixture
) -> None:
    store.delete(["study.log"])
    study = start(store, search())
    assert [trial.params for trial in study.trials] == parameters
    assert states(study) == [RUNNING] * 4
    assert "does not know the trials t0000 to t0003" in caplog.text


def test_trials_that_are_nobodys_are_not_taken(tmp_path: Path) -> None:
    """A stranger's folder with a huge number, a run of another search, and one that left no checkpoint."""
    store = open_store(str(tmp_path / "sweep"))
    start(store, search()).close()
    checkpoint(store, 2, {"langevin.step_size": 0.3, "energy.width": 50})
    checkpoint(store, 1, {"langevin.step_size": 1.5, "energy.width": 50})
    for name in ("t999999999", "t٣٣٣٣", "t00001", "x0001"):
        store.child("trials").put(f"{name}/run.json", b"{}")
    study = start(store, search())
    assert len(study.trials) == 3
    assert study.trials[2].params == {"langevin.step_size": 0.3, "energy.width": 50}
    assert study.trials[1].params["langevin.step_size"] <= 1
