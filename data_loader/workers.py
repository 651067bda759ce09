"""Decoding image files, a batch at a time, in worker processes that live as long as the loader."""
from __future__ import annotations

import os
import random
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from base.base_data_loader import AUGMENT
from base.stop import STOPS
from data_loader.images import read_rgb, shown
from data_loader.memory import MemoryImages
from data_loader.transforms import (
    alternate_flips,
    base_pixels,
    read_for_test,
    read_for_training,
    test_pixels,
    torchvision_policy,
)
from logger.text import count_of
from utils.errors import ConfigError, RunError
from utils.seed import mix, numpy_rng

NAMED = 10              # at most this many unreadable images are named in an error
LOOK_ON = 60            # seconds spent on finding further unreadable images

Key = tuple[int, int, int]   # epoch, position in the epoch, index of the image


def worker_count(wanted: int | None, world_size: int, in_memory: bool = False) -> int:
    """The number of worker processes: 0 if the images are in memory; else `wanted`, where several training processes
    are on this machine at most their share of its cores; else (None) this process's share, from 1 to 8."""
    if in_memory:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    share = max(1, cores // processes)
    if wanted is None:
        return min(8, share)
    return wanted if processes == 1 else min(wanted, share)


def worker_notes(wanted: int | None, count: int) -> list[str]:
    """A line for the log if `worker_count` gives fewer than the `wanted` worker processes, else none."""
    if wanted is None or count >= wanted:
        return []
    return [f"data_loader.args.num_workers: {count} for each training process instead of {wanted}, as the processes on "
            "this machine share its cores"]


@dataclass
class Failure:
    """A ConfigError raised in a worker, returned as a value because torch would wrap an exception in a long traceback.
    """

    message: str


class Sources(Dataset):
    """Dataset: key -> (uint8 pixels or a custom transform's tensor, index, position), a function of (seed, key) alone;
    a `Failure` if the image can't be read.

    paths: files, or the images themselves, uint8 [N, P, P, 3]; None: the transform's input comes from `store`. mode:
    `train`: random crops of large images [3, S, S]; `test`: see `test_pixels`; `base`: the square [R, R, 3] from which
    small images are cropped later, in batches. degrees: maximum rotation, with `train`.
    """

    def __init__(self, paths: list[str] | np.ndarray | None, store: MemoryImages | None, preprocess: dict[str, Any], *,
                 seed: int, mode: str, jitter: float = 0.0, flip: bool | str = True, policy: str = "basic",
                 degrees: float = 0.0, transform: Callable | None = None):
        # One block of bytes instead of many strings, so that workers share its memory pages with the parent.
        self.paths = np.array([os.fsencode(path) for path in paths]) if isinstance(paths, list) else paths
        self.store, self.preprocess, self.seed, self.mode = store, preprocess, seed, mode
        self.jitter, self.flip, self.transform, self.degrees = jitter, flip, transform, degrees
        self.policy = None if policy == "basic" else torchvision_policy(policy)
        #: Of each image: in even epochs 1, and in odd ones 0, means mirrored.
        self.turns = None
        if flip == "alternate" and mode == "train" and self.paths is not None:
            self.turns = alternate_flips(seed, 0, np.arange(len(self.paths))).astype(np.int8)
        if degrees:
            from torchvision.transforms.functional import rotate  # slow to import
            self.rotate = rotate

    def __getitem__(self, key: Key) -> tuple[Any, int, int] | Failure:
        epoch, position, index = key
        try:
            return self._pixels(epoch, position, index), index, position
        except ConfigError as error:
            return Failure(str(error))

    def _pixels(self, epoch: int, position: int, index: int) -> Any:
        path = None if self.paths is None else self.paths[index]
        path = os.fsdecode(path) if isinstance(path, bytes) else path
        if self.transform is not None:
            image = Image.fromarray(self.store.raw(index)) if path is None else read_rgb(path)
            with _seeded(mix(self.seed, epoch, AUGMENT, position)):
                return self.transform(image)
        if self.mode == "train":
            rng = numpy_rng(self.seed, epoch, AUGMENT, position)
            pixels = read_for_training(path, rng, self.preprocess["image_size"], self.flip is True, self.jitter,
                                       self.preprocess["interpolation"])
            if self.turns is not None and (self.turns[index] + epoch) % 2:
                pixels = pixels.flip(2)
            if self.degrees:
                pixels = self.rotate(pixels, rng.uniform(-self.degrees, self.degrees))
            if self.policy is not None:
                with _seeded(mix(self.seed, epoch, AUGMENT, position)):
                    pixels = self.policy(pixels)
            return pixels
        image = read_for_test(path, self.preprocess)
        return (test_pixels if self.mode == "test" else base_pixels)(image, self.preprocess)


@contextmanager
def _seeded(value: int) -> Iterator[None]:
    """Inside, the global generators that transforms may draw from are seeded by `value`; then they are restored."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(value)     # torch.manual_seed would reseed the GPUs' too, for good
        random.seed(value)
        np.random.seed(value % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


class _Keys:
    """The batch sampler: the batches of keys for the workers, which torch reads again each epoch."""

    def __init__(self) -> None:
        self.batches: Iterable[list[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


class FileBatches:
    """A torch DataLoader whose batches of keys are replaced each epoch, so that its workers never restart."""

    def __init__(self, source: Sources, targets: np.ndarray, workers: int, pin_memory: bool, prefetch: int):
        self.targets = torch.from_numpy(targets)
        self.keys = _Keys()
        more = {"persistent_workers": True, "prefetch_factor": prefetch} if workers else {}
        # A separate generator: otherwise torch draws the workers' seeds from the global one, and a run resumed in the
        # middle of an epoch would get other random numbers than one that never stopped.
        with warnings.catch_warnings():  # torch warns about more workers than cores, but that is the user's choice
            warnings.simplefilter("ignore")
            self.loader = DataLoader(source, batch_sampler=self.keys, num_workers=workers, pin_memory=pin_memory,
                                     collate_fn=_collate, generator=torch.Generator(),
                                     worker_init_fn=leave_stops_to_parent, **more)
        # Stop the workers before anything is torn down: once a queue is garbage-collected, they can't be told to stop.
        weakref.finalize(self, _dismiss, self.loader)

    def batches(self, keys: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield (pixels [n, ...], labels [n], positions [n]) for each (epoch, positions [n], indices [n]) in `keys`.

        Raises ConfigError, naming the file, for an image that can't be read, RunError if a worker dies.
        """
        self.keys.batches = ([(epoch, int(p), int(i)) for p, i in zip(positions, indices, strict=True)]
                             for epoch, positions, indices in keys)
        try:
            for batch in loaded(self.loader):
                if isinstance(batch, Failure):
                    raise ConfigError(batch.message + self.others_like(batch))
                pixels, indices, positions = batch
                yield pixels, self.targets[indices], positions
        finally:
            self.keys.batches = ()  # they refer to the loader and would keep it alive if an epoch is left early

    def others_like(self, failure: Failure) -> str:
        """The end of an error message, naming other images that can't be read, so that all can be fixed before the next
        start. They are searched for here in threads, for at most LOOK_ON seconds."""
        paths = self.loader.dataset.paths
        if paths is None or paths.dtype.kind != "S":
            return ""
        until = time.monotonic() + LOOK_ON

        def unreadable(path: bytes) -> str | None:
            try:
                if time.monotonic() < until:
                    read_rgb(os.fsdecode(path), lambda *size: 8)
            except ConfigError:
                return shown(os.fsdecode(path))
            return None
        with ThreadPoolExecutor(worker_count(None, 1)) as pool:
            return name_others([name for name in pool.map(unreadable, paths)
                                if name is not None and not failure.message.startswith(f"{name}: ")])


def loaded(loader: DataLoader) -> Iterator[Any]:
    """Yield a torch DataLoader's batches. Raises RunError, with advice about num_workers, if a worker is killed."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:  # from torch, if a worker process has died
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(f"{str(error).splitlines()[0]} (often for want of memory: try a smaller "
                           "data_loader.args.num_workers)") from None
        yield batch


def leave_stops_to_parent(worker: int) -> None:
    """DataLoader's `worker_init_fn`: make a worker ignore signals to stop unless the parent sends SIGTERM.

    A batch system sends SIGTERM or SIGUSR1, and a terminal SIGINT, to every process of a job, but the parent needs its
    workers until its step is done.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return  # macOS

    def wait() -> None:
        while True:
            told = signal.sigwaitinfo(STOPS)
            if told.si_signo == signal.SIGTERM and told.si_pid == parent:
                os._exit(0)

    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    threading.Thread(target=wait, daemon=True).start()


def _dismiss(loader: DataLoader) -> None:
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()


def _collate(items: list) -> Any:
    for item in items:
        if isinstance(item, Failure):
            return item
    pixels, indices, positions = zip(*items, strict=True)
    return torch.stack(pixels), torch.tensor(indices), torch.tensor(positions)


def decode_all(paths: list[str] | np.ndarray, preprocess: dict[str, Any]) -> torch.Tensor:
    """All images as returned by `base_pixels`, uint8 [N, R, R, 3]. Raises ConfigError naming the files that can't be
    read."""
    side = preprocess["resize"]
    pixels = torch.empty(len(paths), side, side, 3, dtype=torch.uint8)

    def decode(index: int) -> str | None:
        try:
            pixels[index] = base_pixels(read_for_test(paths[index], preprocess), preprocess)
        except ConfigError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(worker_count(None, 1)) as pool:
        bad = [(index, message) for index, message in enumerate(pool.map(decode, range(len(paths)))) if message]
    if bad:
        raise ConfigError(bad[0][1] + name_others([shown(paths[index]) for index, _ in bad[1:]]))
    return pixels


def name_others(names: list[str]) -> str:
    """The end of an error message about an unreadable image: names of further ones, or "" if there are none."""
    if not names:
        return ""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return (f"; {count_of(len(names), 'other image', 'other images')} of the split can't be read either: "
            f"{', '.join(names[:NAMED])}{more}")
