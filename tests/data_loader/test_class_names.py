"""Names in classes.txt, in lists and in a checkpoint that contradict one another."""
from __future__ import annotations

from pathlib import Path

import pytest

from data_loader.data_loaders import ListFileDataLoader
from tests.data_loader.test_files import SMALL, picture
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
