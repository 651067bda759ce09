"""Several crops of each test image: which they are, and that their logits are averaged wherever images are judged."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import test as test_script
import train
from data_loader.crops import crops_of, with_crops
from data_loader.data_loaders import DigitsLTDataLoader, ImageFolderLTDataLoader
from data_loader.transforms import resize, test_preprocess, test_transform
from model.crops import forward_crops
from tools import predict
from tools.opened import open_run
from utils.errors import ConfigError

STATISTICS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.mark.parametrize("number", [5, 10])
@pytest.mark.parametrize("shape", [(248, 300), (224, 224), (231, 225)])
def test_are_torchvisions(number, shape):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    pixels = torch.randint(256, (3, *shape), dtype=torch.uint8)
    theirs = torch.stack({5: v2.FiveCrop, 10: v2.TenCrop}[number](224)(pixels))
    assert torch.equal(crops_of(pixels, 224, number), theirs)


@pytest.mark.parametrize("size, expand, side", [(224, None, 248), (224, 32, 256), (32, None, 35), (96, 0, 96)])
def test_short_side(size, expand, side):
    preprocess = test_preprocess(size, *STATISTICS)
    crops = with_crops(preprocess, 5, expand)
    assert crops["resize"] == side and "crops" not in preprocess and with_crops(preprocess, 1) is preprocess
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8))
    views = test_transform(crops)(image)
    assert views.shape == (5, 3, size, size)
    larger = (resize(image, side, int(side * 200 / 150)).double() / 255 - torch.tensor(STATISTICS[0]).view(3, 1, 1)) \
        / torch.tensor(STATISTICS[1]).view(3, 1, 1)
    assert torch.allclose(views[3].double(), larger[:, -size:, -size:], atol=1e-5)


def test_the_mean_of_what_the_model_says():
    torch.manual_seed(0)
    linear = torch.nn.Linear(3 * 16, 4)

    def model(images):
        feats = images.flatten(1)
        return {"output": linear(feats), "feat": feats[:, None]}

    crops = torch.randn(6, 5, 3, 4, 4)
    outputs = forward_crops(model, crops)
    assert torch.allclose(outputs["output"], torch.stack([model(c)["output"] for c in crops.unbind(1)]).mean(0))
    assert outputs["feat"].shape == (6, 1, 48)
    assert torch.equal(forward_crops(model, crops[:, 0])["output"], model(crops[:, 0])["output"])


def test_loaders(tmp_path):
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(tmp_path / label / f"{i}.png")
    for size in (48, 80):       # small images, else decoded by workers
        loader = ImageFolderLTDataLoader(str(tmp_path), 4, training=False, image_size=size, num_workers=0, crops=5)
        images, labels = next(iter(loader))
        assert images.shape == (len(labels), 5, 3, size, size) and images.dtype == torch.float32
        wanted = test_transform(loader.views)(Image.open(loader.paths[0]))
        assert torch.allclose(images[0], wanted, atol=1e-6) and "crops" not in loader.preprocess
    training = ImageFolderLTDataLoader(str(tmp_path), 4, image_size=48, num_workers=0, crops=5, validation="holdout",
                                       val_share=0.4)
    assert next(iter(training))[0].shape[1:] == (3, 48, 48)
    assert next(iter(training.split_validation()))[0].shape[1:] == (5, 3, 48, 48)
    memory = DigitsLTDataLoader(batch_size=4, training=False, crops=10, image_size=16)
    assert next(iter(memory))[0].shape == (4, 10, 3, 16, 16)


@pytest.mark.parametrize("given, said", [({"crops": 3}, "data_loader.args.crops: must be one of 1, 5, 10, not 3"),
                                         ({"expand": 3}, "data_loader.args.expand: is for several crops"),
                                         ({"crops": 5, "expand": 99}, "data_loader.args.expand: must be 0 to 32")])
def test_refusals(given, said):
    with pytest.raises(ConfigError, match=said):
        DigitsLTDataLoader(batch_size=4, training=False, **given)


def test_commands(tmp_path, capsys):
    train.main(["-c", "configs/digits_lt_ce.json", "--run_id", "run", "-d", "cpu", "-q", "--epochs", "1", "--save_dir",
                str(tmp_path), "--set", "data_loader.args.image_size=16", "--set", "trainer.tensorboard=false"])
    path = next(tmp_path.glob("models/*/run/checkpoint-epoch1.pth"))
    plain = json.loads((path.parent / "test_metrics.json").read_text())
    test_script.main(["-r", str(path), "-d", "cpu", "-q", "--crops", "5", "--expand", "2"])
    several = json.loads((path.parent / "test_metrics.json").read_text())
    assert several["crops"] == 5 and several["loss"] != plain["loss"] and several["n_samples"] == plain["n_samples"]

    run = open_run(path)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    image.save(tmp_path / "one.png")

    def probability(*flags):
        predict.main(["-r", str(path), "-d", "cpu", str(tmp_path / "one.png"), *flags, "--json",
                      str(tmp_path / "found.json")])
        found = json.loads((tmp_path / "found.json").read_text())["predictions"][0]
        return found["class"], found["probability"]
    found = probability("--crops", "5", "--expand", "4")
    views = test_transform(with_crops(run.facts["preprocess"], 5, 4))(image)
    with torch.no_grad():
        probabilities = run.model(views)["output"].mean(0).softmax(0)
    assert found[1] == pytest.approx(float(probabilities.max()), abs=1e-4)
    assert found[0] == run.facts["class_names"][int(probabilities.argmax())]
    config = ["--set", "data_loader.args.crops=5", "--set", "data_loader.args.expand=4"]
    assert probability(*config) == found, "as test.py takes them"
    assert probability(*config, "--crops", "1") == probability() != found
    assert probability(*config, "--expand", "0") == probability("--crops", "5", "--expand", "0") != found
    with pytest.raises(ConfigError, match="--crops: must be one of 1, 5, 10, not 2"):
        predict.main(["-r", str(path), "-d", "cpu", str(tmp_path / "one.png"), "--crops", "2"])
    with pytest.raises(ConfigError, match=r"data_loader\.args\.crops: must be one of 1, 5, 10, not 2"):
        predict.main(["-r", str(path), "-d", "cpu", str(tmp_path / "one.png"), "--set", "data_loader.args.crops=2"])
