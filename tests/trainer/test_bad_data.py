"""Odd and broken data through train.py: a run that ends well, or one line that names the file."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tests.trainer.conftest import write_images
from utils.errors import ConfigError


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    write_images(folder / "train", (4, 3, 2))
    write_images(folder / "val", (2, 2, 2))
    return folder


def settings(data, **args):
    return {"data_loader": {"args": {"data_dir": str(data), "batch_size": 4, "cache": False, **args}}}


def rgb(seed=0, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8))


ODD = {
    "cmyk.jpg": lambda path: rgb().convert("CMYK").save(path),
    "palette.png": lambda path: rgb().convert("P").save(path),
    "sixteen.png": lambda path: Image.fromarray(np.full((16, 16), 40000, np.uint16)).save(path),
    "moving.gif": lambda path: rgb(1).save(path, save_all=True, append_images=[rgb(2), rgb(3)]),
    "alpha.png": lambda path: rgb().convert("RGBA").save(path),
    "one.png": lambda path: rgb(size=(1, 1)).save(path),
    "thin.png": lambda path: rgb(size=(1, 500)).save(path),
}


def test_odd_images_train(runs, data):
    for name, save in ODD.items():
        save(data / "train" / "class1" / name)
    models = runs("odd", "--epochs", 1, **settings(data))
    assert (models / "checkpoint-epoch1.pth").is_file()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "cut short"])
def test_an_image_that_cant_be_read_is_named(runs, data, content, workers):
    path = data / "train" / "class1" / "01.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    with pytest.raises(ConfigError, match=r"class1/01\.png"):
        runs("bad", "--epochs", 1, **settings(data, num_workers=workers))


def test_a_test_image_that_cant_be_read_loses_no_training(runs, data):
    write_images(data / "test", (1, 1, 1))
    (data / "test" / "class1" / "00.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"class1/00\.png: .* the training is done: .*test\.py -r .*epoch1\.pth$"):
        runs("late", "--epochs", 1, **settings(data))
    assert (runs.models("late") / "checkpoint-epoch1.pth").is_file()


def test_an_image_that_goes_away_is_named(runs, data, monkeypatch):
    from trainer.trainer import Trainer

    def gone(self, epoch, figures):
        (data / "train" / "class2" / "00.png").unlink()
    monkeypatch.setattr(Trainer, "log_epoch", gone)
    with pytest.raises(ConfigError, match=r"class2/00\.png"):
        runs("gone", **settings(data))
    assert (runs.models("gone") / "checkpoint-epoch1.pth").is_file()


def test_batches_of_one_image(runs, data):
    models = runs("ones", "--epochs", 1, "--bs", 1, **settings(data))
    assert (models / "checkpoint-epoch1.pth").is_file()


def test_one_image_a_class_and_a_class_that_validation_lacks(runs, data, capfd):
    for label in (0, 1, 2):
        for path in sorted((data / "train" / f"class{label}").iterdir())[1:]:
            path.unlink()
    shutil.rmtree(data / "val" / "class2")
    models = runs("few", "--epochs", 1, **settings(data))
    assert (models / "checkpoint-epoch1.pth").is_file()
    assert "class2" in capfd.readouterr().out


def test_a_class_without_images(runs, data):
    for path in (data / "train" / "class1").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="class1"):
        runs("empty", "--epochs", 1, **settings(data))


def test_a_list_with_a_label_out_of_range_names_its_line(runs, data, tmp_path):
    (data / "train.txt").write_text("train/class0/00.png 0\r\n\r\ntrain/class1/00.png 1\r\n")
    (data / "val.txt").write_text("val/class0/00.png 7\n")
    runs.base["data_loader"]["type"] = "ListFileDataLoader"
    with pytest.raises(ConfigError, match=r"val\.txt.*7"):
        runs("list", "--epochs", 1, **settings(data))
    assert not (runs.save_dir / "models").exists()


def test_a_label_beyond_the_models_classes_is_named_by_file_and_line(runs, tmp_path):
    folder = tmp_path / "listed"
    folder.mkdir()
    for i in range(12):
        rgb(i).save(folder / f"{i}.png")
    (folder / "train.txt").write_text("".join(f"{i}.png {i % 3}\n" for i in range(9)) + "9.png 7\n")
    (folder / "test.txt").write_text("10.png 0\n11.png 1\n")
    with pytest.raises(ConfigError, match=r"train\.txt, line 10: label 7 is out of range.*num_classes is 3"):
        runs("labels", "--set", "data_loader.type=ListFileDataLoader", arch={"args": {"num_classes": 3}},
             **settings(folder))
    assert not runs.models("labels").exists()


def test_one_image_whose_maps_end_1_x_1(runs, data):
    sections = {**settings(data), "arch": {"type": "ResNet10Model", "args": {"layer2_output_dim": None,
                                                                             "layer3_output_dim": None}}}
    with pytest.raises(ConfigError, match=r"batch_size: a step has one image on a process, .* give a --bs"):
        runs("one", "--bs", 1, **sections)
    assert not runs.models("one").exists()
