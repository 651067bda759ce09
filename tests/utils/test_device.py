"""Which device a process gets, and what utils.device says of the memory in use."""
import re
import subprocess
import sys

import pytest
import torch

from utils.device import pick_device
from utils.errors import ConfigError

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


@pytest.mark.parametrize(("flag", "said"), [("0,1", "4 processes for 2 GPU(s)"), (None, "4 processes for 3 GPU(s)")])
def test_a_gpu_takes_one_process(monkeypatch, flag, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert pick_device("2,1") == torch.device("cuda", 2 - rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        with pytest.raises(ConfigError, match=rf"^--nproc_per_node: {re.escape(said)}; give at most one a GPU"):
            pick_device(flag)
    assert pick_device("cpu").type == "cpu"
