"""Whether all gradients are finite: decided on the device, read by the host when it need not wait."""

from collections import deque

import torch
from torch import Tensor

from jebm.errors import DivergedError

__all__ = ["Finite", "finite_seed"]

_REMEDY = "lower optimizer.energy.lr or energy.output_scale, or turn energy.spectral_norm on"


class Finite:
    """Keeps parameters from moving once a gradient is not finite, and tells the host.

    From the first such gradient on, Adam with this `found_inf` changes neither parameters nor moments, so
    nothing is lost by reading late, and no checkpoint holds what is not finite.
    """

    def __init__(self, device: torch.device, *, late: bool | None = None) -> None:
        """Start with all finite; if `late` (by default on CUDA) a step's flag is read after the next step."""
        # float32 even if torch's default is another: Adam takes no other flag.
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        """() on the device: 1 from the first gradient on that is not finite, else 0."""
        self._sum = torch.zeros_like(self.found_inf)  # 0, or NaN for ever
        self._late = device.type == "cuda" if late is None else late
        self._flags: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def take(self, norm: Tensor) -> None:
        """Take the norm of a gradient, (), before its update; it must be the same on all ranks."""
        self._sum.add_(norm, alpha=0)  # 0 times infinity or NaN is NaN
        torch.ne(self._sum, 0, out=self.found_inf)

    def end_step(self, step: int) -> None:
        """Send the flag of a step to the host, without waiting for it."""
        on_cuda = self.found_inf.is_cuda
        flag = torch.empty((), dtype=torch.float32, pin_memory=on_cuda)
        flag.copy_(self.found_inf, non_blocking=True)
        event = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record()
        self._flags.append((step, flag, event))

    def check(self, *, now: bool = False) -> None:
        """Read the flags of all steps; without `now` and if late, of all but the last one.

        Raises:
            DivergedError: a gradient was not finite; raised on all ranks for the same step.
        """
        while len(self._flags) > (self._late and not now):
            step, flag, event = self._flags.popleft()
            if event is not None:
                event.synchronize()
            if flag.item() != 0:
                raise DivergedError(
                    f"loss or gradient is not finite at step {step} (no parameter was moved by it); {_REMEDY}"
                )


def finite_seed(loss: Tensor) -> Tensor:
    """Return what to begin a backward pass with, (): 1, or NaN for a loss that is not finite.

    So a loss that is not finite makes all gradients so, on all ranks after their mean.
    """
    return torch.rsub(loss.detach(), 1, alpha=0)  # 1 - 0 loss
