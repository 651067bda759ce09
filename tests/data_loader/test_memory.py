"""Batch augmentation against torchvision's per-image transforms, pixel by pixel and in distribution."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from data_loader.data_loaders import DigitsLTDataLoader, ImageFolderLTDataLoader
from data_loader.memory import MemoryImages, Recipe

PLAIN = dict(mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)   # normalising that leaves the levels as they are


def some_pixels(n: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (n, side, side, 3), dtype=np.uint8)


def slow_twin(pixels: np.ndarray, recipe: Recipe, top: int, left: int, flip: int, angle: float) -> np.ndarray:
    image = F.pad(Image.fromarray(pixels), recipe.border)
    image = F.crop(image, top, left, recipe.size, recipe.size)
    image = F.hflip(image) if flip else image
    return np.asarray(F.rotate(image, angle)).transpose(2, 0, 1)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 40), border=st.integers(0, 6), more=st.integers(0, 9),
       degrees=st.sampled_from([0.0, 15.0, 180.0]), seed=st.integers(0, 2**31),
       which=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_equals_crop_flip_rotate_one_by_one(size: int, border: int, more: int, degrees: float, seed: int,
                                            which: list[int]) -> None:
    recipe = Recipe(size, border=border, degrees=degrees, **PLAIN)
    pixels = some_pixels(5, size + more)
    images = MemoryImages(pixels, recipe)
    index = torch.tensor(which)
    draws = images.draw(len(index), seed)
    out = images.augmented(index, draws)
    assert out.shape == (len(which), 3, size, size) and out.is_contiguous()
    for i, image in enumerate(which):
        slow = slow_twin(pixels[image], recipe, int(draws.top[i]), int(draws.left[i]), int(draws.flip[i]),
                         float(draws.angle[i]))
        assert np.array_equal(slow, out[i].round().numpy().astype(np.uint8))


def test_normalises_as_torchvision() -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    pixels = some_pixels(4, 32)
    out = MemoryImages(pixels, Recipe(32, mean, std)).plain(torch.arange(4))
    slow = torch.stack([T.Compose([T.ToTensor(), T.Normalize(mean, std)])(Image.fromarray(p)) for p in pixels])
    assert torch.allclose(out, slow, atol=1e-6)


@pytest.mark.parametrize(("size", "side"), [(64, 73), (32, 32), (33, 38)])
def test_plain_is_the_centre(size: int, side: int) -> None:
    pixels = some_pixels(3, side)
    out = MemoryImages(pixels, Recipe(size, border=0, **PLAIN)).plain(torch.tensor([2, 0]))
    slow = np.asarray(F.center_crop(Image.fromarray(pixels[2]), size)).transpose(2, 0, 1)
    assert np.array_equal(out[0].round().numpy().astype(np.uint8), slow)


def test_raw_gives_the_pixels_back() -> None:
    pixels = some_pixels(3, 20)
    images = MemoryImages(pixels, Recipe(20, border=3, **PLAIN))
    assert all(np.array_equal(images.raw(i), pixels[i]) for i in range(3))


def test_draws_are_torchvisions_distribution() -> None:
    images = MemoryImages(some_pixels(1, 32), Recipe(32, **PLAIN))
    n = 20000
    draws = images.draw(n, 7)
    for corner in (draws.top, draws.left):   # uniform over 0 to 8, both included
        counts = torch.bincount(corner.long(), minlength=9)
        assert len(counts) == 9
        assert ((counts - n / 9) ** 2 / (n / 9)).sum() < 30    # chi-squared, 8 degrees: p < 0.0003
    assert abs(draws.flip.float().mean() - 0.5) < 0.02
    assert draws.angle.min() >= -15 and draws.angle.max() <= 15
    parts = torch.histc(draws.angle, bins=10, min=-15, max=15)
    assert ((parts - n / 10) ** 2 / (n / 10)).sum() < 33
    pairs = torch.stack([draws.top, draws.left, draws.flip, draws.angle]).float()
    assert (torch.corrcoef(pairs) - torch.eye(4)).abs().max() < 0.03   # independent of each other
    # Borders: the share of black that padding and rotation bring in, as torchvision's pipeline has it.
    white = MemoryImages(np.full((1, 32, 32, 3), 255, np.uint8), Recipe(32, **PLAIN))
    black = (white.augmented(torch.zeros(2000, dtype=torch.long), images.draw(2000, 3)) == 0).float().mean((0, 1))
    pipeline = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.RandomRotation(15)])
    torch.manual_seed(0)
    picture = Image.fromarray(np.full((32, 32, 3), 255, np.uint8))
    slow = np.mean([np.asarray(pipeline(picture))[..., 0] == 0 for _ in range(2000)], axis=0)
    assert np.abs(black.numpy() - slow).max() < 0.06 and abs(float(black.mean()) - slow.mean()) < 0.006


def test_draws_depend_on_the_seeds_alone() -> None:
    images = MemoryImages(some_pixels(1, 8), Recipe(8, border=1, **PLAIN))
    torch.manual_seed(1)
    first = images.draw(50, 3, 1)
    torch.manual_seed(2)
    assert torch.equal(first.angle, images.draw(50, 3, 1).angle)
    assert not torch.equal(first.angle, images.draw(50, 3, 2).angle)


def test_leaves_the_thread_count_alone() -> None:
    images, threads = MemoryImages(some_pixels(1, 8), Recipe(8, border=1, **PLAIN)), torch.get_num_threads()
    images.plain(torch.tensor([0]))
    assert torch.get_num_threads() == threads
    with pytest.raises(IndexError):
        images.plain(torch.tensor([99]))
    assert torch.get_num_threads() == threads


class Copies(TorchDispatchMode):
    """Counts tensors that are copied from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.up = self.down = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        places = [a.device.type for a in args if isinstance(a, torch.Tensor)]
        to = (kwargs or {}).get("device")
        if func is torch.ops.aten._to_copy.default and to is not None:
            self.up += places[0] == "cpu" != torch.device(to).type
            self.down += places[0] != "cpu" == torch.device(to).type
        elif func is torch.ops.aten.copy_.default:
            self.up += places == ["meta", "cpu"]
            self.down += places == ["cpu", "meta"]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_images_on_a_device_copies_nothing(training: bool) -> None:
    """A copy from the host may wait for the device; numbers of an epoch are copied at its beginning."""
    loader = DigitsLTDataLoader(batch_size=32, training=training, device="meta", cutout=4)
    batches = iter(loader)
    next(batches)
    with Copies() as copies:
        images, labels = next(batches)
    assert images.device.type == labels.device.type == "meta" and (copies.up, copies.down) == (0, 0)


def test_small_images_from_workers_go_to_the_device_and_stay(tmp_path: Path) -> None:
    for name in "ab":
        for part in ("train", "test"):
            (tmp_path / part / name).mkdir(parents=True)
            for number, pixels in enumerate(some_pixels(6, 24)):
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    loader = ImageFolderLTDataLoader(str(tmp_path), 4, image_size=16, num_workers=0, cache=False, device="meta")
    batches = iter(loader)
    next(batches)
    with Copies() as copies:
        images, labels = next(batches)
    assert images.shape == (4, 3, 16, 16) and copies.down == 0
    assert copies.up == 3       # the pixels, the labels, and where in the epoch they are


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same_pixels() -> None:
    pixels, recipe = some_pixels(9, 32), Recipe(32, **PLAIN)
    here, there = MemoryImages(pixels, recipe), MemoryImages(pixels, recipe, "cuda")
    index = torch.arange(9)
    assert torch.equal(here.augmented(index, here.draw(9, 1)),
                       there.augmented(index.cuda(), there.draw(9, 1)).cpu())
