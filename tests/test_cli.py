"""From errors to exit codes."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jebm.cli import log_lines, run, tell, tell_json
from jebm.errors import CheckpointError, ConfigError, DataError, DivergedError, JebmError, StoreError


class UnreachableError(StoreError):
    """A kind of StoreError."""


def outcome(main: Callable[[], int | None], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    with pytest.raises(SystemExit) as caught:
        run(main)
    return caught.value.code, capsys.readouterr().err


def raising(error: BaseException) -> Callable[[], int | None]:
    def main() -> int | None:
        raise error

    return main


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_result_is_the_exit_code(
    result: int | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(lambda: result, capsys) == (code, "")


@pytest.mark.parametrize("kind", [CheckpointError, ConfigError, DataError, StoreError, UnreachableError])
def test_what_the_user_can_put_right_is_one_line_and_2(
    kind: type[JebmError], capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(raising(kind("x.png: bad\n  very bad")), capsys) == (2, "error: x.png: bad very bad\n")


def test_other_ends_have_their_own_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(raising(DivergedError("step 7")), capsys) == (1, "diverged: step 7\n")
    assert outcome(raising(KeyboardInterrupt()), capsys) == (130, "interrupted\n")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


def test_nothing_foreign_reaches_the_terminal_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    tell("one\x1b[2J\ntwo\rthree")
    tell_json({"a\x1b\x7f": "\u202e"})
    assert capsys.readouterr().out == 'one\\x1b[2J\ntwo\\rthree\n{"a\\u001b\\u007f": "\\u202e"}\n'
    error = outcome(raising(StoreError("s3://x/\x1b]0;title\x07: gone")), capsys)
    assert error == (2, "error: s3://x/\\x1b]0;title\\x07: gone\n")


def test_the_log_is_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    log_lines()
    try:
        raise ValueError("\x1b[31m")
    except ValueError:
        logging.getLogger("jebm.test").exception("run %s", "a\x1b[2Jb\nc")
    out = capsys.readouterr().out
    assert out.startswith("run a\\x1b[2Jb\\nc\nTraceback")
    assert "\x1b" not in out


def test_lines_that_nobody_reads_any_more_are_dropped() -> None:
    many = "[logging.getLogger('jebm').info('x' * 1000) for _ in range(500)]; tell('end')"
    program = f"import logging\nfrom jebm.cli import log_lines, tell\nlog_lines()\n{many}"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("from jebm.commands import main; sys.argv = ['jebm', '--help']; main()", 2),
        ("from jebm.commands import main; sys.argv = ['jebm', 'new', '--help']; main()", 2),
        ("tell('before'); run(lambda: tell('after'))", 2),
        ("log_lines(); run(lambda: [logging.getLogger('jebm').info('a'), tell('b'), 0][-1])", 0),
        ("log_lines(); run(lambda: [logging.getLogger('jebm').info('a'), tell('b'), 3][-1])", 3),
    ],
)
def test_a_stdout_that_cannot_be_written_is_one_line(program: str, code: int) -> None:
    program = f"import logging, sys\nfrom jebm.cli import log_lines, run, tell\n{program}"
    command = [sys.executable, "-c", program]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.stderr == "stdout cannot be written: No space left on device\n"
        assert done.returncode == code
        # Nor a stderr on the same disk, as of `… > log 2>&1`.
        assert subprocess.run(command, stdout=full, stderr=full, check=False).returncode == code


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}],
)
def test_letters_that_a_terminal_does_not_know_are_escaped(variables: dict[str, str]) -> None:
    shown = subprocess.check_output([sys.executable, "-m", "jebm", "--help"], env=os.environ | variables)
    assert shown.startswith(b"usage: jebm COMMAND \\u2026\n")
