"""Large images: our crops, colours and test pixels against torchvision's with Pillow."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image

from data_loader import transforms
from data_loader.transforms import (
    IMAGENET_STATISTICS,
    colour_jitter,
    random_crop_box,
    read_for_test,
    read_for_training,
    reduction,
    test_pixels,
    test_preprocess,
    test_transform,
)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


class Fixed:
    """A generator that gives what it is told."""

    def __init__(self, factors: list[float], order: list[int]):
        self.factors, self.order = factors, order

    def uniform(self, low: float, high: float, size: int) -> np.ndarray:
        return np.array(self.factors)

    def permutation(self, n: int) -> list[int]:
        return self.order


@pytest.mark.parametrize(("width", "height", "size"), [(500, 375, 224), (300, 700, 224), (224, 224, 224), (90, 61, 64),
                                                       (256, 256, 224), (50, 40, 32)])
def test_test_pixels_are_pillows_to_a_level(width: int, height: int, size: int) -> None:
    image, preprocess = photo(width, height), test_preprocess(size, *IMAGENET_STATISTICS)
    slow = T.CenterCrop(size)(T.Resize(preprocess["resize"])(image)) if size > 32 else image.resize(
        (size, size), Image.Resampling.BILINEAR)
    away = test_pixels(image, preprocess).int() - torch.from_numpy(np.array(slow)).permute(2, 0, 1).int()
    assert away.abs().max() <= 1


def test_decoding_reduced_stays_close(tmp_path: Path) -> None:
    path = str(tmp_path / "a.jpg")
    photo(1600, 1200).save(path, quality=90)
    preprocess = test_preprocess(224, *IMAGENET_STATISTICS)
    image = read_for_test(path, preprocess)
    assert image.size == (400, 300)
    slow = T.CenterCrop(224)(T.Resize(256)(Image.open(path).convert("RGB")))
    away = (test_pixels(image, preprocess).int() - torch.from_numpy(np.array(slow)).permute(2, 0, 1).int()).abs()
    assert away.float().mean() < 2 and away.max() <= 12


def test_preprocess_sizes() -> None:
    big, small = test_preprocess(224, *IMAGENET_STATISTICS), test_preprocess(32, *IMAGENET_STATISTICS)
    assert (big["resize"], big["crop"], small["resize"], small["crop"]) == (256, True, 32, False)


def test_transform_is_normalised_test_pixels() -> None:
    preprocess = test_preprocess(224, *IMAGENET_STATISTICS)
    image = photo(300, 260)
    slow = T.Normalize(*IMAGENET_STATISTICS)(test_pixels(image, preprocess) / 255)
    assert torch.allclose(test_transform(preprocess)(image), slow, atol=1e-5)
    grey = test_transform(preprocess)(image.convert("L"))
    assert grey.shape == (3, 224, 224) and grey.is_contiguous()


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_colour_jitter_is_torchvisions(order: list[int]) -> None:
    factors = [1.35, 0.7, 1.4]
    pixels = torch.from_numpy(np.array(photo(60, 50))).permute(2, 0, 1).contiguous()
    slow = pixels / 255
    for step in order:
        slow = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[step](slow, factors[step])
    fast = colour_jitter(pixels, Fixed(factors, order), 0.4)
    assert fast.dtype == torch.uint8
    assert (fast.float() - slow * 255).abs().max() <= 0.51


def test_crop_boxes_have_torchvisions_distribution() -> None:
    rng, n = np.random.default_rng(0), 4000
    ours = np.array([random_crop_box(rng, 500, 375) for _ in range(n)])
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    theirs = np.array([T.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(n)])
    theirs = theirs[:, [1, 0, 3, 2]]   # (top, left, height, width) -> (left, top, width, height)
    for a, b in zip(ours.T, theirs.T, strict=True):
        grid = np.quantile(np.concatenate([a, b]), np.linspace(0, 1, 30))
        gap = np.abs(np.searchsorted(np.sort(a), grid) - np.searchsorted(np.sort(b), grid)).max() / n
        assert gap < 0.045     # Kolmogorov-Smirnov: 1.95 * sqrt(2 / n) = 0.044 at p = 0.001
    assert (ours[:, 0] + ours[:, 2] <= 500).all() and (ours[:, 1] + ours[:, 3] <= 375).all()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1000, 1), (1, 1000), (3, 2)])
def test_crop_boxes_of_odd_shapes(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        left, top, wide, high = random_crop_box(rng, width, height)
        assert left >= 0 and top >= 0 and 1 <= wide <= width - left and 1 <= high <= height - top


def test_training_crop_equals_pillows_for_the_same_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "a.jpg")
    photo(500, 375).save(path, quality=95)
    monkeypatch.setattr(transforms, "random_crop_box", lambda rng, width, height: (37, 21, 300, 280))
    fast = read_for_training(path, np.random.default_rng(0), 224, flip=False)
    slow = F.resized_crop(Image.open(path).convert("RGB"), 21, 37, 280, 300, [224, 224])
    assert (fast.int() - torch.from_numpy(np.array(slow)).permute(2, 0, 1).int()).abs().max() <= 1


def test_training_pixels_follow_the_generator(tmp_path: Path) -> None:
    path = str(tmp_path / "a.jpg")
    photo(400, 300).save(path)
    first, same, other = (read_for_training(path, np.random.default_rng(s), 64, True, 0.4) for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_reduction_keeps_enough_pixels() -> None:
    assert [reduction(length, 224) for length in (100, 447, 448, 895, 896, 1792, 9000)] == [1, 1, 2, 2, 4, 8, 8]
