"""Loaders of pictures with boxes and masks: COCO's layout, and scenes of digits that are made on the spot.

A batch is (list of images, list of targets). An image is float [3, H, W] from 0 to 1 (the model normalises); a target
is a dict of `boxes` float [n, 4] (corners x0, y0, x1, y1 in pixels of that image), `labels` long [n] (1 to C; 0 is the
background), `masks` uint8 [n, H, W] (training only) and `image_id` (int).
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from base.base_data_loader import AUGMENT, ORDER, BaseDataLoader
from data_loader.coco import CocoSplit, box_corners, read_coco
from data_loader.digit_scenes import make_scenes
from utils.class_counts import FEW
from utils.errors import ConfigError, unknown
from utils.rle import to_mask
from utils.seed import generator, numpy_rng

HOLDOUT = 3  # the stream of random numbers that picks held-out images


class RepeatFactor:
    """Images of rare classes come more often (Gupta et al. 2019, LVIS, section 4.2), epochs keep their length.

    An image's weight is the largest over its classes of max(1, sqrt(threshold / f)), f being the share of images that
    have the class; each epoch draws its images by these weights.
    """

    def __init__(self, split: CocoSplit, threshold: float, seed: int):
        classes = [{a["category_id"] for a in found if not a["iscrowd"]} for found in split.annotations]
        share = {c["id"]: sum(c["id"] in has for has in classes) / len(classes) for c in split.categories}
        self.weights = np.array([max([1.0, *((threshold / share[c]) ** 0.5 for c in has)]) for has in classes])
        self.seed = seed

    def epoch_indices(self, epoch: int) -> np.ndarray:
        """np.int64 [images]: every image's whole number of copies, the rest drawn."""
        rng = numpy_rng(self.seed, epoch, ORDER)
        expected = self.weights * (len(self.weights) / self.weights.sum())
        copies = np.floor(expected).astype(np.int64)
        left = len(expected) - int(copies.sum())
        if left:
            rest = expected - copies
            drawn = rng.choice(len(rest), size=left, replace=True, p=rest / rest.sum())
            np.add.at(copies, drawn, 1)
        return rng.permutation(np.repeat(np.arange(len(copies)), copies))


