"""Long-tailed subsets: the published sizes, and LDAM-DRW's choice of images."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_loader.imbalance import img_num_per_cls, long_tail_indices
from utils.errors import ConfigError


def test_published_sizes():
    hundred = img_num_per_cls(500, 100, "exp", 0.01)
    assert sum(hundred) == 10_847 and hundred[0] == 500 and hundred[-1] == 5
    assert [sum(n > 100 for n in hundred), sum(20 <= n <= 100 for n in hundred), sum(n < 20 for n in hundred)] \
        == [35, 35, 30]
    assert sum(img_num_per_cls(5000, 10, "exp", 0.01)) == 12_406
    assert img_num_per_cls(120, 10, "exp", 0.02) == [120, 77, 50, 32, 21, 13, 8, 5, 3, 2]
    assert all(type(n) is int for n in hundred)


def test_step_and_none():
    assert img_num_per_cls(500, 4, "step", 0.1) == [500, 500, 50, 50]
    assert img_num_per_cls(500, 5, "step", 0.1) == [500, 500, 50, 50, 50]
    assert img_num_per_cls(7, 3, None, 0.1) == img_num_per_cls(7, 3, "none", 0.1) == [7, 7, 7]
    assert img_num_per_cls(7, 1, "exp", 0.1) == [7]


@given(st.integers(1, 5000), st.integers(1, 200), st.floats(1e-4, 1))
def test_exponential_sizes_fall_from_the_largest(img_max, cls_num, factor):
    counts = img_num_per_cls(img_max, cls_num, "exp", factor)
    assert len(counts) == cls_num and counts[0] == img_max
    assert counts == sorted(counts, reverse=True)
    if cls_num > 1:
        assert counts[-1] == int(img_max * factor)


@pytest.mark.parametrize(("args", "says"), [
    ((500, 10, "exp", 0), "imb_factor"), ((500, 10, "exp", 1.1), "imb_factor"), ((500, 10, "step", -1), "imb_factor"),
    ((500, 10, "expo", 0.1), "exp"), ((0, 10, "exp", 0.1), "img_max"), ((5, 0, "exp", 0.1), "cls_num")])
def test_wrong_arguments_are_named(args, says):
    with pytest.raises(ConfigError, match=says):
        img_num_per_cls(*args)


def legacy_choice(targets, counts, seed):
    """What LDAM-DRW's class does, on the global generator as it does."""
    state = np.random.get_state()
    try:
        np.random.seed(seed)
        out = []
        for label, count in zip(np.unique(targets), counts, strict=True):
            where = np.where(targets == label)[0]
            np.random.shuffle(where)
            out.extend(where[:count])
        return out
    finally:
        np.random.set_state(state)


@pytest.mark.parametrize("seed", [0, 3])
def test_choice_is_the_legacy_generators(seed):
    targets = np.random.default_rng(1).integers(0, 10, 3000)
    counts = img_num_per_cls(200, 10, "exp", 0.05)
    before = np.random.get_state()[1].copy()
    chosen = long_tail_indices(targets.tolist(), counts, seed)
    assert (np.random.get_state()[1] == before).all(), "the global generator is left alone"
    assert chosen.tolist() == legacy_choice(targets, counts, seed)
    assert chosen.dtype == np.int64 and np.bincount(targets[chosen]).tolist() == counts


def test_choice_for_seed_0_by_number():
    """Written down once, so that neither numpy nor we can change which images a published subset has."""
    targets = np.arange(50) % 5
    assert long_tail_indices(targets, [4, 3, 2, 1, 1]).tolist() == [10, 40, 20, 45, 16, 26, 6, 12, 17, 33, 29]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(0, 9), st.data())
def test_choice_has_the_counts_and_no_image_twice(targets, seed, data):
    classes, available = np.unique(targets, return_counts=True)
    counts = [data.draw(st.integers(0, int(n))) for n in available]
    chosen = long_tail_indices(targets, counts, seed)
    assert len(set(chosen.tolist())) == len(chosen) == sum(counts)
    assert [int((np.asarray(targets)[chosen] == c).sum()) for c in classes] == counts


def test_too_many_images_or_classes_are_named():
    with pytest.raises(ConfigError, match="class 1 has 2 images, 3"):
        long_tail_indices([0, 0, 1, 1], [1, 3])
    with pytest.raises(ConfigError, match="3 classes, targets 2"):
        long_tail_indices([0, 0, 1, 1], [1, 1, 1])
