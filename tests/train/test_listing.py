"""A storage's runs and sweeps on a line each: what is told of them, at what cost, whoever wrote them."""

import json
import sys
import threading
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from jebm.commands import run_command
from jebm.errors import StoreError
from jebm.store.checkpoint import Checkpoints, Facts
from jebm.store.memory import MemoryStore
from jebm.store.storage import Store, open_store
from jebm.train.lease import Lease
from jebm.train.listing import Metric, listed_runs

FACTS = Facts(step=0, attempt=1, state={}, config={}, metrics={}, provenance={}, world_size=1, parent=None)
DISTORTION = Metric("distortion", "min")


class Counted(MemoryStore):
    """Objects in memory that count the requests to them, by kind."""

    requests: ClassVar[Counter[str]] = Counter()
    lock: ClassVar = threading.Lock()

    def __getattribute__(self, name: str) -> Any:
        if name in ("get", "head", "list", "read_into"):
            with Counted.lock:
                Counted.requests[name] += 1
        return super().__getattribute__(name)

    def child(self, prefix: str) -> "Counted":
        return Counted(self._name, f"{self._prefix}/{prefix.strip('/')}".lstrip("/"))


def journal(store: Store, name: str, *rows: dict[str, object], total_steps: int = 40) -> None:
    attempt = {"started": "2026-01-01T00:00:00Z", "from_step": 0, "total_steps": total_steps}
    store.put(f"{name}/run.json", json.dumps({"attempts": [attempt]}).encode())
    store.put(f"{name}/metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def save(store: Store, name: str, step: int) -> None:
    Checkpoints(store, name).save({"model.x": torch.ones(3)}, replace(FACTS, step=step))


def test_a_run_is_listed_with_its_last_and_best_value_its_state_size_and_holder() -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}/runs")
    with pytest.raises(StoreError, match="holds no run"):
        listed_runs(store, DISTORTION)
    rows = [{"step": 10, "distortion": 3.5}, {"step": 20, "distortion": -2e-1}, {"step": 30, "distortion": 9}]
    journal(store, "team/first", *rows)
    save(store, "team/first", 40)
    journal(store, "second", {"step": 4, "distortion": None, "other": 1.0})
    with Lease(store.child("second")):
        second, first = listed_runs(store, DISTORTION)
        assert (second.name, second.state, second.step) == ("second", "waiting", 4)
        assert (second.last, second.best) == (None, None)
        assert second.holder is not None
        assert second.holder.startswith("process ")
    assert (first.name, first.state, first.step, first.total_steps) == ("team/first", "finished", 40, 40)
    assert (first.last, first.best, first.holder) == (9.0, -0.2, None)
    assert first.size == sum(info.size for info in store.list("team/"))
    assert {run.best for run in listed_runs(store, Metric("distortion", "max"))} == {None, 9.0}
    assert {run.state for run in listed_runs(store, DISTORTION)} == {"finished", "stopped"}


def test_a_sweep_is_one_line_with_its_trials_best() -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}/runs")
    store.put("sweep/sweep.json", b"{}")
    for number, value in enumerate((5.0, 3.0, 4.0)):
        journal(
            store,
            f"sweep/trials/t000{number}",
            {"step": 9, "distortion": 1.0},
            {"step": 10, "distortion": value},
        )
    store.put("empty/sweep.json", b"{}")
    by_name = {run.name: run for run in listed_runs(store, DISTORTION)}
    assert by_name.keys() == {"sweep", "empty"}
    sweep = by_name["sweep"]
    assert (sweep.kind, sweep.trials, sweep.step, sweep.last, sweep.best) == ("sweep", 3, 30, None, 3.0)
    assert sweep.size == sum(info.size for info in store.list("sweep/"))
    assert by_name["empty"].trials == 0


def test_a_thousand_runs_cost_one_listing_and_a_few_reads_each() -> None:
    store = Counted(uuid.uuid4().hex, "runs")
    for number in range(1000):
        journal(store, f"run{number:04d}", {"step": 7, "distortion": float(number)})
    Counted.requests.clear()
    assert len(listed_runs(store, DISTORTION)) == 1000
    assert Counted.requests["list"] == 1
    assert Counted.requests.total() <= 1 + 3 * 1000  # run.json: its size, then itself; the end of the journal


def test_hostile_records_forge_no_line_and_hide_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path))
    journal(store, "good", {"step": 7, "distortion": 1.5})
    store.put("bad\x1b[2J/run.json".replace("\x1b", "%1b"), b"{}")  # no run's name
    store.put("odd/run.json", b"[" * 100_000)
    store.put(
        "odd/metrics.jsonl",
        b'{"step": 1, "distortion": 1e999}\n{"distortion": ' + b"9" * 400 + b"}\n\xff\x00",
    )
    store.put("odd/lease/00000001.json", b"who?\x1b[2J")

    def runs(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["jebm", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as caught:
            run_command("runs")
        return caught.value.code, *capsys.readouterr()

    code, out, _ = runs()
    assert code == 0
    assert "\x1b" not in out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines.keys() == {"run", "good", "odd"}
    assert runs("--metric", "lss")[1].splitlines()[-1] == "none has the metric lss; metrics are distortion"
    assert lines["good"].split()[1:7] == ["unknown", "7", "of", "40", "1.5", "1.5"]
    assert "cannot be read" in lines["odd"]
    document = json.loads(runs("--json", "--metric", 'a"b')[1])
    assert [(run["name"], run["last"]) for run in document["runs"]] == [("odd", None), ("good", None)]


@pytest.mark.parametrize("spoilt", ["run.json", "checkpoints/data"])
def test_a_run_that_cannot_be_listed_is_left_out_with_a_line_and_hides_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoilt: str
) -> None:
    store = open_store(str(tmp_path))
    for name in ("bad", "good"):
        journal(store, name, {"step": 7, "distortion": 1.5})
    link = tmp_path / "bad" / spoilt
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(link.name)
    assert [run.name for run in listed_runs(store, DISTORTION)] == ["good"]
    (line,) = caplog.messages
    assert line.startswith("bad is left out: ")
    assert f"bad/{spoilt}: cannot" in line
