"""The base class of all data loaders: which images form which batch, on which rank, in which epoch.

Order and augmentation are pure functions of (seed, epoch, position in the epoch), so a run that stopped in the middle
of an epoch resumes exactly (`set_epoch(epoch, start_batch)`), with any number of workers.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from utils.errors import ConfigError
from utils.seed import numpy_rng

# Random-number streams. Derived from (seed, epoch): the images' order, augmentation and mixing; from the seed alone:
# which half of the images is flipped first.
ORDER, AUGMENT, MIX, FLIP = 1, 2, 3, 4


class BaseDataLoader:
    """Iterates over (images [n, 3, H, W] float, labels [n] long) on `device`. A subclass implements `_batches` and sets
    `num_classes` and `cls_num_list`; what else a run asks of a loader has defaults here.

    targets: labels of the images, np.int64 [n_samples].
    batch_size: size of the global batch, over all ranks; rank r gets every world_size-th of its images, from the
    r-th on.
    sampler: an object with `epoch_length` and `epoch_indices(epoch) -> np.int64 [epoch_length]`; without one an epoch
    is every image once, shuffled if `shuffle` and `training`.
    Raises ConfigError for a batch size below 1.
    """

    task = "classification"     # or "detection": targets are boxes and masks
    num_classes: int
    cls_num_list: list[int]     # training images of each class, whichever split this is
    class_names: Sequence[str] | None = None
    #: How an image becomes a test image, for predictions and exported files (see `data_loader.transforms.
    #: test_preprocess`); empty if that isn't known. Subtracted mean and divisor of each channel, to show images.
    preprocess: dict[str, Any] = {}
    mean: Sequence[float] = (0.0, 0.0, 0.0)
    std: Sequence[float] = (1.0, 1.0, 1.0)
    validation = "none"                     # the config's choice: none, test or holdout
    validation_note: str | None = None      # one line for the log: which images are for validation
    has_spare = False                       # whether images are left for validation that no split uses

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

    def split_validation(self) -> BaseDataLoader | None:
        """The loader of the validation images; None: the run has none."""
        return None

    def train_eval_loader(self) -> BaseDataLoader:
        """A loader of the same images in order, not augmented. Raises ConfigError where a loader has none."""
        raise ConfigError(f"data_loader.type: {type(self).__name__} has no `train_eval_loader`, which gives the "
                          "training images in order and not augmented; what was asked for needs them")

    def summary(self, groups: dict[str, float] | None = None) -> list[str]:
        """Lines for the log that describe the data. groups: the config's limits of many- and few-shot classes."""
        return []

    def __len__(self) -> int:
        """Number of batches per epoch. In training a last batch of one image is dropped, since batch norm can't train
        on it; after an offset that image joins the batch before it: the old batch size might not have dropped it."""
        full, rest = divmod(self.epoch_size - self.offset, self.batch_size)
        if rest == 1 and self.training and (full or self.offset):
            rest = 0
        return full + (rest > 0)

    def set_epoch(self, epoch: int, start_batch: int = 0, offset: int = 0) -> None:
        """Make the next iteration epoch `epoch` (1, 2, ...), from batch `start_batch` on. offset: number of images
        skipped at the beginning of the epoch, because batches of another size have covered them."""
        self.epoch, self.start_batch, self.offset, self._started = epoch, start_batch, offset, False

    def images_done(self, batches: int) -> int:
        """Number of the epoch's images that the offset and the first `batches` batches cover."""
        return self.span(batches - 1)[1]

    def span(self, batch: int) -> tuple[int, int]:
        """Positions [start, stop) in the epoch that global batch `batch` covers."""
        start = self.offset + batch * self.batch_size
        stop = min(start + self.batch_size, self.epoch_size)
        alone = self.offset and self.training and batch >= 0 and self.epoch_size - stop == 1
        return start, stop + bool(alone)

    def share(self, batch: int) -> tuple[int, int]:
        """Number of real images in batch `batch`: (on this rank, on all ranks). A rank that would get none borrows the
        batch's first image, so that every rank takes the same number of steps; it counts as 0 here."""
        start, stop = self.span(batch)
        return len(range(start + self.rank, stop, self.world_size)), stop - start

    def least_share(self) -> int:
        """The smallest number of images (1 or more, counting a borrowed one) that a rank gets in any batch of an
        epoch."""
        sizes = (stop - start for start, stop in map(self.span, {0, len(self) - 1}))
        return min(max(size // self.world_size, 1) for size in sizes)

    def positions(self, batch: int) -> np.ndarray:
        """This rank's positions in the epoch for global batch `batch`: int64 [n], never empty (see `share`)."""
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
