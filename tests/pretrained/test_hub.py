"""`jebm push` and hf://: huggingface_hub itself, against a small stand-in of the hub on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, served
from made_models import save

from jebm.pretrained.write import export
from jebm.store.storage import open_store

pytest.importorskip("huggingface_hub")

SCRIPT = """
import json, os, sys
import jebm
from jebm.cli import log_lines
from pathlib import Path
from jebm.pretrained.hub import push

log_lines()
said = [push(Path("model"), "hf://me/mine", public=False), push(Path("model"), "hf://lab/open", public=True)]
found = [jebm.from_pretrained(place) for place in ("model", "hf://me/mine", "hf://lab/open@main")]
samples = [each.sample(2) for each in found]
refused = []
for place in ("hf://me/nothing", "hf://me/mine@" + "0" * 40 + "x"):
    try:
        jebm.from_pretrained(place)
    except jebm.JebmError as error:
        refused.append(str(error))
Path("model/model.safetensors").write_bytes(b"other")
try:
    push(Path("model"), "hf://me/other", public=False)
except jebm.JebmError as error:
    refused.append(str(error))
equal = all(one.equal(samples[0]) for one in samples)
print("RESULT" + json.dumps({"said": said, "equal": equal, "refused": refused}))
"""


def run(folder: Path, uri: str, token: str, script: str = SCRIPT) -> "subprocess.CompletedProcess[str]":
    """Run a script in the folder with a hub at `uri`, in its own process: addresses are read at import."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": uri,
        "HF_TOKEN": token,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_what_is_pushed_comes_back_and_the_token_is_nowhere(tmp_path: Path) -> None:
    save(str(tmp_path / "runs/mine"))
    export(str(tmp_path / "runs/mine"), open_store(str(tmp_path / "model")))
    (tmp_path / "model/notes.txt").write_text("not for others")
    with served() as hub:
        done = run(tmp_path, hub.uri, TOKEN)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.partition("RESULT")[2])
        assert result["said"] == [f"{hub.uri}/me/mine (private)", f"{hub.uri}/lab/open (public)"]
        assert result["equal"]
        assert hub.private == {"me/mine": True, "lab/open": False}
        assert hub.repositories["me/mine"].keys() == {"model.safetensors", "config.json", "README.md"}
        missing, revision, tampered = result["refused"]
        assert missing.startswith("hf://me/nothing: ")
        assert revision.startswith("hf://me/mine@")
        assert "model.safetensors: has 5 bytes instead of" in tampered
        assert not any("\n" in line for line in result["refused"])
        assert TOKEN not in done.stdout + done.stderr
        kept = [
            path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
        ]
        assert kept == []
