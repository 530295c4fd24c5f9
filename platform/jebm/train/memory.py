"""Freed memory stays with the process."""

import ctypes
import os

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's names of what `mallopt` sets (malloc.h)."""


def keep_freed_memory() -> bool:
    """Let the allocator keep what tensors free, for the next step; return whether it can be told so.

    Each step frees and takes the same megabytes of activations again. As they come, glibc gives them back to
    the system in between, and the step pays for thousands of page faults: a tenth of its time on a CPU
    (docs/performance.md). The price is that the process stays at its peak size. In threads other than the
    main one (Ray trains in one) glibc still returns whole heaps of 64 MB; large pages, which torch asks for
    with THP_MEM_ALLOC_ENABLE (read at its first allocation), make that cheap. Without glibc or large pages
    nothing happens.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Above the threshold memory comes from the system and goes back at once; older glibc takes 32 MB at most.
    kept = mallopt(_MMAP_THRESHOLD, 1 << 30) or mallopt(_MMAP_THRESHOLD, 1 << 25)
    return bool(kept and mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
