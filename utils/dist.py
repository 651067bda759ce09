"""Ranks: who am I among the processes of a run, and the few collective calls that training needs."""
from __future__ import annotations

import datetime
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def _initialised() -> bool:
    import torch.distributed as dist
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 to world_size() - 1, as torchrun sets it."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together (1 without torchrun)."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its own machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


def setup(device_type: str, timeout_s: float = 600) -> None:
    """Join the process group where torchrun started us: nccl on GPUs, gloo on CPU. No-op for a single process."""
    if world_size() == 1 or _initialised():
        return
    import torch.distributed as dist
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo",
                            timeout=datetime.timedelta(seconds=timeout_s))


def cleanup() -> None:
    """Leave the process group, if any."""
    if _initialised():
        import torch.distributed as dist
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if _initialised():
        import torch.distributed as dist
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all processes, in place, and return it."""
    if _initialised():
        import torch.distributed as dist
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value: object) -> object:
    """Rank 0's plain value, on every rank."""
    if not _initialised():
        return value
    import torch.distributed as dist
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_with_grad(features: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Concatenate every rank's `features` [n_r, ...] along dim 0, letting gradients flow back to their rank.

    Ranks may hold different n_r. Returns (all [sum n_r, ...], offset of this rank's rows).
    """
    if not _initialised():
        return features, 0
    import torch
    import torch.distributed as dist
    import torch.distributed.nn.functional as dist_nn
    sizes = torch.zeros(world_size(), dtype=torch.long, device=features.device)
    sizes[rank()] = features.shape[0]
    dist.all_reduce(sizes)
    sizes = sizes.tolist()
    # all_gather wants equal shapes: pad to the largest, cut afterwards.
    padding = features.new_zeros((max(sizes) - features.shape[0], *features.shape[1:]))
    gathered = dist_nn.all_gather(torch.cat([features, padding]).contiguous())
    return torch.cat([part[:n] for part, n in zip(gathered, sizes, strict=True)]), sum(sizes[:rank()])
