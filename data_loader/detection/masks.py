"""Masks in COCO's formats, polygons and run lengths (https://cocodataset.org/#format-data), by pycocotools."""
from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from utils.errors import ConfigError

INSTALL = "pip install pycocotools"


def mask_tools() -> ModuleType:
    """pycocotools.mask; ConfigError with the command to install it where it is missing."""
    try:
        from pycocotools import mask
    except ImportError:
        raise ConfigError(f"detection data needs pycocotools, which isn't installed: {INSTALL}") from None
    return mask


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask [H, W] as {"size": [H, W], "counts": text}."""
    packed = mask_tools().encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in packed["size"]], "counts": packed["counts"].decode()}


def packed(segmentation: list | dict, height: int, width: int) -> dict[str, Any]:
    """Polygons or run lengths, plain or packed, as packed run lengths of the union. Raises ValueError where the run
    lengths don't make a mask."""
    tools = mask_tools()
    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return segmentation
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if any(count < 0 for count in counts) or sum(counts) != height * width:
            raise ValueError(f"run lengths sum to {sum(counts)}, the mask has {height}x{width} pixels")
    found = tools.frPyObjects(segmentation, height, width)
    return tools.merge(found) if isinstance(found, list) else found


def decode(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """A mask, uint8 [height, width] of 0 and 1. Raises ValueError where run lengths don't fill it."""
    return mask_tools().decode(packed(segmentation, height, width))


def area(segmentation: list | dict, height: int, width: int) -> float:
    """How many pixels a segmentation covers."""
    return float(mask_tools().area(packed(segmentation, height, width)))


def to_mask(segmentation: list | dict, height: int, width: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """A segmentation of a [height, width] picture as a mask, uint8, of `size` (h, w) if given: polygons are drawn at
    that size, run lengths are resized."""
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


def turned(annotation: dict[str, Any], orientation: int, height: int, width: int) -> dict[str, Any]:
    """An annotation made on a picture [height, width] as it is stored, for the picture as EXIF orientation 5 to 8 shows
    it, [width, height]."""
    def move(x: float, y: float) -> tuple[float, float]:
        return {5: (y, x), 6: (height - y, x), 7: (height - y, width - x), 8: (y, width - x)}[orientation]
    x, y, w, h = annotation["bbox"]
    (left, top), (right, bottom) = move(x, y), move(x + w, y + h)
    box = [min(left, right), min(top, bottom), abs(right - left), abs(bottom - top)]
    shape = annotation["segmentation"]
    if isinstance(shape, list):
        shape = [[float(value) for point in zip(polygon[::2], polygon[1::2]) for value in move(*point)]
                 for polygon in shape]
    else:
        mask = decode(shape, height, width)
        turn = {5: mask.T, 6: np.rot90(mask, -1), 7: np.rot90(mask, 2).T, 8: np.rot90(mask)}[orientation]
        shape = encode(turn)
    return {**annotation, "bbox": box, "segmentation": shape}
