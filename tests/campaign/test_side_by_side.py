"""Runs beside each other on a page: what differs, where they stand, and that no storage can break it."""

import io
import json
import statistics
import sys
from pathlib import Path

import pytest
from PIL import Image

from jebm.campaign.side_by_side import side_by_side
from jebm.campaign.traces import read_traces
from jebm.commands import run_command
from jebm.config import Config, config_to_dict
from jebm.errors import StoreError
from jebm.parser import override
from jebm.report.findings import Findings, Measured, Section
from jebm.store.storage import open_store


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (40, 40), shade).save(file, "PNG")
    return file.getvalue()


def write(
    place: Path, values: dict[str, object], curve: dict[int, float], pictures: tuple[int, ...] = ()
) -> str:
    """Write what a run leaves; return its URI."""
    store = open_store(str(place))
    config = config_to_dict(override(Config(), values))
    store.put("run.json", json.dumps({"config": config, "attempts": []}).encode())
    rows = ({"step": step, "distortion": value, "odd": None} for step, value in curve.items())
    store.put("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    for step in pictures:
        store.put(f"pictures/step-{step:08d}.png", png(step % 256))
    return str(place)


def evaluate(place: str, name: str, elbo: float) -> None:
    figure = {"name": "ELBO", "value": elbo, "error": 0.5, "unit": "nats", "better": "higher", "meaning": ""}
    undefined = {"name": "nothing", "value": None, "error": None, "unit": "", "better": None, "meaning": ""}
    document = {"schema": 2, "sections": [{"name": "likelihood", "figures": [figure, undefined]}]}
    open_store(place).put(f"evaluations/{name}/evaluation.json", json.dumps(document).encode())


def sections(findings: Findings) -> dict[str, Section]:
    return {section.name: section for section in findings.sections}


def test_what_differs_is_told_and_curves_share_an_axis_of_images(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"energy.width": 50}, {10: 9.0, 20: 7.0, 30: 5.5}, (10, 20, 30))
    second = write(
        tmp_path / "b", {"energy.width": 200, "train.batch_size": 256}, {10: 8.0, 20: 6.0}, (10, 20)
    )
    evaluate(first, "step-1-quick", -100.0)
    evaluate(second, "step-2-paper", -90.0)
    findings = side_by_side(read_traces([first, second]))
    found = sections(findings)
    (result,) = found["config"].tables
    assert set(result.rows) == {("train.batch_size", "128", "256"), ("energy.width", "50", "200")}
    assert [picture.title for picture in found["pictures"].pictures] == ["a", "b"]
    assert "step 20:" in found["pictures"].pictures[0].meaning  # the last that both have
    (drawing,) = found["curves"].drawings
    assert drawing.title == "distortion"
    assert b"images seen" in drawing.svg
    (table,) = found["evaluations"].tables
    assert table.rows == (("likelihood", "ELBO ↑", "nats", Measured(-100.0, 0.5), Measured(-90.0, 0.5)),)
    assert {row[0]: row[1:] for row in found["metrics"].tables[0].rows}["distortion"] == (5.5, 6.0)
    assert "seeds" not in found


def test_runs_that_differ_by_their_seed_are_a_mean_with_an_interval(tmp_path: Path) -> None:
    values = (3.0, 4.0, 8.0)
    places = [
        write(tmp_path / f"s{seed}", {"run.seed": seed, "run.name": f"s{seed}"}, {10: 9.0, 20: value})
        for seed, value in enumerate(values)
    ]
    other = write(tmp_path / "wide", {"energy.width": 7}, {10: 9.0, 20: 1.0})
    (table,) = sections(side_by_side(read_traces([*places, other])))["seeds"].tables
    assert table.columns == ("metric", "s0 + s1 + s2")
    ((name, cell),) = table.rows
    assert name == "distortion"
    assert isinstance(cell, Measured)
    assert cell.value == pytest.approx(statistics.fmean(values))
    # 4.3027: the 97.5 % quantile of Student's t with two degrees of freedom
    assert cell.error == pytest.approx(4.3027 * statistics.stdev(values) / 3**0.5, rel=1e-4)


def test_the_command_writes_a_page_whatever_the_storages_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good", {}, {10: 9.0, 20: 7.0}, (10,))
    odd = write(tmp_path / "x" / "good", {}, {10: 9.0})
    store = open_store(odd)
    store.put("metrics.jsonl", b"\xff\n[1]\n" + b'{"step": 3, "<script>": 1e308}\n')
    store.put("pictures/step-00000010.png", b"\x89PNG no picture")
    store.put("evaluations/e/evaluation.json", b'{"sections": [{"figures": 7}]}')

    def compare(*arguments: str, output: str = "page") -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["jebm", *arguments, "--output", str(tmp_path / output)])
        with pytest.raises(SystemExit) as caught:
            run_command("compare-runs")
        return caught.value.code, *capsys.readouterr()

    assert compare(good, odd)[0] == 0
    page = (tmp_path / "page/runs.html").read_text()
    assert "<script" not in page
    assert f"no picture of {odd}" in page  # of two runs of one name each is called by its place
    code, _, err = compare(good)
    assert (code, err) == (2, "error: give 2 to 12 runs; there are 1\n")
    code, _, err = compare(good, str(tmp_path / "nothing"))
    assert code == 2
    assert err.endswith("no run here; jebm runs lists the runs of a storage\n")
    code, _, err = compare(good, str(tmp_path / "nothing"), output="good/run.json")  # before runs are read
    assert code == 2
    assert err.endswith("run.json is no folder; choose another folder\n")
    with pytest.raises(StoreError):
        read_traces([str(tmp_path / "nothing")])
