"""Augmentation policies by the batch: Pillow's pixels, the published frequencies, erased boxes, alternating flips."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, RandAugment, TrivialAugmentWide
from torchvision.transforms.autoaugment import _apply_op

from data_loader import policies
from data_loader.data_loaders import DigitsLTDataLoader
from data_loader.erasing import draw_boxes, erase
from data_loader.memory import MemoryImages, Recipe
from data_loader.transforms import alternate_flips, test_preprocess
from data_loader.workers import Sources
from utils.errors import ConfigError
from utils.seed import generator

PLAIN = dict(mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)
THEIRS = {"autoaugment": AutoAugment(AutoAugmentPolicy.CIFAR10), "randaugment": RandAugment(),
          "trivialaugment": TrivialAugmentWide()}


def pictures(n: int, size: int, seed: int) -> np.ndarray:
    """Noise, smooth pictures and single colours."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        cells = (size, 3, 1)[i % 3]
        picture = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        found.append(np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)))
    return np.stack(found)


def one_by_one(image: np.ndarray, name: str, strength: float) -> np.ndarray:
    if name == "Identity":
        return image
    return np.asarray(_apply_op(Image.fromarray(image), name, strength, InterpolationMode.NEAREST, None))


@pytest.mark.parametrize("name", policies.OPERATIONS)
@settings(max_examples=8, deadline=None)
@given(size=st.integers(3, 33), wide=st.booleans(), level=st.integers(0, 30), sign=st.sampled_from([1, -1]),
       seed=st.integers(0, 1000))
def test_each_operation_gives_torchvisions_pixels(name: str, size: int, wide: bool, level: int, sign: int,
                                                  seed: int) -> None:
    images = pictures(1 + seed % 6, size, seed)
    strengths = policies.magnitudes(31, size, wide).get(name, torch.zeros(31, dtype=torch.float64))
    strength = float(strengths[level]) * (sign if name in policies._SIGNED else 1)
    found = policies.apply(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
                           torch.full((len(images),), policies.OPERATIONS.index(name)),
                           torch.full((len(images),), strength, dtype=torch.float64))
    for image, batch in zip(images, found.permute(0, 2, 3, 1).numpy()):
        np.testing.assert_array_equal(batch, one_by_one(image, name, strength))


@pytest.mark.parametrize("policy", policies.DRAWS)
def test_a_policys_batch_equals_its_steps_one_by_one(policy: str) -> None:
    recipe = Recipe(32, border=4, degrees=10.0, policy=policy, **PLAIN)
    pixels = pictures(40, 32, 1)
    images = MemoryImages(pixels, recipe)
    draws = images.draw(40, 5)
    found = images.augmented(torch.arange(40), draws).round().numpy().astype(np.uint8)
    cropped = MemoryImages(pixels, Recipe(32, border=4, degrees=10.0, **PLAIN)).augmented(torch.arange(40), draws)
    for i, image in enumerate(cropped.round().byte().permute(0, 2, 3, 1).numpy()):
        for number, strength in zip(draws.operation[i].tolist(), draws.strength[i].tolist()):
            image = one_by_one(image, policies.OPERATIONS[number], strength)
        np.testing.assert_array_equal(found[i].transpose(1, 2, 0), image)


def test_the_sub_policies_are_torchvisions() -> None:
    theirs = [tuple((name, chance, level or 0) for name, chance, level in pair)
              for pair in THEIRS["autoaugment"].policies]
    assert sorted(policies.CIFAR10_POLICY) == sorted(theirs)


