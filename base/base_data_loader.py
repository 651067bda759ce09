"""The base of all loaders: which images make which batch, on which rank, in which epoch.

Order and augmentation are pure functions of (seed, epoch, position in the epoch), so a run that stops in the middle
of an epoch goes on exactly (`set_epoch(epoch, start_batch)`), with any number of workers.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from utils.errors import ConfigError
from utils.seed import numpy_rng

# Streams of random numbers under one (seed, epoch): the order, the augmentation, the mixing of images; under the
# seed alone, which half of the images is flipped first.
ORDER, AUGMENT, MIX, FLIP = 1, 2, 3, 4


class BaseDataLoader:
    """Iterates (images [n, 3, H, W] float, labels [n] long) on `device`; a subclass fills in `_batches`.

    targets: labels of the images iterated, np.int64 [n_samples].
    batch_size: of the global batch; rank r of `world_size` gets every world_size-th image of it, from the r-th on.
    sampler: an object with `epoch_length` and `epoch_indices(epoch) -> np.int64 [epoch_length]`; without one an epoch
    is every image once, shuffled if `shuffle` (training only).
    """

    task = "classification"     # or "detection": targets are boxes and masks

    def __init__(self, targets: np.ndarray, batch_size: int, *, shuffle: bool, training: bool, seed: int = 0,
                 device: str | torch.device = "cpu", rank: int = 0, world_size: int = 1,
                 sampler: Any = None):
        if batch_size < 1:
            raise ConfigError(f"data_loader.args.batch_size: {batch_size} is under 1")
        self.targets = np.asarray(targets, dtype=np.int64)
        self.batch_size, self.shuffle, self.training = batch_size, shuffle, training
        self.seed, self.device, self.rank, self.world_size = seed, torch.device(device), rank, world_size
        self.index_sampler = sampler
        self.n_samples = len(self.targets)
        self.epoch_size = self.n_samples if sampler is None else sampler.epoch_length
        self.epoch, self.start_batch, self.offset = 1, 0, 0
        self._started = False

    def __len__(self) -> int:
        """Batches an epoch. A last training batch of one image is dropped, since batch norm can't learn from it; after
        an offset that image joins the batch before it, since batches of the old size may have had it."""
        full, rest = divmod(self.epoch_size - self.offset, self.batch_size)
        if rest == 1 and self.training and (full or self.offset):
            rest = 0
        return full + (rest > 0)

    def set_epoch(self, epoch: int, start_batch: int = 0, offset: int = 0) -> None:
        """The next iteration is epoch `epoch` (1, 2, ...) from batch `start_batch` on. offset: images of the epoch that
        are left out at its beginning, since batches of another size have had them."""
        self.epoch, self.start_batch, self.offset, self._started = epoch, start_batch, offset, False

    def images_done(self, batches: int) -> int:
        """How many images of the epoch the first `batches` batches (and the offset) make up."""
        return self.span(batches - 1)[1]

    def span(self, batch: int) -> tuple[int, int]:
        """Positions [start, stop) in the epoch that make up global batch `batch`."""
        start = self.offset + batch * self.batch_size
        stop = min(start + self.batch_size, self.epoch_size)
        alone = self.offset and self.training and batch >= 0 and self.epoch_size - stop == 1
        return start, stop + bool(alone)

    def share(self, batch: int) -> tuple[int, int]:
        """Real images of batch `batch`: (on this rank, on all ranks). A rank left without any gets one repeated
        image, so that every rank takes the same steps, and counts 0 here."""
        start, stop = self.span(batch)
        return len(range(start + self.rank, stop, self.world_size)), stop - start

    def least_share(self) -> int:
        """The fewest images that a rank has in any batch of an epoch, repeated ones too."""
        sizes = (stop - start for start, stop in map(self.span, {0, len(self) - 1}))
        return min(max(size // self.world_size, 1) for size in sizes)

    def positions(self, batch: int) -> np.ndarray:
        """This rank's positions of global batch `batch`, never empty."""
        start, stop = self.span(batch)
        mine = np.arange(start + self.rank, stop, self.world_size)
        return mine if len(mine) else np.array([start])

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Index of the image at each position of an epoch, np.int64 [epoch_size]."""
        if self.index_sampler is not None:
            return self.index_sampler.epoch_indices(epoch)
        if self.shuffle and self.training:  # evaluation never shuffles
            return numpy_rng(self.seed, epoch, ORDER).permutation(self.n_samples)
        return np.arange(self.n_samples)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # A plain `for epoch: for batch in loader` without set_epoch still sees new epochs.
        if self._started and self.training:
            self.epoch, self.start_batch, self.offset = self.epoch + 1, 0, 0
        self._started = True
        return self._batches(self.epoch, range(self.start_batch, len(self)))

    def _batches(self, epoch: int, batches: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        raise NotImplementedError
