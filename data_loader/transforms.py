"""From images to what the model sees: resizing and cropping on eight-bit pixels, normalising last.

Test images: the short side to 8/7 of `image_size` (224: 256), the centre cropped; images of 32 pixels or less are only
resized. Large training images: random resized crop, flip and colour jitter, as torchvision's with Pillow, but JPEGs are
decoded at the smallest size that still covers the crop, and torch resizes the eight-bit pixels (within a level of
Pillow's).
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
LARGEST_RESIZED = 32   # up to this image_size test images are resized, not cropped
MOST_ELONGATED = 4     # of longer images the middle, 4 to 1, is used: the rest would be cropped anyway


def test_preprocess(image_size: int, mean: tuple, std: tuple, wanted: dict[str, Any] | None = None) -> dict[str, Any]:
    """What is done to a test image, as plain data that goes into checkpoints and exported models.

    wanted: what pretrained weights expect of their images: `crop_share` of the resized short side (None: no crop),
    `interpolation`, `mean`, `std`. timm's evaluation then, at any size.
    """
    if wanted is None:
        crop = image_size > LARGEST_RESIZED
        wanted = {"crop_share": 7 / 8 if crop else None, "interpolation": "bilinear", "mean": mean, "std": std}
        resize = round(image_size * 8 / 7) if crop else image_size
    else:
        resize = math.floor(image_size / (wanted["crop_share"] or 1))
    return {"image_size": image_size, "resize": resize, "crop": wanted["crop_share"] is not None,
            "interpolation": wanted["interpolation"], "mean": list(wanted["mean"]), "std": list(wanted["std"])}


def test_transform(preprocess: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """The function PIL image (any mode) -> float [3, S, S] that `preprocess` describes, equal to the test loader's."""
    normalise = Normalise(preprocess["mean"], preprocess["std"])
    return lambda image: normalise(test_pixels(to_rgb(image), preprocess))


# Not tests, whatever their names begin with.
test_preprocess.__test__ = test_transform.__test__ = False


class Normalise:
    """uint8 or float pixels [..., 3, H, W] of 0 to 255 to float (x / 255 - mean) / std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: str | torch.device = "cpu"):
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
        self.scale, self.shift = (v.float().to(device) for v in (1 / (255 * std), -mean / std))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        images = pixels.to(torch.float32)
        images = images.mul_(self.scale) if images is not pixels else images * self.scale
        return images.add_(self.shift)


def resize(image: Image.Image, height: int, width: int, interpolation: str = "bilinear") -> torch.Tensor:
    """An RGB image as uint8 [3, height, width] (channels last in memory): bilinear or bicubic, antialiased where it
    shrinks.

    Pillow stores four bytes a pixel; taking all four spares a copy and makes torch's resizing twice as fast.
    """
    words = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8)
    batch = words.view(1, image.height, image.width, 4).permute(0, 3, 1, 2)
    if image.size != (width, height):
        batch = torch.nn.functional.interpolate(batch, (height, width), mode=interpolation, antialias=True)
    return batch[0, :3]


def test_pixels(image: Image.Image, preprocess: dict[str, Any]) -> torch.Tensor:
    """The part of an RGB image that a test sees, before normalising: uint8 [3, S, S], of several crops [K, 3, S, S]."""
    size, resized = preprocess["image_size"], _resized(image, preprocess)
    if preprocess.get("crops"):
        return crops_of(resized, size, preprocess["crops"])
    top, left = (int(round((side - size) / 2)) for side in resized.shape[1:])
    return resized[:, top:top + size, left:left + size].contiguous()


test_pixels.__test__ = False


def base_pixels(image: Image.Image, preprocess: dict[str, Any]) -> torch.Tensor:
    """The square that small training images are cropped from: uint8 [R, R, 3], R the `resize` of the preprocessing.

    Its centre of `image_size` pixels is what `test_pixels` gives.
    """
    size, side, resized = preprocess["image_size"], preprocess["resize"], _resized(image, preprocess)
    inner = int(round((side - size) / 2))
    top, left = (min(max(int(round((length - size) / 2)) - inner, 0), length - side) for length in resized.shape[1:])
    return resized[:, top:top + side, left:left + side].permute(1, 2, 0).contiguous()


def _resized(image: Image.Image, preprocess: dict[str, Any]) -> torch.Tensor:
    side, mode = preprocess["resize"], preprocess["interpolation"]
    if not preprocess["crop"]:
        return resize(image, side, side, mode)
    width, height = image.size
    if max(width, height) > MOST_ELONGATED * min(width, height):
        width, height = (min(length, MOST_ELONGATED * min(image.size)) for length in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    short = min(width, height)
    return resize(image, int(side * height / short), int(side * width / short), mode)


def read_for_test(path: str, preprocess: dict[str, Any]) -> Image.Image:
    """The image at `path`; a JPEG is decoded at the smallest size whose short side is the resized one's or more."""
    return read_rgb(path, lambda width, height: reduction(min(width, height), preprocess["resize"]))


def reduction(length: int, wanted: int) -> int:
    """The largest of the JPEG decoder's factors that leaves `wanted` pixels of `length`."""
    return next((factor for factor in (8, 4, 2) if length // factor >= wanted), 1)


def random_crop_box(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random resized crop (Szegedy et al., CVPR 2015): 8% to 100% of the area, sides
    3:4 to 4:3; after ten misses the largest central crop with such sides."""
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
    """The image at `path` randomly cropped to `size`, flipped, with jittered colours: uint8 [3, size, size].

    rng decides everything, in a fixed order, so the same generator gives the same pixels.
    """
    full: list[int] = []
    box: list[int] = []

    def plan(width: int, height: int) -> int:
        full[:], box[:] = (width, height), random_crop_box(rng, width, height)
        return reduction(min(box[2:]), size)

    image = read_rgb(path, plan)
    if not box:  # the plan is asked for JPEGs only
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
    """Whether images `indices` [n] are flipped in an epoch, int32 0 or 1: a fixed random half in odd epochs, the other
    half in even ones, so that two epochs show both sides of each (Jordan, arXiv 2404.00498)."""
    half = numpy_rng(seed, FLIP).integers(0, 2, int(indices.max()) + 1, dtype=np.int32) if len(indices) else indices
    return (half[indices] + epoch) % 2


def torchvision_policy(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The augmentation policy of that name for large images, uint8 [3, H, W] to the same; it draws from torch's global
    generator. AutoAugment's is the one found for ImageNet."""
    from torchvision.transforms import v2  # takes a while to import
    kinds = {"autoaugment": v2.AutoAugment, "randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}
    if name not in kinds:
        raise ConfigError(f"data_loader.args.augment: {name} is for images of 64 pixels or less; use one of "
                          f"{', '.join(kinds)}")
    return kinds[name]()


def colour_jitter(pixels: torch.Tensor, rng: np.random.Generator, strength: float) -> torch.Tensor:
    """Brightness, contrast and saturation each scaled by a factor of 1 - strength to 1 + strength, in random order.

    uint8 [3, H, W] to uint8 [3, H, W]; torchvision's ColorJitter on float tensors, rounded at the end only.
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
