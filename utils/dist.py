"""This process's rank among the processes of a run, and the few collective calls that training needs."""
from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from utils.errors import ConfigError, RunError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
#: Environment variable of workers that a plain `python train.py` started; it holds the launcher's folder for notes.
LAUNCHED_HERE = "LTR_LAUNCHED_BY_PYTHON"


def initialised() -> bool:
    """Whether this process has joined a process group. Imports nothing: without torch it can't have."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 to world_size() - 1, as torchrun sets it."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together (1 without torchrun)."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its own machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def command(program: str) -> str:
    """The command that starts `program` as this run was: with python, or with torchrun and as many processes.

    On several machines it is the same on each: they meet at the first one's address, on torchrun's default port.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or LAUNCHED_HERE in os.environ:
        return f"python {program}"
    each = os.environ.get("LOCAL_WORLD_SIZE", "1")
    nodes, meet = os.environ.get("GROUP_WORLD_SIZE", "1"), ""
    if nodes != "1":
        meet = (f"--nnodes {nodes} --rdzv_backend c10d --rdzv_id {os.environ['TORCHELASTIC_RUN_ID']} "
                f"--rdzv_endpoint {os.environ.get('MASTER_ADDR', 'HOST')}:29500 ")
    return f"torchrun {meet}--nproc_per_node {each} {program}"


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


def setup(device: torch.device | str, timeout_s: float = 600) -> None:
    """Join the process group under torchrun: nccl on GPUs where torch has it, else gloo. No-op for one process.

    Raises ConfigError where WORLD_SIZE is set but the rest of what torchrun sets isn't.
    """
    import torch
    device = torch.device(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # for nccl's object collectives, and for whatever names no GPU (pinned memory)
    if world_size() == 1 or initialised():
        return
    try:
        nccl = device.type == "cuda" and torch.distributed.is_nccl_available()
        torch.distributed.init_process_group("nccl" if nccl else "gloo", timeout=datetime.timedelta(seconds=timeout_s),
                                             device_id=device if nccl else None)
    except ValueError as error:
        raise ConfigError(f"WORLD_SIZE is {world_size()} but the processes can't be joined ({error}); start them with "
                          "torchrun --nproc_per_node N train.py ...") from None


def cleanup() -> None:
    """Leave the process group, if any."""
    if initialised():
        import torch.distributed as dist
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process has called it."""
    if initialised():
        import torch.distributed as dist
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all processes, in place, and return it."""
    if initialised():
        import torch.distributed as dist
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value: object) -> object:
    """Rank 0's plain value, on every rank; all ranks must call it."""
    if not initialised():
        return value
    import torch.distributed as dist
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def first_to_say(message: str) -> bool:
    """True on only one of the ranks that want to print `message`: rank 0 before they join, then the first to ask."""
    if not initialised():
        return is_main()
    from torch.distributed.distributed_c10d import _get_default_store
    try:
        return _get_default_store().add(f"said: {message}", 1) == 1
    except Exception:  # the store's process has gone: better twice than not at all
        return True


def gather_objects(value: T) -> list[T]:
    """Every rank's plain value, in order of rank; all ranks must call it."""
    if not initialised():
        return [value]
    import torch.distributed as dist
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on any rank; all ranks must call it."""
    return any(gather_objects(flag))


def on_main(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and return its value (plain data) on every rank; all ranks must call it.

    Where it fails, every rank raises (others would wait for rank 0 forever), but only rank 0's error is printed.
    """
    if not initialised():
        return work()
    failed: Exception | None = None
    value, message = None, None
    if is_main():
        try:
            value = work()
        except Exception as error:
            failed, message = error, (isinstance(error, ConfigError), str(error))
    value, message = broadcast_object((value, message))
    if failed is not None:
        raise failed
    if message is not None:
        error = (ConfigError if message[0] else RunError)(message[1])
        error.told = True
        raise error
    return value
