"""Several crops of each test image, whose logits are averaged: the four corners and the centre, and these mirrored."""
from __future__ import annotations

from typing import Any

import torch

from utils.errors import ConfigError

NUMBERS = (1, 5, 10)
MARGIN = 24 / 224    # by how much an image is larger than a crop, relative to it (Shi et al., ICML 2024: 24 at 224)


def with_crops(preprocess: dict[str, Any], number: int, expand: int | None = None,
               path: str = "data_loader.args.") -> dict[str, Any]:
    """The preprocessing (see `test_preprocess`) that gives `number` (1, 5 or 10) crops per image.

    For several crops the short side is first resized to `image_size` + `expand` pixels (None: MARGIN of image_size),
    instead of `preprocess["resize"]`. path: prefix of the keys in errors. Raises ConfigError for values out of range.
    """
    if number not in NUMBERS:
        raise ConfigError(f"{path}crops: must be one of {', '.join(map(str, NUMBERS))}, not {number}")
    if expand is not None and (number == 1 or not 0 <= expand <= preprocess["image_size"]):
        raise ConfigError(f"{path}expand: " + ("is for several crops; give crops too" if number == 1 else
                                               f"must be 0 to {preprocess['image_size']}, not {expand}"))
    if number == 1:
        return preprocess
    size = preprocess["image_size"]
    expand = round(size * MARGIN) if expand is None else expand
    return {**preprocess, "resize": size + expand, "crop": True, "crops": number}


def crops_of(pixels: torch.Tensor, size: int, number: int) -> torch.Tensor:
    """[..., 3, H, W] -> [..., K, 3, size, size]: upper left, upper right, lower left, lower right, centre; with
    K = `number` = 10, then the same of the mirrored image. As torchvision's FiveCrop and TenCrop."""
    down, right = (length - size for length in pixels.shape[-2:])
    corners = [(0, 0), (0, right), (down, 0), (down, right), (int(round(down / 2)), int(round(right / 2)))]
    sides = (pixels, pixels.flip(-1)) if number == 10 else (pixels,)
    return torch.stack([side[..., top:top + size, left:left + size] for side in sides for top, left in corners], -4)


def enlarged_crops(images: torch.Tensor, preprocess: dict[str, Any]) -> torch.Tensor:
    """The crops of images held in memory at a crop's size, which are enlarged first: float [n, 3, S, S] ->
    [n, K, 3, S, S]."""
    larger = torch.nn.functional.interpolate(images, (preprocess["resize"],) * 2, mode="bilinear")
    return crops_of(larger, images.shape[-1], preprocess["crops"])
