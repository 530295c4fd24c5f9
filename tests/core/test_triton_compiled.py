"""The Triton kernels, compiled for GPUs that are not there by the Triton that torch brings for CUDA."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jebm.native.triton_chain import padded

HERE = Path(__file__).parent
TRITON = os.environ.get("JEBM_TRITON", "")  # a folder: scripts/test-long installs it there
SHARED = 63 << 10  # of a T4, the least of all
SHAPES = {
    "fashion": (14, 100, 2),
    "fid": (50, 100, 2),
    "hs": (16, 50, 4),
    "256": (50, 256, 2),
    "512": (100, 512, 3),
    "widest": (1024, 1024, 1),
}
GPUS = {75: "T4", 80: "A100", 86: "A10G", 89: "L4", 90: "H100", 100: "B200"}


@pytest.mark.long
@pytest.mark.skipif(not (TRITON or importlib.util.find_spec("triton")), reason="triton is not installed")
def test_it_keeps_all_in_registers_on_every_gpu(tmp_path: Path) -> None:
    """At most a few words a thread are spilled; of an earlier kernel 6 kB were, on an H100."""
    cases = [(gpu, shape, "philox") for gpu, shape in itertools.product(GPUS, ("fashion", "fid", "512"))]
    cases += [(gpu, shape, "philox") for gpu, shape in itertools.product((75, 90), ("hs", "256"))]
    cases += [(89, "fashion", "torch"), (90, "512", "torch")]
    cases += [(gpu, shape, "power") for gpu, shape in itertools.product(GPUS, ("fashion", "widest"))]
    arguments: list[str] = []
    for gpu, shape, noise in cases:
        dims, width, depth = SHAPES[shape]
        sizes = (dims, width) if noise == "power" else (padded(dims), padded(width))
        arguments += map(str, (gpu, *sizes, depth, noise))
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1] / "platform"), TRITON]),
    }
    command = [sys.executable, str(HERE / "triton_compile.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases)
    for line in lines:
        registers, stack, shared = map(int, line.split()[5:])
        assert (stack <= 32, registers <= 255, shared <= SHARED) == (True, True, True), line
