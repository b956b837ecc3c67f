"""Memory that was freed, kept for what comes next."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h


def keep_freed_memory(most: int = 2**30) -> None:
    """Let up to `most` bytes that this process frees stay with it, for any of its threads.

    glibc gives large blocks back to the system at once, and those of threads other than the first in any case. The next
    batch's activations are then faulted in again, page by page: half of the time that a batch takes on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc has it, others do without
        mallopt(M_MMAP_THRESHOLD, most // 2)
        mallopt(M_TRIM_THRESHOLD, most)
        mallopt(M_ARENA_MAX, 1)
