"""Loaders of images with boxes and masks: COCO's layout, and generated scenes of digits.

A batch is (list of images, list of targets). An image is float [3, H, W] from 0 to 1 (the model normalises); a target
is a dict of `boxes` float [n, 4] (corners x0, y0, x1, y1 in pixels of that image), `labels` long [n] (1 to C; 0 is the
background), `masks` uint8 [n, H, W] (training only), `image_id` (int) and `orientation` (int), the EXIF orientation by
which its annotations were turned (1 if they weren't).
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from base.base_data_loader import BaseDataLoader
from data_loader.class_names import match_classes
from data_loader.detection.arguments import check_arguments
from data_loader.detection.coco import CocoSplit, read_coco
from data_loader.detection.dataset import DetectionDataset, RepeatFactor
from data_loader.detection.digit_scenes import make_scenes
from data_loader.detection.masks import mask_tools
from data_loader.detection.splits import described, held_out, without_specks
from data_loader.splitting import names_digest, sample_of
from data_loader.workers import leave_stops_to_parent, loaded, worker_count, worker_notes
from logger.log import get_logger
from utils.class_counts import FEW
from utils.errors import ConfigError
from utils.seed import generator

log = get_logger()


class CocoDataLoader(BaseDataLoader):
    """Images with COCO annotations. `data_dir` contains the annotation files and the image folders.

    Args:
        min_size: shorter side of training images in pixels, or a list from which one is drawn at random (multi-scale);
            less if the longer side would exceed `max_size`. In evaluation the model resizes the images, not the loader.
        flip: the probability of flipping a training image horizontally, 0 to 1.
        group_by_aspect: make training batches of wide or of tall images only, which need less padding.
        keep_empty: also train on images without instances (as background); by default they are left out.
        skip_degenerate: leave out boxes without width or height instead of refusing the file (COCO 2017 has two).
        train_annotations, train_images, val_annotations, val_images: paths relative to `data_dir`.
        balanced: repeat images with classes that less than a share `repeat_threshold` of images have (RepeatFactor).
        sampler: only {"type": "InstanceBalanced"}, as the others need a single label per image.
        retain_epoch_size: accepted for consistency and ignored; epochs always keep their length.
        annotated_on: `upright`, `stored` or `auto`: the pixels to which annotations refer, see DetectionDataset.
        validation: `test` (the val split), `holdout` (`holdout_fraction` of the training images) or `none`.
        split_seed: which images are held out, independently of `seed`.
        allow_outside: the annotation files may name images outside data_dir and the image folders.
        facts: what a checkpoint records about its data (`data_facts`): classes are then in its order, by name, and in
            testing groups follow its training counts.

    Raises ConfigError, naming the argument or file, for anything wrong with them.
    """

    task = "detection"
    split_files = ("train_annotations", "train_images", "val_annotations", "val_images")
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    batch_limit: int | None = None
    guess_said = False

    def __init__(self, data_dir: str, batch_size: int = 16, shuffle: bool = True, num_workers: int = 0,
                 training: bool = True, balanced: bool = False, retain_epoch_size: bool = True,
                 sampler: str | dict | None = None, repeat_threshold: float = 0.001, min_size: int | list[int] = 800,
                 max_size: int = 1333, flip: float = 0.5, group_by_aspect: bool = True, keep_empty: bool = False,
                 skip_degenerate: bool = False, train_annotations: str = "annotations/instances_train2017.json",
                 train_images: str = "train2017", val_annotations: str = "annotations/instances_val2017.json",
                 val_images: str = "val2017", validation: str = "test", holdout_fraction: float = 0.1, seed: int = 0,
                 device: str | torch.device = "cpu", rank: int = 0, world_size: int = 1, annotated_on: str = "auto",
                 split_seed: int = 0, allow_outside: bool = False, facts: Any = None):
        self.options = {key: value for key, value in locals().items() if key not in ("self", "__class__", "facts")}
        self.data_dir, self.facts = data_dir, facts or {}
        self.min_size = [min_size] if isinstance(min_size, int) else list(min_size)
        check_arguments(self.options, self.min_size)
        #: Whether validation images are selected here; whether they are taken from the training images.
        self.draws_validation = self.holds_out = validation == "holdout"
        mask_tools()  # fails before anything is read or written if pycocotools is missing
        self.root = Path(data_dir)
        if not self.root.is_dir():
            raise ConfigError(f"data_loader.args.data_dir: no folder {self.root}")
        self._train: CocoSplit | None = None
        split = self._training_split() if training else self._validation_split()
        if training and validation == "holdout":
            split = split.subset(self._held_out(split)[1])
        self._use(split, training)

    def _use(self, split: CocoSplit, training: bool) -> None:
        """Set the split to iterate over."""
        options = self.options
        if training:
            split = without_specks(split, min(self.min_size), options["max_size"])
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
        repeats = training and options["balanced"]
        super().__init__(np.zeros(len(split.images)), options["batch_size"], shuffle=options["shuffle"],
                         training=training, seed=self.seed, device=options["device"], rank=options["rank"],
                         world_size=options["world_size"],
                         sampler=RepeatFactor(split, options["repeat_threshold"], self.seed) if repeats else None)
        self.dataset = DetectionDataset(split, training, self.min_size, options["max_size"], options["flip"],
                                        options["seed"], options["annotated_on"])
        self.class_names, self.num_classes = split.class_names, len(split.categories)
        self.paths = [str(self.dataset.path(i)) for i in range(len(split.images))]
        self.preprocess = {"task": "detection"}
        self.workers = worker_count(options["num_workers"], self.world_size)
        self.notes = split.notes + worker_notes(options["num_workers"], self.workers)

    # ------------------------------------------------------------------ splits

    def _training_split(self) -> CocoSplit:
        if self._train is None:
            self._train = self._read("train", None)
            self._number(self._train)
        return self._train

    def _validation_split(self) -> CocoSplit:
        # The classes are the training file's categories or, without that file, the val file's.
        if (self.root / self.options["train_annotations"]).is_file():
            whole = self._training_split()
            split = self._read("val", whole.categories)
            split.names = whole.names
            return split
        split = self._read("val", None)
        self._number(split)
        return split

    def _read(self, part: str, categories: list[dict[str, Any]] | None) -> CocoSplit:
        options = self.options
        return read_coco(self.root / options[f"{part}_annotations"], self.root / options[f"{part}_images"],
                         categories=categories, skip_degenerate=options["skip_degenerate"], data_dir=self.root,
                         allow_outside=options["allow_outside"])

    def _number(self, split: CocoSplit) -> None:
        """Put the classes in the order of the checkpoint in `facts`. Raises ConfigError if the names don't match,
        unless the checkpoint only initialises a training."""
        known, some = self.facts.get("class_names"), not self.options["training"]
        optional = self.facts.get("optional") and match_classes(split.class_names, known or [], some) is None
        if known and not optional:
            split.number_as(list(known), str(self.data_dir), some)

    def _held_out(self, split: CocoSplit) -> tuple[np.ndarray, np.ndarray]:
        """(indices of the held-out images, of the kept images), each ascending."""
        return held_out(len(split.images), self.options["holdout_fraction"], self.options["split_seed"])

    def split_validation(self) -> CocoDataLoader | None:
        """A loader of the images that `validation` selects; None for `none`."""
        kind = self.options["validation"]
        if kind == "none":
            return None
        other = object.__new__(type(self))
        other.options, other.min_size, other.root = {**self.options, "training": False}, self.min_size, self.root
        other._train, other.data_dir = self._train, self.data_dir
        other.facts = {}        # the classes are in order already, and groups follow this training's counts
        if kind == "test":
            other._use(other._validation_split(), training=False)
        else:
            whole = self._training_split()
            other._use(whole.subset(self._held_out(whole)[0]), training=False)
        return other

    @property
    def validation_note(self) -> str | None:
        """A line for the log about the validation split, or None."""
        return ("validation uses the val split, which test.py reports on too (COCO's convention)"
                if self.options["validation"] == "test" and self.training else None)

    @property
    def cls_num_list(self) -> list[int] | None:
        """Training instances per class [C], in testing those of the checkpoint; None if there is only a val split."""
        if self.training:
            return self.split.counts()
        known = self.facts.get("cls_num_list")
        if known and len(known) == self.num_classes:
            return list(known)
        if not (self.root / self.options["train_annotations"]).is_file():
            return None
        whole = self._training_split()
        if self.options["validation"] == "holdout":
            whole = whole.subset(self._held_out(whole)[1])
        return whole.counts()

    @property
    def split_memory(self) -> dict[str, Any] | None:
        """What a checkpoint records to recognise its training images: a sample of them, see `sample_of`. With "holdout"
        also `drawn_from`, a digest of all images in the annotation file, from which the held-out ones are drawn."""
        if not self.training:
            return None
        root, memory = str(self.data_dir), {"rule": "names", "sample": sample_of(self.paths, str(self.data_dir))}
        if self.holds_out:
            whole = self._training_split()
            names = [str(whole.folder / image["file_name"]) for image in whole.images]
            memory["drawn_from"] = names_digest(names, root)
        return memory

    def summary(self, groups: dict[str, float] | None = None) -> list[str]:
        """Log lines about the data. groups: the config's limits of the groups, such as {"few": 20}."""
        return described(self.split, self.cls_num_list or [], (groups or {}).get("few", FEW)) + self.notes

    def ground_truth(self) -> dict[str, Any]:
        """The split's annotations as one COCO dict, including crowds."""
        return self.split.ground_truth()

    def raw_image(self, index: int) -> np.ndarray:
        """Image `index` at its original size, turned upright: uint8 [H, W, 3]."""
        return np.array(self.dataset.picture(index))

    # ------------------------------------------------------------------ batches

    def _say_guessed(self, image_id: int) -> None:
        if not self.guess_said:
            log.warning("data_loader.args.annotated_on: %s: image %s has an EXIF orientation, and its width and height "
                        "fit the pixels as stored and upright: its annotations are taken as made on the upright photo; "
                        "say \"stored\" or \"upright\"", self.split.file, image_id)
        self.guess_said = True

    def __len__(self) -> int:
        """Batches per epoch, limited to `batch_limit` in a shortened last epoch (`trainer.iterations`)."""
        return super().__len__() if self.batch_limit is None else min(super().__len__(), self.batch_limit)

    @property
    def is_cut(self) -> bool:
        """Whether the epoch ends before all its images were used."""
        return len(self) < super().__len__()

    def epoch_order(self, epoch: int) -> np.ndarray:
        """As in the base class, then regrouped so that a batch's images are all wide or all tall (the last few mixed).
        """
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
        # A separate generator: DataLoader would draw from the global one, which a resumed run has already restored.
        loader = DataLoader(self.dataset, batch_sampler=keys, num_workers=self.workers, collate_fn=list,
                            generator=generator(self.seed, epoch), worker_init_fn=leave_stops_to_parent)
        for samples in loaded(loader):
            for sample in samples:
                if isinstance(sample, ConfigError):
                    raise sample
                if sample[1].pop("guessed"):
                    self._say_guessed(sample[1]["image_id"])
            yield ([image.to(self.device, non_blocking=True) for image, _ in samples],
                   [{key: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                     for key, value in target.items()} for _, target in samples])


