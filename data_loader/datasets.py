"""The images and labels of a data set's splits, and reading data sets that come as arrays (digits, CIFAR)."""
from __future__ import annotations

import importlib.util
import os
import shutil
import tarfile
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from utils.checkpoint.plain_pickle import read_arrays
from utils.dist import local_rank
from utils.errors import ConfigError


@dataclass
class ImageSet:
    """The images of one split: labels, and either pixels or file paths.

    targets: np.int64 [N]. pixels: uint8 [N, S, S, 3], or None for files. paths: N file paths (also of images in shards,
    see `data_loader.places`), or None for pixels. where: (name of the list file, line number of each image), or None.
    """

    targets: np.ndarray
    pixels: np.ndarray | None = None
    paths: list[str] | None = None
    where: tuple[str, list[int]] | None = None

    def __post_init__(self) -> None:
        self.targets = np.asarray(self.targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: np.ndarray) -> ImageSet:
        """The images at `indices`, in that order."""
        return ImageSet(self.targets[indices], None if self.pixels is None else self.pixels[indices],
                        None if self.paths is None else [self.paths[i] for i in indices],
                        None if self.where is None else (self.where[0], [self.where[1][i] for i in indices]))


@dataclass
class Splits:
    """A data set as read: `train` (None if only the test split was requested and there is no training split), `test`,
    `val` if the data set has its own validation images, `spare` images that no split uses, the names and number of
    classes, `notes`, lines for the log, and `named`, the {label: name} of lists, even if not all classes are named."""

    train: ImageSet | None
    test: ImageSet | None
    val: ImageSet | None = None
    spare: ImageSet | None = None
    class_names: list[str] | None = None
    num_classes: int | None = None
    notes: list[str] = field(default_factory=list)
    named: dict[int, str] = field(default_factory=dict)

    def parts(self) -> list[ImageSet]:
        """The splits that there are."""
        return [part for part in (self.train, self.val, self.test, self.spare) if part is not None]


def read_digits(split_seed: int, img_num: list[int], test_per_class: int = 50, size: int = 32) -> Splits:
    """scikit-learn's handwritten digits (1,797 scans of 8 x 8 pixels), enlarged to `size` pixels.

    Each class is shuffled by `split_seed`; the first `test_per_class` images are for testing, the next `img_num[class]`
    for training, and the rest is spare. Raises ConfigError if a class has too few images.
    """
    every = _digits(size)
    shuffle = np.random.RandomState(split_seed)
    test, train, spare = [], [], []
    for label, count in enumerate(img_num):
        own = shuffle.permutation(np.flatnonzero(every.targets == label))
        if len(own) < test_per_class + count:
            raise ConfigError(f"data_loader.args: class {label} of the digits has {len(own)} images, "
                              f"{test_per_class} to test and {count} to train are too many")
        test.append(own[:test_per_class])
        train.append(own[test_per_class:test_per_class + count])
        spare.append(own[test_per_class + count:])
    parts = [every.subset(np.concatenate(part)) for part in (train, test, spare)]
    return Splits(*parts[:2], spare=parts[2], class_names=[str(digit) for digit in range(10)], num_classes=10)


@cache
def _digits(size: int) -> ImageSet:
    from PIL import Image

    scans, labels = digit_scans()
    small = np.rint(scans * (255 / 16)).astype(np.uint8)  # ink is 0 to 16
    grey = np.stack([np.asarray(Image.fromarray(scan).resize((size, size), Image.Resampling.BILINEAR))
                     for scan in small])
    return ImageSet(labels, np.repeat(grey[..., None], 3, axis=3))


def digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: (ink float64 [1797, 8, 8], 0 to 16; labels int64 [1797]).

    The same as `sklearn.datasets.load_digits`, but read directly from its file: importing that module pulls in scipy
    and pandas, and takes half as long as importing torch, at each start.
    """
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.exists():
            rows = np.loadtxt(path, delimiter=",", ndmin=2)
            return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits  # another version may keep it elsewhere
    digits = load_digits()
    return digits.images, digits.target


@dataclass(frozen=True)
class CifarKind:
    """The layout on disk of one of the two CIFAR data sets (the official Python version)."""

    folder: str
    url: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    label_key: str
    names_key: str
    classes: int


CIFAR10 = CifarKind("cifar-10-batches-py", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                    tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), "batches.meta",
                    "labels", "label_names", 10)
CIFAR100 = CifarKind("cifar-100-python", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                     ("train",), ("test",), "meta", "fine_labels", "fine_label_names", 100)


def read_cifar(data_dir: str, kind: CifarKind, download: bool = True) -> Splits:
    """Read CIFAR in its official Python layout, from `data_dir/<folder>` or `data_dir` itself. If it is in neither and
    `download` is true, it is downloaded.

    Contents are checked (shapes, dtypes, label range), not checksums. Raises ConfigError, naming the file, if something
    is wrong or missing.
    """
    folder = _find_cifar(Path(data_dir), kind, download)
    train = _read_cifar_files([folder / name for name in kind.train], kind)
    test = _read_cifar_files([folder / name for name in kind.test], kind)
    names = None
    if (folder / kind.meta).exists():
        meta = read_arrays(folder / kind.meta)
        names = meta.get(kind.names_key) if isinstance(meta, dict) else None
        if not isinstance(names, list) or len(names) != kind.classes or not all(isinstance(n, str) for n in names):
            raise ConfigError(f"{folder / kind.meta}: holds no list {kind.names_key} of {kind.classes} names")
    for split, path in ((train, kind.train[0]), (test, kind.test[0])):
        missing = np.setdiff1d(np.arange(kind.classes), split.targets)
        if len(missing):
            raise ConfigError(f"{folder / path}: no image of class {missing[0]} ({len(missing)} classes are missing)")
    return Splits(train, test, class_names=names, num_classes=kind.classes)


def _find_cifar(data_dir: Path, kind: CifarKind, download: bool) -> Path:
    needed = (*kind.train, *kind.test)
    candidates = (data_dir / kind.folder, data_dir)
    for folder in candidates:
        if all((folder / name).is_file() for name in needed):
            return folder
    partial = [folder / name for folder in candidates[:1] if folder.is_dir()
               for name in needed if not (folder / name).is_file()]
    if partial:
        raise ConfigError(f"{partial[0]}: no such file; the folder of the official python version is incomplete, "
                          "remove it and fetch it again")
    advice = f"unpack the official python version ({kind.url}) there, as {kind.folder}/"
    if not download:
        raise ConfigError(f"data_loader.args.data_dir: {data_dir} holds no {kind.folder}; {advice}")
    if local_rank() > 0:  # one process a machine fetches for all on it; should it fail, it ends the job
        return _wait_for(data_dir / kind.folder)
    try:
        _download(kind, data_dir)
    except Exception as error:
        raise ConfigError(f"data_loader.args.data_dir: {data_dir} holds no {kind.folder}, and the download failed "
                          f"({type(error).__name__}: {error}); {advice}") from None
    return _find_cifar(data_dir, kind, download=False)


def _wait_for(folder: Path, seconds: float = 3600) -> Path:
    until = time.monotonic() + seconds
    while not folder.is_dir():
        if time.monotonic() > until:
            raise ConfigError(f"{folder}: this machine's first process hasn't brought it here in {seconds:.0f} "
                              "seconds; fetch it beforehand")
        time.sleep(1)
    return folder


def _download(kind: CifarKind, data_dir: Path) -> None:
    """Download and unpack an archive; the folder appears complete or not at all."""
    made = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".fetching-") as place:
            archive = Path(place) / "archive.tar.gz"
            with urllib.request.urlopen(kind.url, timeout=30) as source, open(archive, "wb") as target:
                shutil.copyfileobj(source, target)
            with tarfile.open(archive) as packed:
                packed.extractall(place, filter="data")
            try:
                os.replace(Path(place) / kind.folder, data_dir / kind.folder)
            except OSError:  # another machine was faster, on a shared disk
                if not (data_dir / kind.folder).is_dir():
                    raise
    except BaseException:
        for folder in made:  # leave no empty folders behind if the download failed
            folder.rmdir()
        raise


def _read_cifar_files(paths: list[Path], kind: CifarKind) -> ImageSet:
    images, labels = [], []
    for path in paths:
        batch = read_arrays(path)
        if not isinstance(batch, dict) or "data" not in batch or kind.label_key not in batch:
            raise ConfigError(f"{path}: not {kind.folder}'s layout (a dict with data and {kind.label_key})")
        pixels, own = batch["data"], batch[kind.label_key]
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (len(pixels), 3072):
            raise ConfigError(f"{path}: data must be a uint8 array of N rows of 3,072 bytes")
        try:
            own = np.asarray(own)
        except (ValueError, TypeError):
            own = np.empty(0)
        if own.shape != (len(pixels),) or own.dtype.kind not in "iu":
            raise ConfigError(f"{path}: {kind.label_key} must be {len(pixels)} whole numbers, one an image")
        if len(own) and not (own.min() >= 0 and own.max() < kind.classes):
            raise ConfigError(f"{path}: {kind.label_key} must lie in 0 to {kind.classes - 1}, "
                              f"found {own.min()} to {own.max()}")
        images.append(pixels)
        labels.append(own)
    pixels = np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ImageSet(np.concatenate(labels), np.ascontiguousarray(pixels))
