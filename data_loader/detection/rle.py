"""Masks as COCO stores them: run lengths down the columns, plain or packed into text; and polygons to masks.

COCO's annotation format is described at https://cocodataset.org/#format-data. The packed text holds each run length
(from the third on, its difference from the run two before) in base 32, least significant digit first; a digit is a
character from "0" on whose bit 5 says that more follow and whose bit 4, in the last one, is the sign.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw


def run_lengths(mask: np.ndarray) -> list[int]:
    """The lengths of a mask's runs [H, W], column by column, alternately of zeros and ones, zeros first."""
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    if not flat.size:
        return [0]
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def pack(counts: Sequence[int]) -> str:
    """Run lengths as COCO's text."""
    out = []
    for i, count in enumerate(counts):
        value = int(count) - (int(counts[i - 2]) if i > 2 else 0)
        while True:
            digit, value = value & 31, value >> 5
            done = value == (-1 if digit & 16 else 0)
            out.append(chr(48 + (digit if done else digit | 32)))
            if done:
                break
    return "".join(out)


def unpack(text: str | bytes) -> list[int]:
    """COCO's text as run lengths. Raises ValueError where it breaks off or holds other characters."""
    digits = [byte - 48 for byte in (text.encode() if isinstance(text, str) else bytes(text))]
    counts: list[int] = []
    value = shift = 0
    for digit in digits:
        if not 0 <= digit < 64:
            raise ValueError("not COCO's packed run lengths")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("packed run lengths break off")
    return counts


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask [H, W] as {"size": [H, W], "counts": text}, which pycocotools and other COCO tools read."""
    return {"size": [int(side) for side in mask.shape], "counts": pack(run_lengths(mask))}


def decode(rle: dict[str, Any]) -> np.ndarray:
    """A mask, uint8 [H, W] of 0 and 1, from {"size": [H, W], "counts": text or list of run lengths}.

    Raises ValueError where the runs don't fill the mask exactly.
    """
    height, width = (int(side) for side in rle["size"])
    counts = rle["counts"] if isinstance(rle["counts"], list) else unpack(rle["counts"])
    runs = np.asarray(counts, dtype=np.int64)
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"run lengths sum to {int(runs.sum())}, the mask has {height}x{width} pixels")
    values = np.arange(len(runs), dtype=np.int64) % 2
    return np.repeat(values, runs).astype(np.uint8).reshape(width, height).T


def polygons_to_mask(polygons: Sequence[Sequence[float]], height: int, width: int,
                     scale: tuple[float, float] = (1.0, 1.0), oversample: int = 4) -> np.ndarray:
    """The union of polygons [x0, y0, x1, y1, ...] as a mask, uint8 [height, width].

    Args:
        scale: factors on x and y: a resized image's masks are drawn at its size, not resized.
        oversample: draws at this many times the size, and keeps a pixel that is at least half covered.
    """
    mask = np.zeros((height, width), dtype=np.uint8)
    for polygon in polygons:
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2) * scale
        # Only the polygon's own corner of the picture is drawn: most are small.
        left, top = np.clip(np.floor(points.min(axis=0)), 0, (width, height)).astype(int)
        right, bottom = np.clip(np.ceil(points.max(axis=0)), 0, (width, height)).astype(int)
        if right <= left or bottom <= top:
            continue
        canvas = Image.new("L", (int(right - left) * oversample, int(bottom - top) * oversample))
        # COCO's pixel k covers [k, k + 1), while a drawn point k is that pixel's centre: hence the half.
        corners = (points - (left, top)) * oversample - 0.5
        ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners], fill=1)
        fine = np.asarray(canvas, dtype=np.uint8).reshape(bottom - top, oversample, right - left, oversample)
        mask[top:bottom, left:right] |= (2 * fine.sum(axis=(1, 3)) > oversample ** 2).astype(np.uint8)
    return mask


def to_mask(segmentation: list | dict, height: int, width: int,
            size: tuple[int, int] | None = None) -> np.ndarray:
    """A COCO segmentation (polygons or run lengths) as a mask, uint8 [height, width], or of `size` (h, w) if given."""
    new_height, new_width = size or (height, width)
    if isinstance(segmentation, list):
        return polygons_to_mask(segmentation, new_height, new_width, (new_width / width, new_height / height))
    mask = decode(segmentation)
    if mask.shape == (new_height, new_width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((new_width, new_height), Image.Resampling.NEAREST))
