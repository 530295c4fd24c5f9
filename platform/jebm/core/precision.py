"""What a product of float32 numbers is on a GPU: true float32, or TF32.

TF32 rounds the factors to 10 bits of mantissa (float32 has 23). By torch's own defaults convolutions are in
TF32 and linear layers are not, so both are always set here. CPUs have no TF32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["set_tf32", "tf32", "true_fp32"]


def set_tf32(*, convolutions: bool, linear: bool) -> None:
    """Set whether this process computes float32 convolutions and matrix products in TF32 on GPUs."""
    # Set by torch's first names: after its newer ones (fp32_precision) the first cannot be read any more.
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = linear


def tf32() -> dict[str, bool]:
    """Return what `set_tf32` has set, or torch's default, by the names of its arguments."""
    both = {"convolutions": torch.backends.cudnn.conv, "linear": torch.backends.cuda.matmul}  # type: ignore[attr-defined]
    return {name: backend.fp32_precision == "tf32" for name, backend in both.items()}


@contextmanager
def true_fp32() -> Iterator[None]:
    """Compute in true float32 inside, whatever training computes in."""
    before = tf32()
    set_tf32(convolutions=False, linear=False)
    try:
        yield
    finally:
        set_tf32(**before)
