"""What utils.device says of the memory in use."""
import subprocess
import sys

PROGRAM = """
import torch
from utils.device import peak_memory

before = peak_memory(torch.device("cpu"))
torch.ones(50 << 20)
print(peak_memory(torch.device("cpu")) - before)
"""


def test_peak_memory_counts_what_was_given_back():
    """In a process of its own, since a test before this one may have used more."""
    added = int(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout)
    assert 190 << 20 < added < 240 << 20
