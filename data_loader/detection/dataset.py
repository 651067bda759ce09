"""A detection data set's images, resized and flipped with their boxes and masks, and repeat-factor sampling."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from base.base_data_loader import AUGMENT, ORDER
from data_loader.detection.coco import CocoSplit, box_corners
from data_loader.detection.masks import to_mask, turn_boxes, turn_mask
from data_loader.images import read_rgb, stored_as
from utils.errors import ConfigError
from utils.seed import numpy_rng


class RepeatFactor:
    """Sampler that repeats images of rare classes (Gupta et al., CVPR 2019: LVIS, section 4.2) while epochs keep their
    length.

    An image's weight is the largest over its classes of max(1, sqrt(threshold / f)), where f is the share of images
    that have the class; each epoch draws its images by these weights.
    """

    def __init__(self, split: CocoSplit, threshold: float, seed: int):
        classes = [{a["category_id"] for a in found if not a["iscrowd"]} for found in split.annotations]
        share = {c["id"]: sum(c["id"] in has for has in classes) / len(classes) for c in split.categories}
        self.weights = np.array([max([1.0, *((threshold / share[c]) ** 0.5 for c in has)]) for has in classes])
        self.epoch_length, self.seed = len(self.weights), seed

    def epoch_indices(self, epoch: int) -> np.ndarray:
        """The shuffled indices of an epoch, np.int64 [number of images]: each image's expected number of copies rounded
        down, and the rest drawn by the remainders."""
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
    """Reads, resizes and flips images; a key is (epoch, position in the epoch, image index).

    Photos are turned upright by their EXIF orientation. annotated_on: the pixels to which boxes and masks refer:
    `upright`; `stored`, as in the file (and as COCO's own tools read it), so that they must be turned too; or `auto`,
    decided by the annotation file's width and height, `upright` if these fit both (turned by 180 degrees, mirrored,
    square). min_size: training images' shorter side in pixels, one of these at random; max_size: limit of the longer
    side; flip: probability of a horizontal flip.
    ConfigErrors are returned, not raised, as a worker process would bury them in a traceback.
    """

    def __init__(self, split: CocoSplit, training: bool, min_size: list[int], max_size: int, flip: float, seed: int,
                 annotated_on: str = "auto"):
        self.split, self.training, self.seed, self.annotated_on = split, training, seed, annotated_on
        self.min_size, self.max_size, self.flip = min_size, max_size, flip

    def __len__(self) -> int:
        return len(self.split.images)

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.split.folder / self.split.images[index]["file_name"]

    def picture(self, index: int) -> Image.Image:
        """Image `index` in RGB, upright. Raises ConfigError if it can't be read, or if its size isn't that in the
        annotation file."""
        path, entry = self.path(index), self.split.images[index]
        image = read_rgb(str(path))
        turned = self.turn(index)[0] >= 5
        if (image.size[::-1] if turned else image.size) != (entry["width"], entry["height"]):
            raise ConfigError(f"{path}: {image.width}x{image.height} pixels, but {self.split.file} says "
                              f"{entry['width']}x{entry['height']}" + (", on the pixels as stored" if turned else ""))
        return image

    def turn(self, index: int) -> tuple[int, bool]:
        """(the EXIF orientation, 1 to 8, by which an image's annotations must be turned, 1 if they refer to the upright
        image already; whether that is a guess)."""
        entry = self.split.images[index]
        orientation, width, height = stored_as(str(self.path(index)))
        shown = (height, width) if orientation >= 5 else (width, height)
        fits = [(entry["width"], entry["height"]) == size for size in ((width, height), shown)]
        stored = self.annotated_on == "stored" or (self.annotated_on == "auto" and fits == [True, False])
        return (orientation if stored else 1), self.annotated_on == "auto" and orientation > 1 and all(fits)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[torch.Tensor, dict[str, Any]] | ConfigError:
        try:
            return self.sample(*key)
        except ConfigError as error:
            return error

    def sample(self, epoch: int, position: int, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """One image, float [3, H, W] from 0 to 1, and its target (see `data_loader.detection.loaders`); in training
        resized to a random scale and possibly flipped. Raises ConfigError as `picture`."""
        image, entry = self.picture(index), self.split.images[index]
        orientation, guessed = self.turn(index)
        instances = [a for a in self.split.annotations[index] if not a["iscrowd"]]
        labels = self.split.labels
        boxes = turn_boxes(box_corners(instances), orientation, entry["width"], entry["height"])
        target: dict[str, Any] = {"image_id": entry["id"], "orientation": orientation, "guessed": guessed,
                                  "boxes": torch.from_numpy(boxes),
                                  "labels": torch.tensor([labels[a["category_id"]] for a in instances],
                                                         dtype=torch.long)}
        if not self.training:
            return to_tensor(image), target
        rng = numpy_rng(self.seed, epoch, AUGMENT, position)
        width, height = resized(image.width, image.height, int(rng.choice(self.min_size)), self.max_size)
        target["boxes"] *= torch.tensor([width / image.width, height / image.height] * 2)
        masks = np.zeros((len(instances), height, width), dtype=np.uint8)
        size = (height, width) if orientation < 5 else (width, height)
        for mask, instance in zip(masks, instances):
            drawn = to_mask(instance["segmentation"], entry["height"], entry["width"], size)
            mask[:] = turn_mask(drawn, orientation)
        tensor = to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
        target["masks"] = torch.from_numpy(masks)
        if rng.random() < self.flip:
            tensor, target["masks"] = tensor.flip(-1), target["masks"].flip(-1)
            target["boxes"][:, [0, 2]] = width - target["boxes"][:, [2, 0]]
        return tensor, target


def resized(width: int, height: int, min_size: int, max_size: int) -> tuple[int, int]:
    """(width, height) with the shorter side equal to `min_size`, or less if the longer side would exceed `max_size`."""
    scale = min(min_size / min(width, height), max_size / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def to_tensor(image: Image.Image | np.ndarray) -> torch.Tensor:
    """An RGB image, or its pixels as uint8 [H, W, 3] -> float [3, H, W], 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
