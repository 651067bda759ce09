"""Validation images drawn after a training are none that was trained on."""
import numpy as np
import pytest
from PIL import Image

from data_loader.data_loaders import DigitsLTDataLoader, ImageFolderLTDataLoader
from data_loader.held_out import check_held_out
from utils.errors import ConfigError


class FixedDigits(DigitsLTDataLoader):
    """Somebody's own, with an imbalance of its own."""

    def __init__(self, data_dir=None, **more):
        super().__init__(data_dir, imb_factor=0.1, **more)


def digits(kind=DigitsLTDataLoader, **args):
    return kind(**{"image_size": 8, "validation": "holdout", **args})


def facts_of(loader):
    return {"class_names": loader.class_names, "cls_num_list": list(loader.cls_num_list)}


@pytest.fixture
def photos(tmp_path):
    """Two classes of 12 images."""
    for label in range(2):
        (tmp_path / f"class{label}").mkdir()
        for number in range(12):
            pixels = np.full((8, 8, 3), 20 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"class{label}" / f"{number}.png")
    return str(tmp_path)


@pytest.mark.parametrize(("before", "now"), [
    ({}, {}), ({"imb_factor": 0.02}, {"imb_type": "exp"}), ({"imb_type": "step"}, {"imb_type": "step"}),
    ({"split_seed": 3, "imb_factor": None}, {"split_seed": 3, "imb_factor": None}), ({"validation": "none"}, {})])
def test_the_same_subset_is_validated(before, now):
    for kind in (DigitsLTDataLoader, FixedDigits) if "imb_factor" not in {**before, **now} else (DigitsLTDataLoader,):
        check_held_out(digits(kind, **now), facts_of(digits(kind, **before)), before, now)


@pytest.mark.parametrize(("before", "now", "says"), [
    ({}, {"split_seed": 1}, "split_seed: 1, but the model was trained with 0"),
    ({"split_seed": 2}, {}, "split_seed: 0, but the model was trained with 2"),
    ({"imb_factor": 0.01}, {"imb_factor": 0.1}, "imb_factor: 0.1, but"), ({"imb_factor": 0.01}, {}, "imb_factor: 0.02"),
    ({}, {"imb_factor": 0.5}, "imb_factor: 0.5"), ({"imb_type": "step"}, {"imb_type": "exp"}, "imb_type: exp")])
def test_another_subset_is_not(before, now, says):
    trained = facts_of(digits(**before))
    with pytest.raises(ConfigError, match=f"data_loader.args.{says}"):
        check_held_out(digits(**now), trained, before, now)
    check_held_out(digits(**now, **{"validation": "test"}), trained, before, now)        # nothing is drawn


def test_the_same_images_by_another_loader_are_not():
    """No argument tells; the counts do."""
    trained = facts_of(digits())
    with pytest.raises(ConfigError, match=r"trains on .* images, the model was trained on 331 of the same data"):
        check_held_out(digits(FixedDigits), trained, None, {})
    check_held_out(digits(FixedDigits), {**trained, "class_names": ["other"] * 10}, None, {})


def test_photos_that_were_trained_on_are_not(photos):
    def loader(mode):
        return ImageFolderLTDataLoader(str(photos), 4, image_size=8, num_workers=0, validation=mode, val_share=0.3)
    for mode in ("none", "test"):
        with pytest.raises(ConfigError, match=f"validation: the model was trained with '{mode}'"):
            check_held_out(loader("holdout"), facts_of(loader(mode)), {"validation": mode}, {"validation": "holdout"})
    check_held_out(loader("holdout"), facts_of(loader("holdout")), {"validation": "holdout"}, {"validation": "holdout"})
    check_held_out(loader("holdout"), facts_of(loader("none")), None, {"validation": "holdout"})     # another folder


@pytest.mark.parametrize("change", ["added", "renamed", None])
def test_a_subset_of_photos_that_have_changed_is_not(photos, tmp_path, change):
    """The subset is drawn by position: after a change, what is left over has images that were trained on."""
    args = {"imb_factor": 0.3, "validation": "holdout"}

    def loader():
        return ImageFolderLTDataLoader(photos, 4, image_size=8, num_workers=0, **args)
    before = loader()
    trained = {**facts_of(before), "split": before.split_memory}
    old = {**trained, "split": {key: value for key, value in before.split_memory.items() if key != "drawn_from"}}
    if change:
        photo = tmp_path / "class1" / "3.png"
        photo.with_name("A.png").write_bytes(photo.read_bytes())
        if change == "renamed":
            photo.unlink()
    now = loader()
    check_held_out(now, old, args, args)                # an older version's checkpoint
    check_held_out(now, trained, None, args)            # of other data
    if change is None:
        check_held_out(now, trained, args, args)
        return
    with pytest.raises(ConfigError, match="imb_factor: photos were added, renamed or removed since the model was trai"):
        check_held_out(now, trained, args, args)
