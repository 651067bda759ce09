"""What a run's figures say in plain words: numbers by hand, and which classes are named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logger.figures.facts import RunFacts
from tools.words import in_words, wilson, words_for


def said(right, counts, accuracy, ece=0.02, n=400):
    result = {"accuracy": accuracy, "n_samples": n, "ece": ece, "per_class_acc": right}
    return in_words(RunFacts({}, result, counts, [f"c{i}" for i in range(len(counts))]))


def test_the_range_is_wilsons():
    """Newcombe, Statistics in Medicine 1998, table I: 81 of 263 gives 0.2553 to 0.3662, 0 of 20 ends at 0.1611."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_the_range_holds_the_share(count, share):
    low, high = wilson(share, count)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1


def test_weak_classes_are_named_the_rarest_first():
    trust, photos, unknown = said([0.95, 0.55, None, 0.2, 0.75], [100, 30, 4, 2, 9], 0.8)
    assert "it names 80 right (76 to 84)" in trust and "2 points off" in trust and "--calibrate" not in trust
    assert photos.index("c3 (2 training photos, 20 % right)") < photos.index("c1 (30 training photos, 55 % right)")
    assert "c0" not in photos and "c4" not in photos       # 75 % is within ten points of 80 %
    assert "c2" in unknown


def test_only_the_first_few_are_named():
    photos = said([0.9] + [0.1] * 8, [50] + [3] * 8, 0.6)[1]
    assert photos.count("3 training photos") == 5 and photos.endswith("and 3 more.")


def test_nothing_stands_out():
    assert said([0.9, 0.88], [10, 10], 0.89)[1].startswith("no class stands out")
    assert "1 training photo," in said([0.9, 0.1], [10, 1], 0.89)[1]


def test_bad_probabilities_are_said_with_what_mends_them():
    assert "12 points off" in said([0.9], [10], 0.9, ece=0.12)[0] and "--calibrate" in said([0.9], [10], 0.9, 0.12)[0]
    for more in ({"calibration": {"temperature": 2}}, {"classifier": "ncm"}):     # done, or of no use
        result = {"accuracy": 0.9, "n_samples": 400, "ece": 0.12, "per_class_acc": [0.9], **more}
        assert "--calibrate" not in in_words(RunFacts({}, result, [10], ["a"]))[0]


def test_a_benchmark_or_a_detector_is_left_alone():
    class Loader:
        own_images, cls_num_list, class_names = False, [3, 2], ["a", "b"]
    result = {"accuracy": 0.5, "n_samples": 10, "per_class_acc": [0.5, 0.5]}
    assert words_for({}, result, Loader()) == []
    Loader.own_images = True
    assert len(words_for({}, result, Loader())) == 2
    assert words_for({}, {"bbox_AP": 0.3}, Loader()) == []
