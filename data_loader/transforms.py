"""From image files to the model's input: resizing and cropping eight-bit pixels, then normalising.

Test images: the short side is resized to 8/7 of `image_size` (256 for 224) and the centre cropped; if `image_size` is
32 or less, they are only resized. Large training images: random resized crop, flip and colour jitter as in torchvision
with Pillow, except that JPEGs are decoded at the smallest size that still covers the crop, and torch resizes the
eight-bit pixels (to within one level of Pillow).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from base.base_data_loader import FLIP
from data_loader.crops import crops_of
from data_loader.images import read_rgb, to_rgb
from utils.errors import ConfigError
from utils.seed import numpy_rng

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = (0.2989, 0.587, 0.114)   # of red, green, blue (ITU-R BT.601)
LARGEST_RESIZED = 32   # up to this image_size, test images are resized without cropping
MOST_ELONGATED = 4     # more elongated images are first cropped to 4 : 1, as the rest would be cropped away anyway


def test_preprocess(image_size: int, mean: tuple, std: tuple, wanted: dict[str, Any] | None = None) -> dict[str, Any]:
    """The preprocessing of test images, as plain data for checkpoints and exported models.

    Returns `image_size` and `resize` in pixels, `crop` (bool), `interpolation`, `mean` and `std` (three values each,
    for pixels from 0 to 1). wanted: the preprocessing that pretrained weights need: `crop_share` of the resized short
    side (None: no crop), `interpolation`, `mean`, `std`, and perhaps `squash` (resized to a square, then cropped),
    which is returned too; it then follows timm's evaluation, at any `image_size`.
    """
    if wanted is None:
        crop = image_size > LARGEST_RESIZED
        wanted = {"crop_share": 7 / 8 if crop else None, "interpolation": "bilinear", "mean": mean, "std": std}
        resize = round(image_size * 8 / 7) if crop else image_size
    else:
        resize = math.floor(image_size / (wanted["crop_share"] or 1))
    return {"image_size": image_size, "resize": resize, "crop": wanted["crop_share"] is not None,
            "interpolation": wanted["interpolation"], "mean": list(wanted["mean"]), "std": list(wanted["std"]),
            **({"squash": True} if wanted.get("squash") else {})}


def as_recorded(wanted: dict[str, Any] | None, known: dict[str, Any]) -> dict[str, Any] | None:
    """What a network's weights need (`wanted` of `test_preprocess`; None stays None), as a checkpoint has recorded it.

    known: the checkpoint's `test_preprocess`. It differs if the network's package has other settings now than when the
    model was trained.
    """
    if wanted is None or not {"image_size", "resize", "crop", "interpolation", "mean", "std"} <= known.keys():
        return wanted
    share = wanted["crop_share"] if known["crop"] else None
    if known["crop"] and math.floor(known["image_size"] / (share or 1)) != known["resize"]:
        share = known["image_size"] / (known["resize"] + 1e-3)      # rounded down, it gives the same again
    return {**wanted, "crop_share": share, "squash": bool(known.get("squash")),
            **{key: known[key] for key in ("interpolation", "mean", "std")}}


def test_transform(preprocess: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """The function that `preprocess` describes, the same as in the test loader: PIL image (any mode) -> float
    [3, S, S], or [K, 3, S, S] with several crops."""
    normalise = Normalise(preprocess["mean"], preprocess["std"])
    return lambda image: normalise(test_pixels(to_rgb(image), preprocess))


# Keep pytest from collecting these functions as tests.
test_preprocess.__test__ = test_transform.__test__ = False


class Normalise:
    """Pixels x [..., 3, H, W], uint8 or float from 0 to 255 -> float32 (x / 255 - mean) / std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: str | torch.device = "cpu"):
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
        self.scale, self.shift = (v.float().to(device) for v in (1 / (255 * std), -mean / std))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        images = pixels.to(torch.float32)
        images = images.mul_(self.scale) if images is not pixels else images * self.scale
        return images.add_(self.shift)


def resize(image: Image.Image, height: int, width: int, interpolation: str = "bilinear") -> torch.Tensor:
    """Resize an RGB image to uint8 [3, height, width] (channels last in memory): bilinear or bicubic, antialiased when
    shrinking.

    Pillow stores four bytes per pixel; using all four saves a copy and makes torch's resizing twice as fast.
    """
    words = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8)
    batch = words.view(1, image.height, image.width, 4).permute(0, 3, 1, 2)
    if image.size != (width, height):
        batch = torch.nn.functional.interpolate(batch, (height, width), mode=interpolation, antialias=True)
    return batch[0, :3]


def test_pixels(image: Image.Image, preprocess: dict[str, Any]) -> torch.Tensor:
    """Resize and crop an RGB image for testing, without normalising: uint8 [3, S, S], or [K, 3, S, S] with several
    crops."""
    size, resized = preprocess["image_size"], _resized(image, preprocess)
    if preprocess.get("crops"):
        return crops_of(resized, size, preprocess["crops"])
    top, left = (int(round((side - size) / 2)) for side in resized.shape[1:])
    return resized[:, top:top + size, left:left + size].contiguous()


test_pixels.__test__ = False


