"""Image files decoded by worker processes that live as long as the loader, a batch at a time."""
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

NAMED = 10              # images that can't be read and are named
LOOK_ON = 60            # seconds in which others are looked for

Key = tuple[int, int, int]   # epoch, position in the epoch, index of the image


def worker_count(wanted: int | None, world_size: int, in_memory: bool = False) -> int:
    """How many worker processes: as wanted, else one a core that this process may use, 8 at most; 0 for memory."""
    if in_memory:
        return 0
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))


@dataclass
class Failure:
    """A user's mistake met in a worker: torch would wrap the exception in a page of traceback."""

    message: str


class Sources(Dataset):
    """Key -> (uint8 pixels, or a custom transform's tensor, index, position), a function of (seed, key) alone.

    paths: files, or the images themselves, uint8 [N, P, P, 3]. mode: `train`: random crops of large images; `test`: the
    test's pixels; `base`: the square that small images are cropped from later, by the batch.
    """

    def __init__(self, paths: list[str] | np.ndarray | None, store: MemoryImages | None, preprocess: dict[str, Any], *,
                 seed: int, mode: str, jitter: float = 0.0, flip: bool | str = True, policy: str = "basic",
                 degrees: float = 0.0, transform: Callable | None = None):
        # One block of bytes instead of many strings: workers share its pages with the parent.
        self.paths = np.array([os.fsencode(path) for path in paths]) if isinstance(paths, list) else paths
        self.store, self.preprocess, self.seed, self.mode = store, preprocess, seed, mode
        self.jitter, self.flip, self.transform, self.degrees = jitter, flip, transform, degrees
        self.policy = None if policy == "basic" else torchvision_policy(policy)
        if degrees:
            from torchvision.transforms.functional import rotate  # takes a while to import
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
            if self.flip == "alternate" and alternate_flips(self.seed, epoch, np.array([index]))[0]:
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
    """The global generators that custom transforms draw from, seeded for one image and put back."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(value)
        random.seed(value)
        np.random.seed(value % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


class _Keys:
    """The batches of keys that the workers are to do next; torch asks for them anew each epoch."""

    def __init__(self) -> None:
        self.batches: Iterable[list[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


class FileBatches:
    """A torch DataLoader whose batches of keys are set anew for each epoch, so its workers never restart."""

    def __init__(self, source: Sources, targets: np.ndarray, workers: int, pin_memory: bool, prefetch: int):
        self.targets = torch.from_numpy(targets)
        self.keys = _Keys()
        more = {"persistent_workers": True, "prefetch_factor": prefetch} if workers else {}
        # A generator of its own: torch would draw the workers' seeds from the global one, and a run that goes on in the
        # middle of an epoch would see other random numbers than one that never stopped.
        with warnings.catch_warnings():  # torch advises against more workers than cores; the user has decided
            warnings.simplefilter("ignore")
            self.loader = DataLoader(source, batch_sampler=self.keys, num_workers=workers, pin_memory=pin_memory,
                                     collate_fn=_collate, generator=torch.Generator(),
                                     worker_init_fn=leave_stops_to_parent, **more)
        # Before anything is torn down: once the garbage collector has closed a queue, workers can't be told to stop.
        weakref.finalize(self, _dismiss, self.loader)

    def batches(self, keys: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> Iterator[tuple[torch.Tensor, ...]]:
        """(pixels, labels [n], positions [n]) for each (epoch, positions [n], indices [n]). Raises ConfigError."""
        self.keys.batches = ([(epoch, int(p), int(i)) for p, i in zip(positions, indices, strict=True)]
                             for epoch, positions, indices in keys)
        try:
            for batch in loaded(self.loader):
                if isinstance(batch, Failure):
                    raise ConfigError(batch.message + self.others_like(batch))
                pixels, indices, positions = batch
                yield pixels, self.targets[indices], positions
        finally:
            self.keys.batches = ()  # they refer to the loader, which would live on where an epoch is left early

    def others_like(self, failure: Failure) -> str:
        """What is said of the other images that can't be read either, so that one restart does for all of them.

        They are looked for in threads here, for LOOK_ON seconds at most.
        """
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
    """A torch DataLoader's batches. Raises RunError, one line that names num_workers, where a worker is killed."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:  # torch's, where a worker process has gone
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(f"{str(error).splitlines()[0]} (often for want of memory: try a smaller "
                           "data_loader.args.num_workers)") from None
        yield batch


def leave_stops_to_parent(worker: int) -> None:
    """A batch system sends SIGTERM or SIGUSR1, and a terminal SIGINT, to every process of a job, but the parent
    needs its workers until its step is done: only its own SIGTERM ends them."""
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
    """All images as `base_pixels` gives them, uint8 [N, R, R, 3]. Raises ConfigError naming the bad files."""
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
    """The end of an error about one image that can't be read, where there are more."""
    if not names:
        return ""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return (f"; {count_of(len(names), 'other image', 'other images')} of the split can't be read either: "
            f"{', '.join(names[:NAMED])}{more}")
