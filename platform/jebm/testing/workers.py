"""Two processes that train one part together, against one that does so by itself."""

import multiprocessing
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jebm.testing.kinds import Case
from jebm.train.group import process_group

__all__ = ["workers_differ"]

_BATCH = 4
_STEPS = 2
_PATIENCE = timedelta(seconds=60)


class _Task(nn.Module):
    """The scalar of a case as a module, so that DDP sees one forward and one backward."""

    def __init__(self, case: Case, part: nn.Module) -> None:
        super().__init__()
        self.case, self.part = case, part

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.case.scalar(self.case.outputs(self.part, inputs))


def workers_differ(case: Case) -> str | None:
    """Return in what two gloo workers, each with half a batch, train otherwise than one; None: in nothing.

    This process is one of the two; a part without parameters, or a process that is in a group already, is
    left out.
    """
    by_itself = case.build()
    if not list(by_itself.parameters()) or dist.is_initialized():
        return None
    _train(_Task(case, by_itself), case, slice(None))
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder)}/meeting"
        other = multiprocessing.get_context("spawn").Process(target=_work, args=(case, 1, meeting, None))
        other.start()
        try:
            together = case.build()
            same = _work(case, 0, meeting, together)
        finally:
            other.join(_PATIENCE.total_seconds())
            other.kill()
    if not same:
        return "two workers end with different weights: they do not compute the same update"
    for name, tensor in by_itself.state_dict().items():
        if not torch.allclose(together.state_dict()[name], tensor, rtol=1e-6, atol=1e-9):
            return f"{name} is another one when two workers share the batch"
    return None


def _work(case: Case, rank: int, meeting: str, part: nn.Module | None) -> bool:
    """Train as one of two workers; return whether both end with the same weights."""
    torch.set_num_threads(1)
    with process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=_PATIENCE):
        return _train_half(case, rank, case.build() if part is None else part)


def _train_half(case: Case, rank: int, part: nn.Module) -> bool:
    """Train on this rank's half of each batch; a function of its own, since nothing of DDP may outlive it."""
    half = _BATCH // 2
    _train(DistributedDataParallel(_Task(case, part)), case, slice(rank * half, (rank + 1) * half))
    weights = torch.cat([tensor.detach().flatten() for tensor in part.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    return both[0].equal(both[1])


def _train(task: nn.Module, case: Case, rows: slice) -> None:
    descent = torch.optim.SGD(task.parameters(), lr=1e-2)
    for step in range(_STEPS):
        descent.zero_grad()
        task(*[tensor[rows] for tensor in case.inputs(_BATCH, seed=step)]).backward()
        descent.step()
