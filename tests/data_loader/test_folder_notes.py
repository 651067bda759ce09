"""Folders that are probably not meant as they are read are warned of, and ordinary ones aren't."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from data_loader import folder_notes
from data_loader.data_loaders import ImageFolderLTDataLoader
from tests.data_loader.test_files import SMALL, picture


def warnings(data: Path | str) -> list[str]:
    loader = ImageFolderLTDataLoader(str(data), validation="none", num_workers=0, **SMALL)
    return [note for note in loader.notes if note.startswith("warning")]


@pytest.mark.parametrize("copy", [shutil.copy, os.link])
def test_copies_of_training_images_in_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: object) -> None:
    """Images of the same name, as cameras count them, are others; so are those that happen to have the same size."""
    data = tmp_path
    for seed, (part, count) in enumerate((("train", 4), ("test", 2), ("val", 2))):
        for label in range(2):
            for number in range(count):
                picture(tmp_path / part / f"class_{label}" / f"{number}.png", 100 * seed + 10 * label + number)
            picture(tmp_path / part / f"class_{label}" / "equal.bmp", 100 * seed + label)
    assert warnings(data) == []
    for name in ("class_0/2.png", "class_0/3.png", "class_1/2.png"):
        copy(tmp_path / "train" / name, tmp_path / "test" / name)
    copy(tmp_path / "train" / "class_1" / "2.png", tmp_path / "val" / "class_1" / "2.png")
    copy(tmp_path / "train" / "class_0" / "2.png", tmp_path / "val" / "class_1" / "9.png")     # neither name nor class
    assert warnings(data) == ["warning: 1 image is in train and, as copies, in val",
                              "warning: 3 images are in train and, as copies, in test"]
    monkeypatch.setattr(folder_notes, "MOST_COPIES", 2)
    assert "warning: 2 or more images are in train and, as copies, in test" in warnings(data)
    (tmp_path / "test" / "class_1" / "2.png").unlink()
    (tmp_path / "test" / "class_1" / "2.png").symlink_to(tmp_path / "train" / "class_1" / "2.png")
    assert "warning: 1 image is in train and, through links, in test" in warnings(data)


@pytest.mark.parametrize(("outer", "inner", "warned"), [
    (("training_set", "test_set"), ("ant", "bee", "crab"), True), (("seg_train", "seg_test"), ("ant", "bee"), True),
    (("TrainImages", "ValImages"), ("ant", "bee"), True), (("ant", "bee"), ("test", "train"), True),
    (("apple", "tomato"), ("healthy", "sick"), False), (("testudo", "trainer"), ("day", "night"), False),
    (("my_train", "my_test"), ("ant",), False)])
def test_splits_under_other_names(tmp_path: Path, outer: tuple, inner: tuple, warned: bool) -> None:
    for name in outer:
        for other in inner:
            for number in range(3):
                picture(tmp_path / name / other / f"{number}.png", number)
    said = [f"warning: {tmp_path}: {', '.join(sorted(outer))} are taken for classes, though they look like splits or "
            f"hold some: each has the folders {', '.join(sorted(inner))}; splits are train/CLASS/*, val/CLASS/* and "
            "test/CLASS/*"]
    assert warnings(tmp_path) == (said if warned else [])
    picture(tmp_path / outer[0] / "own.png")        # a class with images of its own, and folders below
    assert warnings(tmp_path) == []


def test_classes_that_differ_in_case(tmp_path: Path) -> None:
    for name in ("Cat", "cat", "dog", "a", "A"):    # letters are classes of their own in both cases
        for number in range(3):
            picture(tmp_path / name / f"{number}.png", number)
    if not (tmp_path / "cat" / "0.png").samefile(tmp_path / "Cat" / "0.png"):
        note, = warnings(tmp_path)
        assert note.startswith(f"warning: {tmp_path}: Cat and cat are taken for two classes, though their names differ")