class DigitScenesDataLoader(CocoDataLoader):
    """Real handwritten digits on a textured background, long-tailed, generated in `data_dir` (no download).

    Args:
        image_size, n_max, imb_factor, n_val, scene_seed: see `data_loader.detection.digit_scenes.make_scenes`.
        Others as for CocoDataLoader; digits aren't flipped by default.
    """

    def __init__(self, data_dir: str = "data/digit_scenes", batch_size: int = 2, shuffle: bool = True,
                 num_workers: int = 0, training: bool = True, balanced: bool = False, retain_epoch_size: bool = True,
                 sampler: str | dict | None = None, repeat_threshold: float = 0.1, min_size: int | list[int] = 128,
                 max_size: int = 256, flip: float = 0.0, group_by_aspect: bool = True, validation: str = "test",
                 holdout_fraction: float = 0.1, image_size: int = 128, n_max: int = 300, imb_factor: float = 0.02,
                 n_val: int = 40, scene_seed: int = 0, seed: int = 0, device: str | torch.device = "cpu",
                 rank: int = 0, world_size: int = 1, split_seed: int = 0, facts: Any = None):
        folder = make_scenes(data_dir, image_size=image_size, n_max=n_max, imb_factor=imb_factor, n_val=n_val,
                             scene_seed=scene_seed)
        super().__init__(str(folder), batch_size, shuffle, num_workers, training, balanced, retain_epoch_size,
                         sampler, repeat_threshold, min_size, max_size, flip, group_by_aspect, validation=validation,
                         holdout_fraction=holdout_fraction, seed=seed, device=device, rank=rank,
                         world_size=world_size, split_seed=split_seed, facts=facts)
        self.data_dir = data_dir        # sampled images in checkpoints are relative to the config's folder
