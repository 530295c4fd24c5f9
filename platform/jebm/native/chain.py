"""The Langevin chain of `jebm.core.chain` as one call into C, built on first use by the available compiler.

The sources, `chain.c` and `simd.h`, ship with the package, so a node needs a C compiler (cc, gcc, clang, or
the one in the wheel `ziglang`: `pip install ziglang`) but no build step. The build is kept in the user's
cache folder, under a hash of the sources, the compiler's version and the CPU's instruction set. Shapes: B
chains, D dimensions, K steps.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from jebm.native.perceptron import SLOPE, Perceptron
from jebm.paths import cache_folder

__all__ = ["describe", "draw", "run", "usable"]

_SOURCE, _HEADER = (Path(__file__).with_name(name) for name in ("chain.c", "simd.h"))
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno")
_TIMEOUT_SECONDS = 300
_ACTIVATIONS = ("leaky_relu", "silu", "softplus")
"""In the order of their numbers in chain.c."""


class _Job(ctypes.Structure):
    """The struct Job of chain.c."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("chains", "dims", "steps", "first_step")],
        *[(name, ctypes.c_int64) for name in ("depth", "activation", "threads")],
        *[(name, ctypes.c_void_p) for name in ("widths", "weights", "transposed", "biases", "last")],
        *[(name, ctypes.c_void_p) for name in ("noise", "z", "gradient")],
        *[(name, ctypes.c_float) for name in ("step_size", "slope")],
        ("key", ctypes.c_uint32 * 2),
    ]


def usable(z_BD: Tensor) -> bool:
    """Return whether `run` can take these positions: float32 on a CPU, with the kernel built."""
    return z_BD.is_cpu and z_BD.dtype == torch.float32 and _library()[0] is not None


def describe() -> str:
    """Describe briefly what computes chains on this machine's CPU, and if not the C kernel, why."""
    return _library()[1]


def run(
    energy: Perceptron,
    z_BD: Tensor,
    noise: Tensor | tuple[int, int],
    *,
    first_step: int = 0,
    steps: int,
    step_size: float,
) -> Tensor:
    """Advance the chains `z_BD` by `steps` in place; return the gradient (B, D) of log p at the last step.

    `energy` has one of the activations that `energy.activation` names. `noise` is (K, B, D), or the key (two
    32-bit words) of `jebm.core.philox` noise that the kernel draws itself from `first_step` on. Uses as many
    threads as torch; the result does not depend on their number.
    """
    library, why = _library()
    if library is None:
        raise RuntimeError(f"no C kernel: {why}")
    if z_BD.dtype != torch.float32:
        raise TypeError(f"the C kernel computes in float32, not in {z_BD.dtype}")
    layers = energy.layers
    # Arrays of pointers, kept alive until the call returns.
    hidden = [
        (weight.contiguous(), weight.mT.contiguous(), bias.contiguous()) for weight, bias in layers[:-1]
    ]
    weights, transposed, biases = (_pointers(tensors) for tensors in zip(*hidden, strict=True))
    widths = (ctypes.c_int64 * len(hidden))(*[len(weight) for weight, _, _ in hidden])
    last = layers[-1][0].contiguous()
    gradient_BD = torch.empty_like(z_BD)
    given = noise.contiguous() if isinstance(noise, Tensor) else None
    # The fields of the struct, in order.
    job = _Job(
        *(*z_BD.shape, steps, first_step),
        *(len(hidden), _ACTIVATIONS.index(energy.activation), torch.get_num_threads()),
        *(ctypes.addressof(array) for array in (widths, weights, transposed, biases)),
        last.data_ptr(),
        None if given is None else given.data_ptr(),
        *(z_BD.data_ptr(), gradient_BD.data_ptr(), step_size, SLOPE),
        (ctypes.c_uint32 * 2)(*(noise if isinstance(noise, tuple) else (0, 0))),
    )
    if library.jebm_chain(ctypes.byref(job)) != 0:
        raise MemoryError("no memory for the scratch space of the Langevin chains")
    return gradient_BD


def draw(key: tuple[int, int], step: int, chains: int, dims: int, device: torch.device) -> Tensor:
    """Return the `jebm.core.philox` noise of a step, (B, D): a chain of one step of size 1 from 0, f = 0."""
    z_BD = torch.zeros(chains, dims, device=device)
    run(_Flat(dims), z_BD, key, first_step=step, steps=1, step_size=1.0)
    return z_BD


class _Flat:
    """f = 0, of one hidden unit."""

    activation = "leaky_relu"

    def __init__(self, dims: int) -> None:
        zeros = torch.zeros(dims)
        self.layers = (zeros[None], zeros[:1]), (zeros[None, :1], zeros[:1])


def _pointers(tensors: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """Return the loaded kernel, or None, and a description."""
    failures = []
    for compiler in _compilers():
        name = shlex.join(compiler)
        try:
            return ctypes.CDLL(str(_built(compiler))), f"C kernel (compiled by {name})"
        except (OSError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            failures.append(f"{name}: {(output.strip().splitlines() or ['failed'])[0]}")
    return None, f"torch (no C kernel: {'; '.join(failures) or 'no C compiler found'})"


def _compilers() -> Iterator[list[str]]:
    """Yield the commands of the available C compilers, the best guess first."""
    if os.environ.get("CC"):
        yield shlex.split(os.environ["CC"])
    yield from ([name] for name in ("cc", "gcc", "clang") if shutil.which(name))
    if importlib.util.find_spec("ziglang"):
        yield [sys.executable, "-m", "ziglang", "cc"]


def _built(compiler: list[str]) -> Path:
    """Return the shared library of these sources, compiler and CPU; build it unless it is in the cache.

    Raises:
        OSError, subprocess.SubprocessError: the compiler cannot be run, or fails.

    """
    # Predefined macros identify the compiler's version and, with -march=native, the CPU's instruction set.
    predefined = _output([*compiler, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull])
    digest = hashlib.blake2b(
        _SOURCE.read_bytes() + _HEADER.read_bytes() + predefined.encode(), digest_size=16
    ).hexdigest()
    folder = _cache_folder()
    library = folder / f"chain-{digest}.so"
    if not library.exists():
        partial = folder / f"{library.name}.{uuid.uuid4().hex}"
        _output([*compiler, *_FLAGS, "-shared", "-fPIC", "-pthread", "-o", str(partial), str(_SOURCE)])
        partial.replace(library)  # atomic, even if others build it at the same time
    return library


def _output(command: list[str]) -> str:
    done = subprocess.run(  # noqa: S603 (the compiler that the user's environment names)
        command,
        capture_output=True,
        text=True,
        check=True,
        timeout=_TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout


def _cache_folder() -> Path:
    """Return a writable folder private to this user: the cache folder, or one for this process."""
    try:
        return cache_folder()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="jebm-"))
