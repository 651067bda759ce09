"""Lists and folders that say something else than they seem to: two names of one photo, splits that are classes."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_loader.data_loaders import ImageFolderLTDataLoader, ListFileDataLoader
from tests.data_loader.test_files import SMALL, folders, lists, picture
from tools.shard import main as shard
from utils.errors import ConfigError


def add(file: Path, *lines: str) -> None:
    with open(file, "a", encoding="utf-8") as handle:
        handle.writelines(f"{line}\n" for line in lines)


# -- one photo, two spellings ----------------------------------------------------------------------------------------
SPELLINGS = ["./train/0_0.jpg", "train//0_0.jpg", "val/../train/0_0.jpg", "train\\0_0.jpg", "{root}/train/0_0.jpg"]


@pytest.mark.parametrize("written", SPELLINGS)
@pytest.mark.parametrize("relative", [False, True])
def test_one_photo_under_two_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str,
                                       relative: bool) -> None:
    data = lists(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    if relative:
        data = tmp_path.name
    written, whole = written.format(root=tmp_path), (tmp_path / "train.txt").read_text()
    add(tmp_path / "train.txt", f"{written} 0", "train/0_0.jpg 0")
    loader = ListFileDataLoader(data, **SMALL)
    assert loader.cls_num_list == [6, 3, 2] and len(set(loader.paths)) == 11
    assert "warning: train.txt: 2 repeated lines are left out" in loader.notes
    assert loader.images.where[1] == list(range(1, 12))
    assert loader.images.targets.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
    (tmp_path / "train.txt").write_text(whole)
    add(tmp_path / "train.txt", f"{written} 1")
    with pytest.raises(ConfigError, match=r"train\.txt, line 12: .*0_0\.jpg has label 1 here and 0 in line 1$"):
        ListFileDataLoader(data, **SMALL)


def test_shards_are_made_of_photos_that_are_listed_once(tmp_path: Path) -> None:
    """A shard has no `..` and no root, so the other spelling wouldn't be found in it."""
    data = lists(tmp_path / "in")
    add(tmp_path / "in" / "train.txt", f"{data}/train/0_0.jpg 0")
    with pytest.raises(ConfigError, match=r"train\.txt, line 12: .*0_0\.jpg and train/0_0\.jpg are one image; list"):
        shard([data, str(tmp_path / "out")])


