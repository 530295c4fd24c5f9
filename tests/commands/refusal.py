"""What a command says of bad input."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def refusal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, *words: str
) -> str:
    """Run jobs/NAME.py in this process; return the one line with which it ends, with exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / f"jobs/{name}.py"), run_name="__main__")
    written = capsys.readouterr().err
    assert ended.value.code == 2
    assert written.count("\n") == 1, written
    return written
