"""The notebooks: executed as they are, from the first cell to the last; committed without outputs."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["first_run", "has_my_prior_mixed", "own_data", "own_energy", "read_a_sweep"]
PICTURES = {"first_run": 4, "has_my_prior_mixed": 3, "own_data": 3, "own_energy": 1, "read_a_sweep": 1}


def test_notebooks_hold_no_outputs_and_no_places_of_a_machine() -> None:
    assert [path.stem for path in NOTEBOOKS] == NAMES
    for path in NOTEBOOKS:
        text = path.read_text("utf-8")
        assert not re.search(r"[\"' =(](/|~/|file:)[a-z]+/", text), path
        for cell in json.loads(text)["cells"]:
            assert not cell.get("outputs"), path
            assert cell.get("execution_count") is None, path


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, but for the sweep that one reads: without it, it would start Ray."""
    import nbformat
    from nbclient import NotebookClient

    if name == "read_a_sweep":
        monkeypatch.syspath_prepend(ROOT / "tests" / "sweep")
        from made_sweeps import draw, make_sweep, trial, value_at

        points = [draw(random.Random(seed)) for seed in range(12)]
        make_sweep(tmp_path / "runs" / "first", [trial(point, value_at(point)) for point in points])
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "platform"))
    monkeypatch.setenv("JEBM_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook: Any = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in shown if output.output_type == "error"]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) == PICTURES[name]
