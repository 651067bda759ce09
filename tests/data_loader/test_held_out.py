"""Validation images drawn after a training are none that was trained on."""
import numpy as np
import pytest
import torch
from PIL import Image

from data_loader.data_loaders import DigitsLTDataLoader, ImageFolderLTDataLoader, ListFileDataLoader
from data_loader.held_out import check_held_out, of_same_data
from logger.log import setup_logging
from tools.session import Start, data_facts, facts_to_follow, warn_of_seen
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


OWN = {"train": "train-{0..9}.tar", "test": "test.tar"}


@pytest.mark.parametrize(("before", "now", "same"), [
    (OWN, OWN, True), (OWN, {"test": "test.tar"}, True), (OWN, {**OWN, "test": "other.tar"}, False),
    (OWN, {"test": "other.tar"}, False), ({"train": "a.tar"}, {"test": "b.tar"}, False), ("a.tar", "a.tar", True),
    ("a.tar", "b.tar", False), (None, OWN, False), (OWN, None, False), (None, None, True)])
def test_other_shards_beside_the_own_are_other_data(before, now, same):
    specs = [{"type": "ListFileDataLoader", "args": {"data_dir": "x", "shards": shards}} for shards in (before, now)]
    assert of_same_data(*specs, {}, doubt=False) == same
    assert of_same_data(*specs, {})                     # validation images are looked at closely all the same
    assert of_same_data({}, specs[1], None, doubt=False)                    # weights without a config


# ---------------------------------------------------------------------- photos divided anew after a training

def noisy(folder, name, seed, ending="png"):
    """A photo whose size in bytes few others have (as PNG), or all (as BMP)."""
    folder.mkdir(parents=True, exist_ok=True)
    size = (8, 8) if ending == "bmp" else (8 + seed % 13, 8 + seed % 17)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(
        folder / f"{name}.{ending}")


def of_folder(root, training=True, facts=None, kind=ImageFolderLTDataLoader, **more):
    return kind(str(root), 4, training=training, facts=facts, image_size=8, num_workers=0, **more)


def test_trained_photos_moved_into_a_test_folder_are_said(tmp_path):
    for label in "ab":
        for number in range(20):
            noisy(tmp_path / label, f"{number:03}", 20 * ord(label) + number)
    first = of_folder(tmp_path, validation="holdout")
    facts, trained = data_facts(first), {path[-9:] for path in first.paths}
    assert not of_folder(tmp_path, training=False, facts=facts).seen and not of_folder(tmp_path, facts=facts).seen
    for label in "ab":
        for number in range(20):
            place = tmp_path / ("test" if number % 3 == 0 else "train") / label / f"{number:03}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / label / place.name).rename(place)
        (tmp_path / label).rmdir()
    tested = of_folder(tmp_path, training=False, facts=facts)
    both = len(trained & {path[-9:] for path in tested.paths})
    says = f"{both} of the {len(trained)} training photos that the checkpoint records are now among the "
    assert both > 5 and tested.seen == {"test": says + "test images"}
    again = of_folder(tmp_path, facts=facts, validation="holdout")
    assert f"warning: figures will be too good: {says}test images" in again.notes
    assert any(path[-9:] in trained for path in again.split_validation().paths)
    with pytest.raises(ConfigError, match="photos that the checkpoint records are now among the validation images"):
        check_held_out(again, facts, None, {})
    later = data_facts(again)       # has other photos, but remembers
    assert of_folder(tmp_path, training=False, facts=later).seen == tested.seen


def test_lists_that_are_swapped_are_noticed(tmp_path):
    for number in range(30):
        noisy(tmp_path / "p", number, number, "bmp")    # known by their names, all of one size
    for name, numbers in (("train", range(20)), ("test", range(20, 30))):
        (tmp_path / f"{name}.txt").write_text("".join(f"p/{n}.bmp {n % 2}\n" for n in numbers))
    facts = data_facts(of_folder(tmp_path, kind=ListFileDataLoader))
    assert not of_folder(tmp_path, training=False, facts=facts, kind=ListFileDataLoader).seen
    (tmp_path / "test.txt").write_text("".join(f"p/{n}.bmp {n % 2}\n" for n in range(15, 30)))
    assert "5 of the 20 " in of_folder(tmp_path, training=False, facts=facts, kind=ListFileDataLoader).seen["test"]


@pytest.mark.parametrize("ending", ["png", "bmp"])
def test_other_photos_of_the_same_names_are_not_those_trained_on(tmp_path, ending):
    """Numbered in each folder, as cameras and scripts do."""
    for at, (root, split) in enumerate((root, split) for root in ("here", "there") for split in ("train", "test")):
        for label in "ab":
            for number in range(12):
                noisy(tmp_path / root / split / label, f"{number:03}", 1000 * at + 50 * ord(label) + number, ending)
    facts = data_facts(of_folder(tmp_path / "here"))
    (tmp_path / "there" / "train").rename(tmp_path / "other")       # with test/ alone, all of it is tested
    assert not of_folder(tmp_path / "here", training=False, facts=facts).seen
    assert not of_folder(tmp_path / "there", training=False, facts=facts).seen


# ---------------------------------------------------------------------- validation images that stage 1 has seen

@pytest.mark.parametrize("how", ["-r STAGE1 -c", "-r", "load_crt", "pretrained", "distill_checkpoint"])
def test_what_stage_1_has_seen_is_said_once_and_remembered(photos, tmp_path, capsys, how):
    def checkpoint(loader, mode):
        return {"state_dict": {}, "data": data_facts(loader), "config": {"arch": {}, "data_loader": spec(mode)}}

    def spec(mode):
        return {"type": "ImageFolderLTDataLoader", "args": {"data_dir": photos, "validation": mode}}

    def begun(file, mode, how="-r"):
        """The loader of a run that starts from, or goes on with, what is in `file`."""
        place = str(tmp_path / "file.pth")
        torch.save(file, place)
        config = {"data_loader": spec(mode), "distill": how == "distill_checkpoint", "trainer": {
            "type": "Trainer", "freeze": None, "epochs": 1}, **({} if how.startswith("-r") else {how: place})}
        start = Start(config, file, tmp_path / "file.pth", how == "-r") if how.startswith("-r") else Start(config)
        loader = of_folder(photos, facts=facts_to_follow(start), validation=mode)
        warn_of_seen(start, loader)
        assert start.take(place)["data"] == file["data"]
        return loader
    setup_logging()
    for before, said in (("holdout", 0), ("none", 1)):
        stage1 = checkpoint(of_folder(photos, validation=before), before)
        stage2 = begun(stage1, "holdout", how)
        assert capsys.readouterr().out.count("warning: validation figures will be too good") == said
        assert ("seen" in data_facts(stage2)) == said
    with pytest.raises(ConfigError, match=r"validation images: data_loader.args.validation: .* with 'none'"):
        check_held_out(of_folder(photos, validation="holdout"), data_facts(stage2), {"validation": "holdout"}, {
            "validation": "holdout"})                                       # as test.py --calibrate does
    later = begun(checkpoint(stage2, "holdout"), "holdout")
    assert later.seen == stage2.seen and capsys.readouterr().out.count("warning: ") == 1
    assert not begun(checkpoint(stage2, "holdout"), "none").seen and not capsys.readouterr().out


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