# -- classes of lists ------------------------------------------------------------------------------------------------
def test_a_test_list_alone_may_be_short(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg", 1)
    (tmp_path / "test.txt").write_text("a.jpg 4\nb.jpg 3\n")
    facts = {"num_classes": 5, "class_names": None, "cls_num_list": [9, 8, 7, 6, 5], "split": {"sample": {"x.jpg": 1}}}
    loader = ListFileDataLoader(str(tmp_path), training=False, facts=facts, **SMALL)
    assert (loader.n_samples, loader.num_classes, loader.targets.tolist()) == (2, 5, [4, 3])
    assert ListFileDataLoader(str(tmp_path), training=False, **SMALL).num_classes == 5      # nobody knows how many
    for label in (5, -1, 10**17):
        (tmp_path / "test.txt").write_text(f"a.jpg 4\nb.jpg {label}\n")
        with pytest.raises(ConfigError, match=rf"test\.txt, line 2: label {label} is out of range; labels are 0 to 4, "
                                              "as the checkpoint's model knows them$"):
            ListFileDataLoader(str(tmp_path), training=False, facts=facts, **SMALL)
    with pytest.raises(ConfigError, match=r"test\.txt, line 2: label 1\d+ is out of range; labels are 0 to 999999, "):
        ListFileDataLoader(str(tmp_path), training=False, **SMALL)
    (tmp_path / "train.txt").write_text("a.jpg 4\nb.jpg 3\n")
    (tmp_path / "test.txt").write_text("a.jpg 1\n")
    with pytest.raises(ConfigError, match=r"train\.txt, line 1: label 4 .*2 images can't fill more than 2 classes"):
        ListFileDataLoader(str(tmp_path), **SMALL)


@pytest.mark.parametrize("label", [0, 1])
def test_a_training_list_of_one_class(tmp_path: Path, label: int) -> None:
    data = lists(tmp_path)
    (tmp_path / "train.txt").write_text(f"train/0_0.jpg {label}\ntrain/0_1.jpg {label}\n")
    for name in ("val.txt", "test.txt"):
        (tmp_path / name).write_text("train/0_2.jpg 0\n")
    with pytest.raises(ConfigError, match=r"train\.txt: lists 1 class, training needs two or more$"):
        ListFileDataLoader(data, **SMALL)


def test_names_behind_labels_may_hold_numbers(tmp_path: Path) -> None:
    names = ("Boeing 737", "type 2 diabetes", "2019 Audi A3 2", "great white")
    paths = ("x.jpg", "my photo 3 b.JPEG", "7 4.png", "c.jpg")
    lines = [f"{path} {label} {name}" for label, (path, name) in enumerate(zip(paths, names, strict=True))]
    for number, path in enumerate(paths):
        picture(tmp_path / path, number)
    (tmp_path / "train.txt").write_text("\n".join(lines).replace("3 great", "3\tgreat"))
    (tmp_path / "test.txt").write_text("\n".join(f"{path} {label}" for label, path in enumerate(paths)))
    loader = ListFileDataLoader(str(tmp_path), **SMALL)
    assert loader.class_names == list(names)
    assert [os.path.relpath(path, tmp_path) for path in loader.paths] == list(paths)
    assert [os.path.relpath(path, tmp_path) for path in
            ListFileDataLoader(str(tmp_path), training=False, **SMALL).paths] == list(paths)
    add(tmp_path / "train.txt", "", "x.jpg 0 737")      # a number alone: a name, or a label of `x.jpg 0`?
    with pytest.raises(ConfigError, match=r"label 737 is out of range; .*; names of classes that are numbers stand in "
                                          r"classes\.txt$"):
        ListFileDataLoader(str(tmp_path), **SMALL)


def test_a_path_that_ends_in_a_number_stays_one(tmp_path: Path) -> None:
    for number, path in enumerate(("x.jpg 2", "x.jpg", "scan 4")):
        picture(tmp_path / "a.png", number).rename(tmp_path / path)
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("x.jpg 2 0\nx.jpg 1\nscan 4 2 wide\n")
    loader = ListFileDataLoader(str(tmp_path), **SMALL)
    assert [os.path.basename(path) for path in loader.paths] == ["x.jpg 2", "x.jpg", "scan 4"]
    assert loader.targets.tolist() == [0, 1, 2]


# -- folders that are named as splits, links -------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["test", "Validation"])
def test_a_class_that_is_named_as_a_split_is_said(tmp_path: Path, name: str) -> None:
    data = folders(tmp_path, flat=[4, 4])
    assert "taken for a class" not in "\n".join(ImageFolderLTDataLoader(data, **SMALL).notes)
    for number in range(3):
        picture(tmp_path / name / f"{number}.png", number)
    loader = ImageFolderLTDataLoader(data, **SMALL)
    assert sorted(loader.class_names) == sorted(["class_0", "class_1", name])
    said = [line for line in loader.notes if "taken for a class" in line]
    assert len(said) == 1 and f"{tmp_path}: {name} is taken for a class, though it is named as a split" in said[0]


def test_loose_photos_in_a_split_are_said(tmp_path: Path) -> None:
    data = folders(tmp_path, train=[4, 4], val=[1, 1])
    for number in range(3):
        picture(tmp_path / "test" / f"{number}.png", number)
    with pytest.raises(ConfigError, match=r"/test: holds 3 images but no class folders; images belong into test/CLASS"):
        ImageFolderLTDataLoader(data, **SMALL)
    (tmp_path / "test" / "class_0").mkdir()
    with pytest.raises(ConfigError, match=r"/test: holds 3 images but none in its class folders; images belong"):
        ImageFolderLTDataLoader(data, **SMALL)
    picture(tmp_path / "test" / "class_0" / "0.png")
    for path in (tmp_path / "val").glob("*/*.png"):
        path.rename(tmp_path / "val" / f"{path.parent.name}.png")
        path.parent.rmdir()
    assert f"warning: {tmp_path / 'val'}: left out: 2 images beside the class folders" in \
        ImageFolderLTDataLoader(data, **SMALL).notes


@pytest.mark.parametrize("where", ["train/class_1/up", "train/class_1/in/up"])
@pytest.mark.parametrize("target", ["train", ".", "..", "train/class_1"])
@pytest.mark.parametrize("outside", [False, True])
def test_a_link_that_leads_up_isnt_followed(tmp_path: Path, where: str, target: str, outside: bool) -> None:
    """Every other class's photos are below it."""
    data = folders(tmp_path / "data", train=[4, 2], test=[1, 1])
    picture(tmp_path / "data/train/class_1/in/9.png")
    (tmp_path / "data" / where).symlink_to(tmp_path / "data" / target)
    loader = ImageFolderLTDataLoader(data, allow_outside=outside, **SMALL)
    assert loader.cls_num_list == [4, 3]
    said = f"warning: {tmp_path / 'data' / where}: left out: a link to a folder above it"
    assert (said in loader.notes) == (target != "train/class_1")    # which has been read: nothing is left out


def test_other_links_are_followed(tmp_path: Path) -> None:
    data = folders(tmp_path / "data", train=[4, 2], test=[1, 1])
    folders(tmp_path, elsewhere=[3], aside=[4])
    (tmp_path / "data/train/class_1/aside").symlink_to(tmp_path / "aside/class_0")
    (tmp_path / "data/train/class_2").symlink_to(tmp_path / "elsewhere/class_0")
    assert ImageFolderLTDataLoader(data, allow_outside=True, **SMALL).cls_num_list == [4, 6, 3]
    (tmp_path / "elsewhere/class_0/home").symlink_to(tmp_path / "data")
    assert ImageFolderLTDataLoader(data, allow_outside=True, **SMALL).cls_num_list == [4, 6, 3]
    (tmp_path / "data/train/class_3").symlink_to("..")
    with pytest.raises(ConfigError, match=r"train/class_3: a link to a folder above it; remove it$"):
        ImageFolderLTDataLoader(data, allow_outside=True, **SMALL)


def test_a_photo_that_links_show_twice(tmp_path: Path) -> None:
    data = folders(tmp_path / "data", train=[4, 2], test=[1, 1])
    inner = tmp_path / "data/train/class_0"
    (inner / "again.png").symlink_to(next(inner.glob("*.png")).name)
    (tmp_path / "data/val").symlink_to("train")
    loader = ImageFolderLTDataLoader(data, **SMALL)
    assert loader.cls_num_list == [4, 2]
    assert "warning: train: 1 image that links show again left out" in loader.notes
    assert "warning: 6 images are in train and, through links, in val" in loader.notes
    (tmp_path / "data/train/class_1/other").symlink_to("../class_0")
    with pytest.raises(ConfigError, match=r"class_1/other/.*png is .*class_0/.*png, which has another class; remove"):
        ImageFolderLTDataLoader(data, **SMALL)


@pytest.mark.parametrize("link", ["train/class_2", "test/class_1", "val", "train/class_0/more"])
@pytest.mark.parametrize("outside", [False, True])
def test_a_link_to_a_folder_that_is_gone(tmp_path: Path, link: str, outside: bool) -> None:
    """A class or a split would be missing without a word: a disk that isn't mounted."""
    data = folders(tmp_path, train=[3, 3], test=[1])
    (tmp_path / link).symlink_to("/nowhere/there")
    with pytest.raises(ConfigError, match=f"{link}: a link to /nowhere/there, which isn't there; remove it$"):
        ImageFolderLTDataLoader(data, allow_outside=outside, **SMALL)


def test_lists_through_a_linked_folder(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / "in" / f"{number}.png", number)
    (tmp_path / "way").symlink_to("in")
    (tmp_path / "train.txt").write_text("in/0.png 0\nin/1.png 1\nin/2.png 1\n")
    (tmp_path / "test.txt").write_text("way/0.png 0\nin/3.png 1\n")
    assert "warning: 1 image is in train.txt and in test.txt" in ListFileDataLoader(str(tmp_path), **SMALL).notes


@pytest.mark.parametrize("text, names", [
    ("dog 1\ncat 0\n", ["cat", "dog"]), ("cat 0\ndog 1\n", ["cat", "dog"]), ("dog 2\ncat 1\n", ["dog 2", "cat 1"]),
    ("class 1\nclass 0\n", ["class 1", "class 0"]), ("1\n0\n", ["1", "0"])])
def test_names_with_their_labels_come_in_any_order(tmp_path: Path, text: str, names: list[str]) -> None:
    for number in range(2):
        picture(tmp_path / f"{number}.png", number)
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("0.png 0\n1.png 1\n")
    (tmp_path / "classes.txt").write_text(text)
    assert ListFileDataLoader(str(tmp_path), **SMALL).class_names == names


def test_images_in_several_lists_are_warned_of(tmp_path: Path) -> None:
    data = lists(tmp_path)
    add(tmp_path / "test.txt", "val/0_0.jpg 0", "./val/0_1.jpg 0", "train/1_0.jpg 1")
    notes = ListFileDataLoader(data, **SMALL).notes
    assert [note for note in notes if " in " in note] == ["warning: 1 image is in train.txt and in test.txt",
                                                          "warning: 2 images are in val.txt and in test.txt"]
