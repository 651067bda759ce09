"""Freed memory stays with the process, unless its user wants it otherwise."""
import sys

import pytest

FAULTS = """
import resource
from tools.allocator import keep_freed_memory
print(keep_freed_memory())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        block = b"x" * (48 << 20)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_large_blocks_are_mapped_once(run_cli):
    took, faults = run_cli(["-c", FAULTS], check=True).stdout.split()
    if took == "False":
        pytest.skip("the C library isn't glibc, or is already tuned")
    # Mapped anew each time, 10 blocks of 48 MB are over 100,000 pages.
    assert int(faults) < 10_000


def test_a_tuned_allocator_is_left_alone(monkeypatch):
    from tools.allocator import keep_freed_memory
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert keep_freed_memory() is False
