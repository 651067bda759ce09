"""Masks in COCO's formats, and annotations of photos that lie on their side."""
import numpy as np
import pytest
from PIL import Image, ImageOps

pytest.importorskip("pycocotools")

from data_loader.detection.masks import (
    area,
    decode,
    encode,
    run_lengths,
    to_mask,
    turn_boxes,
    turn_mask,
    undone,
)


@pytest.mark.parametrize("seed", range(5))
def test_masks_come_back(seed):
    rng = np.random.default_rng(seed)
    mask = (rng.random(rng.integers(1, 90, 2)) < rng.random()).astype(np.uint8)
    assert (decode(encode(mask), *mask.shape) == mask).all() and area(encode(mask), *mask.shape) == mask.sum()
    runs = run_lengths(encode(mask)["counts"])
    assert (np.repeat(np.arange(len(runs)) % 2, runs) == mask.ravel(order="F")).all()


def test_runs_go_down_the_columns_and_begin_with_zeros():
    assert decode({"size": [2, 3], "counts": [2, 3, 1]}, 2, 3).tolist() == [[0, 1, 1], [0, 1, 0]]


@pytest.mark.parametrize("counts", ["5", "1", "", [5], [3, 4], [7, -1], "\x01", "o", "52", "_j", "0" * 50, "oooooooo1"])
def test_runs_that_do_not_fill_the_mask_are_refused(counts):
    with pytest.raises(ValueError):
        decode({"size": [2, 3], "counts": counts}, 2, 3)


def test_a_square_covers_its_pixels():
    square = [10, 10, 20, 10, 20, 20, 10, 20]
    mask = decode([square], 40, 30)
    assert mask.shape == (40, 30) and mask.sum() == 100 and mask[10:20, 10:20].all()
    assert to_mask([square], 40, 30, (80, 60)).sum() == 400
    assert to_mask([[-5, -5, 5, -5, 5, 5, -5, 5]], 40, 30).sum() == 25      # what sticks out is cut off


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_and_masks_turn_as_pillow_turns_the_picture(orientation):
    mask = np.zeros((40, 60), np.uint8)
    mask[5:25, 10:16] = 1
    mask[20:25, 10:40] = 1
    picture = Image.fromarray(mask * 255)
    picture.getexif()[0x0112] = orientation
    shown = np.asarray(ImageOps.exif_transpose(picture)) > 0
    assert (turn_mask(mask, orientation) == shown).all()
    assert (turn_mask(turn_mask(mask[None], orientation), undone(orientation)) == mask).all()
    boxes = np.array([[10, 5, 40, 25]], np.float32)
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    turned = turn_boxes(boxes, orientation, 60, 40)
    assert turned.tolist() == [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]
    assert (turn_boxes(turned, undone(orientation), *shown.shape[::-1]) == boxes).all()
