"""The loader behind every classification data set: splits, imbalance, validation, samplers, and how images are kept.

A data set is a subclass that defines how its splits are read (`read`) and the statistics for normalising.
"""
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from base.base_data_loader import BaseDataLoader
from data_loader.augmentation import Augmentation
from data_loader.class_names import follow_classes
from data_loader.crops import with_crops
from data_loader.datasets import ImageSet, Splits
from data_loader.files import check_data_dir
from data_loader.held_out import seen_in
from data_loader.imbalance import img_num_per_cls, long_tail_indices
from data_loader.memory import MemoryImages
from data_loader.mixing import Mixing
from data_loader.pixels import LARGEST_SMALL, PixelLoader, suited_size
from data_loader.samplers import sampler_of
from data_loader.splitting import (
    Division,
    holdout_of_spare,
    is_same_place,
    summary,
)
from data_loader.transforms import (
    IMAGENET_STATISTICS,
    as_recorded,
    test_preprocess,
)
from logger.text import count_of
from utils.errors import ConfigError


class ImageDataLoader(PixelLoader):
    """Batches of (images [n, 3, S, S] float, labels [n] long) of a data set's training or test split.

    data_dir: the data set's folder. batch_size: over all ranks together. seed: for order and augmentation.
    num_workers: processes that decode files (None: up to 8, by available cores; images in memory need none), for each
        training process; where several share a machine, at most their share of its cores.
    training: the training split, augmented; false: the test split. shuffle: the training split only.
    balanced: class-balanced sampling. retain_epoch_size: if false, a class-balanced epoch (also by `sampler`) has
        (number of classes) x (size of the largest class) images.
    sampler: {"type": "ClassAware", "args": {...}}, see `data_loader.samplers`.
    validation: `test`: the published convention (the data set's validation images if it has some, else its test
        images); `holdout`: never the test images, but the validation images, or images that no split uses, or a share
        `val_share` (0 to 1, exclusive) of each class's training images; `none`.
    imb_type, imb_factor: make the training split long-tailed; with imb_factor null it stays as it is.
    image_size: side S in pixels, 1 to 4096; "auto" (for custom images): 224 or 128 on a GPU if the photos are that
        large, else 64. split_seed: which images are taken for splits made here, independently of `seed`.
    test_share: share of each class set aside for testing if there is no test split. flip: false for images that
        mustn't be mirrored; "alternate": half of the images in odd epochs, the others in even ones.
    allow_outside: images may lie outside data_dir. download: download missing data, if possible.
    cache: keep decoded small images in memory: true, false, or "auto" (up to 1 GiB).
    pin_memory: null: yes if the device is a GPU. prefetch: batches that each worker prepares ahead.
    augment: `basic`: crop, flip and, for small images, rotation; `autoaugment`, `randaugment`, `trivialaugment`: crop,
        flip and that policy (AutoAugment: CIFAR-10's up to 64 pixels, else ImageNet's). rotation: maximum degrees
        either way (null: 15 with `basic` up to 64 pixels, else 0). cutout: side in pixels of a square that is set to 0,
        centred anywhere. random_erasing: share of images in which a rectangle is set to 0.
    jitter: strength of brightness, contrast and saturation jitter, for images over 64 pixels with `basic` (null: the
        data set's default).
    mix: {"type": "mixup" | "cutmix" | "either", "alpha": 0.4, "prob": 1.0, "off_epochs": 0}: labels are then
        `MixedLabels`, see `data_loader.mixing`.
    crops: K crops of each image that isn't augmented, [n, K, 3, S, S]: 1 (without the dimension K), 5 (corners and
        centre) or 10 (these and mirrored). expand: the short side is then S + expand pixels (null: 3/28 of S).
    shards: "train-{000..999}.tar", or {"train": ..., "val": ..., "test": ...}: images are in tar files (in data_dir, or
        at URLs such as s3://), see `data_loader.shards`; only for loaders of lists or folders.
    facts: what a checkpoint records about its data (`data_facts`): classes are then in its order, by name, groups
        follow its training counts, training images stay in training, and images are prepared as they were.
    preprocess: the preprocessing that pretrained weights need (`TimmModel.preprocess`): `image_size`, if the config has
        none, crop, interpolation and statistics; optionally `takes`, a function that tells if a size can be used.
    transform: function of a PIL image, replaces the loader's own augmentation of training images (Python only).
    distributed: accepted for old configs and ignored; `torchrun` decides.
    epochs: of the training; needed for `mix.off_epochs` and the ProgressivelyBalanced sampler.

    Raises ConfigError, naming the argument or file, for anything wrong with them.
    """

    statistics: tuple[tuple, tuple] = IMAGENET_STATISTICS
    default_size = 224
    flips = True
    jitter = 0.0                 # default strength for large training images
    holdout_cap = 50             # most validation images per class, if taken from unused images
    holdout_fewest = 1           # with fewer per class, unused images aren't balanced (see `holdout_of_spare`)
    degrees = 15.0               # default maximum rotation of small images
    takes_shards = False
    draws_tests = False          # for images in memory: whether split_seed decides which are test images
    may_download = False         # whether `data_dir` may be missing because the data set can be downloaded
    own_images = False           # custom photos rather than a benchmark: figures are also explained in words

    def __init__(self, data_dir: str, batch_size: int = 128, shuffle: bool = True, num_workers: int | None = None,
                 training: bool = True, balanced: bool = False, retain_epoch_size: bool = True, *,
                 sampler: dict | None = None, validation: Literal["test", "holdout", "none"] | None = "test",
                 val_share: float = 0.1, imb_type: str | None = "exp", imb_factor: float | None = None,
                 image_size: int | Literal["auto"] | None = None, split_seed: int = 0, test_share: float = 0.2,
                 flip: bool | Literal["alternate"] | None = None, allow_outside: bool = False, download: bool = True,
                 cache: bool | str = "auto", pin_memory: bool | None = None, prefetch: int = 4,
                 distributed: bool | None = None, seed: int = 0, device: str | torch.device = "cpu", rank: int = 0,
                 world_size: int = 1, epochs: int | None = None, transform: Callable | None = None,
                 augment: str = "basic",
                 rotation: float | None = None, cutout: int = 0, random_erasing: float = 0.0, mix: dict | None = None,
                 jitter: float | None = None, crops: int = 1, expand: int | None = None,
                 shards: str | dict | None = None, facts: Any = None, preprocess: Any = None):
        self.data_dir = data_dir
        self.num_workers, self.pin_memory, self.prefetch = num_workers, pin_memory, prefetch
        self.val_share, self.test_share, self.split_seed = val_share, test_share, split_seed
        self.allow_outside, self.download, self.cache, self.transform = allow_outside, download, cache, transform
        facts = facts or {}
        known = facts.get("preprocess") or {}
        # The network, or the part of it that stays frozen, has been trained on images prepared as `known` says.
        own = bool(facts.get("frozen")) or not (facts.get("optional") or facts.get("teacher"))
        follows = own or (image_size == "auto" and not facts.get("optional"))
        own_size = preprocess["image_size"] if preprocess and image_size is None else self.default_size
        trained_at = known.get("image_size") if follows else None
        self.image_size = (trained_at or own_size) if image_size in (None, "auto") else image_size
        self.augmentation = Augmentation.of(jitter, flip, self.jitter, self.flips, augment=augment, rotation=rotation,
                                            cutout=cutout, random_erasing=random_erasing)
        self.mixing, self.epochs = Mixing.of(mix), epochs
        self.imb_type, self.imb_factor = imb_type, imb_factor
        self.validation = validation or "none"
        self.shards = shards
        self._check()
        if data_dir is not None:
            check_data_dir(data_dir, may_be_made=self.may_download and download)
        #: All images of another folder than the training images' are for testing.
        elsewhere = bool(facts) and not is_same_place(str(data_dir), facts.get("split"))
        self.division = Division.following({} if elsewhere and facts.get("optional") else facts, root=str(data_dir),
                                           seed=split_seed, test_share=test_share, val_share=val_share)
        self.whole, self.known_classes = elsewhere and not training, facts.get("num_classes")
        splits = self.read(training)
        if facts and not elsewhere:
            self.division.agree(facts, splits.class_names)
        self.whole = self.whole and splits.train is None  # only if there was no training folder
        if facts:
            follow_classes(splits, facts, str(data_dir), some=not training, elsewhere=elsewhere)
        if splits.train is None and splits.class_names is None:     # a test list may lack the last classes
            splits.num_classes = max(splits.num_classes, self.known_classes or 0)
        self.notes = list(splits.notes)
        if self.mixing is not None and training:
            self.notes.append(self.mixing.note(self.epochs))
        if image_size == "auto" and not trained_at and splits.test.paths is not None:
            self.image_size, note = suited_size((splits.train or splits.test).paths, torch.device(device).type != "cpu",
                                                preprocess and preprocess["image_size"],
                                                preprocess and preprocess.get("takes"))
            self.notes.append(note)
        if training and facts.get("frozen") and self.image_size != known.get("image_size", self.image_size):
            self.notes.append(f"warning: data_loader.args.image_size: {self.image_size}, but what stays frozen was "
                              f"trained on images of {trained_at} pixels; leave it out to keep that size")
        pixels = splits.test.pixels
        whole = {"crop_share": None} if pixels is not None and pixels.shape[1] >= self.image_size else {}
        self.preprocess, usual = (test_preprocess(self.image_size, *self.statistics, wanted and {**wanted, **whole}) for
                                  wanted in (as_recorded(preprocess, known) if own else preprocess, preprocess))
        if self.preprocess != usual:
            changed = ", ".join(f"{key} {value}" for key, value in self.preprocess.items() if value != usual[key])
            self.notes.append(f"images are prepared as in the checkpoint, not by its network's defaults: {changed}")
        if preprocess is None and (own or not facts.get("optional")) and {"mean", "std"} <= known.keys():
            # The model was trained with these; another loader (CIFAR-100 instead of CIFAR-100-LT) may have others.
            if any(self.preprocess[key] != list(known[key]) for key in ("mean", "std")):
                self.notes.append("images are normalised as in the checkpoint: mean {mean}, std {std}".format(**known))
            self.preprocess |= {key: list(known[key]) for key in ("mean", "std")}
        self.mean, self.std = tuple(self.preprocess["mean"]), tuple(self.preprocess["std"])
        self.views = with_crops(self.preprocess, crops, expand)
        if training:
            self.notes += self.augmentation.notes(self.image_size <= LARGEST_SMALL)
        self.class_names, self.num_classes = splits.class_names, int(splits.num_classes)
        train, self._val, self.validation_note = self._divide(splits)
        #: {"test" or "val": in words, that the model of `facts` was trained on images of it}, if any are known.
        self.seen = seen_in({"test": splits.test, "val": self._val if training and self._val is not splits.test else
                             None}, str(data_dir), facts, elsewhere)
        if training and "test" in self.seen:
            self.notes.append(f"warning: figures will be too good: {self.seen['test']}")
        self.cls_num_list = [0] * self.num_classes if train is None else \
            np.bincount(train.targets, minlength=self.num_classes).tolist()
        if facts.get("cls_num_list") and not training and len(facts["cls_num_list"]) == self.num_classes:
            self.cls_num_list = list(facts["cls_num_list"])
        self.split_memory = None if train is None or (train.paths is None and not self.draws_tests) \
            else self.division.memory(train, self._drawn_from if training else None)
        self._test_counts = np.bincount(splits.test.targets[splits.test.targets >= 0], minlength=self.num_classes)
        images = train if training else splits.test
        order = sampler_of(sampler, balanced, retain_epoch_size, images.targets, seed, epochs) if training else None
        super().__init__(images.targets, batch_size, shuffle=shuffle, training=training, seed=seed, device=device,
                         rank=rank, world_size=world_size, sampler=order)
        self._attach(images, augment=training)

    def read(self, training: bool) -> Splits:
        """Read the data set's splits; `train` may be None if `training` is false. Raises ConfigError."""
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
        if self.mixing is not None and self.mixing.off_epochs and self.epochs is None:
            raise ConfigError("data_loader.args.epochs: missing; mix.off_epochs counts from the last epoch")
        if self.shards is not None and not self.takes_shards:
            raise ConfigError(f"data_loader.args.shards: {type(self).__name__} reads none; use a loader of lists or of "
                              "folders")
        if self.split_seed not in range(2**32):
            raise refuse("split_seed", "0 to 4294967295")

    # -- splits ------------------------------------------------------------------------------------------------------
    def _divide(self, splits: Splits) -> tuple[ImageSet | None, ImageSet | None, str | None]:
        """(training images, validation images, a line for the log), each may be None."""
        #: Whether validation images are selected here; whether they are taken from the training images.
        self.draws_validation = self.holds_out = False
        #: Whether the validation images are the test images; whether there are images that no split uses.
        self.validates_on_test = self.has_spare = False
        #: The paths of the images that the training images were drawn from by their positions, or None.
        self._drawn_from: list[str] | None = None
        if splits.train is None:
            return None, None, None
        train, spare = self._imbalanced(splits)
        self.has_spare = spare is not None and len(spare) > 0
        if self.validation == "none":
            return train, None, None
        if splits.val is not None and len(splits.val):
            return train, splits.val, None
        if self.validation == "test":
            self.validates_on_test = True
            return train, splits.test, ("validation: \"test\": the best epoch is picked on the test images, as the "
                                        "published code does; the last epoch's figures are the honest ones")
        self.draws_validation = True
        if self.has_spare:
            chosen, missing = holdout_of_spare(spare.targets, self.num_classes, self.holdout_cap, self.split_seed,
                                               self.holdout_fewest)
            note = f"validation: \"holdout\": {len(chosen)} images that neither training nor test uses"
            if missing:
                note += f"; {missing} of {self.num_classes} classes have none left over"
            return train, spare.subset(chosen), note
        self.holds_out = True
        kept, held = self.division.divide(train, "val")
        if not len(held):
            return train, None, "validation: \"holdout\": no class has enough images to spare one; there is none"
        return train.subset(kept), train.subset(held), (
            f"validation: \"holdout\": {count_of(len(held), 'further image', 'further images')}, held out of training")

    def _imbalanced(self, splits: Splits) -> tuple[ImageSet, ImageSet | None]:
        """(the long-tailed training subset, the unused images or None)."""
        train = splits.train
        if self.imb_factor is None or self.imb_type in (None, "none"):
            return train, splits.spare
        present = np.bincount(train.targets, minlength=self.num_classes)
        wanted = img_num_per_cls(int(present.max()), self.num_classes, self.imb_type, self.imb_factor)
        wanted = np.maximum(np.minimum(wanted, present), np.minimum(present, 1))
        chosen = long_tail_indices(train.targets, wanted[present > 0].tolist(), seed=self.split_seed)
        rest = np.setdiff1d(np.arange(len(train)), chosen)
        self._drawn_from = train.paths if len(rest) else None
        return train.subset(chosen), train.subset(rest)

    # -- other splits of the same data -------------------------------------------------------------------------------
    def split_validation(self) -> ImageDataLoader | None:
        """A loader of the validation split, in order and not augmented; None if there is none."""
        return None if self._val is None or not self.training else self._sibling(self._val)

    def train_eval_loader(self) -> ImageDataLoader:
        """A loader of the same images in order and not augmented, such as the training images for class means."""
        return self._sibling(self.images, self.store)

    def feature_loader(self, augment: bool = False) -> ImageDataLoader:
        """A loader of the same images, each once and in order, never mixed and with one crop each. augment: augmented
        as in the epoch that is set."""
        other = copy.copy(self)
        other.mixing, other.views = None, self.preprocess
        return other._sibling(self.images, self.store, augment)

    def _sibling(self, images: ImageSet, store: MemoryImages | None = None, augment: bool = False) -> ImageDataLoader:
        other = copy.copy(self)
        BaseDataLoader.__init__(other, images.targets, self.batch_size, shuffle=False, training=False, seed=self.seed,
                                device=self.device, rank=self.rank, world_size=self.world_size)
        other._attach(images, augment=augment, store=store)
        return other

    def summary(self, groups: dict[str, float] | None = None) -> list[str]:
        """Log lines about the data: classes, counts, imbalance, few-shot classes, and warnings.

        groups: the config's limits of the groups, such as {"many": 100, "few": 20}.
        """
        notes = self.notes + self.worker_notes
        return summary(self.cls_num_list, self._test_counts, self.class_names, notes, **(groups or {}))
