"""Where a loader's pixels are kept and how they become batches: from memory, augmented in batches, or from workers."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from base.base_data_loader import AUGMENT, BaseDataLoader
from base.labels import MixedLabels
from data_loader.crops import enlarged_crops
from data_loader.datasets import ImageSet
from data_loader.erasing import erase
from data_loader.images import read_rgb, short_side
from data_loader.memory import MemoryImages, Recipe
from data_loader.places import file_of, stamp
from data_loader.transforms import LARGEST_RESIZED, Normalise, alternate_flips
from data_loader.workers import FileBatches, Sources, decode_all, worker_count, worker_notes
from utils.errors import ConfigError

LARGEST_SMALL = 64          # up to this image_size, images are augmented in batches
SMALLEST_AUTO = 64          # the least value of image_size "auto", which CPUs always use
CACHE_LIMIT = 1 << 30       # largest size in bytes of decoded images that `cache: "auto"` keeps


class PixelLoader(BaseDataLoader):
    """The part of `ImageDataLoader` that turns an `ImageSet` into batches, using options that are attributes of it.

    Batches are (images float [n, 3, S, S], or [n, K, 3, S, S] with several crops; labels [n] or `MixedLabels`).
    """

    def _attach(self, images: ImageSet, augment: bool, store: MemoryImages | None = None) -> None:
        """Set the images to iterate over, held in memory (in `store`, if given) or decoded by workers."""
        if not len(images):
            raise ConfigError(f"data_loader.args.data_dir: {self.data_dir}: the "
                              f"{'training' if self.training else 'evaluation'} split has no image")
        self.images, self.augment, self.store, self.files = images, augment, store, None
        self.worker_notes: list[str] = []
        self.paths = images.paths
        files = images.pixels if images.paths is None else images.paths  # arrays of another size are treated like files
        self._draws: tuple[int, Any] = (0, None)
        small = self._is_small
        how = self.augmentation
        self.recipe = Recipe(self.image_size, self.mean, self.std, flip=bool(how.flip), policy=how.augment,
                             degrees=how.degrees(self.degrees if small else 0.0), cutout=how.cutout,
                             erasing=how.random_erasing,
                             border=self.image_size // 8 if self.image_size <= LARGEST_RESIZED else 0)
        if store is not None or (self.transform is not None and augment and images.pixels is None):
            pass
        elif images.pixels is not None and images.pixels.shape[1] == self.preprocess["resize"]:
            self.store = MemoryImages(images.pixels, self.recipe, self.device)
            self.images = ImageSet(images.targets)  # hold the pixels only once
        elif small and self.cache is not False and (self.cache is True or self._bytes(images) <= CACHE_LIMIT):
            self.store = MemoryImages(decode_all(files, self.preprocess), self.recipe, self.device)
            self.images = images if images.pixels is None else ImageSet(images.targets)
        elif self.cache is True and self.image_size > LARGEST_SMALL:
            raise ConfigError(f"data_loader.args.cache: only images of {LARGEST_SMALL} pixels or less are kept in "
                              f"memory, image_size is {self.image_size}")
        if self.store is None or (self.transform is not None and augment):
            source = Sources(files if self.store is None else None, self.store,
                             self.preprocess if augment else self.views, seed=self.seed, flip=how.flip,
                             jitter=how.jitter if how.augment == "basic" else 0.0, policy=how.augment,
                             degrees=self.recipe.degrees, transform=self.transform if augment else None,
                             mode="base" if small else "train" if augment else "test")
            workers = worker_count(self.num_workers, self.world_size, in_memory=self.store is not None)
            if self.store is None:
                self.worker_notes = worker_notes(self.num_workers, workers)
            pin = self.device.type == "cuda" if self.pin_memory is None else self.pin_memory
            self.files = FileBatches(source, self.targets, workers, pin and torch.cuda.is_available(), self.prefetch)

    @property
    def _is_small(self) -> bool:
        """Whether images are cropped in batches; for several crops of each image, workers crop the larger image."""
        return self.image_size <= LARGEST_SMALL and (self.augment or "crops" not in self.views)

    def describe(self, digest: Any) -> None:
        """Update a hashlib digest with which images these are, and how they are preprocessed."""
        how = [sorted(self.preprocess.items())]
        if self.augment:
            how += [self.recipe, self.seed, self.augmentation.flip, self.augmentation.jitter,
                    getattr(self.transform, "__qualname__", None)]
        digest.update(repr(how).encode() + self.targets.tobytes())
        if self.paths is None:
            digest.update(np.ascontiguousarray(self.images.pixels) if self.store is None else
                          self.store.words.cpu().numpy())
        seen = set()
        for path in self.paths or ():
            digest.update(os.fsencode(path))
            file = file_of(path)
            if file not in seen:    # a shard once, not for each image in it
                seen.add(file)
                with contextlib.suppress(OSError):     # a file's size and time change if it is replaced
                    digest.update("{} {}".format(*stamp(file, known=True)).encode())

    def _bytes(self, images: ImageSet) -> int:
        side = self.preprocess["resize"] + 2 * self.recipe.border
        return 4 * len(images) * side * side

    def raw_image(self, index: int) -> np.ndarray:
        """Image `index` of this split without augmentation or normalising, uint8 [H, W, 3]: a file's image at full
        size, or the pixels held in memory."""
        if self.paths is not None:
            return np.asarray(read_rgb(self.paths[index]))
        return self.images.pixels[index] if self.store is None else self.store.raw(index)

    def _batches(self, epoch: int, batches: range) -> Iterator[tuple[torch.Tensor, torch.Tensor | MixedLabels]]:
        found = self._plain_batches(epoch, batches)
        if not self.augment or self.mixing is None or (
                self.mixing.off_epochs and epoch > self.epochs - self.mixing.off_epochs):
            yield from found
            return
        for batch, (images, labels) in zip(batches, found):
            yield self.mixing.mix(images, labels, self.seed, epoch, self.span(batch)[0], self.rank)

    def _plain_batches(self, epoch: int, batches: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = self.epoch_order(epoch)
        if self.files is not None:
            keys = ((epoch, position, order[position]) for position in (self.positions(b) for b in batches))
            yield from self._file_batches(epoch, keys, order)
            return
        labels = torch.from_numpy(self.targets[order]).to(self.device)
        index = torch.from_numpy(order).to(self.device)
        draws = self._epoch_draws(epoch, order) if self.augment else None
        for batch in batches:
            own = self.positions(batch)
            mine = slice(own[0], own[-1] + 1, self.world_size)  # a slice of tensors on the device needs no copy to it
            images = self.store.plain(index[mine]) if draws is None else \
                self.store.augmented(index[mine], draws[mine])
            if draws is None and "crops" in self.views:
                images = enlarged_crops(images, self.views)
            yield images, labels[mine].clone()

    def _epoch_draws(self, epoch: int, order: np.ndarray) -> Any:
        """The random numbers for all positions of an epoch, drawn at once."""
        if self._draws[0] != epoch:
            side = self.store.side if self.store is not None else self.preprocess["resize"] + 2 * self.recipe.border
            draws = self.recipe.draw(self.epoch_size, side - self.image_size, self.seed, epoch, AUGMENT)
            if self.augmentation.flip == "alternate":
                draws.flip = torch.from_numpy(alternate_flips(self.seed, epoch, order))
            self._draws = (epoch, draws.to(self.device))
        return self._draws[1]

    def _file_batches(self, epoch: int, keys: Iterator,
                      order: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        small = self._is_small and not (self.transform is not None and self.augment)
        erases = bool(self.augmentation.cutout or self.augmentation.random_erasing)
        draws = self._epoch_draws(epoch, order) if self.augment and (small or erases) else None
        normalise = Normalise(self.mean, self.std, self.device)
        for pixels, labels, positions in self.files.batches(keys):
            pixels = pixels.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            if small:  # decoded by workers, then augmented here like images in memory
                some = MemoryImages(pixels, self.recipe, self.device, normalise)
                every = torch.arange(len(labels), device=self.device)
                images = some.plain(every) if draws is None else some.augmented(every, draws[positions])
            else:  # a custom transform's floats are used as they are
                images = normalise(pixels) if pixels.dtype == torch.uint8 else pixels
                images = images if draws is None else erase(images, draws[positions].boxes)
            yield images, labels


def half_size(own: int, takes: Callable[[int], bool] | None = None) -> int | None:
    """Half of the image size `own` at which a network was trained, or None if `takes` says that the network can't use
    it."""
    return own // 2 if takes is None or takes(own // 2) else None


def suited_size(paths: list[str], fast: bool, own: int | None = None,
                takes: Callable[[int], bool] | None = None) -> tuple[int, str]:
    """(the `image_size` that "auto" stands for, a line for the log), from the headers of at most a hundred images.

    fast: there is a GPU, so that large photos needn't be shrunk much. own: the size at which a pretrained network was
    trained; it is used as it is, or halved if the photos' median short side is less than half of it. takes: whether the
    network can use images of a given size; None: any size.
    """
    sides = [side for path in paths[::-(-len(paths) // 100)] if (side := short_side(path))]
    middle = sorted(sides)[len(sides) // 2] if sides else 0
    if own is not None:
        small = middle < own // 2
        chosen = (half_size(own, takes) if small else None) or own
        but = f"; it takes none of {own // 2}" if small and chosen == own else ""
        return chosen, (f"image size: {chosen} (the network's is {own}, half of the images have {middle} pixels or "
                        f"more{but})")
    wanted = next((size for size in (224, 128) if middle >= size), SMALLEST_AUTO)
    chosen = wanted if fast else SMALLEST_AUTO
    note = f"image size: {chosen} (half of the images have a short side of {middle} pixels or more)"
    if chosen < wanted:
        note += f"; {wanted} shows more of them and takes {(wanted / chosen) ** 2:.0f} times as long"
    return chosen, note