class DetectionDataset(Dataset):
    """Reads, resizes and flips; a key is (epoch, position in the epoch, image).

    Errors are returned, not raised: a worker process would bury them in a traceback.
    """

    def __init__(self, split: CocoSplit, training: bool, min_size: list[int], max_size: int, flip: float, seed: int):
        self.split, self.training, self.seed = split, training, seed
        self.min_size, self.max_size, self.flip = min_size, max_size, flip

    def __len__(self) -> int:
        return len(self.split.images)

    def path(self, index: int) -> Path:
        return self.split.folder / self.split.images[index]["file_name"]

    def picture(self, index: int) -> Image.Image:
        """The picture in RGB, of the size its annotations are for. Raises ConfigError."""
        path, entry = self.path(index), self.split.images[index]
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ConfigError(f"{path}: not a readable image ({str(error)[:100]})") from None
        if image.size != (entry["width"], entry["height"]):
            raise ConfigError(f"{path}: {image.width}x{image.height} pixels, but {self.split.file} says "
                              f"{entry['width']}x{entry['height']}")
        return image

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[torch.Tensor, dict[str, Any]] | ConfigError:
        try:
            return self.sample(*key)
        except ConfigError as error:
            return error

    def sample(self, epoch: int, position: int, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """One image and its target; in training resized to a random scale and perhaps mirrored."""
        image, entry = self.picture(index), self.split.images[index]
        instances = [a for a in self.split.annotations[index] if not a["iscrowd"]]
        labels = self.split.labels
        target: dict[str, Any] = {"image_id": entry["id"], "boxes": torch.from_numpy(box_corners(instances)),
                                  "labels": torch.tensor([labels[a["category_id"]] for a in instances],
                                                         dtype=torch.long)}
        if not self.training:
            return to_tensor(image), target
        rng = numpy_rng(self.seed, epoch, AUGMENT, position)
        width, height = resized(image.width, image.height, int(rng.choice(self.min_size)), self.max_size)
        target["boxes"] *= torch.tensor([width / image.width, height / image.height] * 2)
        masks = np.zeros((len(instances), height, width), dtype=np.uint8)
        for mask, instance in zip(masks, instances):
            mask[:] = to_mask(instance["segmentation"], image.height, image.width, (height, width))
        tensor = to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
        target["masks"] = torch.from_numpy(masks)
        if rng.random() < self.flip:
            tensor, target["masks"] = tensor.flip(-1), target["masks"].flip(-1)
            target["boxes"][:, [0, 2]] = width - target["boxes"][:, [2, 0]]
        return tensor, target


def resized(width: int, height: int, min_size: int, max_size: int) -> tuple[int, int]:
    """(width, height) with the shorter side `min_size`, or less where the longer one would pass `max_size`."""
    scale = min(min_size / min(width, height), max_size / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A picture as float [3, H, W], 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


class CocoDataLoader(BaseDataLoader):
    """Pictures with COCO annotations. `data_dir` holds the annotation files and the image folders.

    Args:
        min_size: training images' shorter side, one of these at random (multi-scale), unless `max_size` is reached.
            Evaluation gives pictures as they are; the model resizes those.
        flip: the probability of mirroring a training image.
        group_by_aspect: batches of wide or of high pictures only, so that less is padded.
        keep_empty: train on pictures without instances too (they are background); by default they are left out.
        skip_degenerate: leave boxes without width or height out instead of refusing the file (COCO 2017 has two).
        train_annotations, train_images, val_annotations, val_images: paths under `data_dir`.
        balanced: images of classes that fewer than `repeat_threshold` of the images have come more often.
        sampler: only {"type": "InstanceBalanced"} means something for pictures with many objects.
        retain_epoch_size: taken for the other loaders' sake; epochs always keep their length here.
        validation: `test` (the val split), `holdout` (`holdout_fraction` of the training images) or `none`.
    """

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    batch_limit: int | None = None

    def __init__(self, data_dir: str, batch_size: int = 16, shuffle: bool = True, num_workers: int = 0,
                 training: bool = True, balanced: bool = False, retain_epoch_size: bool = True,
                 sampler: str | dict | None = None, repeat_threshold: float = 0.001,
                 min_size: int | list[int] = 800, max_size: int = 1333, flip: float = 0.5,
                 group_by_aspect: bool = True, keep_empty: bool = False,
                 skip_degenerate: bool = False, train_annotations: str = "annotations/instances_train2017.json",
                 train_images: str = "train2017", val_annotations: str = "annotations/instances_val2017.json",
                 val_images: str = "val2017", validation: str = "test", holdout_fraction: float = 0.1,
                 seed: int = 0, device: str | torch.device = "cpu", rank: int = 0, world_size: int = 1):
        self.options = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self.min_size = [min_size] if isinstance(min_size, int) else list(min_size)
        _check(self.options, self.min_size)
        self.root = Path(data_dir)
        if not self.root.is_dir():
            raise ConfigError(f"data_loader.args.data_dir: no folder {self.root}")
        self._train: CocoSplit | None = None
        self._train_read = False
        split = self._training_split() if training else self._validation_split()
        if training and validation == "holdout":
            split = split.subset(self._held_out(split)[1])
        self._use(split, training)

    def _use(self, split: CocoSplit, training: bool) -> None:
        """Iterate `split`."""
        options = self.options
        if training and not options["keep_empty"]:
            full = [i for i, found in enumerate(split.annotations) if any(not a["iscrowd"] for a in found)]
            if not full:
                raise ConfigError(f"{split.file}: no image has an instance to train on")
            empty = len(split.images) - len(full)
            if empty:
                split = split.subset(full)
                split.notes = [*split.notes, f"{empty} training images without instances left out"]
        self.split = split
        self.seed = options["seed"]
        super().__init__(np.zeros(len(split.images)), options["batch_size"], shuffle=options["shuffle"],
                         training=training, seed=self.seed, device=options["device"], rank=options["rank"],
                         world_size=options["world_size"], sampler=self._sampler(split) if training else None)
        self.dataset = DetectionDataset(split, training, self.min_size, options["max_size"], options["flip"],
                                        options["seed"])
        self.class_names, self.num_classes = split.class_names, len(split.categories)
        self.paths = [str(self.dataset.path(i)) for i in range(len(split.images))]
        self.preprocess = {"task": "detection"}
        self.notes = split.notes

    # ------------------------------------------------------------------ splits

    def _training_split(self) -> CocoSplit:
        if self._train is None:
            options = self.options
            self._train = read_coco(self.root / options["train_annotations"], self.root / options["train_images"],
                                    skip_degenerate=options["skip_degenerate"])
        return self._train

    def _validation_split(self) -> CocoSplit:
        options = self.options
        # The training file's categories are the classes; without one the val file speaks for itself.
        has_train = (self.root / options["train_annotations"]).is_file()
        categories = self._training_split().categories if has_train else None
        return read_coco(self.root / options["val_annotations"], self.root / options["val_images"],
                         categories=categories, skip_degenerate=options["skip_degenerate"])

    def _held_out(self, split: CocoSplit) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the held-out and of the kept images, each in order."""
        n = len(split.images)
        held = max(1, round(n * self.options["holdout_fraction"]))
        if held >= n:
            raise ConfigError(f"data_loader.args.holdout_fraction: {self.options['holdout_fraction']} of {n} images "
                              "leaves nothing to train on")
        order = numpy_rng(self.options["seed"], HOLDOUT).permutation(n)
        return np.sort(order[:held]), np.sort(order[held:])

    def split_validation(self) -> CocoDataLoader | None:
        """The loader that `validation` asks for."""
        kind = self.options["validation"]
        if kind == "none":
            return None
        other = object.__new__(type(self))
        other.options, other.min_size, other.root = {**self.options, "training": False}, self.min_size, self.root
        other._train = self._train
        if kind == "test":
            other._use(other._validation_split(), training=False)
        else:
            whole = self._training_split()
            other._use(whole.subset(self._held_out(whole)[0]), training=False)
        return other

    @property
    def validation_note(self) -> str | None:
        """What to say once about the validation split."""
        return ("validation uses the val split, which test.py reports on too (COCO's convention)"
                if self.options["validation"] == "test" and self.training else None)

    @property
    def cls_num_list(self) -> list[int] | None:
        """Training instances of each class; None where only the val split is there."""
        if self.training:
            return self.split.counts()
        if not (self.root / self.options["train_annotations"]).is_file():
            return None
        whole = self._training_split()
        if self.options["validation"] == "holdout":
            whole = whole.subset(self._held_out(whole)[1])
        return whole.counts()

    def summary(self) -> list[str]:
        """What there is to learn from, for the log."""
        counts = self.cls_num_list or []
        instances = sum(map(len, self.split.annotations))
        lines = [f"{self.split.file}: {self.num_classes} classes, {self.n_samples:,} images, {instances:,} instances"]
        if any(counts):
            most, least = max(counts), min(n for n in counts if n)
            lines.append(f"training instances a class: {most:,} ({self.class_names[counts.index(most)]}) to {least:,} "
                         f"({self.class_names[counts.index(least)]}), imbalance {most / least:.4g} : 1; few-shot "
                         f"(under {FEW}): {sum(n < FEW for n in counts)} classes")
        untrained = [name for name, n in zip(self.class_names, counts) if not n]
        if untrained:
            lines.append(f"warning: {len(untrained)} classes have no training instance: {', '.join(untrained[:5])}"
                         + (", ..." if len(untrained) > 5 else ""))
        return lines + self.notes

    def ground_truth(self) -> dict[str, Any]:
        """The split's annotations as one COCO dict, crowds included."""
        return self.split.ground_truth()

    def raw_image(self, index: int) -> np.ndarray:
        """Picture `index` as it is on disk: uint8 [H, W, 3]."""
        return np.array(self.dataset.picture(index))

    # ------------------------------------------------------------------ batches

    def __len__(self) -> int:
        """Batches an epoch, or `batch_limit` where the last one ends early (`trainer.iterations`)."""
        return super().__len__() if self.batch_limit is None else min(super().__len__(), self.batch_limit)

    def _sampler(self, split: CocoSplit) -> RepeatFactor | None:
        spec = self.options["sampler"] or "InstanceBalanced"
        kind = spec.get("type") if isinstance(spec, dict) else spec
        if kind != "InstanceBalanced":
            raise ConfigError(f"data_loader.args.sampler.type: {kind!r} draws single labels, which pictures with many "
                              "objects don't have; use \"balanced\": true (repeat factors)")
        return RepeatFactor(split, self.options["repeat_threshold"], self.seed) if self.options["balanced"] else None

    def epoch_order(self, epoch: int) -> np.ndarray:
        """As in the base, then regrouped so that a batch's pictures are all wide or all high (the last few mixed)."""
        order = super().epoch_order(epoch)
        if not (self.training and self.options["group_by_aspect"]):
            return order
        batches: list[list[int]] = []
        waiting: dict[bool, list[int]] = {False: [], True: []}
        for index in order.tolist():
            entry = self.split.images[index]
            group = waiting[entry["width"] >= entry["height"]]
            group.append(index)
            if len(group) == self.batch_size:
                batches.append(group.copy())
                group.clear()
        return np.array([i for batch in (*batches, waiting[False], waiting[True]) for i in batch], dtype=np.int64)

    def _batches(self, epoch: int, batches: range) -> Iterator[tuple[list[torch.Tensor], list[dict[str, Any]]]]:
        order = self.epoch_order(epoch)
        keys = [[(epoch, int(p), int(order[p])) for p in self.positions(batch)] for batch in batches]
        # Its own generator: DataLoader would draw from the global one, which a resumed run has put back already.
        loader = DataLoader(self.dataset, batch_sampler=keys, num_workers=self.options["num_workers"],
                            collate_fn=list, generator=generator(self.seed, epoch))
        for samples in loader:
            for sample in samples:
                if isinstance(sample, ConfigError):
                    raise sample
            yield ([image.to(self.device, non_blocking=True) for image, _ in samples],
                   [{key: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                     for key, value in target.items()} for _, target in samples])


class DigitScenesDataLoader(CocoDataLoader):
    """Real handwritten digits on textured ground, long-tailed, made on the spot under `data_dir` (no download).

    Args:
        image_size, n_max, imb_factor, n_val, scene_seed: see `data_loader.digit_scenes.make_scenes`.
        Others as for CocoDataLoader; digits aren't mirrored by default.
    """

    def __init__(self, data_dir: str = "data/digit_scenes", batch_size: int = 2, shuffle: bool = True,
                 num_workers: int = 0, training: bool = True, balanced: bool = False, retain_epoch_size: bool = True,
                 sampler: str | dict | None = None, repeat_threshold: float = 0.1, min_size: int | list[int] = 128,
                 max_size: int = 256, flip: float = 0.0, group_by_aspect: bool = True, validation: str = "test",
                 holdout_fraction: float = 0.1, image_size: int = 128, n_max: int = 300, imb_factor: float = 0.02,
                 n_val: int = 40, scene_seed: int = 0, seed: int = 0, device: str | torch.device = "cpu",
                 rank: int = 0, world_size: int = 1):
        folder = make_scenes(data_dir, image_size=image_size, n_max=n_max, imb_factor=imb_factor, n_val=n_val,
                             scene_seed=scene_seed)
        super().__init__(str(folder), batch_size, shuffle, num_workers, training, balanced, retain_epoch_size,
                         sampler, repeat_threshold, min_size, max_size, flip, group_by_aspect, validation=validation,
                         holdout_fraction=holdout_fraction, seed=seed, device=device, rank=rank,
                         world_size=world_size)


def _check(options: dict[str, Any], min_size: list[int]) -> None:
    where = "data_loader.args"
    if not min_size or min(min_size) < 1 or options["max_size"] < max(min_size):
        raise ConfigError(f"{where}.min_size: {options['min_size']}; it must be above 0 and at most max_size "
                          f"({options['max_size']})")
    if options["repeat_threshold"] <= 0:
        raise ConfigError(f"{where}.repeat_threshold: {options['repeat_threshold']} should be above 0")
    if not 0 <= options["flip"] <= 1:
        raise ConfigError(f"{where}.flip: {options['flip']}; it is a probability, 0 to 1")
    if not 0 < options["holdout_fraction"] < 1:
        raise ConfigError(f"{where}.holdout_fraction: {options['holdout_fraction']}; it must be between 0 and 1")
    if options["num_workers"] < 0:
        raise ConfigError(f"{where}.num_workers: {options['num_workers']} is under 0")
    if options["validation"] not in ("test", "holdout", "none"):
        raise unknown(f"{where}.validation", options["validation"], ["test", "holdout", "none"])
