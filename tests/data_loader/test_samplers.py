"""Samplers: class frequencies fit the theory, epochs are functions of (seed, epoch), ranks share, and it is fast."""
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from data_loader.imbalance import img_num_per_cls
from data_loader.samplers import (
    SAMPLERS,
    ClassAwareSampler,
    ClassBalancedSampler,
    EpochSampler,
    InstanceBalancedSampler,
    ProgressivelyBalancedSampler,
    SquareRootSampler,
    power_of,
)
from utils.errors import ConfigError

COUNTS = np.array([400, 150, 60, 25, 10, 3])


def make_targets(counts=COUNTS, seed=0):
    targets = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(seed).shuffle(targets)
    return targets


TARGETS = make_targets()


def make(name, targets=TARGETS, **args):
    return SAMPLERS[name](targets, **({"epochs": 5} if name == "ProgressivelyBalanced" else {}), **args)


def drawn(sampler, epochs=20):
    """All indices of some epochs."""
    return np.concatenate([sampler.epoch_indices(k) for k in range(1, epochs + 1)])


def fits(observed, share):
    return chisquare(observed, share / share.sum() * observed.sum()).pvalue > 0.01


@pytest.mark.parametrize(("sampler", "power"), [
    (SquareRootSampler(TARGETS, seed=1), 0.5), (ClassBalancedSampler(TARGETS, seed=1), 0)])
def test_class_and_image_frequencies_fit_the_theory(sampler, power):
    indices = drawn(sampler, 60)
    assert fits(np.bincount(TARGETS[indices], minlength=len(COUNTS)), COUNTS.astype(float) ** power)
    assert fits(np.bincount(indices, minlength=len(TARGETS)), COUNTS[TARGETS].astype(float) ** (power - 1))


@pytest.mark.parametrize("epochs", [2, 5])
def test_progressive_mixes_k_minus_1_over_t_minus_1(epochs):
    instance, balanced = COUNTS / COUNTS.sum(), np.full(len(COUNTS), 1 / len(COUNTS))
    targets = np.repeat(TARGETS, 50)
    sampler = ProgressivelyBalancedSampler(targets, epochs, seed=3)
    for k in range(1, epochs + 1):
        share = (k - 1) / (epochs - 1)
        assert sampler.class_balanced_share(k) == share
        got = np.bincount(targets[sampler.epoch_indices(k)], minlength=len(COUNTS))
        assert fits(got, (1 - share) * instance + share * balanced)
    assert sampler.class_balanced_share(epochs + 3) == 1


def test_progressive_over_one_epoch_is_instance_balanced():
    targets = np.repeat(TARGETS, 20)
    sampler = ProgressivelyBalancedSampler(targets, 1)
    assert [sampler.class_balanced_share(k) for k in (1, 2)] == [0, 0]
    assert fits(np.bincount(targets[sampler.epoch_indices()]), COUNTS)


def test_instance_balanced_shows_each_image_once():
    sampler = InstanceBalancedSampler(TARGETS)
    assert sorted(sampler) == list(range(len(TARGETS)))
    assert sampler.epoch_indices().tolist() != list(range(len(TARGETS)))
    assert sorted(np.bincount(InstanceBalancedSampler([5, 6, 7], epoch_length=7).epoch_indices())) == [2, 2, 3]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 99),
       st.integers(1, 200))
def test_class_aware_goes_in_shuffled_cycles(counts, k, seed, length):
    targets = make_targets(np.array(counts), seed)
    indices = ClassAwareSampler(targets, seed, num_samples_cls=k, epoch_length=length).epoch_indices(2)
    assert len(indices) == length
    turns = [indices[i:i + k] for i in range(0, length, k)]
    classes = [targets[turn[0]] for turn in turns]
    assert all((targets[turn] == c).all() for turn, c in zip(turns, classes)), "k images of one class in a row"
    for i in range(0, len(classes), len(counts)):
        cycle = classes[i:i + len(counts)]
        assert len(set(cycle)) == len(cycle), "each class once a cycle"
    for c, n in enumerate(counts):
        own = indices[targets[indices] == c]
        for i in range(0, len(own), n):
            assert len(set(own[i:i + n])) == len(own[i:i + n]), "all images of a class before one comes again"