@pytest.mark.parametrize("policy", policies.DRAWS)
def test_operations_come_as_often_as_torchvision_draws_them(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-squared of (operation, strength) over both, as two samples of one distribution."""
    seen: dict[tuple, list[int]] = {}
    number, strength = policies.draw_operations(policy, 40000, 32, generator(3))
    for pair in zip(number.flatten().tolist(), strength.flatten().tolist()):
        name = policies.OPERATIONS[pair[0]]
        seen.setdefault((name, round(pair[1], 3)), [0, 0])[0] += name != "Identity"

    def note(image: object, name: str, magnitude: float, **more: object) -> object:
        seen.setdefault((name, round(magnitude, 3)), [0, 0])[1] += name != "Identity"
        return image
    monkeypatch.setattr("torchvision.transforms.autoaugment._apply_op", note)
    torch.manual_seed(0)
    image = Image.new("RGB", (32, 32))
    for _ in range(8000):
        THEIRS[policy](image)
    counts = np.array([pair for pair in seen.values() if sum(pair)], dtype=float).T
    counts = counts[:, counts.sum(0) >= 60]
    expected = counts.sum(0) * counts.sum(1, keepdims=True) / counts.sum()
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), counts.shape[1] - 1
    assert freedom > 10 and abs(counts[0].sum() / counts[1].sum() - 5) < 0.15
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)   # p about 0.0001


def test_basic_draws_stay_what_they_were_beside_a_policy_and_boxes() -> None:
    plain, more = Recipe(32, **PLAIN), Recipe(32, **PLAIN, policy="autoaugment", cutout=8, erasing=0.5)
    one, other = (recipe.draw(50, 8, 1, 2) for recipe in (plain, more))
    for name in ("top", "left", "flip", "angle"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.operation.shape == (50, 0) and other.boxes.shape == (50, 2, 4)


@settings(max_examples=20, deadline=None)
@given(size=st.integers(2, 40), cutout=st.integers(0, 50), erasing=st.sampled_from([0.0, 0.4, 1.0]),
       seed=st.integers(0, 100))
def test_boxes_become_zero_and_nothing_else_does(size: int, cutout: int, erasing: float, seed: int) -> None:
    boxes = draw_boxes(30, size, cutout, erasing, generator(seed))
    found = erase(torch.ones(30, 2, size, size), boxes)
    slow = np.ones((30, 2, size, size))
    for image, own in zip(slow, boxes.tolist()):
        for top, bottom, left, right in own:
            image[:, top:bottom, left:right] = 0
    np.testing.assert_array_equal(found.numpy(), slow)
    if cutout:
        tall = boxes[:, 0, 1] - boxes[:, 0, 0]
        assert (tall <= cutout).all() and (tall >= min(cutout - cutout // 2, 1)).all()
    if erasing:
        area = ((boxes[:, -1, 1] - boxes[:, -1, 0]) * (boxes[:, -1, 3] - boxes[:, -1, 2])).float() / size ** 2
        assert (area <= 0.34 + 1.1 / size).all() and (erasing < 1 or size < 8 or (area > 0.01).all())


def test_cutouts_centre_is_anywhere() -> None:
    boxes = draw_boxes(20000, 8, 4, 0, generator(0))[:, 0]
    counts = torch.bincount(boxes[:, 0] * 8 + boxes[:, 1], minlength=1)
    starts = counts[counts > 0].float() / 20000   # -2..5 cut at the edge: (0,2) (0,3) (0,4) (1,5) ... (4,8) (5,8)
    assert len(starts) == 8 and (starts - 1 / 8).abs().max() < 0.01


def test_an_epoch_with_everything_is_a_function_of_its_number() -> None:
    def epoch(number: int, start: int = 0) -> list[torch.Tensor]:
        loader = DigitsLTDataLoader(batch_size=64, augment="trivialaugment", cutout=8, random_erasing=0.3, seed=4,
                                    flip="alternate", image_size=16)
        loader.set_epoch(number, start)
        return [images for images, _ in loader]
    first, again, other = epoch(1), epoch(1), epoch(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])


def test_alternating_flips_show_both_sides_in_two_epochs() -> None:
    loader = DigitsLTDataLoader(batch_size=331, flip="alternate", rotation=0, shuffle=False, seed=1)
    sides = []
    for epoch in (1, 2, 3):
        loader.set_epoch(epoch)
        sides.append(loader._epoch_draws(epoch, loader.epoch_order(epoch)).flip)
    assert torch.equal(sides[0], sides[2]) and torch.equal(sides[0] + sides[1], torch.ones_like(sides[0]))
    assert 0.3 < sides[0].float().mean() < 0.7


def test_large_images_alternate_too(tmp_path) -> None:
    paths = []
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (90, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    how = test_preprocess(72, (0.5,) * 3, (0.5,) * 3)
    turning, still = (Sources(paths, None, how, seed=5, mode="train", flip=flip) for flip in ("alternate", False))
    for epoch in (1, 2, 3):
        expected = alternate_flips(5, epoch, np.arange(6))
        for i in range(6):
            (found, *_), (plain, *_) = turning[epoch, i, i], still[epoch, i, i]
            assert torch.equal(found, plain.flip(2) if expected[i] else plain)


@pytest.mark.parametrize(("wrong", "says"), [
    ({"augment": "autoagument"}, "data_loader.args.augment"), ({"cutout": -1}, "data_loader.args.cutout"),
    ({"random_erasing": 1.5}, "data_loader.args.random_erasing"), ({"rotation": -5}, "data_loader.args.rotation"),
    ({"flip": "often"}, "data_loader.args.flip"), ({"mix": {"type": "mixpu"}}, "mixup"),
    ({"mix": {"type": "mixup", "alpha": 0}}, "mix.alpha"), ({"mix": {"type": "mixup", "prob": 2}}, "mix.prob"),
    ({"mix": {"type": "cutmix", "of_epochs": 1}}, "off_epochs"), ({"mix": "mixup"}, "data_loader.args.mix"),
    ({"mix": {"type": "mixup", "off_epochs": 1.5}}, "mix.off_epochs")])
def test_wrong_values_name_their_key(wrong: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DigitsLTDataLoader(batch_size=8, **wrong)


@pytest.mark.parametrize(("args", "says"), [({"jitter": 0.4}, "jitter has no effect on images this small"),
                                            ({"jitter": 0.0}, None), ({}, None)])
def test_jitter_of_small_images_is_said_to_do_nothing(args, says):
    notes = DigitsLTDataLoader(batch_size=64, image_size=8, **args).notes
    assert any(says in note for note in notes) if says else not any("jitter" in note for note in notes)
