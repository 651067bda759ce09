"""The public loaders, named by a config's `data_loader.type`: each defines where its images are and their defaults."""
from __future__ import annotations

import sys as _sys
from typing import Any as _Any

from data_loader import datasets as _datasets
from data_loader import files as _files
from data_loader import folders as _folders
from data_loader import sharded as _sharded
from data_loader.detection.loaders import CocoDataLoader, DigitScenesDataLoader  # noqa: F401  names for configs
from data_loader.image_loader import ImageDataLoader as _ImageDataLoader
from data_loader.imbalance import img_num_per_cls as _img_num_per_cls
from utils.config.build import build as _build

CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


class DigitsLTDataLoader(_ImageDataLoader):
    """scikit-learn's handwritten digits, 32 x 32: 120 training images of 0 down to 2 of 9, and 50 test images of each.

    The images come with scikit-learn, so there is no data_dir. `split_seed` selects the images. No flips by default, as
    mirrored digits aren't digits. Arguments: see `ImageDataLoader`.
    """

    statistics = ((0.31, 0.31, 0.31), (0.35, 0.35, 0.35))
    default_size = 32
    flips = False
    holdout_cap = 30
    holdout_fewest = 10
    draws_tests = True

    def __init__(self, data_dir: str | None = None, *more: _Any, imb_factor: float | None = 0.02, **args: _Any):
        super().__init__(data_dir, *more, imb_factor=imb_factor, **args)

    def read(self, training: bool) -> _datasets.Splits:
        counts = _img_num_per_cls(120, 10, None if self.imb_factor is None else self.imb_type,
                                  1 if self.imb_factor is None else self.imb_factor)
        return _datasets.read_digits(self.split_seed, counts, size=self.image_size)

    def _imbalanced(self, splits: _datasets.Splits) -> tuple:
        return splits.train, splits.spare  # read_digits has already applied the counts


class _CifarDataLoader(_ImageDataLoader):
    kind: _datasets.CifarKind
    statistics = CIFAR10_STATISTICS
    default_size = 32
    may_download = True

    @property
    def holdout_cap(self) -> int:
        return 5000 // self.kind.classes  # a tenth of each class's images in the full data set

    def read(self, training: bool) -> _datasets.Splits:
        return _datasets.read_cifar(self.data_dir, self.kind, self.download)


class CIFAR100DataLoader(_CifarDataLoader):
    """CIFAR-100, all 500 images of each class (unless `imb_factor` is given)."""

    kind = _datasets.CIFAR100
    statistics = ((0.50707, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615))


class ImbalanceCIFAR100DataLoader(_CifarDataLoader):
    """CIFAR-100-LT (Cao et al., NeurIPS 2019): from 500 down to 5 images per class with the default factor 0.01."""

    kind = _datasets.CIFAR100

    def __init__(self, data_dir: str, *more: _Any, imb_factor: float | None = 0.01, **args: _Any):
        super().__init__(data_dir, *more, imb_factor=imb_factor, **args)


class ImbalanceCIFAR10DataLoader(ImbalanceCIFAR100DataLoader):
    """CIFAR-10-LT: from 5,000 down to 50 images per class with the default factor 0.01."""

    kind = _datasets.CIFAR10


class _ListDataLoader(_ImageDataLoader):
    """Images listed in text files, with one `path label` per line."""

    lists: tuple[str, str | None, str | None]   # file names of the train, val and test lists
    folder = ""                                 # subfolder of data_dir that may also hold the lists

    takes_shards = True

    def read(self, training: bool) -> _datasets.Splits:
        if self.shards is None:
            return _files.read_lists(self.data_dir, self.lists, self.folder, training, self.allow_outside,
                                     known=self.known_classes)
        found = _sharded.open_shards(self.shards, self.data_dir)
        root = _files.list_folder(self.data_dir, self.lists, self.folder)
        if not any((root / name).exists() for name in self.lists if name):
            return _sharded.read_shards(self.data_dir, found, self.division, self.whole, self.known_classes)
        return _files.read_lists(self.data_dir, self.lists, self.folder, training, self.allow_outside,
                                 _sharded.finder(found), self.known_classes)


class ImageNetLTDataLoader(_ListDataLoader):
    """ImageNet-LT (Liu et al., CVPR 2019): ImageNet_LT_train.txt, _val.txt and _test.txt in data_dir."""

    lists = ("ImageNet_LT_train.txt", "ImageNet_LT_val.txt", "ImageNet_LT_test.txt")
    folder = "ImageNet_LT"
    jitter = 0.4


class PlacesLTDataLoader(_ListDataLoader):
    """Places-LT (Liu et al., CVPR 2019): Places_LT_train.txt, _val.txt and _test.txt in data_dir."""

    lists = ("Places_LT_train.txt", "Places_LT_val.txt", "Places_LT_test.txt")
    folder = "Places_LT"
    jitter = 0.4


class iNaturalistDataLoader(_ListDataLoader):  # the name that configs use
    """iNaturalist 2018: iNaturalist18_train.txt and _val.txt in data_dir; val is the test split."""

    lists = ("iNaturalist18_train.txt", None, "iNaturalist18_val.txt")
    folder = "iNaturalist18"
    statistics = ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))


class ListFileDataLoader(_ListDataLoader):
    """Custom images in list files: train.txt, val.txt and test.txt in data_dir (without test.txt, val is the test
    split)."""

    lists = ("train.txt", "val.txt", "test.txt")
    jitter = 0.4
    holdout_fewest = 10
    own_images = True


class ImageFolderLTDataLoader(_ImageDataLoader):
    """Custom images with one folder per class: data_dir/train/CLASS/*, and likewise val and test if they exist; or
    data_dir/CLASS/*, of which `test_share` is set aside for testing.
    """

    jitter = 0.4
    holdout_fewest = 10
    own_images = True
    takes_shards = True

    def read(self, training: bool) -> _datasets.Splits:
        if self.shards is not None:
            found = _sharded.open_shards(self.shards, self.data_dir)
            return _sharded.read_shards(self.data_dir, found, self.division, self.whole, self.known_classes)
        return _folders.read_folders(self.data_dir, self.division, self.allow_outside, self.whole)


def build_loader(spec: dict, *, path: str = "data_loader", **more: _Any) -> _ImageDataLoader:
    """Build the loader given by a config's `{"type": ..., "args": {...}}`.

    more: seed, device, rank, world_size, epochs, training and so on; they override the config's.
    Raises ConfigError, naming the key under `path`.
    """
    return _build(_sys.modules[__name__], spec, path, **more)