def test_class_aware_images_are_shuffled_evenly():
    """The first image of the smallest class's stream is each of the three equally often."""
    sampler = ClassAwareSampler(TARGETS, seed=5)
    own = np.flatnonzero(TARGETS == 5)
    firsts = [next(i for i in sampler.epoch_indices(k).tolist() if TARGETS[i] == 5) for k in range(300)]
    assert fits(np.array([firsts.count(i) for i in own]), np.ones(3))


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_epoch_is_a_function_of_seed_and_epoch(name):
    sampler, twin, other = make(name, seed=7), make(name, seed=7), make(name, seed=8)
    assert list(sampler) == sampler.epoch_indices(1).tolist(), "epoch 1 before any call"
    assert sampler.epoch_indices().dtype == np.int64 and len(sampler) == len(TARGETS) == len(list(sampler))
    sampler.set_epoch(3)
    twin.set_epoch(3)
    assert list(sampler) == list(sampler) == list(twin) == make(name, seed=7).epoch_indices(3).tolist()
    assert sampler.epoch_indices(3).tolist() != sampler.epoch_indices(4).tolist()
    assert sampler.epoch_indices(3).tolist() != other.epoch_indices(3).tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_ranks_share_without_overlap(name):
    whole = make(name, seed=2).epoch_indices(1)
    parts = [make(name, seed=2, rank=r, world_size=3) for r in range(3)]
    assert sum(len(p) for p in parts) == len(whole) and [len(list(p)) for p in parts] == [len(p) for p in parts]
    woven = np.empty_like(whole)
    for r, part in enumerate(parts):
        woven[r::3] = list(part)
    assert (woven == whole).all()


@pytest.mark.parametrize("name", SAMPLERS)
@given(labels=st.lists(st.sampled_from([-3, 0, 4, 70_000, 2**40]), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_any_labels_and_sizes(name, labels, seed):
    """Labels with gaps, classes without images, one image: all give valid indices."""
    indices = make(name, np.array(labels), seed=seed).epoch_indices(2)
    assert len(indices) == len(labels) and indices.min() >= 0 and indices.max() < len(labels)


def test_rare_and_far_labels_are_drawn_like_others():
    targets = np.array([0] * 90 + [10**12] * 10)
    assert abs((targets[drawn(ClassBalancedSampler(targets), 100)] > 0).mean() - 0.5) < 0.02


def test_epoch_sizes():
    assert len(ClassBalancedSampler(TARGETS, retain_epoch_size=False)) == 400 * 6
    assert len(ClassBalancedSampler(TARGETS, epoch_length=17).epoch_indices()) == 17
    assert len(ClassAwareSampler(TARGETS, num_samples_cls=4)) == len(TARGETS)


@pytest.mark.parametrize("call", [
    lambda: InstanceBalancedSampler([]), lambda: ClassBalancedSampler(np.zeros((2, 2))),
    lambda: ClassAwareSampler(TARGETS, num_samples_cls=0), lambda: ProgressivelyBalancedSampler(TARGETS, 0),
    lambda: SquareRootSampler(TARGETS, epoch_length=0)])
def test_wrong_arguments_are_named(call):
    with pytest.raises(ConfigError, match=r"data_loader\.args\.sampler"):
        call()


def test_the_power_of_a_loaders_sampler():
    kinds = {"InstanceBalanced": 1.0, "SquareRoot": 0.5, "ClassBalanced": 0.0, "ClassAware": 0.0,
             "ProgressivelyBalanced": 0.0}
    assert {kind: power_of({"sampler": {"type": kind}}) for kind in SAMPLERS} == kinds
    assert [power_of(args) for args in ({}, {"balanced": False}, {"balanced": True}, {"sampler": None})] == [1, 1, 0, 1]


class Undersampled(EpochSampler):
    """Two images of each class, without saying how many that are."""

    def _draw(self, rng, epoch):
        return self._draw_images(np.repeat(np.arange(self.num_classes), 2), rng)


def test_a_sampler_that_draws_another_number_is_named():
    with pytest.raises(ConfigError, match=r"Undersampled draws 12 images for an epoch of 648; its epoch_length"):
        Undersampled(TARGETS).epoch_indices()
    assert len(Undersampled(TARGETS, epoch_length=12).epoch_indices()) == 12


def test_a_sampler_need_not_say_what_it_favours():
    assert Undersampled.power is None
    assert power_of({"sampler": {"type": f"{__name__}:Undersampled"}}) is None


@pytest.fixture(scope="module")
def large():
    """As many images and classes as iNaturalist 2018 (437,513 and 8,142), and numpy's time for one weighted choice."""
    counts = np.array(img_num_per_cls(1000, 8142, "exp", 0.002))
    counts = np.maximum(counts * 437_513 // counts.sum(), 2)
    targets = make_targets(counts)
    chance = (1 / counts)[targets]
    chance /= chance.sum()
    return targets, fastest(lambda: np.random.default_rng(0).choice(len(targets), len(targets), p=chance))


def fastest(call, repeats=3):
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_epoch_of_inaturalist_takes_less_than_three_weighted_choices(name, large):
    targets, choice = large
    assert fastest(lambda: make(name, targets).epoch_indices(3)) < 3 * choice
