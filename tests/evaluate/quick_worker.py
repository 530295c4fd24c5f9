"""Two gloo processes that take one quick look together: `quick_worker.py FOLDER`.

Rank 0 comes later than the gradients' group would wait, and rank 1 has an empty cache. Each writes what it
found, how many images it decoded, and how many threads of gloo were left, to FOLDER/RANK.json.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from forked import exit_code
from jebm.config import Config, Data, Energy, Evaluation, Generator, Inference, Langevin
from jebm.core.model import JointModel, build_model
from jebm.evaluate.quick import quick_look
from jebm.train.group import process_group, running_loops
from jebm.train.runtime import Runtime, member_runtime

TRAIN = str(Path(__file__).resolve().parents[2] / "jobs/data/fashion_mnist_2000/train")
CONFIG = Config(
    data=Data(TRAIN, TRAIN),
    inference=Inference((2, 4), 8),
    generator=Generator((2, 4), 8),
    energy=Energy(8),
    langevin=Langevin(4, 0.4),
    evaluation=Evaluation(every_steps=1, samples=500, chain_factor=3),
)
TIMEOUT, LATE = 6.0, 9.0


def look_at(model: JointModel, runtime: Runtime) -> tuple[dict[str, float], int]:
    """Return what a look finds, and how many images this rank has decoded for it."""
    torch.set_num_threads(1)
    decoded: list[int] = []
    model.generator.register_forward_hook(lambda net, codes, images: decoded.append(len(images)))
    look = quick_look(CONFIG)
    assert look is not None
    return look(model, 1, runtime), sum(decoded)


def work(rank: int, folder: Path) -> None:
    place = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": 2}
    if rank == 1:
        os.environ["JEBM_CACHE"] = str(folder / "cache")
    with (
        process_group("gloo", timeout=timedelta(seconds=TIMEOUT), **place),
        member_runtime(rank, 2, torch.device("cpu")) as runtime,
    ):
        if rank == 0:
            time.sleep(LATE)
        found, decoded = look_at(build_model(CONFIG).eval(), runtime)
        assert runtime.agree(rank < 2, rank == 0) == [True, False]
    result = {"found": found, "decoded": decoded, "loops": len(running_loops())}
    (folder / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    sys.exit(exit_code(work, 2, Path(sys.argv[1])))
