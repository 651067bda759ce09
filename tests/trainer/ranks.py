"""Two processes that train together, on CPU, without torchrun's start-up: forked from a server that has torch loaded.

`run_ranks(job, argument)` calls `job(argument)` in each, with torchrun's environment set, and returns what each gave.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from model.model import FAMILIES

#: What `data_loader.args.shards` says of the fixture `tiny_shards`.
SHARDS = {"train": "train-{00000..00001}.tar", "test": "test-00000.tar"}


def run_ranks(job, argument, world_size: int = 2, timeout: float = 240) -> list:
    """What `job(argument)` (a function at a module's top level) returned, by rank: tensors and plain data."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "tests.trainer.ranks"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        depths = {name: family["depths"] for name, family in FAMILIES.items()}  # a test may have fewer
        processes = [context.Process(target=_rank, args=(job, argument, rank, world_size, port, folder, depths))
                     for rank in range(world_size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
            if process.is_alive():
                for other in processes:
                    other.kill()
                raise TimeoutError("a rank hangs")
        assert [process.exitcode for process in processes] == [0] * world_size
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank(job, argument, rank, world_size, port, folder, depths):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                      LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for name, of_stages in depths.items():
        FAMILIES[name]["depths"] = of_stages
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*torch.distributed", category=FutureWarning)    # of deprecated calls
    torch.save(job(argument), Path(folder) / f"{rank}.pt")


# ---------------------------------------------------------------------- jobs

def train_and_record(commands: list[list[str]]) -> dict:
    """Run train.py once a command, in this process: each step's gradients and what this rank wrote.

    Dropout is off: ranks draw their own. Everything is float64, so that what differs isn't rounding.
    """
    import train
    from model.model import Model
    from trainer.trainer import Trainer
    from utils import dist
    dist.cleanup = lambda: None  # the ranks stay joined between commands
    update, begin, forward = Trainer._gradient_norm, Trainer._start_epoch, Model.forward
    steps: list[list[torch.Tensor]] = []
    written: list[str] = []

    def record(self):
        steps[-1].append(torch.cat([p.grad.flatten() for p in self.trainable]).clone())
        return update(self)

    def without_dropout(self, *args):
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(module, torch.nn.MultiheadAttention):
                module.dropout = 0.0
        begin(self, *args)

    Trainer._gradient_norm, Trainer._start_epoch = record, without_dropout
    Model.forward = lambda self, x, *args, **more: forward(self, x.to(torch.get_default_dtype()), *args, **more)
    torch.set_default_dtype(torch.float64)
    sys.addaudithook(lambda event, args: written.append(str(args[0])) if event == "os.mkdir" or (
        event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)) else None)
    try:
        for command in commands:
            steps.append([])
            train.main(command)
    finally:
        Trainer._gradient_norm, Trainer._start_epoch, Model.forward = update, begin, forward
        torch.set_default_dtype(torch.float32)
    return {"steps": steps, "written": [path for path in written if "/models/" in path or "/log/" in path]}


def train_where_one_writes(commands: list[list[str]]) -> dict:
    """`train_and_record`, where no rank but the first may write to a mapped file."""
    import numpy

    own, rank = numpy.memmap, int(os.environ["RANK"])

    def mapped(file, kind, mode, *args, **more):
        assert rank == 0 or mode == "r", f"rank {rank} writes {file}"
        return own(file, kind, mode, *args, **more)
    numpy.memmap = mapped
    return train_and_record(commands)


def stop_and_resume(commands: list[list[str]]) -> list[str]:
    """The first command is stopped by a SIGTERM that rank 1 alone gets in its sixth step; then the others."""
    import signal

    import train
    from trainer.trainer import Trainer
    from utils import dist
    dist.cleanup = lambda: None
    update, taken = Trainer._update, [0]

    def stop(self, *args):
        taken[0] += 1
        if taken[0] == 6 and dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *args)
    Trainer._update = stop
    for command in commands:
        train.main(command)
    return []


def open_shards(places: list[str]) -> dict:
    """Open the shards in this rank's of `places`, a machine each where they differ: how many shards were read for it,
    this rank's part of an epoch, and what is said where a place holds another shard than rank 0's."""
    import data_loader.shards as shards
    from data_loader.data_loaders import ImageFolderLTDataLoader
    from utils import dist
    from utils.errors import ConfigError
    dist.setup("cpu")
    rank, read, original = dist.rank(), [], shards.read_tar
    if places[0] != places[-1]:
        os.environ["LOCAL_RANK"] = "0"
    shards.read_tar = lambda shard, length: read.append(shard) or original(shard, length)
    loader = ImageFolderLTDataLoader(places[rank], batch_size=5, image_size=16, num_workers=0, cache=False, rank=rank,
                                     world_size=2, shards=SHARDS)
    batches = [(images, labels, torch.tensor(loader.share(batch)[0])) for batch, (images, labels) in enumerate(loader)]
    said = ""
    try:
        shards.open_index("odd.tar", places[rank])
    except ConfigError as error:
        said = str(error)
    dist.barrier()
    return {"read": len(read), "batches": batches, "said": said}


def make_temporary_folder(_) -> dict:
    """Share a folder for what is derived from the data, write to it, and leave it."""
    from data_loader.derived import nothing_kept, temporary_folder
    from utils import dist
    dist.setup("cpu")
    with nothing_kept():
        folder = temporary_folder()
        (folder / str(dist.rank())).touch()
        dist.barrier()
        found = sorted(path.name for path in folder.iterdir())
        dist.barrier()
    dist.barrier()
    return {"folder": str(folder), "found": found, "left": folder.exists()}
