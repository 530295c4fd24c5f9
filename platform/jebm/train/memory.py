"""How much memory there is, and that the process keeps what it has freed."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

__all__ = ["keep_freed_memory", "machine_memory"]

_CGROUP = Path("/sys/fs/cgroup/memory.max")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt` (malloc.h)."""


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of this container if that may have less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no such file, or "max"
        memory = min(memory, int(_CGROUP.read_text()))
    return memory


def keep_freed_memory() -> bool:
    """Make the allocator keep freed memory for the next step; return whether it supports that.

    Each step frees and reallocates the same megabytes of activations. By default glibc returns them to the
    system in between, and the step pays for thousands of page faults: a tenth of its time on a CPU
    (docs/performance.md). The price is that the process stays at its peak size. In threads other than the
    main one (Ray trains in one) glibc still returns whole heaps of 64 MB; large pages, which torch asks for
    with THP_MEM_ALLOC_ENABLE (read at its first allocation), make that cheap. Without glibc or large pages
    this has no effect.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Larger blocks come from the system and return at once; older glibc limits the threshold to 32 MB.
    kept = mallopt(_MMAP_THRESHOLD, 1 << 30) or mallopt(_MMAP_THRESHOLD, 1 << 25)
    return bool(kept and mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
