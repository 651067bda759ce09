"""Mixup and CutMix of batches: images and labels against a loop over the images, one draw for all ranks, resume."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.labels import plain_labels
from data_loader.data_loaders import DigitsLTDataLoader, ImageFolderLTDataLoader
from data_loader.mixing import Mixing
from model.loss import MixedLabels


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(["mixup", "cutmix", "either"]), n=st.integers(1, 9), size=st.integers(1, 9),
       alpha=st.sampled_from([0.2, 1.0]), position=st.integers(0, 1000))
def test_an_image_is_its_label_and_its_partners_in_the_label_weights_shares(kind: str, n: int, size: int, alpha: float,
                                                                            position: int) -> None:
    # Each image is filled with its own number, so that what it became tells who its partner was.
    images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 3, size, size).contiguous()
    labels = torch.arange(n)
    mixed, target = Mixing(kind, alpha).mix(images, labels, 0, 1, position)
    assert isinstance(target, MixedLabels) and 0 <= target.weight <= 1 and len(target) == n
    assert torch.equal(target.first, labels) and sorted(target.second.tolist()) == labels.tolist()
    for image, first, second in zip(mixed, target.first, target.second):
        share = target.weight * float(first) + (1 - target.weight) * float(second)
        assert float(image.mean()) == pytest.approx(share, abs=1e-4)   # both kinds: on average, their shares
        if kind == "cutmix":
            assert set(image.unique().tolist()) <= {float(first), float(second)}
        if kind == "mixup":
            assert image.min().item() == pytest.approx(image.max().item())
    assert torch.equal(images[:, 0, 0, 0], torch.arange(n).float())   # the loader's own tensors aren't touched


def test_weights_are_betas_and_batches_are_mixed_as_often_as_asked() -> None:
    images, labels = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    weights = np.array([Mixing("mixup", 0.4, 0.7).mix(images, labels, 3, 1, i)[1].weight for i in range(3000)])
    mixed = weights[weights < 1]
    assert abs(len(mixed) / 3000 - 0.7) < 0.03
    assert abs(mixed.mean() - 0.5) < 0.03 and abs(mixed.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.01


def test_ranks_share_the_weight_and_have_partners_of_their_own() -> None:
    images, labels = torch.rand(20, 3, 4, 4), torch.arange(20)
    one, other, again = (Mixing("mixup").mix(images, labels, 0, 1, 64, rank)[1] for rank in (0, 1, 0))
    assert one.weight == other.weight and not torch.equal(one.second, other.second)
    assert torch.equal(one.second, again.second)


def test_heavier_label() -> None:
    first, second = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    assert plain_labels(MixedLabels(first, second, 0.3)).tolist() == [4, 5, 6]
    assert plain_labels(MixedLabels(first, second, torch.tensor([0.7, 0.5, 0.1]))).tolist() == [1, 2, 6]
    assert plain_labels(first) is first


def test_a_loader_mixes_training_batches_alone_and_stops_for_the_last_epochs() -> None:
    loader = DigitsLTDataLoader(batch_size=64, image_size=8, validation="holdout", epochs=5, seed=2,
                                mix={"type": "either", "alpha": 1.0, "off_epochs": 2})
    kinds = []
    for epoch in range(1, 6):
        loader.set_epoch(epoch)
        images, labels = next(iter(loader))
        kinds.append(isinstance(labels, MixedLabels))
        assert images.shape == (64, 3, 8, 8) and torch.isfinite(images).all()
    assert kinds == [True] * 3 + [False] * 2
    assert all(torch.is_tensor(labels) for _, labels in loader.split_validation())
    test = DigitsLTDataLoader(batch_size=64, image_size=8, training=False, mix={"type": "mixup"})
    assert all(torch.is_tensor(labels) for _, labels in test)


@pytest.mark.parametrize(("epochs", "says"), [(2, "no image is mixed: data_loader.args.mix.off_epochs is 2"),
                                              (3, "images are mixed")])
def test_a_run_too_short_for_its_mixing_is_told_so(epochs: int, says: str) -> None:
    loader = DigitsLTDataLoader(batch_size=64, image_size=8, epochs=epochs, mix={"type": "mixup", "off_epochs": 2})
    assert any(says in line for line in loader.summary())


def test_a_mixed_epoch_that_goes_on_in_its_middle_is_the_same() -> None:
    def batches(start: int) -> list:
        loader = DigitsLTDataLoader(batch_size=64, image_size=8, seed=2, mix={"type": "cutmix"})
        loader.set_epoch(3, start)
        return list(loader)
    whole, rest = batches(0), batches(2)
    assert len(rest) == len(whole) - 2
    for (images, labels), (own, their) in zip(whole[2:], rest):
        assert torch.equal(images, own) and torch.equal(labels.second, their.second) and labels.weight == their.weight


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment", "trivialaugment"])
def test_large_images_take_the_same_names(policy: str, tmp_path) -> None:
    from PIL import Image
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(6):
            noise = np.random.default_rng(i).integers(0, 256, (90, 120, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{i}.png")

    def epoch(**more: object) -> torch.Tensor:
        loader = ImageFolderLTDataLoader(str(tmp_path), batch_size=12, image_size=80, num_workers=0, seed=1,
                                         validation="none", **more)
        return next(iter(loader))[0]
    first, again, plain = epoch(augment=policy), epoch(augment=policy), epoch()
    assert torch.equal(first, again) and not torch.equal(first, plain)
    erased = epoch(augment=policy, cutout=40)
    assert (erased == 0).all(1).float().mean() > 0.05 and torch.equal(first[erased != 0], erased[erased != 0])
