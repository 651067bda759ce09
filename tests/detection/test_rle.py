"""Masks in COCO's format, against pycocotools and by hand."""
import numpy as np
import pytest

from data_loader.detection.rle import decode, encode, pack, polygons_to_mask, run_lengths, to_mask, unpack


def test_runs_go_down_the_columns_and_begin_with_zeros():
    mask = np.array([[0, 1, 1], [0, 1, 0]])
    assert run_lengths(mask) == [2, 3, 1]
    assert run_lengths(1 - mask) == [0, 2, 3, 1]
    assert decode({"size": [2, 3], "counts": [2, 3, 1]}).tolist() == mask.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_packed_text_is_that_of_pycocotools(seed):
    tool = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(seed)
    mask = (rng.random(rng.integers(1, 90, 2)) < rng.random()).astype(np.uint8)
    ours = encode(mask)
    assert ours["counts"] == tool.encode(np.asfortranarray(mask))["counts"].decode()
    assert (decode(ours) == mask).all()
    assert unpack(pack(run_lengths(mask))) == run_lengths(mask)


@pytest.mark.parametrize("counts", ["5", [3, 4], [7, -1], "\x01", "o"])
def test_runs_that_do_not_fill_the_mask_are_refused(counts):
    with pytest.raises(ValueError):
        decode({"size": [2, 3], "counts": counts})


def test_a_square_covers_its_pixels():
    square = [10, 10, 20, 10, 20, 20, 10, 20]
    mask = polygons_to_mask([square], 40, 30)
    assert mask.shape == (40, 30) and mask.sum() == 100 and mask[10:20, 10:20].all()
    assert to_mask([square], 40, 30, (80, 60)).sum() == 400
    assert to_mask([[-5, -5, 5, -5, 5, 5, -5, 5]], 40, 30).sum() == 25      # what sticks out is cut off
    assert to_mask([[-9, -9, -5, -9, -5, -5]], 40, 30).sum() == 0


def test_polygons_agree_with_pycocotools():
    tool = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    overlaps = []
    for _ in range(30):
        angles = np.sort(rng.random(12)) * 2 * np.pi
        polygon = (np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(15, 35, (12, 1)) + (50, 45)).ravel()
        ours = polygons_to_mask([polygon.tolist()], 90, 100)
        theirs = tool.decode(tool.merge(tool.frPyObjects([polygon.tolist()], 90, 100)))
        overlaps.append((ours & theirs).sum() / (ours | theirs).sum())
    assert np.mean(overlaps) > 0.95
