"""The documentation's lines run, in order, on what the quick start leaves.

All pages share one folder: a copy of the repository, with its S3 server and the quick start's run. To take
minutes, the configs of the copy are shortened (`SHORT`): nets of a few channels, and the quick start for
its real number of steps. `jebm evaluate` takes smaller samples, `jebm compare` one seed. The lines are run
as they stand.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from doc_blocks import ROOT, RUN, TINY, Block, blocks_of, pages, run_blocks, shorten
from preloaded import preloaded_jebm

CHEAP = {"train.gaussian_share": 0.9, "train.energy_updates": 1}
SHORT: dict[str, dict[str, Any]] = {
    "jobs/configs/smoke.yaml": TINY,
    "jobs/configs/fashion_mnist.yaml": TINY | {"train.batch_size": 8, "train.epochs": 5.36} | CHEAP,
    "jobs/configs/pictures.yaml": {
        **TINY,
        "model.latent_dims": [2, 2, 2, 10],
        "generator.channels": [2, 2, 2],
        "inference.channels": [2, 2, 2],
        "train.epochs": 1,
    },
    "jobs/searches/first.yaml": {"trials": 2},
}
"""By file of the copy: the keys that are changed. 5.36 epochs of 200 steps are the quick start's 1,072."""

JEBM = """\
#!/bin/bash
# Smaller samples, one seed; and torch and ray are imported once for all commands.
case "$1" in
evaluate) set -- "$@" --samples 100 ;;
compare) set -- "$@" --seeds '[0]' ;;
esac
exec {program} "$@"
"""
QUICK_START = """\
```bash
scripts/s3 start
eval "$(scripts/s3 env)"
jebm train --config jobs/configs/fashion_mnist.yaml --run.name quickstart --run.storage s3://jebm/runs \\
    --cluster.engine process --cluster.workers 1 --train.pictures_every_steps 1072
```
"""
SECONDS = 900.0  # of a page, on a busy machine


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A copy of the repository in which the quick start has run, and the environment of its shell."""
    folder = tmp_path_factory.mktemp("clone")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name, keys in SHORT.items():
        shorten(folder / name, keys)
    (folder / ".bin/preloaded").mkdir(parents=True)
    (folder / ".bin/jebm").write_text(JEBM.format(program=folder / ".bin/preloaded/jebm"))
    (folder / ".bin/jebm").chmod(0o755)
    environment = {
        "PATH": f"{folder / '.bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "platform"),
        "JEBM_CACHE": str(cache),
    }
    write_pictures(folder / "pictures.zip")
    shutil.copytree(ROOT / "jobs/data/fashion_mnist_2000", folder / "data/fashion_mnist")
    (folder / ".s3").mkdir()
    for program in (ROOT / ".s3").glob("seaweedfs-*"):  # else it is fetched again
        (folder / ".s3" / program.name).symlink_to(program)
    try:
        with preloaded_jebm(folder / ".bin/preloaded", os.environ | environment):
            run_blocks(blocks_of("quick start", QUICK_START), folder, environment, SECONDS)
            yield folder, environment
    finally:  # not `scripts/s3 stop`, which takes the server 15 s
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((folder / ".s3/server.pid").read_text()), signal.SIGKILL)


def to_run(page: str) -> list[Block]:
    found = blocks_of(page, (ROOT / page).read_text("utf-8"))
    return [block for block in found if block.language in RUN and not block.reason]


def write_pictures(path: Path) -> None:
    draws = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        for number in range(800):
            buffer = BytesIO()
            Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
            file.writestr(f"{number:03d}.png", buffer.getvalue())


@pytest.mark.docs
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("page", [page for page in pages() if to_run(page)])
def test_the_lines_of_a_page_run(
    page: str, clone: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, environment = clone
    output = run_blocks(to_run(page), folder, environment, SECONDS)
    with capsys.disabled():
        for line in output.splitlines():
            if line.startswith("== ") and " took " in line:
                print(line, flush=True)
