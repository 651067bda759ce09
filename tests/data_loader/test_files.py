"""Lists and folders of one's own images, good and bad."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_loader.data_loaders import (
    ImageFolderLTDataLoader,
    ImageNetLTDataLoader,
    ListFileDataLoader,
    PlacesLTDataLoader,
    iNaturalistDataLoader,
)
from data_loader.list_lines import read_list
from data_loader.transforms import test_transform
from tools.classify import find_images
from utils.errors import ConfigError

SMALL = dict(batch_size=4, image_size=16)


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (24, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def folders(root: Path, **splits: list[int]) -> str:
    """root/split/class_i/*.png with the given counts; split `flat` has no folder of its own."""
    for split, counts in splits.items():
        for label, count in enumerate(counts):
            place = (root if split == "flat" else root / split) / f"class_{label}"
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture(place / f"{i}.png", 100 * label + i)
    return str(root)


def lists(root: Path, names: tuple[str, ...] = ("train.txt", "val.txt", "test.txt"),
          counts: tuple[int, ...] = (6, 3, 2), size: tuple[int, int] = (24, 20)) -> str:
    for name in names:
        lines = []
        for label, count in enumerate(counts):
            for i in range(count):
                where = f"{name[:-4]}/{label}_{i}.jpg"
                picture(root / where, len(lines), size)
                lines.append(f"{where} {label}")
        (root / name).write_text("\n".join(lines) + "\n")
    return str(root)


# -- folders ---------------------------------------------------------------------------------------------------------
def test_folder_with_splits(tmp_path: Path) -> None:
    loader = ImageFolderLTDataLoader(folders(tmp_path, train=[8, 4, 2], val=[2, 2, 1], test=[3, 0, 1]), **SMALL)
    assert loader.cls_num_list == [8, 4, 2] and loader.class_names == ["class_0", "class_1", "class_2"]
    assert loader.split_validation().n_samples == 5 and loader.validation_note is None
    test = ImageFolderLTDataLoader(str(tmp_path), training=False, **SMALL)
    assert test.n_samples == 4 and test.cls_num_list == [8, 4, 2]
    text = "\n".join(loader.summary())
    assert "classes: 3" in text and "3 few-shot" in text and "4 : 1" in text
    assert "no test image" in text and "class_1" in text and "small" in text


def test_flat_folder_is_split_by_class_and_the_same_each_time(tmp_path: Path) -> None:
    data = folders(tmp_path, flat=[20, 10, 2, 1])
    loader = ImageFolderLTDataLoader(data, validation="holdout", **SMALL)
    test = ImageFolderLTDataLoader(data, training=False, seed=9, **SMALL)
    taken = np.bincount(test.targets, minlength=4).tolist()
    assert 1 <= taken[0] <= 8 and 1 <= taken[1] <= 5 and taken[2:] == [1, 0]
    held = loader.split_validation()
    assert not set(loader.paths) & set(test.paths) and not set(held.paths) & (set(loader.paths) | set(test.paths))
    assert len(loader.paths) + len(test.paths) + len(held.paths) == 33
    assert min(loader.cls_num_list) == 1     # a class keeps its last image
    assert "no test folder" in "\n".join(loader.summary())


def test_folder_with_train_and_val_tests_on_val(tmp_path: Path) -> None:
    loader = ImageFolderLTDataLoader(folders(tmp_path, train=[8, 8], val=[2, 2]), validation="holdout", **SMALL)
    assert loader.cls_num_list == [7, 7] and loader.split_validation().n_samples == 2
    assert ImageFolderLTDataLoader(str(tmp_path), training=False, **SMALL).n_samples == 4


def test_folder_made_long_tailed(tmp_path: Path) -> None:
    data = folders(tmp_path, train=[20, 20, 20], test=[2, 2, 2])
    loader = ImageFolderLTDataLoader(data, imb_factor=0.1, validation="holdout", **SMALL)
    assert loader.cls_num_list == [20, 6, 2]
    assert not set(loader.paths) & set(loader.split_validation().paths)
    assert ImageFolderLTDataLoader(data, imb_factor=0.01, **SMALL).cls_num_list[-1] == 1     # never empty


@pytest.mark.parametrize("size", [16, 48, 80])
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_memory_give_the_same_batches(tmp_path: Path, size: int, workers: int) -> None:
    data = folders(tmp_path, train=[5, 4, 2], test=[1, 1, 1])
    args = dict(batch_size=4, image_size=size, seed=5)
    wanted = [x for x, _ in ImageFolderLTDataLoader(data, num_workers=0, **args)]
    loader = ImageFolderLTDataLoader(data, num_workers=workers, cache=False, **args)
    for (images, labels), other in zip(loader, wanted, strict=True):
        assert torch.equal(images, other) and images.shape[1:] == (3, size, size) and len(labels) == len(images)
    loader.set_epoch(1, start_batch=2)
    assert torch.equal(next(iter(loader))[0], wanted[2])


def test_workers_live_on(tmp_path: Path) -> None:
    loader = ImageFolderLTDataLoader(folders(tmp_path, train=[5, 4], test=[1, 1]), 4, num_workers=2, image_size=80)
    pids = []
    for _ in range(2):
        for _ in loader:
            pass
        pids.append([worker.pid for worker in loader.files.loader._iterator._workers])
    assert pids[0] == pids[1] and len(pids[0]) == 2


def test_processes_on_a_machine_share_its_cores_for_their_workers(tmp_path: Path, monkeypatch) -> None:
    data = folders(tmp_path, train=[5, 4], test=[1, 1])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16), raising=False)

    def workers(wanted, size: int = 80) -> tuple[int | None, list[str]]:
        loader = ImageFolderLTDataLoader(data, 4, num_workers=wanted, image_size=size, world_size=8)
        return loader.files and loader.files.loader.num_workers, [x for x in loader.summary() if "num_workers" in x]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")         # each of the eight processes has a machine for itself
    assert workers(24) == (24, [])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert workers(12) == (2, ["data_loader.args.num_workers: 2 for each training process instead of 12, as the "
                               "processes on this machine share its cores"])
    assert workers(1) == (1, []) and workers(0) == (0, []) and workers(None) == (2, [])
    assert workers(12, size=16) == (None, [])           # in memory


@pytest.mark.parametrize("size", [16, 48, 80])
def test_test_batches_equal_the_test_transform(tmp_path: Path, size: int) -> None:
    loader = ImageFolderLTDataLoader(folders(tmp_path, train=[2, 2], test=[3, 3]), 6, training=False, image_size=size)
    images, _ = next(iter(loader))
    transform = test_transform(loader.preprocess)
    for image, path in zip(images, loader.paths, strict=True):
        assert torch.allclose(image, transform(Image.open(path)), atol=1e-6)


def test_custom_transform_is_reproducible(tmp_path: Path) -> None:
    import torchvision.transforms as T
    own = T.Compose([T.RandomResizedCrop(16), T.ToTensor()])
    data = folders(tmp_path, train=[5, 4], test=[1, 1])
    state = torch.get_rng_state()
    first = [x for x, _ in ImageFolderLTDataLoader(data, transform=own, num_workers=0, **SMALL)]
    again = [x for x, _ in ImageFolderLTDataLoader(data, transform=own, num_workers=2, **SMALL)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].min() >= 0 and first[0].max() <= 1
    assert torch.equal(state, torch.get_rng_state())     # the run's own random numbers aren't touched


def test_other_files_are_left_out_and_said(tmp_path: Path) -> None:
    data = folders(tmp_path, train=[3, 3], test=[1, 1])
    (tmp_path / "train" / "class_0" / "notes.txt").write_text("x")
    (tmp_path / "train" / "class_0" / ".DS_Store").write_text("x")
    loader = ImageFolderLTDataLoader(data, **SMALL)
    assert loader.cls_num_list == [3, 3] and any("1 file not named as images are" in line for line in loader.summary())


def test_heic_beside_the_folders_is_counted(tmp_path: Path) -> None:
    data = folders(tmp_path, train=[3, 3], test=[1, 1])
    (tmp_path / "unsorted").mkdir()
    for place in ("IMG_0.HEIC", "train/IMG_1.heic", "unsorted/IMG_2.HEIC", "unsorted/._IMG_2.HEIC", "unsorted/a.txt"):
        (tmp_path / place).write_bytes(b"x")
    notes = "\n".join(ImageFolderLTDataLoader(data, **SMALL).notes)
    for said in ("1 image beside the folders of splits", "1 image beside the class folders", "1 image in no split"):
        assert said in notes


def test_a_class_of_nothing_but_heic(tmp_path: Path) -> None:
    data = folders(tmp_path, train=[3, 3], test=[1, 1])
    for number in range(3):
        (tmp_path / "train" / "class_2").mkdir(exist_ok=True)
        (tmp_path / "train" / "class_2" / f"IMG_{number}.HEIC").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"class_2: holds no image .*only 3 files not .* \(.heic 3\); convert HEIC"):
        ImageFolderLTDataLoader(data, **SMALL)


def test_a_link_to_nothing_is_said_as_such(tmp_path: Path) -> None:
    data = folders(tmp_path, train=[3, 3], test=[1, 1])
    (tmp_path / "train" / "class_0" / "gone.png").symlink_to("/nowhere/gone.png")
    with pytest.raises(ConfigError, match=r"gone.png: a link to /nowhere/gone.png, which isn't there"):
        ImageFolderLTDataLoader(data, **SMALL)


@pytest.mark.parametrize("where", [".", "train", "train/class_1", "train/class_1/more"])
def test_a_folder_that_may_not_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Its photos would be missed in silence. Simulated, as permissions don't stop root."""
    data = folders(tmp_path, train=[3, 3], test=[1, 1])
    picture(tmp_path / "train" / "class_1" / "more" / "9.png")
    real = os.scandir

    def scandir(path: str) -> object:
        if os.path.normpath(path) == os.path.normpath(tmp_path / where):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match=r"can't be read \(Permission denied\)$"):
        ImageFolderLTDataLoader(data, **SMALL)
    with pytest.raises(ConfigError, match=r"can't be read \(Permission denied\)$"):
        find_images([data])


def test_folder_mistakes(tmp_path: Path) -> None:
    def said(text: str, root: Path, **more: object) -> None:
        with pytest.raises(ConfigError, match=text) as caught:
            ImageFolderLTDataLoader(str(root), **{**SMALL, **more})
        assert "\n" not in str(caught.value)
    said("no such folder", tmp_path / "gone")
    said("has 0 class folders", tmp_path)
    picture(tmp_path / "file.png")
    said("is a file", tmp_path / "file.png")
    folders(tmp_path / "empty", train=[2, 0], test=[1, 1])
    said(r"class_1: holds no image", tmp_path / "empty")
    folders(tmp_path / "new", train=[2, 2], test=[1, 1, 1])
    said(r"class_2: no such class", tmp_path / "new")
    folders(tmp_path / "only", test=[1, 1])
    said(r"train: no such folder", tmp_path / "only")
    folders(tmp_path / "ones", flat=[1, 1])
    said("every class has one image", tmp_path / "ones")
    folders(tmp_path / "blank", train=[2, 2])
    (tmp_path / "blank" / "test" / "class_0").mkdir(parents=True)
    said("holds no image", tmp_path / "blank")
    folders(tmp_path / "big", train=[2, 2], test=[1, 1])
    said("cache", tmp_path / "big", image_size=80, cache=True)


def test_links_that_lead_outside(tmp_path: Path) -> None:
    data = folders(tmp_path / "data", train=[2, 2], test=[1, 1])
    outside = picture(tmp_path / "outside" / "a.png")
    (tmp_path / "data" / "train" / "class_0" / "link.png").symlink_to(outside)
    with pytest.raises(ConfigError, match=r"link\.png leads outside .*allow_outside"):
        ImageFolderLTDataLoader(data, **SMALL)
    assert ImageFolderLTDataLoader(data, allow_outside=True, **SMALL).cls_num_list == [3, 2]
    (tmp_path / "data" / "train" / "class_0" / "link.png").unlink()
    (tmp_path / "data" / "train" / "class_0" / "inside.png").symlink_to(tmp_path / "data/train/class_0/0.png")
    assert ImageFolderLTDataLoader(data, **SMALL).cls_num_list == [2, 2]     # one that stays inside counts once
    (tmp_path / "data" / "train" / "class_2").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="class_2 leads outside"):
        ImageFolderLTDataLoader(data, **SMALL)


# -- unreadable images -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "workers"), [(16, 0), (80, 0), (80, 2)])
def test_an_unreadable_image_is_named_wherever_it_is_read(tmp_path: Path, size: int, workers: int) -> None:
    data = folders(tmp_path, train=[4, 4], test=[1, 1])
    bad = tmp_path / "train" / "class_1" / "2.png"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(ConfigError) as caught:
        for _ in ImageFolderLTDataLoader(data, 4, image_size=size, num_workers=workers):
            pass
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize(("size", "workers"), [(16, 0), (80, 0), (80, 2)])
def test_all_unreadable_images_are_named_at_once(tmp_path: Path, size: int, workers: int) -> None:
    data = folders(tmp_path, train=[4, 14], test=[1, 1])
    for number in range(1, 13):
        (tmp_path / "train" / "class_1" / f"{number}.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"11 other images .* can't be read either: .* and 1 more$") as caught:
        for _ in ImageFolderLTDataLoader(data, 4, image_size=size, num_workers=workers):
            pass
    assert str(caught.value).count(".png") == 11
    for number in range(2, 13):
        picture(tmp_path / "train" / "class_1" / f"{number}.png")
    with pytest.raises(ConfigError, match=r"1.png: can't be read .*; replace or remove it$"):
        for _ in ImageFolderLTDataLoader(data, 4, image_size=size, num_workers=workers):
            pass


# -- lists -----------------------------------------------------------------------------------------------------------
def test_own_lists(tmp_path: Path) -> None:
    loader = ListFileDataLoader(lists(tmp_path), **SMALL)
    assert loader.cls_num_list == [6, 3, 2] and loader.num_classes == 3 and loader.class_names is None
    assert loader.split_validation().n_samples == 11 and loader.raw_image(0).shape == (20, 24, 3)
    (tmp_path / "test.txt").unlink()
    without = ListFileDataLoader(str(tmp_path), validation="holdout", **SMALL)
    assert without.n_samples < 11          # val is the test split now, so training images are held out
    (tmp_path / "train.txt").unlink()
    only = ListFileDataLoader(str(tmp_path), training=False, **SMALL)
    assert only.n_samples == 11 and only.num_classes == 3


def test_testing_needs_the_training_list_but_not_its_images(tmp_path: Path) -> None:
    train = ListFileDataLoader(lists(tmp_path), validation="holdout", **SMALL)
    facts = {"cls_num_list": train.cls_num_list, "num_classes": 3, "class_names": None, "split": train.split_memory}
    shutil.rmtree(tmp_path / "train")
    shutil.rmtree(tmp_path / "val")
    for known in (None, facts):
        loader = ListFileDataLoader(str(tmp_path), training=False, facts=known, **SMALL)
        assert sum(len(labels) for _, labels in loader) == 11 and loader.cls_num_list == [6, 3, 2]
    with pytest.raises(ConfigError, match=r"train/0_0.jpg: no such image \(.*train.txt, line 1; 10 more are missing"):
        ListFileDataLoader(str(tmp_path), **SMALL)
    (tmp_path / "test" / "1_1.jpg").unlink()
    with pytest.raises(ConfigError, match=r"test/1_1.jpg: no such image"):
        ListFileDataLoader(str(tmp_path), training=False, **SMALL)


@pytest.mark.parametrize(("loader", "name", "parts"), [
    (ImageNetLTDataLoader, "ImageNet_LT", ("train", "val", "test")),
    (PlacesLTDataLoader, "Places_LT", ("train", "val", "test")),
    (iNaturalistDataLoader, "iNaturalist18", ("train", "val"))])
@pytest.mark.parametrize("below", ["", "folder"])
def test_official_lists(tmp_path: Path, loader: type, name: str, parts: tuple, below: str) -> None:
    root = tmp_path / name if below else tmp_path
    lists(root, tuple(f"{name}_{part}.txt" for part in parts), size=(260, 240))
    train = loader(str(tmp_path), 4, num_workers=0)
    assert train.split_validation().n_samples == 11 and (train.validation_note is None) == ("test" in parts)
    images, labels = next(iter(train))
    assert images.shape == (4, 3, 224, 224) and train.augmentation.jitter == (0 if name.startswith("iNat") else 0.4)
    assert loader(str(tmp_path), 4, training=False, num_workers=0).n_samples == 11
    assert train.preprocess["resize"] == 256


def test_lists_written_by_other_systems(tmp_path: Path) -> None:
    lists(tmp_path)
    content = (tmp_path / "train.txt").read_bytes()
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n\r\n").replace(b" ", b"\t"))
    picture(tmp_path / "train" / "with blanks in it.png")
    with open(tmp_path / "train.txt", "a") as handle:
        handle.write("train/with blanks in it.png 1\n")
    loader = ListFileDataLoader(str(tmp_path), **SMALL)
    assert loader.cls_num_list == [6, 4, 2]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_lists_that_windows_shell_wrote(tmp_path: Path, encoding: str) -> None:
    lists(tmp_path)
    picture(tmp_path / "train" / "größe.png")
    for name, more in (("train.txt", "train/größe.png 1\n"), ("test.txt", "")):
        text = (tmp_path / name).read_text() + more
        mark = "\ufeff" if encoding == "utf-16-be" else ""
        (tmp_path / name).write_bytes((mark + text).replace("\n", "\r\n").encode(encoding))
    (tmp_path / "classes.txt").write_text("Ameise\nBär\nKatze\n", encoding="utf-16")
    loader = ListFileDataLoader(str(tmp_path), **SMALL)
    assert loader.cls_num_list == [6, 4, 2] and loader.class_names == ["Ameise", "Bär", "Katze"]
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"train.txt: begins as UTF-16"):
        ListFileDataLoader(str(tmp_path), **SMALL)


def test_which_lists_are_needed(tmp_path: Path) -> None:
    lists(tmp_path, names=("train.txt",))
    with pytest.raises(ConfigError, match=r"test.txt: no such file; .* train.txt and test.txt \(or val.txt"):
        ListFileDataLoader(str(tmp_path), **SMALL)


def test_repeated_lines_count_once_and_are_said(tmp_path: Path) -> None:
    lists(tmp_path)
    content = (tmp_path / "train.txt").read_text()
    (tmp_path / "train.txt").write_text(content + content.splitlines()[0] + "\n")
    loader = ListFileDataLoader(str(tmp_path), **SMALL)
    assert loader.cls_num_list == [6, 3, 2] and any("1 repeated" in line for line in loader.summary())


@pytest.mark.parametrize("written", ["train/0_0.jpg", "./train/0_0.jpg", "train//0_0.jpg"])
def test_train_images_in_the_test_list_are_said(tmp_path: Path, written: str) -> None:
    lists(tmp_path)
    with open(tmp_path / "test.txt", "a") as handle:
        handle.write(f"{written} 0\n")
    assert any("1 image is in train.txt and in test.txt" in line
               for line in ListFileDataLoader(str(tmp_path), **SMALL).summary())


def test_classes_without_training_images_are_said(tmp_path: Path) -> None:
    loader = ListFileDataLoader(lists(tmp_path, counts=(4, 0, 2)), **SMALL)
    assert loader.cls_num_list == [4, 0, 2]
    assert any("no training image: 1" in line for line in loader.summary())
    assert ListFileDataLoader(str(tmp_path), balanced=True, **SMALL).epoch_size == 6


@pytest.mark.parametrize(("line", "said"), [
    ("train/0_0.jpg", "has no label; a line is `path label`$"), ("train/0_0.jpg cat", "a whole number.*classes.txt"),
    ("train/0_0.jpg,1", "a blank between them, no comma"), ('"train/0_0.jpg";"1"', "no semicolon"),
    ("train/0_0.jpg 1.5", "whole number"), ("train/0_0.jpg -1", "has label -1 here and 0 in"),
    ("new.jpg -1", "out of range"), ("train/0_0.jpg 1", "has label 1 here and 0 in line 1"),
    ("new.jpg 99999999999", "out of range"), ("new.jpg " + "9" * 30, "whole number"), ("new.jpg 1", "no such image"),
    ("../secret.png 1", "leads outside"), ("/etc/passwd 1", "leads outside"), ("train/../../secret.png 1", "outside"),
    ("train 1", "no such image"), ("new\0.jpg 1", "zero byte"), ("new.jpg \u0661", "whole number")])
def test_list_mistakes_name_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    data = lists(tmp_path / "data")
    picture(tmp_path / "secret.png")
    with open(tmp_path / "data" / "train.txt", "a") as handle:
        handle.write(line + "\n")
    with pytest.raises(ConfigError, match=said) as caught:
        ListFileDataLoader(data, **SMALL)
    text = str(caught.value)
    assert "train.txt" in text and "line 12" in text and "\n" not in text


def test_labels_of_other_lists_are_held_to_the_training_classes(tmp_path: Path) -> None:
    data = lists(tmp_path)
    with open(tmp_path / "test.txt", "a") as handle:
        handle.write("train/0_0.jpg 3\n")
    with pytest.raises(ConfigError, match=r"test\.txt, line 12: label 3 is out of range; labels are 0 to 2"):
        ListFileDataLoader(data, **SMALL)


def test_missing_or_empty_lists(tmp_path: Path) -> None:
    data = lists(tmp_path)
    (tmp_path / "train.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match=r"train\.txt: lists no image"):
        ListFileDataLoader(data, **SMALL)
    (tmp_path / "train.txt").unlink()
    with pytest.raises(ConfigError, match=r"train\.txt: no such file.*train\.txt and test\.txt"):
        ListFileDataLoader(data, **SMALL)
    with pytest.raises(ConfigError, match=r"ImageNet_LT_train\.txt: no such file"):
        ImageNetLTDataLoader(data)
    (tmp_path / "train.txt").mkdir()
    with pytest.raises(ConfigError, match=r"train\.txt: can't be read"):
        ListFileDataLoader(data, **SMALL)


def test_paths_from_the_root_that_stay_inside(tmp_path: Path) -> None:
    data = lists(tmp_path / "data")
    lines = (tmp_path / "data" / "train.txt").read_text().splitlines()
    for before in (f"{data}/", f"{data}/train/../", "/"):    # the last is how Places365's own lists write them
        (tmp_path / "data" / "train.txt").write_text("\n".join(before + line for line in lines))
        assert ListFileDataLoader(data, **SMALL).cls_num_list == [6, 3, 2]


def test_allow_outside_lets_lists_point_anywhere(tmp_path: Path) -> None:
    data = lists(tmp_path / "data")
    outside = picture(tmp_path / "other.png")
    picture(tmp_path / "secret.png")
    with open(tmp_path / "data" / "train.txt", "a") as handle:
        handle.write(f"{outside} 1\n../secret.png 2\n")
    assert ListFileDataLoader(data, allow_outside=True, **SMALL).cls_num_list == [6, 4, 3]
    (tmp_path / "data" / "link").symlink_to(tmp_path)
    (tmp_path / "data" / "train.txt").write_text("train/0_0.jpg 0\nlink/secret.png 1\n")
    with pytest.raises(ConfigError, match=r"link/secret\.png leads outside"):
        ListFileDataLoader(data, **SMALL)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    lists(tmp_path)
    name = os.fsencode(tmp_path) + b"/train/caf\xe9.png"
    try:
        with open(name, "wb") as handle:
            Image.new("RGB", (9, 9)).save(handle, "PNG")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with open(tmp_path / "train.txt", "ab") as handle:
        handle.write(b"train/caf\xe9.png 2\n")
    loader = ListFileDataLoader(str(tmp_path), num_workers=2, batch_size=4, image_size=80)
    assert loader.cls_num_list == [6, 3, 3] and sum(len(y) for _, y in loader) == 12
    assert read_list(tmp_path / "train.txt")[0][-1] == os.fsdecode(b"train/caf\xe9.png")


def test_one_image_a_class(tmp_path: Path) -> None:
    data = lists(tmp_path, counts=(1, 1, 1))
    loader = ListFileDataLoader(data, batch_size=2, image_size=16, validation="holdout")
    assert loader.cls_num_list == [1, 1, 1] and len(loader) == 1     # a last batch of one is dropped
    assert sum(len(y) for _, y in ListFileDataLoader(data, batch_size=1, image_size=16)) == 3


def test_images_beside_the_splits_are_counted(tmp_path: Path) -> None:
    data = folders(tmp_path, train=[2, 2], test=[1, 1])
    picture(tmp_path / "loose.png")
    assert any("1 image beside the folders of splits" in line for line in
               ImageFolderLTDataLoader(data, validation="none", **SMALL).notes)


def test_linked_folders_in_a_class_count_once(tmp_path: Path) -> None:
    data = folders(tmp_path, train=[2, 2], test=[1, 1], more=[3])
    inner = tmp_path / "train/class_0"
    (inner / "linked").symlink_to(tmp_path / "more/class_0")
    (inner / "back").symlink_to(inner)
    loader = ImageFolderLTDataLoader(data, validation="none", **SMALL)
    assert loader.cls_num_list == [5, 2]


def test_a_test_folder_alone_is_tested_whole(tmp_path: Path) -> None:
    data = folders(tmp_path, test=[3, 4])
    facts = {"class_names": ["class_0", "class_1"], "cls_num_list": [30, 20], "split": {"sample": {"gone.png": 1}}}
    loader = ImageFolderLTDataLoader(data, training=False, facts=facts, **SMALL)
    assert loader.n_samples == 7 and loader.cls_num_list == [30, 20]
