"""Masks in COCO's formats, and annotations of photos that lie on their side."""
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools")

from data_loader.detection.masks import area, decode, encode, to_mask, turned


@pytest.mark.parametrize("seed", range(5))
def test_masks_come_back(seed):
    rng = np.random.default_rng(seed)
    mask = (rng.random(rng.integers(1, 90, 2)) < rng.random()).astype(np.uint8)
    assert (decode(encode(mask), *mask.shape) == mask).all() and area(encode(mask), *mask.shape) == mask.sum()


def test_runs_go_down_the_columns_and_begin_with_zeros():
    assert decode({"size": [2, 3], "counts": [2, 3, 1]}, 2, 3).tolist() == [[0, 1, 1], [0, 1, 0]]


@pytest.mark.parametrize("counts", [[3, 4], [7, -1], "\x01", "o", "52"])
def test_runs_that_do_not_fill_the_mask_are_refused(counts):
    with pytest.raises(ValueError):
        decode({"size": [2, 3], "counts": counts}, 2, 3)


def test_a_square_covers_its_pixels():
    square = [10, 10, 20, 10, 20, 20, 10, 20]
    mask = decode([square], 40, 30)
    assert mask.shape == (40, 30) and mask.sum() == 100 and mask[10:20, 10:20].all()
    assert to_mask([square], 40, 30, (80, 60)).sum() == 400
    assert to_mask([[-5, -5, 5, -5, 5, 5, -5, 5]], 40, 30).sum() == 25      # what sticks out is cut off


@pytest.mark.parametrize("kind", ["polygon", "runs"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_annotations_turn_as_pillow_turns_the_picture(kind, orientation):
    from PIL import ImageOps
    height, width = 40, 60
    mask = np.zeros((height, width), np.uint8)
    mask[5:25, 10:16] = 1
    mask[20:25, 10:40] = 1
    corners = [10, 5, 16, 5, 16, 20, 40, 20, 40, 25, 10, 25]
    annotation = {"bbox": [10, 5, 30, 20], "segmentation": [corners] if kind == "polygon" else encode(mask)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(mask * 255)
    picture.getexif().update(exif)
    picture.info["exif"] = exif.tobytes()
    shown = np.asarray(ImageOps.exif_transpose(picture)) > 0
    found = turned(annotation, orientation, height, width)
    assert shown.shape == (width, height)
    got = to_mask(found["segmentation"], width, height)
    assert (got != shown).sum() <= 2
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    assert found["bbox"] == [columns[0], rows[0], len(columns), len(rows)]
