"""`jebm new` writes a skeleton that keeps the contract, and never writes over a file."""

import sys
from pathlib import Path
from typing import Any

import pytest

from jebm.commands import run_command
from jebm.parser import argument_parser, parse_arguments
from jebm.parts import Energy
from jebm.testing import SHAPES, battery, check_energy, check_generator, check_inference, check_likelihood

CHECKS: dict[str, Any] = {
    "generator": check_generator,
    "inference": check_inference,
    "energy": check_energy,
    "likelihood": check_likelihood,
}


def new(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["new", *words])
    with pytest.raises(SystemExit) as caught:
        run_command("new")
    return caught.value.code


@pytest.mark.parametrize("kind", list(CHECKS))
def test_a_skeleton_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(battery, "workers_differ", lambda case: None)  # its seconds: test_testing.py
    module = f"mine_{kind}"
    assert new(monkeypatch, kind, f"{module}.py") == 0
    assert f"--{kind}.class_path {module}.My{kind.capitalize()}" in capsys.readouterr().out
    scope: dict[str, Any] = {"__name__": module}
    exec((tmp_path / f"{module}.py").read_text(), scope)  # what was written above
    shapes = SHAPES._replace(image=(3, 12, 12), layers=((2,), (3,), (4,)), outputs=3)
    CHECKS[kind](scope[f"My{kind.capitalize()}"])
    CHECKS[kind](scope[f"My{kind.capitalize()}"], shapes)
    if kind == "energy":  # its closed form, which the check above compares, lets chains run in place
        assert scope["MyEnergy"].gradient is not Energy.gradient
    test = (tmp_path / f"test_{module}.py").read_text()
    assert f"from {module} import My{kind.capitalize()}" in test
    compile(test, "test", "exec")


def test_what_it_prints_is_right_in_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my nets"
    folder.mkdir()
    assert new(monkeypatch, "energy", "my nets/mine_below.py") == 0
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()[1:]]
    assert printed[:2] == ["cd 'my nets'", "pytest test_mine_below.py"]
    assert "--energy.class_path mine_below.MyEnergy" in printed[2]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = printed[2].split()[3:]
    config, _ = parse_arguments(argument_parser("a job"), ["--config", "smoke", *words[-2:]])
    assert config.energy.class_path == "mine_below.MyEnergy"
    sys.modules.pop("mine_below")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["energy", "there.py"], "file: there.py exists; name another one"),
        (["energy", "tested.py"], "file: test_tested.py exists; name another one"),
        (["energy", "json.py"], "file: there is a module json already; name another one"),
        (["energy", "my-net.py"], "must be named as a Python module"),
        (["energy", "class.py"], "must be named as a Python module"),
        (["energy", "__main__.py"], "file: there is a module __main__ already; name another one"),
        (["energy", ""], "file: is empty (where to, such as mine.py)"),
        (["energy", "/"], "file: / must be named as a Python module"),
        (["energy", "dangling.py"], "file: dangling.py cannot be written (File exists: dangling.py)"),
        (["energy", "half.py"], "file: half.py cannot be written (File exists: test_half.py)"),
        (["energy", f"{'a' * 250}.py"], "cannot be written (File name too long: test_aaa"),
        (["energy", "no/where.py"], "file: there is no folder no"),
        (["energi", "mine.py"], "must be one of generator, inference, energy, likelihood"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("there.py", "test_tested.py"):
        (tmp_path / name).write_text("mine")
    for name in ("dangling.py", "test_half.py"):
        (tmp_path / name).symlink_to("no/where.py")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as in the installed program
    assert new(monkeypatch, *words) == 2
    assert line in capsys.readouterr().err
    assert {path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {"mine"}
