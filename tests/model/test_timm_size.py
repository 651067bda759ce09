"""Which image sizes networks of timm's take: tried before anything is read or written, said in one line."""
import pytest
import torch
from PIL import Image

import train
from model.timm_size import size_problem, takes
from tools.opened import open_run
from tools.parts import make_loader
from utils.checkpoint.store import save_checkpoint
from utils.errors import ConfigError

pytest.importorskip("timm")


@pytest.mark.parametrize("name, size, use", (
    ("mixer_s32_224", 112, "use 224, which it was made for"),             # its layers mix over places
    *(pytest.param(name, 112, "use 224, which", marks=pytest.mark.slow) for name in (
        "levit_128s", "coatnet_nano_rw_224", "gcvit_xxtiny", "cait_xxs24_224")),
    ("dla34", 112, "use 128, or 224, which"),                             # halves must be whole
    ("test_vit", 40, "use 32, or 160, which"), ("torchvision/vit_b_32", 64, "use 224, which")))
def test_sizes_that_do_not_fit(name, size, use):
    before = torch.get_rng_state()
    problem = size_problem(name, size)
    assert problem == f"{name} can't take images of {size} pixels; {problem[problem.index('use'):]}" and use in problem
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name, size", (
    ("mixer_s32_224", 224), ("test_resnet", 33), ("test_vit", 32), ("swin_tiny_patch4_window7_224", 112),
    ("torchvision/regnet_y_400mf", 64)))       # the last can't be made without numbers
def test_sizes_that_fit(name, size):
    assert takes(name, size)


@pytest.mark.parametrize("flags", ([], ["--dry_run"]))
def test_training_says_so_before_it_writes(flags, tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    with pytest.raises(ConfigError, match=r"args\.image_size: test_vit can't take images of 40 pixels; use 32"):
        train.main(["-c", "configs/digits_lt_timm.json", "-d", "cpu", "--save_dir", str(tmp_path / "saved"), "--set",
                    "arch.args.model_name=test_vit", "--set", "data_loader.args.image_size=40", *flags])
    assert not (tmp_path / "saved").exists()


def test_a_teacher_is_asked_too(tmp_path):
    config = {"arch": {"type": "ResNet32Model", "args": {}}, "distill": True, "distill_arch": {
        "type": "TimmModel", "args": {"model_name": "test_vit"}}, "trainer": {"epochs": 1},
        "data_loader": {"type": "DigitsLTDataLoader", "args": {"image_size": 40}}}
    with pytest.raises(ConfigError, match="image_size: test_vit can't take"):
        make_loader(config)
    assert make_loader(config, training=False).image_size == 40


@pytest.mark.parametrize("name, size", (("mixer_s32_224", 224), ("swin_tiny_patch4_window7_224", 112)))
def test_auto_is_what_the_network_takes(name, size, tmp_path):
    for folder in ("ant", "bee"):
        (tmp_path / folder).mkdir()
        for n in range(3):
            Image.new("RGB", (50, 50), (n, 0, 0)).save(tmp_path / folder / f"{n}.png")
    loader = make_loader({"arch": {"type": "TimmModel", "args": {"model_name": name}}, "trainer": {"epochs": 1},
                          "data_loader": {"type": "ImageFolderLTDataLoader", "args": {
                              "data_dir": str(tmp_path), "batch_size": 2, "image_size": "auto"}}})
    assert loader.image_size == size


def test_a_finished_run_refuses_another_size(tmp_path):
    from model.model import build_model
    from utils.config.load import Override
    spec = {"type": "TimmModel", "args": {"model_name": "test_vit", "weights": False, "num_classes": 10}}
    config = {"name": "x", "arch": spec, "loss": {"type": "CrossEntropyLoss"}, "optimizer": {
        "type": "SGD", "args": {"lr": 1}}, "data_loader": {"type": "DigitsLTDataLoader", "args": {"image_size": 32}},
        "trainer": {"epochs": 1}}
    save_checkpoint(tmp_path / "run.pth", {"arch": "TimmModel", "config": config, "epoch": 1, "data": {
        "num_classes": 10, "preprocess": {"image_size": 32}}, "state_dict": build_model(spec).state_dict()})
    assert open_run(tmp_path / "run.pth").model.num_classes == 10
    with pytest.raises(ConfigError, match=r"data_loader\.args\.image_size: test_vit can't take images of 40"):
        open_run(tmp_path / "run.pth", overrides=[Override("data_loader.args.image_size", 40)])
