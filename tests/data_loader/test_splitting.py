"""Which images a split made here takes: by name, so that new photos move none; classes matched by name."""
from __future__ import annotations

import os
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_loader.class_names import match_classes
from data_loader.data_loaders import DigitsLTDataLoader, ImageFolderLTDataLoader, ListFileDataLoader
from data_loader.datasets import ImageSet
from data_loader.splitting import Division, holdout_of_spare, is_same_place, summary, take_share
from utils.errors import ConfigError

SMALL = dict(batch_size=4, image_size=8, num_workers=0)


def photos(folder: Path, count: int, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        Image.new("RGB", (9 + i % 5, 9), (i % 256, 0, 0)).save(folder / f"{i:04d}.png")


def images(names: list[str]) -> ImageSet:
    classes = sorted({name.split("/")[0] for name in names})
    targets = np.array([classes.index(name.split("/")[0]) for name in names])
    return ImageSet(targets, paths=[f"/data/{name}" for name in names])


def division(memory: dict | None = None) -> Division:
    return Division.of(memory, root="/data", seed=0, test_share=0.2, val_share=0.1)


@settings(max_examples=60, deadline=None)
@given(before=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60)), unique=True, min_size=1),
       more=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60)), unique=True),
       gone=st.sets(st.tuples(st.sampled_from("abc"), st.integers(0, 60))), what=st.sampled_from(["test", "val"]))
def test_photos_stay_on_their_side_when_others_come_and_go(before: list, more: list, gone: set, what: str) -> None:
    names = sorted(f"{c}/{i}.png" for c, i in before)
    one = division()
    kept, taken = one.divide(images(names), what)
    assert sorted([*kept, *taken]) == list(range(len(names)))
    counts = np.bincount(images(names).targets)
    left = np.bincount(images(names).targets[kept], minlength=len(counts))
    assert (left >= 1).all()
    if what == "test":
        assert ((counts - left >= 1) | (counts < 2)).all()
    later = sorted(f"{c}/{i}.png" for c, i in {*before, *more} - gone)
    if not later:
        return
    memory = {"rule": one.rule, "kept": sorted(one.kept), "taken": sorted(one.forced)}
    _, taken_later = division(memory).divide(images(later), what)
    trained, tested, tested_later = {names[i] for i in kept}, {names[i] for i in taken}, {later[i] for i in taken_later}
    assert not trained & tested_later
    for name in tested & set(later) - tested_later:     # but where that would leave a class, or too few of it, nothing
        own = [other for other in later if other[0] == name[0]]
        assert len(own) < (2 if what == "test" else 5) or not set(own) & trained


def test_shares_are_about_the_wanted_ones_and_old_runs_keep_their_rule() -> None:
    names = [f"{c}/{i}.png" for c in "abcde" for i in range(400)]
    _, taken = division().divide(images(names), "test")
    per_class = np.bincount(images(names).targets[taken])
    assert abs(len(taken) / 2000 - 0.2) < 0.03 and (abs(per_class / 400 - 0.2) < 0.08).all()
    _, old = division({}).divide(images(names), "test")   # a checkpoint that says nothing of a rule
    assert np.bincount(images(names).targets[old]).tolist() == [80] * 5


def test_many_classes_are_split_in_the_time_that_their_images_take() -> None:
    """Each class's images are found at once; comparing all labels with each class makes 2e10 comparisons here."""
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(100_000), 2))
    began = time.process_time()
    kept, taken = take_share(targets, 0.2, 0)
    chosen, missing = holdout_of_spare(targets, 100_001, 1, 0)
    assert time.process_time() - began < 10
    assert np.array_equal(np.sort(targets[kept]), np.arange(100_000)) and missing == 1
    assert np.array_equal(targets[chosen], np.arange(100_000)) and len(taken) == 100_000

    few = np.array([2, 0, 2, 5, 0, 2, 0, 2, 0, 2])     # one class after the other takes its share
    rng = np.random.RandomState(3)
    own = [rng.permutation(np.flatnonzero(few == label))[:count] for label, count in ((0, 2), (2, 2), (5, 0))]
    assert np.array_equal(take_share(few, 0.5, 3)[1], np.sort(np.concatenate(own)))


