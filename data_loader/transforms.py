"""From images to what the model sees: resizing and cropping on eight-bit pixels, normalising last.

Test images: the short side to 8/7 of `image_size` (224: 256), the centre cropped; images of 32 pixels or less are only
resized. Large training images: random resized crop, flip and colour jitter, as torchvision's with Pillow, but JPEGs are
decoded at the smallest size that still covers the crop, and torch resizes the eight-bit pixels (a level of 255 or less
from Pillow's).
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_loader.images import read_rgb, to_rgb

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LARGEST_RESIZED = 32   # up to this image_size test images are resized, not cropped
MOST_ELONGATED = 4     # of longer images the middle, 4 to 1, is used: the rest would be cropped anyway


def test_preprocess(image_size: int, mean: tuple, std: tuple) -> dict[str, Any]:
    """What is done to a test image, as plain data that goes into checkpoints and exported models."""
    crop = image_size > LARGEST_RESIZED
    return {"image_size": image_size, "resize": round(image_size * 8 / 7) if crop else image_size, "crop": crop,
            "interpolation": "bilinear", "mean": list(mean), "std": list(std)}


def test_transform(preprocess: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """The function PIL image (any mode) -> float [3, S, S] that `preprocess` describes, equal to the test loader's."""
    scale = 1 / (255 * torch.tensor(preprocess["std"])).view(3, 1, 1)
    shift = (-torch.tensor(preprocess["mean"]) / torch.tensor(preprocess["std"])).view(3, 1, 1)

    def transform(image: Image.Image) -> torch.Tensor:
        pixels = test_pixels(to_rgb(image), preprocess)
        return torch.addcmul(shift, torch.from_numpy(pixels).permute(2, 0, 1).float(), scale).contiguous()

    return transform


# Not tests, whatever their names begin with.
test_preprocess.__test__ = test_transform.__test__ = False


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [height, width, 3]: bilinear, antialiased where it shrinks."""
    if pixels.shape[:2] == (height, width):
        return pixels
    batch = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]  # seen as channels-last: fast
    small = torch.nn.functional.interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(small[0].permute(1, 2, 0).numpy())


def test_pixels(image: Image.Image, preprocess: dict[str, Any]) -> np.ndarray:
    """The part of an RGB image that a test sees, before normalising: uint8 [S, S, 3]."""
    size, resized = preprocess["image_size"], _resized(image, preprocess)
    top, left = (int(round((side - size) / 2)) for side in resized.shape[:2])
    return resized[top:top + size, left:left + size]


test_pixels.__test__ = False


def base_pixels(image: Image.Image, preprocess: dict[str, Any]) -> np.ndarray:
    """The square that small training images are cropped from: uint8 [R, R, 3], R the `resize` of the preprocessing.

    Its centre of `image_size` pixels is what `test_pixels` gives.
    """
    size, side, resized = preprocess["image_size"], preprocess["resize"], _resized(image, preprocess)
    inner = int(round((side - size) / 2))
    top, left = (min(max(int(round((length - size) / 2)) - inner, 0), length - side) for length in resized.shape[:2])
    return resized[top:top + side, left:left + side]


def _resized(image: Image.Image, preprocess: dict[str, Any]) -> np.ndarray:
    side = preprocess["resize"]
    if not preprocess["crop"]:
        return resize(np.asarray(image), side, side)
    width, height = image.size
    if max(width, height) > MOST_ELONGATED * min(width, height):
        width, height = (min(length, MOST_ELONGATED * min(image.size)) for length in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    short = min(width, height)
    return resize(np.asarray(image), int(side * height / short), int(side * width / short))


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
                      jitter: float = 0.0) -> np.ndarray:
    """The image at `path` randomly cropped to `size`, flipped, with jittered colours: uint8 [size, size, 3].

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
    pixels = resize(np.asarray(image.crop(corners)), size, size)
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(colour_jitter(pixels, rng, jitter) if jitter else pixels)


_RAMP = Image.frombytes("L", (256, 1), bytes(range(256)))


def colour_jitter(pixels: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Brightness, contrast and saturation each scaled by a factor of 1 - strength to 1 + strength, in random order.

    uint8 [H, W, 3] to uint8 [H, W, 3]; to the last level what Pillow's ImageEnhance gives.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=3)
    for step in rng.permutation(3):
        image = _ADJUST[step](image, float(factors[step]))
    return np.asarray(image)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """`image` blended with black."""
    return _blend_with_grey(image, 0, factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """`image` blended with its mean grey."""
    counts = np.asarray(image.convert("L").histogram())
    return _blend_with_grey(image, int(counts @ np.arange(256) / counts.sum() + 0.5), factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """`image` blended with itself in grey."""
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


def _blend_with_grey(image: Image.Image, level: int, factor: float) -> Image.Image:
    # One grey for all pixels: blending 256 levels gives a table, and a table is quicker than blending the image.
    table = Image.blend(Image.new("L", (256, 1), level), _RAMP, factor)
    return image.point(list(table.tobytes()) * 3)


_ADJUST = (brightness, contrast, saturation)
