"""The command line as a whole: what `jebm` says before it knows a command."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "checkpoints",
    "compare",
    "compare-runs",
    "doctor",
    "encode",
    "evaluate",
    "export",
    "fetch",
    "ingest",
    "push",
    "runs",
    "sample",
    "status",
    "submit",
    "track",
    "train",
    "tune",
)


def jebm(*words: str, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, after some lines of Python."""
    code = f"import sys; sys.argv = ['jebm', *{words!r}]; {prelude}import jebm.commands; jebm.commands.main()"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_help_names_each_command_and_imports_neither_torch_nor_ray(words: tuple[str, ...]) -> None:
    refuse = "sys.modules.update(dict.fromkeys(('torch', 'ray', 'jsonargparse', 'boto3'))); "
    done = jebm(*words, prelude=refuse)
    assert (done.returncode, done.stderr) == (0, "")
    for name in COMMANDS:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"  {name} ")]
        assert line.endswith(".")


def test_a_mistyped_command_is_one_line_with_the_near_one() -> None:
    done = jebm("trian", "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command trian; did you mean train?\n"
    assert "unknown command x; there are checkpoints, " in jebm("x").stderr


def test_without_ray_one_line_says_what_to_install() -> None:
    done = jebm("train", "--config", "smoke", "--dry-run", prelude="sys.modules['ray'] = None; ")
    assert (done.returncode, done.stdout) == (2, "")
    line = "error: ray is not installed; install jebm[ray]; to train without Ray: --cluster.engine process\n"
    assert done.stderr == line


def test_the_module_and_the_front_door_of_a_cluster_are_the_same_command() -> None:
    commands = [("-m", "jebm", "doctor"), ("jobs/doctor.py",)]
    texts = {
        subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, check=True).stdout
        for words in commands
    }
    assert len(texts) == 1
    assert texts.pop().startswith(b"usage: jebm doctor")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_front_door_for_clusters(name: str) -> None:
    assert f'run_command("{name}")' in (ROOT / "jobs" / f"{name.replace('-', '_')}.py").read_text()