def test_a_folder_that_grows_moves_no_photo_from_training_to_test(tmp_path: Path) -> None:
    for name, count in (("ant", 30), ("bee", 12), ("crab", 5)):
        photos(tmp_path / name, count)
    before = set(ImageFolderLTDataLoader(str(tmp_path), validation="none", **SMALL).paths)
    for name in ("ant", "bee", "crab"):
        photos(tmp_path / name, 25, start=500)
    after = ImageFolderLTDataLoader(str(tmp_path), training=False, **SMALL)
    assert not before & set(after.paths) and len(after.paths) > 10


def test_names_as_a_mac_stores_them_are_known_again(tmp_path: Path) -> None:
    """é as e and an accent, on a disk that keeps names as they are; older checkpoints have one character."""
    for name in ("cafe\u0301", "u\u0308ber"):
        photos(tmp_path / name, 20)
    loader = ImageFolderLTDataLoader(str(tmp_path), validation="none", **SMALL)
    memory = loader.split_memory
    older = {**memory, "sample": {unicodedata.normalize("NFC", name): size for name, size in memory["sample"].items()}}
    assert older["sample"].keys() != memory["sample"].keys()
    for known in (memory, older):
        facts = {"class_names": loader.class_names, "cls_num_list": loader.cls_num_list, "split": known}
        tested = ImageFolderLTDataLoader(str(tmp_path), training=False, facts=facts, **SMALL)
        assert tested.n_samples == 40 - loader.n_samples and not set(tested.paths) & set(loader.paths)


def test_the_same_photos_in_another_place_are_known_again(tmp_path: Path) -> None:
    photos(tmp_path / "here" / "ant", 20)
    photos(tmp_path / "here" / "bee", 20)
    loader = ImageFolderLTDataLoader(str(tmp_path / "here"), validation="none", **SMALL)
    os.rename(tmp_path / "here", tmp_path / "there")
    photos(tmp_path / "other" / "ant", 6, start=900)
    assert is_same_place(str(tmp_path / "there"), loader.split_memory)
    assert not is_same_place(str(tmp_path / "other"), loader.split_memory)
    facts = {"class_names": ["ant", "bee"], "cls_num_list": [16, 16], "split": loader.split_memory}
    moved = ImageFolderLTDataLoader(str(tmp_path / "there"), training=False, facts=facts, **SMALL)
    assert moved.n_samples == 40 - loader.n_samples
    with pytest.raises(ConfigError, match=r"no test folder.*other/test/ or set .*test_share to 1"):
        ImageFolderLTDataLoader(str(tmp_path / "other"), training=False, facts=facts, **SMALL)
    with pytest.raises(ConfigError, match=r"split_seed: 3, but the checkpoint's split was made with 0"):
        ImageFolderLTDataLoader(str(tmp_path / "there"), training=False, facts=facts, split_seed=3, **SMALL)
    tests = ImageFolderLTDataLoader(str(tmp_path / "other"), training=False, facts=facts, test_share=1, **SMALL)
    assert tests.n_samples == 6 and tests.cls_num_list == [16, 16] and tests.num_classes == 2   # all of it, and no bee


