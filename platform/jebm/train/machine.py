"""Look at this machine: what training on it needs, and what it lacks."""

import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterator

import torch
import torch.distributed as dist

from jebm.core.chain import chain_kernel
from jebm.data.dataset import default_cache_directory
from jebm.errors import DataError
from jebm.store.diagnose import Check

__all__ = ["cache_check", "gpu_checks", "kernel_check"]

_LEAST_CACHE_GB = 10.0  # ImageNet at 64 x 64 decodes to 15 GB, everything smaller to less than this
_DRIVER_OF_CUDA = {"12": 525, "13": 580}
"""The oldest driver of Linux for each major version of CUDA (its release notes)."""
_LIMIT_SECONDS = 30.0


def kernel_check() -> Check:
    """Report which kernel computes Langevin chains on this machine's CPU."""
    compiled, description = chain_kernel(torch.device("cpu"))
    if compiled:
        return Check("chain kernel", "ok", description)
    remedy = "install a C compiler (gcc, or ziglang: jebm[native]); it computes chains up to 3 times faster"
    return Check("chain kernel", "warn", description, remedy)


def cache_check() -> Check:
    """Report where this machine keeps decoded images, and how much room there is."""
    try:
        folder = default_cache_directory()
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free / 1e9
    except DataError as error:
        return Check("image cache", "fail", str(error))
    except OSError as error:
        remedy = "set JEBM_CACHE to a folder that can be written"
        return Check("image cache", "fail", f"{error.filename}: {error.strerror}", remedy)
    finding = f"{folder}: {free:.1f} GB free"
    if free >= _LEAST_CACHE_GB:
        return Check("image cache", "ok", finding)
    return Check("image cache", "warn", finding, "set JEBM_CACHE to a larger disk before a large data set")


def gpu_checks() -> Iterator[Check]:
    """Yield what a GPU here needs: driver, CUDA in torch, NCCL, Triton; stop at what stops training."""
    driver, finding = _driver()
    built = torch.version.cuda
    if driver is None:
        yield Check("driver", "fail", finding, "install NVIDIA's driver, or choose an image of hosts with it")
        return
    oldest = _DRIVER_OF_CUDA.get((built or "").partition(".")[0], 0)
    if driver < oldest:
        remedy = f"install driver {oldest} or newer, or a torch of an older CUDA"
        yield Check("driver", "fail", f"{finding}, too old for torch's CUDA {built}", remedy)
    else:
        yield Check("driver", "ok", finding)
    # A kernel that runs shows more than a version: torch may lack code for an old or a very new GPU.
    version = f"torch {torch.__version__}, CUDA {built}"
    if built is None:
        yield Check("CUDA", "fail", f"torch {torch.__version__} has none", "install torch of a CUDA index")
        return
    try:
        total = torch.ones(1024, device="cuda").sum().item()
    except Exception as error:  # whatever this GPU, driver and torch have against each other
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        yield Check("CUDA", "fail", f"{version}: {reason}", "install a torch whose CUDA fits driver and GPU")
        return
    yield Check("CUDA", "ok" if total == 1024 else "fail", f"{version}, {torch.cuda.get_device_name()}")
    if dist.is_nccl_available():
        found = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        yield Check("NCCL", "ok", found)
    else:
        yield Check("NCCL", "fail", "not in this torch", "install torch's Linux wheel; one worker needs none")
    compiled, description = chain_kernel(torch.device("cuda", 0))
    remedy = "" if compiled else "install triton and a C compiler; torch computes the chain, in many launches"
    yield Check("Triton", "ok" if compiled else "warn", f"{_triton()}: {description}", remedy)


def _driver() -> tuple[int | None, str]:
    """Return the driver's major version, None if there is none, and what to show."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(  # noqa: S603 (fixed words)
            query, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=True
        )
        version, _, name = answer.stdout.splitlines()[0].partition(", ")
        return int(version.partition(".")[0]), f"{version}, {answer.stdout.count(chr(10))} x {name}"
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return None, f"nvidia-smi does not answer ({type(error).__name__})"


def _triton() -> str:
    try:
        return f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        return "no triton"
