"""What a result was made with is told of any checkout, whatever else lies in it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

import jebm


def facts_of(package: Path) -> dict[str, str]:
    program = "import json; from jebm.train.provenance import provenance; print(json.dumps(provenance()))"
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_links_that_lead_nowhere_and_odd_names_are_no_obstacle(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "platform/jebm", tmp_path / "jebm", ignore=ignored)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    plain = facts_of(tmp_path)
    assert plain["jebm"] == jebm.__version__
    assert "+" not in plain["git_revision"]
    (tmp_path / "jebm/.#cli.py").symlink_to("somebody@somewhere.1234")  # as Emacs marks an open file
    linked = facts_of(tmp_path)
    assert linked["source_sha256"] == plain["source_sha256"]
    assert linked["git_revision"] == f"{plain['git_revision']}+changes"
    subprocess.run([*git, "config", "core.quotePath", "false"], check=True)
    (tmp_path / os.fsdecode(b"jebm/\xff.py")).touch()
    odd = facts_of(tmp_path)
    assert odd["source_sha256"] != plain["source_sha256"]
    assert odd["git_revision"].endswith("+changes")
    (tmp_path / "jebm/native/chain.c").write_text("another kernel")
    assert facts_of(tmp_path)["source_sha256"] not in (plain["source_sha256"], odd["source_sha256"])
