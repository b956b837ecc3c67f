"""What the process does with memory that was freed."""

import subprocess
import sys

import pytest

# Page faults per mebibyte of blocks that are written and freed again, after the first.
FAULTS = """
import resource, sys, threading
from models.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def allocate():
    for size in (100, 40, 70):
        bytearray(size * 2**20)

def run():
    allocate()
    before = faults()
    allocate()
    print((faults() - before) / 210)

if "keep" in sys.argv:
    keep_freed_memory()
thread = threading.Thread(target=run)
thread.start()
thread.join()
run()
"""


def faults(*arguments: str) -> list[float]:
    """In another thread, and in the first."""
    command = [sys.executable, "-c", FAULTS, *arguments]
    return [float(line) for line in subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept_for_every_thread():
    assert min(faults()) > 100  # pages of 4096 bytes: 256 of a mebibyte
    assert max(faults("keep")) < 5
