"""Pictures with detections in them."""
import numpy as np
import pytest
import torch
from PIL import Image

from logger.figures.detections import class_colour, draw_detections

FOUND = {"boxes": torch.tensor([[4.0, 20, 24, 40], [30, 30, 50, 50]]), "labels": torch.tensor([1, 2]),
         "scores": torch.tensor([0.9, 0.3]), "masks": torch.zeros(2, 1, 64, 64)}
FOUND["masks"][0, 0, 22:38, 6:22] = 1
FOUND["masks"][1, 0, 32:48, 32:48] = 1


def test_what_scores_enough_is_drawn():
    picture = np.full((64, 64, 3), 100, dtype=np.uint8)
    drawn = draw_detections(picture, FOUND, ["zero", "one"])
    assert drawn.shape == (64, 64, 3) and drawn.dtype == np.uint8 and (picture == 100).all()
    assert tuple(drawn[39, 10]) == class_colour(1)            # the outline
    assert (drawn[30, 15] != 100).any()                       # the tint
    assert (drawn[31:49, 31:49] == 100).all()                 # too uncertain
    assert (draw_detections(picture, FOUND, threshold=0.2)[40, 40] != 100).any()


@pytest.mark.parametrize("image", [torch.full((3, 64, 64), 0.5), Image.new("L", (64, 64)),
                                   np.zeros((64, 64, 3), np.uint8)], ids=["tensor", "PIL", "array"])
def test_any_kind_of_picture_and_targets_without_scores(image):
    target = {key: FOUND[key] for key in ("boxes", "labels")}
    assert draw_detections(image, target).shape == (64, 64, 3)
    nothing = {key: value[:0] for key, value in FOUND.items()}
    assert draw_detections(image, nothing).shape == (64, 64, 3)


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        draw_detections(np.zeros((64, 64)), FOUND)
