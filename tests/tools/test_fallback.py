"""A config for a pretrained network on a machine that may not have its weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train as train_script
from logger.log import setup_logging
from tools.fallback import settle_weights
from tools.sweep_grid import check_unchanged, read_sweep
from utils.config.load import Override, load_config
from utils.errors import ConfigError

timm = pytest.importorskip("timm")
PROBLEM = "arch.args.weights: can't be fetched; bring a file"


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes that differ in brightness, 10 and 6 photos, 4 of each for testing."""
    for shade, name, count in ((30, "ant", 10), (160, "bee", 6)):
        for part, n in (("train", count), ("test", 4)):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                noise = np.random.default_rng(i).integers(0, 60, (40, 40, 3)) + shade
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def configs(tmp_path) -> Path:
    """configs/image_folder.json, and its fallback, with networks and images small enough for a test."""
    small = {"data_loader": {"args": {"batch_size": 4, "num_workers": 0, "image_size": 32}},
             "trainer": {"save_dir": str(tmp_path / "saved"), "tensorboard": False, "figures": False, "amp": "off"}}
    root = Path(train_script.__file__).parent / "configs"
    (tmp_path / "ride.json").write_text(json.dumps({
        "extends": str(root / "image_folder_ride.json"), **small,
        "arch": {"type": "ResNet32Model", "args": {"num_experts": 1}}}))
    (tmp_path / "own.json").write_text(json.dumps({
        "extends": str(root / "image_folder.json"), **small, "fallback": "ride.json",
        "arch": {"args": {"model_name": "test_efficientnet"}}}))
    return tmp_path / "own.json"


def run(configs, photos, *flags):
    train_script.main(["-c", str(configs), "--data_dir", str(photos), "-d", "cpu", "--run_id", "a", *flags])
    return configs.parent / "saved" / "models" / "image_folder" / "a"


def test_without_weights_it_trains_from_scratch_and_says_so(configs, photos, monkeypatch, capsys):
    monkeypatch.setattr("tools.fallback.missing", lambda arch: PROBLEM)
    models = run(configs, photos, "--epochs", "1")
    out = capsys.readouterr().out
    assert out.count(PROBLEM) == 1 and "until then, from scratch" in out
    saved = json.loads((models / "config.json").read_text())
    assert saved["arch"]["type"] == "ResNet32Model" and saved["name"] == "image_folder" and not saved["fallback"]


def test_a_run_that_began_from_scratch_goes_on_so(configs, photos, tmp_path, monkeypatch, capsys):
    """By the same line, and by the same sweep, even where the weights can be had by now."""
    monkeypatch.setattr("tools.fallback.missing", lambda arch: PROBLEM)
    run(configs, photos, "-r", "auto", "--epochs", "1")
    monkeypatch.setattr("tools.fallback.missing", lambda arch: None)
    capsys.readouterr()
    models = run(configs, photos, "-r", "auto", "--epochs", "2")
    out = capsys.readouterr().out
    assert "epoch 2/2" in out and "epoch 1/2" not in out and "began from scratch, as" in out and PROBLEM not in out
    saved = json.loads((models / "config.json").read_text())
    assert saved["arch"]["type"] == "ResNet32Model" and not saved["fallback"]

    sweep = tmp_path / "sweep.json"
    sweep.write_text(json.dumps({"name": "image", "save_dir": str(tmp_path / "saved"), "methods": {"folder": {
        "config": str(configs), "set": {"data_loader.args.data_dir": str(photos), "trainer.epochs": 2}}}}))
    models.rename(models.with_name("seed0"))
    (models.parents[2] / "log" / "image_folder" / "a").rename(models.parents[2] / "log" / "image_folder" / "seed0")
    job, = read_sweep(str(sweep))[0]
    check_unchanged(job)
    assert job.finished
    sweep.write_text(sweep.read_text().replace('"trainer.epochs": 2', '"trainer.epochs": 2, "optimizer.args.lr": 9'))
    with pytest.raises(ConfigError, match=r"was run with optimizer\.args\.lr .*, the sweep now says 9"):
        check_unchanged(read_sweep(str(sweep))[0][0])


