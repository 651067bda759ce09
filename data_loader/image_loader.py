"""The loader behind every classification data set: splits, imbalance, validation, samplers, and where pixels live.

A data set is a subclass that says how to read its splits (`read`) and which statistics it is normalised with.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch

from base.base_data_loader import AUGMENT, BaseDataLoader
from base.labels import MixedLabels
from data_loader.datasets import ImageSet, Splits
from data_loader.erasing import erase
from data_loader.files import check_data_dir
from data_loader.images import short_side
from data_loader.imbalance import img_num_per_cls, long_tail_indices
from data_loader.memory import MemoryImages, Recipe
from data_loader.mixing import Mixing
from data_loader.policies import POLICIES
from data_loader.samplers import SAMPLERS, ClassBalancedSampler
from data_loader.splitting import Division, holdout_of_spare, is_same_place, match_classes, summary
from data_loader.transforms import (
    IMAGENET_STATISTICS,
    LARGEST_RESIZED,
    Normalise,
    alternate_flips,
    test_preprocess,
)
from data_loader.workers import FileBatches, Sources, decode_all, worker_count
from utils.config.build import build
from utils.errors import ConfigError, unknown

LARGEST_SMALL = 64          # up to this image_size, images are augmented by the batch
SMALLEST_AUTO = 64          # what image_size "auto" is at least, and on CPUs always
CACHE_LIMIT = 1 << 30       # bytes of decoded images that `cache: "auto"` keeps


class ImageDataLoader(BaseDataLoader):
    """Batches of (images [n, 3, S, S] float, labels [n] long) of a data set's training or test split.

    data_dir: where the data set is. batch_size: over all ranks together.
    num_workers: processes that decode files (None: chosen; images in memory need none).
    training: the training split, augmented; false: the test split.
    balanced: class-balanced sampling; retain_epoch_size false makes its epochs classes x largest class long.
    sampler: {"type": "ClassAware", "args": {...}}, see `data_loader.samplers`.
    validation: `test`: the published convention (the data set's validation images where it has some, else its test
        images); `holdout`: never the test images: the validation images, or images that no split uses, or a share
        `val_share` of each class's training images; `none`.
    imb_type, imb_factor: make the training split long-tailed; imb_factor null leaves it as it is.
    image_size: of what the model gets; "auto" (own images): 224 or 128 on a GPU where the photos have that many pixels,
        else 64. split_seed: which images a split made here takes, whatever `seed` is.
    test_share: of each class, for folders without a test split. flip: false for images that mustn't be mirrored;
        "alternate": half of the images in odd epochs, the others in even ones.
    allow_outside: images may lie outside data_dir. download: fetch what is missing, where that is possible.
    cache: decoded small images held in memory: true, false, or "auto" (up to 1 GiB).
    pin_memory: null: where the device is a GPU. prefetch: batches each worker prepares ahead.
    augment: `basic`: crop, flip and, of small images, rotation; `autoaugment`, `randaugment`, `trivialaugment`: crop,
        flip and that policy (AutoAugment's for CIFAR-10 up to 64 pixels, else its ImageNet one). rotation: degrees
        either way (null: 15 with `basic` up to 64 pixels, else 0). cutout: a square of so many pixels becomes 0, with
        its centre anywhere. random_erasing: the share of images in which a rectangle becomes 0.
    mix: {"type": "mixup" | "cutmix" | "either", "alpha": 0.4, "prob": 1.0, "off_epochs": 0}: labels are then
        `MixedLabels`, see `data_loader.mixing`.
    facts: what a checkpoint knows of its data (`data_facts`): classes are then in its order, by name, groups follow its
        training counts, and what was training data stays training data.
    transform: a function of a PIL image for the training images instead of the loader's own (Python only).
    distributed: as in old configs; ignored, `torchrun` decides.
    epochs: what ProgressivelyBalanced takes as its number of epochs.

    Raises ConfigError, naming the argument or the file, for anything wrong with either.
    """

    statistics: tuple[tuple, tuple] = IMAGENET_STATISTICS
    default_size = 224
    flips = True
    jitter = 0.0                 # colour jitter of large training images
    holdout_cap = 50             # validation images a class at most, where they cost no training image
    degrees = 15.0

    def __init__(self, data_dir: str, batch_size: int = 128, shuffle: bool = True, num_workers: int | None = None,
                 training: bool = True, balanced: bool = False, retain_epoch_size: bool = True, *,
                 sampler: dict | None = None, validation: Literal["test", "holdout", "none"] | None = "test",
                 val_share: float = 0.1, imb_type: str | None = "exp", imb_factor: float | None = None,
                 image_size: int | Literal["auto"] | None = None, split_seed: int = 0, test_share: float = 0.2,
                 flip: bool | Literal["alternate"] | None = None, allow_outside: bool = False, download: bool = True,
                 cache: bool | str = "auto", pin_memory: bool | None = None, prefetch: int = 4,
                 distributed: bool | None = None, seed: int = 0, device: str | torch.device = "cpu", rank: int = 0,
                 world_size: int = 1, epochs: int | None = None, transform: Callable | None = None,
                 augment: Literal["basic", "autoaugment", "randaugment", "trivialaugment"] = "basic",
                 rotation: float | None = None, cutout: int = 0, random_erasing: float = 0.0, mix: dict | None = None,
                 facts: Any = None):
        self.data_dir = data_dir
        self.num_workers, self.pin_memory, self.prefetch = num_workers, pin_memory, prefetch
        self.val_share, self.test_share, self.split_seed = val_share, test_share, split_seed
        self.allow_outside, self.download, self.cache, self.transform = allow_outside, download, cache, transform
        self.image_size = self.default_size if image_size in (None, "auto") else image_size
        self.flip = self.flips if flip is None else flip
        self.policy, self.rotation, self.cutout, self.random_erasing = augment, rotation, cutout, random_erasing
        self.mixing, self.epochs = Mixing.of(mix), epochs
        self.imb_type, self.imb_factor = imb_type, imb_factor
        self.validation = validation or "none"
        self._check()
        self.mean, self.std = self.statistics
        if data_dir is not None:
            check_data_dir(data_dir, may_be_made=self.may_download and download)
        facts = facts or {}
        self.division = Division.of(facts.get("split", {}) if facts else None, root=str(data_dir), seed=split_seed,
                                    test_share=test_share, val_share=val_share)
        #: Test images in a folder of their own are all for testing, unless they are where the training images were.
        elsewhere = bool(facts) and not is_same_place(str(data_dir), facts.get("split"))
        if facts and not elsewhere and not facts.get("optional"):
            self.division.agree(facts.get("split") or {})
        self.whole = elsewhere and not training
        splits = self.read(training)
        self.whole = self.whole and splits.train is None  # and there was no training folder
        if facts.get("class_names") and splits.class_names and not (facts.get("optional") and match_classes(
                splits.class_names, facts["class_names"], not training) is None):
            follow_classes(splits, facts["class_names"], str(data_dir), some=not training)
        self.notes = list(splits.notes)
        if image_size == "auto" and splits.test.paths is not None:
            self.image_size, note = suited_size((splits.train or splits.test).paths, torch.device(device).type != "cpu")
            self.notes.append(note)
        self.preprocess = test_preprocess(self.image_size, self.mean, self.std)
        self.class_names, self.num_classes = splits.class_names, int(splits.num_classes)
        train, self._val, self.validation_note = self._divide(splits)
        self.cls_num_list = [0] * self.num_classes if train is None else \
            np.bincount(train.targets, minlength=self.num_classes).tolist()
        if facts.get("cls_num_list") and not training and len(facts["cls_num_list"]) == self.num_classes:
            self.cls_num_list = list(facts["cls_num_list"])
        self.split_memory = None if train is None or train.paths is None else self.division.memory(train)
        self._test_counts = np.bincount(splits.test.targets[splits.test.targets >= 0], minlength=self.num_classes)
        images = train if training else splits.test
        order = self._sampler(sampler, balanced, retain_epoch_size, images.targets, seed, epochs) if training else None
        super().__init__(images.targets, batch_size, shuffle=shuffle, training=training, seed=seed, device=device,
                         rank=rank, world_size=world_size, sampler=order)
        self._attach(images, augment=training)

    may_download = False

    def read(self, training: bool) -> Splits:
        """The data set's splits; `train` may be None where `training` is false."""
        raise NotImplementedError

    def _check(self) -> None:
        def refuse(name: str, wanted: str) -> ConfigError:
            return ConfigError(f"data_loader.args.{name}: must be {wanted}, not {getattr(self, name)!r}")
        if self.validation not in ("test", "holdout", "none"):
            raise refuse("validation", '"test", "holdout" or "none"')
        if not 0 < self.val_share < 1:
            raise refuse("val_share", "over 0 and under 1")
        if not 0 < self.test_share <= 1:
            raise refuse("test_share", "over 0 and at most 1")
        if self.cache not in (True, False, "auto"):
            raise refuse("cache", 'true, false or "auto"')
        if not 1 <= self.image_size <= 4096:
            raise refuse("image_size", "1 to 4096")
        if self.num_workers is not None and self.num_workers < 0:
            raise refuse("num_workers", "0 or more")
        if self.prefetch < 1:
            raise refuse("prefetch", "1 or more")
        if self.imb_factor is not None:
            img_num_per_cls(1, 1, self.imb_type, self.imb_factor)
        if self.policy not in POLICIES:
            raise unknown("data_loader.args.augment", self.policy, POLICIES)
        if self.flip not in (True, False, "alternate"):
            raise refuse("flip", 'true, false or "alternate"')
        if self.rotation is not None and not 0 <= self.rotation <= 180:
            raise refuse("rotation", "0 to 180")
        if self.cutout < 0:
            raise refuse("cutout", "0 or more")
        if not 0 <= self.random_erasing <= 1:
            raise refuse("random_erasing", "0 to 1")
        if self.mixing is not None and self.mixing.off_epochs and self.epochs is None:
            raise ConfigError("data_loader.args.epochs: missing; mix.off_epochs counts from the last epoch")
        if self.split_seed not in range(2**32):
            raise refuse("split_seed", "0 to 4294967295")

    # -- splits ------------------------------------------------------------------------------------------------------
    def _divide(self, splits: Splits) -> tuple[ImageSet | None, ImageSet | None, str | None]:
        """(training images, validation images, what to say about them)."""
        if splits.train is None:
            return None, None, None
        train, spare = self._imbalanced(splits)
        if self.validation == "none":
            return train, None, None
        if splits.val is not None and len(splits.val):
            return train, splits.val, None
        if self.validation == "test":
            return train, splits.test, ("validation: \"test\": the best epoch is picked on the test images, as the "
                                        "published code does; the last epoch's figures are the honest ones")
        if spare is not None and len(spare):
            chosen, missing = holdout_of_spare(spare.targets, self.num_classes, self.holdout_cap, self.split_seed)
            note = f"validation: \"holdout\": {len(chosen)} images that neither training nor test uses"
            if missing:
                note += f"; {missing} of {self.num_classes} classes have none left over"
            return train, spare.subset(chosen), note
        kept, held = self.division.divide(train, "val")
        if not len(held):
            return train, None, "validation: \"holdout\": no class has enough images to spare one; there is none"
        return train.subset(kept), train.subset(held), (
            f"validation: \"holdout\": {len(held)} of the training images are held out")

    def _imbalanced(self, splits: Splits) -> tuple[ImageSet, ImageSet | None]:
        """The long-tailed training subset, and the images outside it."""
        train = splits.train
        if self.imb_factor is None or self.imb_type in (None, "none"):
            return train, splits.spare
        present = np.bincount(train.targets, minlength=self.num_classes)
        wanted = img_num_per_cls(int(present.max()), self.num_classes, self.imb_type, self.imb_factor)
        wanted = np.maximum(np.minimum(wanted, present), np.minimum(present, 1))
        chosen = long_tail_indices(train.targets, wanted[present > 0].tolist(), seed=self.split_seed)
        rest = np.setdiff1d(np.arange(len(train)), chosen)
        return train.subset(chosen), train.subset(rest)

    @staticmethod
    def _sampler(spec: dict | None, balanced: bool, retain_epoch_size: bool, targets: np.ndarray, seed: int,
                 epochs: int | None) -> Any:
        if spec is None:
            return ClassBalancedSampler(targets, seed=seed, retain_epoch_size=retain_epoch_size) if balanced else None
        if balanced:
            raise ConfigError("data_loader.args.sampler: give a sampler or \"balanced\": true, not both")
        own = spec.get("args") or {} if isinstance(spec, dict) else {}
        extra = {name: value for name, value in (("seed", seed), ("epochs", epochs))
                 if name not in own and value is not None}
        return build(SAMPLERS, spec, "data_loader.args.sampler", targets=targets, **extra)

    # -- other splits of the same data -------------------------------------------------------------------------------
    def split_validation(self) -> ImageDataLoader | None:
        """The validation split's loader, in order and not augmented; None where there is none."""
        return None if self._val is None or not self.training else self._sibling(self._val)

    def train_eval_loader(self) -> ImageDataLoader:
        """The training images in order, not augmented (for class means). Of a test loader: its images again."""
        return self._sibling(self.images, self.store)

    def _sibling(self, images: ImageSet, store: MemoryImages | None = None) -> ImageDataLoader:
        other = copy.copy(self)
        BaseDataLoader.__init__(other, images.targets, self.batch_size, shuffle=False, training=False, seed=self.seed,
                                device=self.device, rank=self.rank, world_size=self.world_size)
        other._attach(images, augment=False, store=store)
        return other

    # -- pixels ------------------------------------------------------------------------------------------------------
    def _attach(self, images: ImageSet, augment: bool, store: MemoryImages | None = None) -> None:
        """Make `images` the ones iterated: held in memory, or decoded by workers."""
        if not len(images):
            raise ConfigError(f"data_loader.args.data_dir: {self.data_dir}: the "
                              f"{'training' if self.training else 'evaluation'} split has no image")
        self.images, self.augment, self.store, self.files = images, augment, store, None
        self.paths = images.paths
        self._draws: tuple[int, Any] = (0, None)
        small = self.image_size <= LARGEST_SMALL
        degrees = self.degrees if self.policy == "basic" and small else 0.0
        self.recipe = Recipe(self.image_size, self.mean, self.std, flip=bool(self.flip), policy=self.policy,
                             degrees=degrees if self.rotation is None else float(self.rotation),
                             cutout=self.cutout, erasing=self.random_erasing,
                             border=self.image_size // 8 if self.image_size <= LARGEST_RESIZED else 0)
        if store is not None or (self.transform is not None and augment and images.pixels is None):
            pass
        elif images.pixels is not None:
            self.store = MemoryImages(images.pixels, self.recipe, self.device)
            self.images = ImageSet(images.targets)  # the pixels are held once
        elif small and self.cache is not False and (self.cache is True or self._bytes(images) <= CACHE_LIMIT):
            self.store = MemoryImages(decode_all(images.paths, self.preprocess), self.recipe, self.device)
        elif self.cache is True:
            raise ConfigError(f"data_loader.args.cache: only images of {LARGEST_SMALL} pixels or less are kept in "
                              f"memory, image_size is {self.image_size}")
        if self.store is None or (self.transform is not None and augment):
            source = Sources(images.paths, self.store, self.preprocess, seed=self.seed, flip=self.flip,
                             jitter=self.jitter if self.policy == "basic" else 0.0, policy=self.policy,
                             degrees=self.recipe.degrees, transform=self.transform if augment else None,
                             mode="base" if small else "train" if augment else "test")
            workers = worker_count(self.num_workers, self.world_size, in_memory=images.paths is None)
            pin = self.device.type == "cuda" if self.pin_memory is None else self.pin_memory
            self.files = FileBatches(source, self.targets, workers, pin and torch.cuda.is_available(), self.prefetch)

    def _bytes(self, images: ImageSet) -> int:
        side = self.preprocess["resize"] + 2 * self.recipe.border
        return 4 * len(images) * side * side

    def raw_image(self, index: int) -> np.ndarray:
        """Image `index` of the split iterated, before resizing and normalising where it is a file: uint8 [H, W, 3]."""
        if self.paths is not None:
            from data_loader.images import read_rgb
            return np.asarray(read_rgb(self.paths[index]))
        return self.store.raw(index)

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
            positions = torch.from_numpy(self.positions(batch))
            mine = positions.to(self.device)
            images = self.store.plain(index[mine]) if draws is None else \
                self.store.augmented(index[mine], draws[positions])
            yield images, labels[mine]

    def _epoch_draws(self, epoch: int, order: np.ndarray) -> Any:
        """The random numbers of all positions of an epoch, drawn at once."""
        if self._draws[0] != epoch:
            side = self.store.side if self.store is not None else self.preprocess["resize"] + 2 * self.recipe.border
            draws = self.recipe.draw(self.epoch_size, side - self.image_size, self.seed, epoch, AUGMENT)
            if self.flip == "alternate":
                draws.flip = torch.from_numpy(alternate_flips(self.seed, epoch, order))
            self._draws = (epoch, draws.to(self.device))
        return self._draws[1]

    def _file_batches(self, epoch: int, keys: Iterator,
                      order: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        small = self.image_size <= LARGEST_SMALL and not (self.transform is not None and self.augment)
        erases = bool(self.cutout or self.random_erasing)
        draws = self._epoch_draws(epoch, order) if self.augment and (small or erases) else None
        normalise = Normalise(self.mean, self.std, self.device)
        for pixels, labels, positions in self.files.batches(keys):
            pixels = pixels.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            if small:  # decoded by workers, augmented here as if they were in memory
                some, every = MemoryImages(pixels, self.recipe, self.device), torch.arange(len(labels))
                every = every.to(self.device)
                images = some.plain(every) if draws is None else some.augmented(every, draws[positions])
            else:  # a custom transform's floats are taken as they are
                images = normalise(pixels) if pixels.dtype == torch.uint8 else pixels
                images = images if draws is None else erase(images, draws[positions].boxes)
            yield images, labels

    def summary(self, groups: dict[str, float] | None = None) -> list[str]:
        """What the data look like, for the log: classes, counts, imbalance, few-shot classes, and warnings.

        groups: {"many": 100, "few": 20}, the config's limits.
        """
        return summary(self.cls_num_list, self._test_counts, self.class_names, self.notes, **(groups or {}))


def follow_classes(splits: Splits, wanted: list[str], data_dir: str, some: bool) -> None:
    """Number the splits' classes as `wanted` does, by name, in place. some: the data may lack classes.

    Raises ConfigError where names don't fit.
    """
    numbers = match_classes(splits.class_names, wanted, some)
    if numbers is None:
        def listed(names: list[str]) -> str:
            return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ConfigError(f"data_loader.args.data_dir: {data_dir} has the classes {listed(splits.class_names)}, and "
                          f"the checkpoint's model knows {listed(wanted)}; give the data it was trained for, or start "
                          "a new classifier with --pretrained")
    if splits.class_names != list(wanted):
        if numbers != list(range(len(wanted))):
            splits.notes.append("classes are numbered as in the checkpoint, by their names")
        table = np.array(numbers)
        for part in (splits.train, splits.val, splits.test, splits.spare):
            if part is not None:
                part.targets = np.where(part.targets >= 0, table[part.targets], part.targets)
        splits.class_names, splits.num_classes = list(wanted), len(wanted)


def suited_size(paths: list[str], fast: bool) -> tuple[int, str]:
    """(the `image_size` that "auto" stands for, a line about it), from the headers of a hundred images at most.

    fast: there is a GPU, so that large photos needn't be made small.
    """
    sides = [side for path in paths[::-(-len(paths) // 100)] if (side := short_side(path))]
    middle = sorted(sides)[len(sides) // 2] if sides else 0
    wanted = next((size for size in (224, 128) if middle >= size), SMALLEST_AUTO)
    chosen = wanted if fast else SMALLEST_AUTO
    note = f"image size: {chosen} (half of the images have a short side of {middle} pixels or more)"
    if chosen < wanted:
        note += f"; {wanted} shows more of them and takes {(wanted / chosen) ** 2:.0f} times as long"
    return chosen, note
