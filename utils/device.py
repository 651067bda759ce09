"""Which device this process works on, and whether a single command should start several processes."""
from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from utils import dist
from utils.errors import ConfigError

log = logging.getLogger("ltr")


def pick_device(flag: str | None, n_gpu: int | None = None) -> torch.device:
    """The device of this rank.

    Args:
        flag: `-d`: "cpu", GPU numbers such as "0" or "0,1", or None (GPUs where there are any).
        n_gpu: how many GPUs the config asks for (0: a single process uses the CPU); logs where none is found.
    Raises:
        ConfigError: a GPU number that isn't there, more processes on this machine than GPUs.
    """
    available = gpu_count()
    if flag is not None and flag.strip().lower() == "cpu":
        return torch.device("cpu")
    if flag is not None:
        numbers = gpu_numbers(flag)
        wrong = [n for n in numbers if n >= available]
        if wrong:
            raise ConfigError(f"-d/--device: there is no GPU {wrong[0]} ({available} found); use -d cpu or one of "
                              f"{list(range(available))}")
        return _gpu_of_rank(numbers)
    if available == 0:
        if n_gpu and dist.is_main():
            # A config written for GPUs should still run on a laptop.
            if n_gpu > 1:
                log.warning("n_gpu is %d but no GPU was found: running on the CPU", n_gpu)
            else:
                log.info("no GPU was found: running on the CPU")
        return torch.device("cpu")
    if n_gpu == 0 and dist.world_size() == 1:
        return torch.device("cpu")
    return _gpu_of_rank(range(available))


def _gpu_of_rank(numbers: Sequence[int]) -> torch.device:
    each, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), len(set(numbers))
    if each > gpus:  # NCCL can't share a GPU
        raise ConfigError(f"--nproc_per_node: {each} processes for {gpus} GPU(s); give at most one a GPU, or -d cpu")
    return torch.device("cuda", numbers[dist.local_rank() % len(numbers)])


def gpu_count() -> int:
    """The number of GPUs that can be used here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_numbers(flag: str) -> list[int]:
    """`"0,1"` as [0, 1]. Raises ConfigError where it isn't such a list."""
    try:
        numbers = [int(part) for part in flag.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise ConfigError(f"-d/--device: {flag!r} is neither \"cpu\" nor GPU numbers such as 0 or 0,1")
    return numbers


def workers_to_start(flag: str | None, n_gpu: int | None) -> int:
    """How many processes a plain `python train.py` should start: one per GPU that `-d` or the config asks for."""
    available = gpu_count()
    if "RANK" in os.environ or available == 0:
        return 1
    if flag is not None:
        return 1 if flag.strip().lower() == "cpu" else len(gpu_numbers(flag))
    if (n_gpu or 1) > available:
        log.warning("n_gpu is %d but %d GPUs were found: using %d", n_gpu, available, available)
    return max(1, min(n_gpu or 1, available))


def bfloat16_unit() -> str | None:
    """What this x86 CPU multiplies bfloat16 with: "AMX" (where it has both), "AVX512-BF16", or None."""
    units = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    return next((name for name, asked in units.items() if getattr(torch.cpu, asked, bool)()), None)


def own_memory(what: str = "VmRSS") -> int | None:
    """Bytes of memory that this process, without data workers, uses now ("VmRSS") or has used at most ("VmHWM"); None
    where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:")), None)


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes of the GPU's memory or, on the CPU, of this process's (without data workers); None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = own_memory("VmHWM")
    if found is not None:   # getrusage's figure on Linux includes the parent process's peak
        return found
    try:
        import resource
    except ImportError:    # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
