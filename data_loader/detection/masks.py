"""Masks in COCO's formats, polygons and run lengths (https://cocodataset.org/#format-data), using pycocotools."""
from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from utils.errors import ConfigError

INSTALL = "pip install pycocotools"


def mask_tools() -> ModuleType:
    """The module pycocotools.mask. Raises ConfigError with the command that installs it if it is missing."""
    try:
        from pycocotools import mask
    except ImportError:
        raise ConfigError(f"detection data needs pycocotools, which isn't installed: {INSTALL}") from None
    return mask


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask [H, W] of 0 and 1 -> packed run lengths {"size": [H, W], "counts": str}."""
    found = mask_tools().encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in found["size"]], "counts": found["counts"].decode()}


def run_lengths(counts: list[int] | str) -> np.ndarray:
    """COCO's run lengths, a list or packed into a string, as int64 [n]. Raises ValueError if the string isn't valid.

    In packed form each length (from the fourth on, its difference from the length two before it) is written in base 32,
    least significant digit first. A character's value is its code minus that of "0": bit 5 means that more digits
    follow, and bit 4 of the last digit is the sign.
    """
    if isinstance(counts, list):
        return np.asarray(counts, dtype=np.int64)
    digits = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((digits & 32) == 0)
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or last[-1:] != [len(digits) - 1]:
        raise ValueError("not COCO's packed run lengths")
    first = np.concatenate([[0], last[:-1] + 1])
    places = 5 * (np.arange(len(digits)) - np.repeat(first, last - first + 1))
    if places.max() > 30:
        raise ValueError("packed run lengths of more than 32 bits")
    values = np.add.reduceat((digits & 31) << places, first)
    values -= np.where(digits[last] & 16, 32 << places[last], 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def packed(segmentation: list | dict, height: int, width: int) -> dict[str, Any]:
    """Polygons, or run lengths (list or packed), as packed run lengths of their union. Raises ValueError if run lengths
    don't exactly fill the mask, as pycocotools would then access memory out of bounds."""
    tools = mask_tools()
    if isinstance(segmentation, dict):
        runs = run_lengths(segmentation["counts"])
        if (runs < 0).any() or runs.sum() != height * width:
            raise ValueError(f"run lengths sum to {int(runs.sum())}, the mask has {height}x{width} pixels")
        if isinstance(segmentation["counts"], str):
            return segmentation
        return tools.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    return tools.merge(tools.frPyObjects(segmentation, height, width))


def decode(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """A segmentation as a mask, uint8 [height, width] of 0 and 1. Raises ValueError if run lengths don't fill it."""
    return mask_tools().decode(packed(segmentation, height, width))


def area(segmentation: list | dict, height: int, width: int) -> float:
    """The number of pixels that a segmentation covers. Raises ValueError as `packed`."""
    return float(mask_tools().area(packed(segmentation, height, width)))


def to_mask(segmentation: list | dict, height: int, width: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """A segmentation of a height x width image as a mask of 0 and 1, uint8 [height, width], or of `size` (h, w) if
    given: polygons are then drawn at that size, run lengths decoded and resized. Raises ValueError as `packed`."""
    new_height, new_width = size or (height, width)
    if isinstance(segmentation, list):
        scale = (new_width / width, new_height / height)
        points = [(np.asarray(polygon, dtype=np.float64).reshape(-1, 2) * scale).ravel().tolist()
                  for polygon in segmentation]
        return decode(points, new_height, new_width)
    mask = decode(segmentation, height, width)
    if mask.shape == (new_height, new_width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((new_width, new_height), Image.Resampling.NEAREST))


#: EXIF orientation -> which axes (horizontal, vertical) of stored pixels to mirror; 5 to 8 are transposed first.
_MIRRORED = {1: (False, False), 2: (True, False), 3: (True, True), 4: (False, True),
             5: (False, False), 6: (True, False), 7: (True, True), 8: (False, True)}


def undone(orientation: int) -> int:
    """The EXIF orientation that reverses `orientation`."""
    return {6: 8, 8: 6}.get(orientation, orientation)


def turn_mask(mask: np.ndarray, orientation: int) -> np.ndarray:
    """Turn masks [..., H, W] as EXIF orientation 1 to 8 demands: a view [..., H, W], or [..., W, H] for 5 to 8."""
    mask = mask.swapaxes(-2, -1) if orientation >= 5 else mask
    axes = [axis for axis, mirrored in zip((-1, -2), _MIRRORED[orientation]) if mirrored]
    return np.flip(mask, axes)


def turn_boxes(boxes: np.ndarray, orientation: int, width: int, height: int) -> np.ndarray:
    """Turn boxes, corners x0, y0, x1, y1 [n, 4] in a width x height image, like `turn_mask` turns the image."""
    if orientation >= 5:
        boxes, width, height = boxes[:, [1, 0, 3, 2]], height, width
    across, down = _MIRRORED[orientation]
    boxes = boxes.copy()
    if across:
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    if down:
        boxes[:, [1, 3]] = height - boxes[:, [3, 1]]
    return boxes