def test_with_weights_the_head_comes_first_and_fine_tuning_goes_on(configs, photos, tmp_path, monkeypatch, capsys):
    """Frozen on cached features for two epochs, then all of it; the report and the words are there."""
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet")
    file = tmp_path / "own.pth"
    torch.save(network.state_dict(), file)
    monkeypatch.setattr("model.weights.pretrained.own_file", lambda name: file)
    models = run(configs, photos, "--epochs", "3", "--set", 'trainer.freeze={"until": "epoch 2"}',
                 "--save_period", "1", "--set", "trainer.keep_last=null")
    out = capsys.readouterr().out
    assert "features of" in out and "how far to trust it" in out and "report.html" in out
    assert (models / "report.html").is_file() and "until then" not in out
    weights = [torch.load(models / f"checkpoint-epoch{n}.pth", weights_only=True)["raw_state_dict"] for n in (1, 2, 3)]
    stem = next(name for name in weights[0] if name.endswith("conv_stem.weight"))
    assert torch.equal(weights[1][stem], network.state_dict()["conv_stem.weight"])
    assert not torch.equal(weights[2][stem], weights[1][stem])
    assert not torch.equal(weights[0]["backbone.linear.weight"], weights[1]["backbone.linear.weight"])


@pytest.mark.parametrize("flag", ["-r", "--pretrained"])
def test_weights_that_a_file_brings_are_not_looked_for(flag, configs, photos, tmp_path, monkeypatch, capsys):
    """A new run from another's weights needs none of the package's, which may be out of reach."""
    torch.manual_seed(0)
    file = tmp_path / "own.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), file)
    monkeypatch.setattr("model.weights.pretrained.own_file", lambda name: file)
    first = run(configs, photos, "--epochs", "1") / "checkpoint-epoch1.pth"
    capsys.readouterr()

    def out_of_reach(*_):
        raise AssertionError("looked for")
    monkeypatch.setattr("model.weights.pretrained.own_file", out_of_reach)
    train_script.main(["-c", str(configs), flag, str(first), "--data_dir", str(photos), "-d", "cpu", "--epochs", "1",
                       "--run_id", "b", "--set", "resume_state_dict_only=true"])
    saved = json.loads((configs.parent / "saved" / "models" / "image_folder" / "b" / "config.json").read_text())
    assert saved["arch"]["type"] == "TimmModel" and "until then" not in capsys.readouterr().out


def test_who_chooses_the_network_is_told(configs, monkeypatch):
    """Falling back would lose what was asked for."""
    monkeypatch.setattr("tools.fallback.missing", lambda arch: PROBLEM)
    config = load_config(configs)
    assert config["fallback"] == str(configs.parent / "ride.json")
    with pytest.raises(ConfigError, match="bring a file"):
        settle_weights(config, [Override("arch.args.num_experts", 2)])
    with pytest.raises(ConfigError, match="bring a file"):
        settle_weights(config, [Override("trainer.freeze.then", 0.3)])
    off = {**config, "arch": {"type": "TimmModel", "args": {**config["arch"]["args"], "weights": False}}}
    assert settle_weights(off)["arch"] == off["arch"]
    changed = settle_weights(load_config(configs, [Override("trainer.epochs", 7)]), [Override("trainer.epochs", 7)])
    assert changed["trainer"]["epochs"] == 7 and changed["arch"]["type"] == "ResNet32Model"


OWN = {"seed": 7, "groups": {"few": 8}, "metrics": ["accuracy"],
       "arch": {"args": {"s": 16}}, "optimizer": {"args": {"lr": 0.001}},
       "data_loader": {"args": {"data_dir": "elsewhere", "batch_size": 2, "image_size": 48, "num_workers": 1}},
       "trainer": {"epochs": 3, "save_dir": "mine/", "save_period": 2, "keep_last": 5, "verbosity": 1,
                   "freeze": "backbone"}}


@pytest.fixture
def said(monkeypatch, caplog, capsys):
    """What is logged from here on; the weights can't be had."""
    monkeypatch.setattr("tools.fallback.missing", lambda arch: PROBLEM)
    setup_logging()
    return lambda: caplog.text + "".join(capsys.readouterr())


