"""Names in classes.txt, in lists and in a checkpoint that contradict one another."""
from __future__ import annotations

from pathlib import Path

import pytest

from data_loader.data_loaders import ImageFolderLTDataLoader, ListFileDataLoader
from tests.data_loader.test_files import SMALL, folders, picture
from utils.errors import ConfigError


def listed(root: Path, called: dict[int, str], labels: tuple[int, ...] = (0, 1, 2), *, train: bool = True) -> str:
    """train.txt (if `train`) and test.txt with two images a label; called: the names behind the labels."""
    for name in (("train", "test") if train else ("test",)):
        lines = []
        for label in labels:
            for number in range(2):
                picture(root / f"{name}_{label}_{number}.png", 10 * label + number)
                lines.append(f"{name}_{label}_{number}.png {label} {called.get(label, '')}".rstrip())
        (root / f"{name}.txt").write_text("\n".join(lines))
    return str(root)


@pytest.mark.parametrize(("classes", "called", "says"), [
    ("bee\nant\ncrab\n", {0: "ant"}, "class 0 is bee here and ant in the lists; correct"),
    ("ant\nbee\ncrab\n", {0: "Ant", 1: "bee", 2: "crab"}, None), ("ant\nbee\ncrab\nduck\n", {2: "crab"}, None),
    ("ant\nbee\ncrab\n", {1: "bee", 2: "duck"}, "class 2 is crab here and duck in the lists"),
    ("tench\ngoldfish\nshark\n", {0: "n01440764", 1: "n01443537", 2: "n01484850"}, None)])
def test_classes_txt_is_not_what_the_lists_say(tmp_path: Path, classes: str, called: dict, says: str | None) -> None:
    data = listed(tmp_path, called)
    (tmp_path / "classes.txt").write_text(classes)
    if says is None:
        assert ListFileDataLoader(data, **SMALL).class_names == classes.split()
        return
    with pytest.raises(ConfigError, match=rf"classes\.txt: {says}"):
        ListFileDataLoader(data, **SMALL)


@pytest.mark.parametrize(("classes", "names"), [
    ("ant\t2\nbee\t0\ncrab\t1\n", None), ("2 ant\n0 bee\n1 crab\n", None), ("ant,2\nbee, 0\ncrab,1", None),
    ("2. ant\n1. bee\n0. crab\n", None), ("ant 2\nbee 0\ncrab 1\n", ["bee", "crab", "ant"]),
    ("0 ant\n1 bee\n2 crab\n", ["0 ant", "1 bee", "2 crab"]), ("1\n2\n0\n", ["1", "2", "0"]),
    ("2 ply\n0 ply\n1 ply\n", ["2 ply", "0 ply", "1 ply"]),
    ("2 ant\n7 bee\n0 crab\n", ["2 ant", "7 bee", "0 crab"])])
def test_labels_of_another_form_in_classes_txt(tmp_path: Path, classes: str, names: list[str] | None) -> None:
    """They would stay in the names, which would be those of other classes."""
    data = listed(tmp_path, {})
    (tmp_path / "classes.txt").write_text(classes)
    if isinstance(names, list):
        assert ListFileDataLoader(data, **SMALL).class_names == names
        return
    with pytest.raises(ConfigError, match=r"classes\.txt: its lines have labels in another order .*; write `ant 2`, "):
        ListFileDataLoader(data, **SMALL)


# -- names of a checkpoint -------------------------------------------------------------------------------------------
def facts(names: list[str] | None, **more: object) -> dict:
    """What a checkpoint of data in another place records."""
    elsewhere = {"sample": {"x.jpg": 1}}
    return {"num_classes": 3, "class_names": names, "cls_num_list": [9, 8, 7], "split": elsewhere, **more}


@pytest.mark.parametrize(("called", "labels", "targets"), [
    ({0: "crab", 2: "ant"}, (0, 2), [2, 2, 0, 0]), ({1: "Bee"}, (1,), [1, 1]), ({1: "bee"}, (0, 1), [0, 0, 1, 1])])
def test_a_test_list_that_names_some_classes_follows_the_checkpoint(tmp_path: Path, called: dict, labels: tuple,
                                                                    targets: list[int]) -> None:
    data = listed(tmp_path, called, labels, train=False)
    loader = ListFileDataLoader(data, training=False, facts=facts(["ant", "bee", "crab"]), **SMALL)
    assert loader.targets.tolist() == targets and loader.num_classes == 3
    assert ("classes are numbered as in the checkpoint, by their names" in loader.notes) == (labels == (0, 2))
    assert not any("warning" in note for note in loader.notes)


def test_names_that_contradict_the_checkpoint_are_refused(tmp_path: Path) -> None:
    """Class 1 has no name, so the others can't be renumbered; a new training from the weights has its own classes."""
    data = listed(tmp_path, {0: "crab"}, (0, 1))
    with pytest.raises(ConfigError, match="class 0 is crab in the lists, and ant in the checkpoint's model; number"):
        ListFileDataLoader(data, training=False, facts=facts(["ant", "bee", "crab"]), **SMALL)
    ListFileDataLoader(data, facts=facts(["ant", "bee", "crab"], optional=True), **SMALL)


def test_names_on_one_side_only_are_warned_of(tmp_path: Path) -> None:
    data = listed(tmp_path / "lists", {}, train=False)

    def warned(kind: type, place: str, **known: object) -> list[str]:
        return [note for note in kind(place, training=False, facts=known, **SMALL).notes if "numbered" in note]
    note, = warned(ListFileDataLoader, data, **facts(["0", "1", "10"]))
    assert note == f"warning: {data}: the classes have no names here, so they are taken to be numbered as in the " \
                   "checkpoint (0 0, 1 1, 2 10); give their names in classes.txt"
    assert warned(ListFileDataLoader, data, **facts(None)) == []
    assert warned(ListFileDataLoader, data, **facts(["ant", "bee", "crab"], optional=True)) == []
    note, = warned(ImageFolderLTDataLoader, folders(tmp_path / "photos", test=[1, 1, 1]), **facts(None))
    assert "the checkpoint's classes have no names, so they are taken to be numbered as here (0 class_0, 1" in note
    (tmp_path / "lists" / "classes.txt").write_text("ant\nbee\ncrab\n")
    assert warned(ListFileDataLoader, data, **facts(["ant", "bee", "crab"])) == []
    assert warned(ListFileDataLoader, data, **{**facts(None), "split": {}}) == []       # names that came later