def test_images_are_normalised_as_the_model_learned_them(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            photos(tmp_path / split / name, 3)
    known = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    facts = {"class_names": ["ant", "bee"], "preprocess": known}
    loader = ImageFolderLTDataLoader(str(tmp_path), training=False, facts=facts, **SMALL)
    assert list(loader.mean) == loader.preprocess["mean"] == known["mean"] and loader.views["std"] == known["std"]
    assert any("normalised as in the checkpoint" in note for note in loader.notes)
    plain, (images, _) = ImageFolderLTDataLoader(str(tmp_path), training=False, **SMALL), next(iter(loader))
    assert not any("normalised" in note for note in plain.notes)
    pixels = next(iter(plain))[0][0, 0] * 0.229 + 0.485
    assert np.allclose(images[0, 0], (pixels - 0.5) / 0.2, atol=1e-5)
    new = ImageFolderLTDataLoader(str(tmp_path), facts={**facts, "optional": True}, **SMALL)
    assert new.mean == plain.mean       # a new run that only begins from a file's weights


def test_a_test_list_may_lack_the_last_class(tmp_path: Path) -> None:
    photos(tmp_path, 3)
    (tmp_path / "test.txt").write_text("0000.png 0\n0001.png 1\n")
    facts = {"num_classes": 3, "class_names": None, "cls_num_list": [9, 5, 2]}
    loader = ListFileDataLoader(str(tmp_path), training=False, facts=facts, **SMALL)
    assert loader.num_classes == 3 and loader.cls_num_list == [9, 5, 2]
    (tmp_path / "test.txt").write_text("0000.png 0\n0001.png 1\n0002.png 2\n")
    facts["num_classes"] = 2
    with pytest.raises(ConfigError, match=r"test.txt, line 3: label 2 is out of range; labels are 0 to 1, as"):
        ListFileDataLoader(str(tmp_path), training=False, facts=facts, **SMALL)


def test_a_test_photo_that_is_deleted_is_not_replaced_by_one_that_was_trained_on(tmp_path: Path) -> None:
    for number in range(12):
        photos(tmp_path / f"kind{number:02d}", 3)      # most have no photo whose hash is under the share
    loader = ImageFolderLTDataLoader(str(tmp_path), validation="none", **SMALL)
    facts = {"class_names": loader.class_names, "cls_num_list": loader.cls_num_list, "split": loader.split_memory}
    tested = ImageFolderLTDataLoader(str(tmp_path), training=False, facts=facts, **SMALL)
    assert not set(loader.paths) & set(tested.paths) and set(tested.targets) == set(range(12))
    for path in list(tested.paths)[:6]:
        Path(path).unlink()
    left = ImageFolderLTDataLoader(str(tmp_path), training=False, facts=facts, **SMALL)
    assert list(left.paths) == list(tested.paths)[6:]


def test_weights_to_start_from_are_not_tested_on_what_they_learned_from(tmp_path: Path) -> None:
    for name, count in (("ant", 30), ("bee", 12)):
        photos(tmp_path / "here" / name, count)
        photos(tmp_path / "there" / name, count + 9, start=70)
    loader = ImageFolderLTDataLoader(str(tmp_path / "here"), **SMALL)
    facts = {"class_names": loader.class_names, "cls_num_list": loader.cls_num_list, "split": loader.split_memory,
             "optional": True}
    assert ImageFolderLTDataLoader(str(tmp_path / "here"), facts=facts, **SMALL).n_samples == loader.n_samples
    for change in ({"split_seed": 5}, {"test_share": 0.4}):
        with pytest.raises(ConfigError, match=f"args.{next(iter(change))}: .* the checkpoint's split was made with"):
            ImageFolderLTDataLoader(str(tmp_path / "here"), facts=facts, **change, **SMALL)
        assert ImageFolderLTDataLoader(str(tmp_path / "there"), facts=facts, **change, **SMALL).n_samples > 20
    digits = DigitsLTDataLoader(**SMALL)
    facts = {"class_names": digits.class_names, "split": digits.split_memory, "optional": True}
    with pytest.raises(ConfigError, match=r"split_seed: 1, but"):
        DigitsLTDataLoader(facts=facts, split_seed=1, **SMALL)
    other = {**facts, "class_names": [f"letter {name}" for name in digits.class_names]}
    assert DigitsLTDataLoader(facts=other, split_seed=1, **SMALL)


def test_digits_that_were_trained_on_are_never_tested() -> None:
    """split_seed draws their test images too."""
    loader = DigitsLTDataLoader(validation="none", **SMALL)
    facts = {"class_names": loader.class_names, "cls_num_list": loader.cls_num_list, "split": loader.split_memory}
    assert DigitsLTDataLoader(training=False, facts=facts, **SMALL).n_samples == 500
    with pytest.raises(ConfigError, match=r"split_seed: 3, but the checkpoint's split was made with 0"):
        DigitsLTDataLoader(training=False, facts=facts, split_seed=3, **SMALL)
    assert DigitsLTDataLoader(training=False, facts={**facts, "split": {"rule": "names"}}, split_seed=3, **SMALL)


@pytest.mark.parametrize(("own", "wanted", "some", "expected"), [
    (["a", "b"], ["a", "b"], False, [0, 1]), (["a", "B", "c"], ["C", "a", "b"], False, [1, 2, 0]),
    (["b"], ["a", "b"], True, [1]), (["b"], ["a", "b"], False, None), (["a", "x"], ["a", "b"], True, None),
    (["A", "a"], ["a", "A"], False, [1, 0]), (["A", "a"], ["a", "b"], True, None),
    ([unicodedata.normalize("NFD", "café")], [unicodedata.normalize("NFC", "Café")], False, [0])])
def test_classes_are_matched_by_name(own: list, wanted: list, some: bool, expected: list | None) -> None:
    assert match_classes(own, wanted, some) == expected


def test_data_of_a_checkpoints_classes_in_another_order_and_of_others(tmp_path: Path) -> None:
    for name, count in (("Crab", 3), ("ant", 4), ("bee", 5)):
        photos(tmp_path / "train" / name, count)
        photos(tmp_path / "test" / name, count)
    facts = {"class_names": ["ant", "bee", "crab"], "cls_num_list": [40, 30, 7]}
    loader = ImageFolderLTDataLoader(str(tmp_path), training=False, facts=facts, **SMALL)
    assert loader.class_names == ["ant", "bee", "crab"] and loader.cls_num_list == [40, 30, 7]
    assert np.bincount(loader.targets).tolist() == [4, 5, 3]
    with pytest.raises(ConfigError, match=r"has the classes Crab, ant, bee.*knows apple, banana, cherry"):
        ImageFolderLTDataLoader(str(tmp_path), facts={"class_names": ["apple", "banana", "cherry"]}, **SMALL)
    free = ImageFolderLTDataLoader(str(tmp_path), facts={"class_names": ["apple"], "optional": True}, **SMALL)
    assert free.class_names == ["Crab", "ant", "bee"]


@pytest.mark.parametrize(("train", "second"), [("train", "valid"), ("Training", "Testing"), ("TRAIN", "Validation")])
def test_splits_by_the_names_that_people_give_them(tmp_path: Path, train: str, second: str) -> None:
    for name in ("ant", "bee"):
        photos(tmp_path / train / name, 6)
        photos(tmp_path / second / name, 4)
    assert ImageFolderLTDataLoader(str(tmp_path), validation="none", **SMALL).n_samples == 12
    assert ImageFolderLTDataLoader(str(tmp_path), training=False, **SMALL).n_samples == 8


def test_a_test_folders_classes_may_be_written_in_another_case(tmp_path: Path) -> None:
    for part, names in (("train", ("ant", "crab")), ("test", ("Crab", "ANT"))):
        for number, name in enumerate(names):
            photos(tmp_path / part / name, 3 + number)
    loader = ImageFolderLTDataLoader(str(tmp_path), training=False, **SMALL)
    assert loader.class_names == ["ant", "crab"] and np.bincount(loader.targets).tolist() == [4, 3]


def test_two_folders_that_could_be_one_split_are_refused(tmp_path: Path) -> None:
    for part in ("train", "val", "valid"):
        photos(tmp_path / part / "ant", 2)
    with pytest.raises(ConfigError, match="val/ and valid/"):
        ImageFolderLTDataLoader(str(tmp_path), **SMALL)


def test_photos_below_a_class_count_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    photos(tmp_path / "train" / "ant" / "summer" / "june", 3)
    photos(tmp_path / "train" / "ant", 2, start=50)
    photos(tmp_path / "train" / "bee", 4)
    photos(tmp_path / "test" / "ant", 2)
    photos(tmp_path / "test" / "bee", 2)
    photos(tmp_path / "holiday", 5)
    photos(tmp_path / "train" / "@eaDir" / "ant", 3)
    photos(tmp_path / "train" / "ant" / "@eaDir", 3)
    photos(tmp_path / "train" / "__MACOSX", 1)
    (tmp_path / "train" / "ant" / "._0000.png").write_bytes(b"x")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("x")
    photos(tmp_path / "train", 2)
    loader = ImageFolderLTDataLoader(str(tmp_path), validation="none", **SMALL)
    said = "\n".join(loader.summary())
    assert loader.class_names == ["ant", "bee"] and loader.cls_num_list == [5, 4]
    assert "5 images in no split" in said and "2 images beside the class folders" in said
    assert "1 file not named as images are (.txt 1)" in said


def test_one_class_in_two_unicode_forms(tmp_path: Path) -> None:
    photos(tmp_path / unicodedata.normalize("NFC", "café"), 5)
    photos(tmp_path / unicodedata.normalize("NFD", "café"), 5, start=20)
    photos(tmp_path / "bar", 5)
    loader = ImageFolderLTDataLoader(str(tmp_path), validation="none", **SMALL)
    assert loader.class_names == ["bar", unicodedata.normalize("NFC", "café")]
    assert loader.n_samples + ImageFolderLTDataLoader(str(tmp_path), training=False, **SMALL).n_samples == 15


@pytest.mark.parametrize(("third", "classes", "expected"), [
    (True, None, ["red fox", "bar"]), (False, "red fox\nbar\n", ["red fox", "bar"]),
    (False, "red fox 0\nbar 1\nunseen 2\n", ["red fox", "bar", "unseen"]), (False, None, None)])
def test_lists_name_their_classes(tmp_path: Path, third: bool, classes: str | None, expected: list | None) -> None:
    photos(tmp_path / "my photos 1", 8)
    for part, numbers in (("train", range(6)), ("test", range(6, 8))):
        ending = (" red fox", " bar") if third else ("", "")
        lines = [f"my photos 1/{i:04d}.png {i % 2}{ending[i % 2]}" for i in numbers]
        (tmp_path / f"{part}.txt").write_text("\n".join(lines))
    if classes:
        (tmp_path / "classes.txt").write_text(classes)
    assert ListFileDataLoader(str(tmp_path), **SMALL).class_names == expected


def test_too_few_names_and_names_that_change_are_refused(tmp_path: Path) -> None:
    photos(tmp_path, 4)
    (tmp_path / "train.txt").write_text("0000.png 0 ant\n0001.png 1 bee\n0002.png 0 bee\n")
    (tmp_path / "test.txt").write_text("0003.png 0\n")
    with pytest.raises(ConfigError, match=r"train\.txt, line 3: class 0 is bee here and ant before"):
        ListFileDataLoader(str(tmp_path), **SMALL)
    (tmp_path / "train.txt").write_text("0000.png 0\n0001.png 1\n")
    (tmp_path / "classes.txt").write_text("ant\n")
    with pytest.raises(ConfigError, match=r"classes\.txt: names 1 classes, and the lists have 2"):
        ListFileDataLoader(str(tmp_path), **SMALL)


def test_the_summary_takes_the_configs_groups(tmp_path: Path) -> None:
    photos(tmp_path / "train" / "ant", 9)
    photos(tmp_path / "train" / "bee", 3)
    photos(tmp_path / "test" / "ant", 1)
    photos(tmp_path / "test" / "bee", 1)
    loader = ImageFolderLTDataLoader(str(tmp_path), validation="none", **SMALL)
    assert "groups: 1 many-shot (over 8), 0 medium-shot, 1 few-shot (under 4)" in loader.summary({"many": 8, "few": 4})


def test_the_summary_counts_as_people_do() -> None:
    one = summary([5, 3, 0], np.array([12, 2, 0]), ["ant", "bee", "crab"], [])
    assert "warning: 1 class has no training image: crab" in one
    assert "warning: 1 class has no test image, its accuracy isn't measured: crab" in one
    assert any("1 class has under 10 test images, bee; its accuracy is" in line for line in one)
    two = "\n".join(summary([5, 0, 0], np.array([2, 2, 0]), None, []))
    assert "2 classes have no training image: 1, 2" in two and "2 classes have under 10 test images, 0, 1; their" in two
    assert "training images a class: 4 in each" in summary([4, 4], np.array([20, 20]), None, [])