def settled(file, *overrides):
    return settle_weights(load_config(file, overrides), overrides, file)


def test_a_config_on_top_keeps_its_data_and_its_run(configs, said):
    """It lies in a folder of its own, and the fallback beside the file that names it."""
    file = configs.parent / "mine" / "deep" / "mine.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"extends": "../../own.json", "name": "mine", **OWN}))
    config = settled(file)
    ride = load_config(configs.parent / "ride.json")
    assert config["name"] == "mine" and config["seed"] == 7 and config["groups"] == {"many": 100, "few": 8}
    assert config["data_loader"]["args"] == {**ride["data_loader"]["args"], "data_dir": "elsewhere", "batch_size": 2,
                                             "num_workers": 1}
    trainer = {key: value for key, value in OWN["trainer"].items() if key != "freeze"}
    assert {key: config["trainer"][key] for key in trainer} == trainer and config["trainer"]["freeze"] is None
    assert config["arch"] == ride["arch"] and config["optimizer"] == ride["optimizer"]
    lines = {line for line in said().splitlines() if "until then" in line}
    assert len(lines) == 1 and lines.pop().endswith(
        f"; not taken over from {file}: arch, data_loader.args.image_size, optimizer, metrics, trainer.freeze")


def test_flags_come_last(configs, said):
    file = configs.parent / "mine.json"
    file.write_text(json.dumps({"extends": "own.json", **OWN}))
    config = settled(file, Override("trainer.epochs", 9), Override("optimizer.args.lr", 0.2),
                     Override("data_loader.args.image_size", 40))
    assert config["trainer"]["epochs"] == 9 and config["optimizer"]["args"]["lr"] == 0.2
    assert config["data_loader"]["args"]["image_size"] == 40
    assert said().rstrip().endswith(f"not taken over from {file}: arch, optimizer, metrics, trainer.freeze")


def test_a_config_that_names_its_fallback_has_the_data_and_the_fallback_the_recipe(configs, said):
    """Its epochs and batch size are those of the pretrained network; whose they are can't be told."""
    file = configs.parent / "copy.json"
    file.write_text(json.dumps({"extends": "own.json", "fallback": "ride.json", **OWN}))
    config = settled(file)
    ride = load_config(configs.parent / "ride.json")
    assert config["data_loader"]["args"]["data_dir"] == "elsewhere" and config["trainer"]["save_dir"] == "mine/"
    assert config["trainer"]["epochs"] == ride["trainer"]["epochs"] == 40
    assert config["data_loader"]["args"]["batch_size"] == ride["data_loader"]["args"]["batch_size"] == 4
    told = said()
    assert "data_loader.args.batch_size" in told and "trainer.epochs" in told and "save_dir" not in told


def test_what_lies_under_the_file_is_no_ones_own(configs, said):
    """A config that changes a name alone trains as the fallback does, and nothing of it is lost."""
    file = configs.parent / "mine.json"
    file.write_text(json.dumps({"extends": "own.json", "name": "mine"}))
    assert settled(file)["trainer"]["epochs"] == 40 and "not taken over" not in said()


def test_what_counts_as_missing(monkeypatch):
    from model.timm_body import MissingPackage
    from model.weights.pretrained import MissingWeights
    from tools.fallback import missing

    def fail(error):
        def look(name):
            raise error
        monkeypatch.setattr("model.weights.pretrained.own_file", look)
    for kind in (MissingPackage, MissingWeights):
        fail(kind("why"))
        assert missing({"args": {"model_name": "test_efficientnet"}}) == "why"
    fail(MissingWeights("no weights of that name"))
    for name in ("test_efficientnett", ""):     # a name that nobody knows isn't one without weights
        with pytest.raises(ConfigError, match=r"arch\.args\.model_name: .*has no network"):
            missing({"args": {"model_name": name}})


def test_a_fallback_for_a_network_without_weights_is_no_matter():
    config = load_config("configs/digits_lt_ce.json", [Override("fallback", "configs/digits_lt_ce.json")])
    assert settle_weights(config) == {**config, "fallback": None}
