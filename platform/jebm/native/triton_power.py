"""Power iterations of the spectral norm as one launch on a GPU, if triton is installed.

In torch an iteration is ten launches for each layer, of a matrix too small to keep a GPU busy. Shapes: O
outputs, I inputs of a linear map.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from jebm.native.triton_chain import padded

__all__ = ["run", "usable"]

_LEAST = 1e-12
"""No length is taken to be less: the `eps` of torch's `normalize`."""

_MOST_COLUMNS = 1024
"""What one program keeps in registers (tests/core/test_triton_compiled.py)."""


def usable(weight_OI: Tensor) -> bool:
    """Return whether `run` takes this weight: float32, contiguous, on a GPU that can run the kernel."""
    return (
        (weight_OI.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
        and weight_OI.dtype == torch.float32
        and weight_OI.is_contiguous()
        and weight_OI.shape[1] <= _MOST_COLUMNS
        and importlib.util.find_spec("triton") is not None
        and _works(weight_OI.device, weight_OI.shape)
    )


def run(weight_OI: Tensor, u_O: Tensor, v_I: Tensor, times: int) -> None:
    """Do `times` power iterations in place on the singular vectors: v = W^T u and u = W v, each of length 1.

    It differs from torch's by rounding.
    """
    from jebm.native.triton_kernel import power_kernel  # noqa: PLC0415 (imports triton)

    rows, columns = weight_OI.shape
    with torch.cuda.device(weight_OI.get_device()):  # triton launches on the current device
        power_kernel[(1,)](
            *(weight_OI, u_O, v_I, times, _LEAST),
            ROWS=rows,
            COLUMNS=columns,
            PADDED=padded(columns),
            **options(columns),
        )


def options(columns: int) -> dict[str, int]:
    """Return how the kernel is compiled for that many columns: rows at a time, warps."""
    return {"PIECE": 16 if columns <= 512 else 8, "num_warps": 4 if columns <= 128 else 8}


@functools.cache
def _works(device: torch.device, shape: torch.Size) -> bool:
    """Return whether the kernel compiles and runs there; causes are an old GPU, or no C compiler."""
    weight_OI = torch.zeros(shape, device=device)
    try:
        run(weight_OI, weight_OI[:, 0].contiguous(), weight_OI[0].clone(), 0)
    except Exception:
        return False
    return True
