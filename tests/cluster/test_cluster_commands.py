"""What the cluster's documents tell people to type: it can be typed on a fresh machine, and again."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jebm.parser import load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "cluster/README.md").read_text()


def trainings() -> Iterator[tuple[str, list[str]]]:
    """Yield each command that trains, with the file that names it, as its words after the script."""
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.glob("cluster/**/*.*"))}
    job = yaml.safe_load(texts["cluster/kuberay/rayjob.yaml"])
    texts["cluster/kuberay/rayjob.yaml"] = job["spec"]["entrypoint"]
    for name, text in texts.items():
        joined = text.replace("\\\n", " ")
        for command in re.findall(r"python jobs/train\.py ([^`\n]*--config [^`\n…]+)", joined):
            yield name, shlex.split(command)


def test_documents_name_trainings() -> None:
    assert {name for name, _ in trainings()} >= {"cluster/README.md", "cluster/kuberay/rayjob.yaml"}


@pytest.mark.parametrize(("name", "words"), list(trainings()))
def test_the_data_of_a_documented_training_are_there(name: str, words: list[str]) -> None:
    """On a fresh machine: in the bucket, or in what a clone, an image and an upload all have."""
    given = dict(zip(words[::2], words[1::2], strict=True))
    config = load_config(ROOT / given["--config"])
    for key in ("train", "validation", "held_out"):
        place = given.get(f"--data.{key}", getattr(config.data, key))
        if place is not None and not place.startswith("s3://"):
            assert place.startswith("jobs/data/"), (name, place)
            assert (ROOT / place / "dataset.json").is_file()


def make_token(home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Type the README's lines for the token in a new shell of this home."""
    section = README.split("## The token, once\n")[1]
    (lines,) = re.findall(r"```bash\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"HOME": str(home), "PATH": path, **variables}
    check = f"set -e\n{lines}\nray get-auth-token"
    return subprocess.run(["bash", "-c", check], env=environment, capture_output=True, text=True, check=False)


def test_the_token_can_be_made_again_and_stays(tmp_path: Path) -> None:
    first = make_token(tmp_path)
    assert first.returncode == 0, first.stderr
    file = tmp_path / ".jebm/auth_token"
    token = file.read_text()
    assert re.fullmatch(r"[0-9a-f]{64}\n", token)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert token.strip() in first.stdout  # Ray reads it
    standing = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}  # as in ~/.profile
    again = make_token(tmp_path, **standing)
    assert again.returncode == 0, again.stderr
    assert file.read_text() == token
    for broken in (file.unlink, lambda: file.write_text("")):
        broken()
        assert make_token(tmp_path, **standing).returncode == 0
        assert re.fullmatch(r"[0-9a-f]{64}\n", file.read_text())
    assert {path.name for path in tmp_path.iterdir()} <= {".jebm", ".ray"}
    assert not (tmp_path / ".ray/auth_token").exists()  # one copy, not two