def base_pixels(image: Image.Image, preprocess: dict[str, Any]) -> torch.Tensor:
    """The square from which small training images are cropped: uint8 [R, R, 3], where R is `preprocess["resize"]`.

    Its central `image_size` x `image_size` pixels equal the result of `test_pixels`.
    """
    size, side, resized = preprocess["image_size"], preprocess["resize"], _resized(image, preprocess)
    inner = int(round((side - size) / 2))
    top, left = (min(max(int(round((length - size) / 2)) - inner, 0), length - side) for length in resized.shape[1:])
    return resized[:, top:top + side, left:left + side].permute(1, 2, 0).contiguous()


def _resized(image: Image.Image, preprocess: dict[str, Any]) -> torch.Tensor:
    side, mode = preprocess["resize"], preprocess["interpolation"]
    if not preprocess["crop"] or preprocess.get("squash"):
        return resize(image, side, side, mode)
    width, height = image.size
    if max(width, height) > MOST_ELONGATED * min(width, height):
        width, height = (min(length, MOST_ELONGATED * min(image.size)) for length in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    short = min(width, height)
    return resize(image, int(side * height / short), int(side * width / short), mode)


def read_for_test(path: str, preprocess: dict[str, Any]) -> Image.Image:
    """The RGB image at `path`. A JPEG is decoded at the smallest size whose short side is at least
    `preprocess["resize"]`. Raises ConfigError, naming the path, if it can't be read."""
    return read_rgb(path, lambda width, height: reduction(min(width, height), preprocess["resize"]))


def reduction(length: int, wanted: int) -> int:
    """The JPEG decoder's largest reduction factor (1, 2, 4 or 8) that leaves at least `wanted` of `length` pixels."""
    return next((factor for factor in (8, 4, 2) if length // factor >= wanted), 1)


def random_crop_box(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels of a random resized crop (Szegedy et al., CVPR 2015): 8% to 100% of the
    area, aspect ratio 3:4 to 4:3; after ten failed draws, the largest central crop with such a ratio."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1)), wide, high
    wide = min(width, max(round(height * 4 / 3), 1))
    high = min(height, max(round(width * 4 / 3), 1))
    return (width - wide) // 2, (height - high) // 2, wide, high


def read_for_training(path: str, rng: np.random.Generator, size: int, flip: bool = True,
                      jitter: float = 0.0, interpolation: str = "bilinear") -> torch.Tensor:
    """The image at `path` after random crop, flip and colour jitter (strength 0 to 1): uint8 [3, size, size].

    All random numbers are drawn from `rng` in a fixed order, so that equal generators give equal pixels. Raises
    ConfigError, naming the path, if the image can't be read.
    """
    full: list[int] = []
    box: list[int] = []

    def plan(width: int, height: int) -> int:
        full[:], box[:] = (width, height), random_crop_box(rng, width, height)
        return reduction(min(box[2:]), size)

    image = read_rgb(path, plan)
    if not box:  # read_rgb calls `plan` for JPEGs only
        plan(*image.size)
    left, top, wide, high = box
    across, down = image.width / full[0], image.height / full[1]
    corners = (round(left * across), round(top * down), round((left + wide) * across), round((top + high) * down))
    corners = (*corners[:2], max(corners[2], corners[0] + 1), max(corners[3], corners[1] + 1))
    pixels = resize(image.crop(corners), size, size, interpolation).contiguous()
    if flip and rng.random() < 0.5:
        pixels = pixels.flip(2)
    return colour_jitter(pixels, rng, jitter) if jitter else pixels


def alternate_flips(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """Whether images `indices` [n] are flipped in an epoch, int [n] of 0 or 1: a fixed random half in odd epochs, the
    other half in even ones, so that two epochs show each image both ways (Jordan, arXiv 2404.00498)."""
    half = numpy_rng(seed, FLIP).integers(0, 2, int(indices.max()) + 1, dtype=np.int32) if len(indices) else indices
    return (half[indices] + epoch) % 2


def torchvision_policy(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """torchvision's augmentation policy for large images: uint8 [3, H, W] -> the same. It draws from torch's global
    generator. "autoaugment" is the policy found on ImageNet. Raises ConfigError for an unknown name."""
    from torchvision.transforms import v2  # slow to import
    kinds = {"autoaugment": v2.AutoAugment, "randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}
    if name not in kinds:
        raise ConfigError(f"data_loader.args.augment: {name} is for images of 64 pixels or less; use one of "
                          f"{', '.join(kinds)}")
    return kinds[name]()


def colour_jitter(pixels: torch.Tensor, rng: np.random.Generator, strength: float) -> torch.Tensor:
    """Scale brightness, contrast and saturation, in random order, each by a factor from 1 - strength to 1 + strength.

    uint8 [3, H, W] -> uint8 [3, H, W]; strength: 0 to 1. Like torchvision's ColorJitter on float tensors, rounded only
    at the end.
    """
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=3)
    image = pixels.to(torch.float32)
    for step in rng.permutation(3):
        factor = float(factors[step])
        if step == 0:    # brightness: blended with black
            image.mul_(factor)
        elif step == 1:  # contrast: with the mean grey
            level = image.mean((1, 2)).dot(torch.tensor(GREY)) * (1 - factor)
            image.mul_(factor).add_(level)
        else:            # saturation: with itself in grey
            grey = (image[0] * GREY[0]).add_(image[1], alpha=GREY[1]).add_(image[2], alpha=GREY[2])
            image.mul_(factor).add_(grey.mul_(1 - factor))
        image.clamp_(0, 255)
    return image.round_().to(torch.uint8)
