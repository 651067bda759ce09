"""Runs kept in results/: small folders that test.py evaluates, README's table and the curves drawn from them."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tools.compare import sameness
from tools.keep import halved, keep, without_places
from tools.opened import open_run
from tools.results import draw_curves, minutes, published_for, starts_from, stem
from utils.errors import ConfigError

FIGURES = {"accuracy": 0.5, "many_shot_acc": 0.6, "medium_shot_acc": 0.4, "few_shot_acc": 0.0, "ece": 0.1,
           "n_samples": 10000}


@pytest.fixture(scope="module")
def kept(digits_run, tmp_path_factory):
    """The shared run, kept, and two more folders like it made by hand: another seed, and an ablation."""
    top = tmp_path_factory.mktemp("kept")
    assert (digits_run.models / "test_metrics.json").is_file(), "a training leaves its test figures"
    folder = keep(digits_run.checkpoint, top / "results", "digits_ride_s0")
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    for name, seed, accuracy in (("digits_ride_s1", 1, 0.5), ("digits_minus_router_s0", 0, 0.0)):
        other = shutil.copytree(folder, folder.parent / name)
        (other / "weights.pth").unlink()
        config = json.loads((folder / "config.json").read_text())
        config["seed"] = seed
        if "minus" in name:
            config["optimizer"]["args"]["lr"] = 0.5
        (other / "config.json").write_text(json.dumps(config))
        (other / "test_metrics.json").write_text(json.dumps({**FIGURES, "accuracy": accuracy}))
    return folder


def test_a_kept_run_is_what_it_was(kept, digits_run, call_cli):
    assert sorted(path.name for path in kept.iterdir()) == [
        "config.json", "metrics.csv", "test_metrics.json", "timing.csv", "weights.pth"]
    before = json.loads((digits_run.models / "test_metrics.json").read_text())
    assert json.loads((kept / "test_metrics.json").read_text()) == before
    assert (kept / "weights.pth").stat().st_size < 0.4 * digits_run.checkpoint.stat().st_size
    loaded = torch.load(kept / "weights.pth", weights_only=True)
    assert {"arch", "epoch", "state_dict", "config", "data"} <= set(loaded)
    assert str(digits_run.models.parent.parent.parent) not in json.dumps(loaded["config"])
    again = kept.parent.parent / "again"
    shutil.copytree(kept, again)
    call_cli(["test.py", "-r", again / "weights.pth", "--data_dir", again, "-d", "cpu"], check=True)
    after = json.loads((again / "test_metrics.json").read_text())
    assert after["n_samples"] == before["n_samples"] and abs(after["accuracy"] - before["accuracy"]) <= 0.004
    assert after["loss"] == pytest.approx(before["loss"], rel=0.01)


def test_a_kept_run_kept_again_is_the_same(kept, tmp_path):
    copy = shutil.copytree(kept, tmp_path / "copy")
    figures = json.loads((kept / "test_metrics.json").read_text()) | {"checkpoint": "weights.pth"}
    (copy / "test_metrics.json").write_text(json.dumps(figures))    # as test.py leaves it
    again = keep(copy / "weights.pth", tmp_path / "results", "again")
    for file in ("config.json", "metrics.csv", "timing.csv"):
        assert (again / file).read_bytes() == (kept / file).read_bytes()
    one, other = (torch.load(folder / "weights.pth", weights_only=True)["state_dict"] for folder in (kept, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_figures_of_other_weights_arent_kept(digits_run, tmp_path):
    """Those of a training's own end are of its last epoch; test.py's say which they are of."""
    models = shutil.copytree(digits_run.models, tmp_path / "models" / "digits" / "run")
    last, best, file = (models / name for name in ("checkpoint-epoch2.pth", "model_best.pth", "test_metrics.json"))
    with pytest.raises(ConfigError, match=r"figures are of checkpoint-epoch2\.pth; first: python test\.py -r .*best"):
        keep(best, tmp_path / "results")
    file.write_text(json.dumps({**json.loads(file.read_text()), "checkpoint": "model_best.pth"}))
    assert keep(best, tmp_path / "results").is_dir()
    with pytest.raises(ConfigError, match=r"figures are of model_best\.pth"):
        keep(last, tmp_path / "results", "other")
    file.write_text(json.dumps({**json.loads(file.read_text()), "checkpoint": last.name}))
    os.utime(file, (1, 1))
    with pytest.raises(ConfigError, match="older than the checkpoint"):     # the run went on since
        keep(last, tmp_path / "results", "other")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["digits_s0"]


def test_half_is_kept_only_where_it_holds_the_weights():
    weights = {"conv.weight": torch.randn(4, 3, 3, 3), "far.weight": torch.full((2, 2), 1e6),
               "bn.weight": torch.ones(4), "bn.running_var": torch.full((4,), 1e6), "n": torch.tensor(3)}
    types = {name: value.dtype for name, value in halved(weights).items()}
    assert types == {"conv.weight": torch.float16, "far.weight": torch.float32, "bn.weight": torch.float32,
                     "bn.running_var": torch.float32, "n": torch.int64}


def test_no_path_of_this_machine_is_kept():
    config = {"data_loader": {"args": {"data_dir": "/home/me/cifar", "batch_size": 4}}, "load_crt": "/a/b/c.pth",
              "trainer": {"save_dir": "/tmp/saved"}, "extra": ["/x/y", "as/it/is"]}
    assert without_places(config) == {
        "data_loader": {"args": {"data_dir": "data", "batch_size": 4}}, "load_crt": "c.pth",
        "trainer": {"save_dir": "saved/"}, "extra": ["y", "as/it/is"]}
    assert without_places({"class_names": ["/m/0k4j"]}) == {"class_names": ["/m/0k4j"]}    # Open Images' ids
    assert without_places({"accuracy": 0.5, "data_dir": "/home/me/cifar"}) == {"accuracy": 0.5, "data_dir": "data"}


def test_no_kept_run_names_a_place():
    results = Path(__file__).resolve().parents[2] / "results"
    files = list(results.glob("**/*.json"))
    assert len(files) > 20
    for file in files:
        assert not re.search(r'"/', file.read_text()), file


def test_the_readmes_table(kept, call_cli):
    text = call_cli(["-m", "tools.compare", kept.parent, "--readme"], check=True).stdout
    head, _, first, second = text.strip().splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "run", "method", "params M", "epochs", "minutes", "all %", "many", "medium", "few", "ECE %", "command"]
    assert "| digits_ride | RIDE, 3 experts + square-root sampling |" in first and " ± " in first
    assert re.search(r"`python train.py -c \S+digits_ride_s0/config.json --seed 0`, then 1 \|", first)
    assert second.startswith("| digits_minus_router |") and ", without router" in second and "| 0.0 |" in second


def test_trials_are_kept_without_weights_and_outside_the_table(kept, digits_run, tmp_path, call_cli):
    top = shutil.copytree(kept.parent, tmp_path / "results")
    before = call_cli(["-m", "tools.compare", top, "--readme"], check=True).stdout
    done = call_cli(["-m", "tools.keep", digits_run.models, top / "trials", "--name", "digits_s0", "--no_weights"],
                    check=True)
    trial = top / "trials" / "digits_s0"
    assert f"python train.py -c {trial / 'config.json'} --data_dir data" in done.stdout
    assert sorted(path.name for path in trial.iterdir()) == [
        "config.json", "metrics.csv", "test_metrics.json", "timing.csv"]
    assert call_cli(["-m", "tools.compare", top, "--readme"], check=True).stdout == before
    assert "trials/digits_s0" in call_cli(["-m", "tools.compare", top, "--no_costs"], check=True).stdout


def test_minutes_are_a_range_where_seeds_ran_on_unlike_machines():
    assert minutes({"seconds": 90.0}) == "1.5" and minutes({"seconds": None}) is None
    assert minutes({"seconds": 2400.0, "seconds_least": 900.0, "seconds_most": 3840.0}) == "15 to 64"
    assert minutes({"seconds": 62.0, "seconds_least": 60.0, "seconds_most": 66.0}) == "1.03"


def test_seeds_tested_by_training_and_by_test_py_are_one_method():
    config = {"name": "a", "arch": {}, "data_loader": {}, "trainer": {}}
    by_end, by_test, by_tau = (
        SimpleNamespace(config={**config, "seed": seed}, figures=figures, split="test", epochs_done=1)
        for seed, figures in enumerate(({}, {"classifier": "joint"}, {"classifier": "tau"})))
    assert sameness(by_end) == sameness(by_test) != sameness(by_tau)


def test_each_kept_run_has_a_row(kept, call_cli):
    text = call_cli(["-m", "tools.compare", kept.parent, "--no_costs"], check=True).stdout
    assert "results/digits_ride_s0" in text and "results/digits_minus_router_s0" in text and "mean of 2 seeds" in text


def test_published_figures_stand_beside():
    row = {"data": "CIFAR-100-LT", "model": "ResNet32", "experts": 3, "epochs": 200, "method": "RIDE, 3 experts"}
    assert published_for(row).all == 48.6
    assert published_for({**row, "method": "CE", "experts": 1}).source == "LDAM"
    assert published_for({**row, "method": "CE", "experts": 1, "epochs": 100}).source == "RIDE"
    assert published_for({**row, "method": "RIDE, 3 experts + NBN"}) is None
    assert stem("cifar100_lt_ride_fast30_s12") == "cifar100_lt_ride_fast30"


@pytest.mark.parametrize("method, first, named, flag", [
    ("CE + cRT", "CE", None, " --load_crt results/one_s0/weights.pth"),
    ("CE + LWS", "CE", None, " --load_crt results/one_s0/weights.pth"),
    ("RIDE + EA, 3 experts", "RIDE, 3 experts", None, " -r results/one_s0/weights.pth"),
    ("CE + cRT", "balanced softmax", None, ""), ("CE", "CE", None, ""),
    ("CE + cRT", "balanced softmax", "results/one_s1/weights.pth", " --load_crt results/one_s0/weights.pth")])
def test_a_second_stage_begins_from_the_kept_first(method, first, named, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = []
    for folder, kind, source in (("results/one_s0", first, None), ("results/two_s0", method, named)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps({"load_crt": source}))
        rows.append({"data": "CIFAR-100-LT", "model": "ResNet32", "method": kind, "config": f"{folder}/config.json"})
    assert starts_from(rows[1], rows) == flag


def test_the_curves(kept, call_cli, tmp_path):
    call_cli(["-m", "tools.compare", kept.parent, "--curves", tmp_path / "new" / "curves.png"], check=True)
    with Image.open(tmp_path / "new" / "curves.png") as picture:
        assert picture.width > 900 and len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_the_curves_are_those_of_networks_trained_from_the_start(tmp_path, monkeypatch):
    """Second stages and pretrained networks stay out where there are others, and a figure has every run or isn't shown.
    """
    drawn = []
    monkeypatch.setattr("logger.figures.style.to_png", lambda figure, path: drawn.append(
        {axes.get_title(loc="left"): sorted(text.get_text() for text in axes.texts) for axes in figure.axes}))

    def run(name, method, **more):
        paths = SimpleNamespace(models=tmp_path / name, log=tmp_path / name)
        return SimpleNamespace(name=name, method=method, paths=paths, history=[
            {"epoch": epoch, "accuracy": epoch / 10, **more} for epoch in (1, 2)])

    scratch = [run("ce_s0", "CE"), run("ce_s1", "CE"), run("ride_s0", "RIDE, 3 experts", val_accuracy=0.5)]
    later = [run("crt_s0", "CE + cRT", val_accuracy=0.6), run("ea_s0", "RIDE + EA, 3 experts", val_accuracy=0.6),
             run("lite_s0", "balanced softmax + frozen backbone", val_accuracy=0.6)]
    draw_curves([*scratch, *later, run("ce_minus_decay_s0", "CE")], "results", str(tmp_path / "a.png"))
    draw_curves(later, "results", str(tmp_path / "b.png"))
    assert drawn == [{"accuracy in training, %": ["ce", "ride"]},
                     {title: ["crt", "ea", "lite"] for title in ("validation accuracy, %", "accuracy in training, %")}]


def test_a_mistake_is_named(digits_run, kept, tmp_path):
    with pytest.raises(ConfigError, match="there already"):
        keep(digits_run.checkpoint, kept.parent, kept.name)
    shutil.copy(digits_run.checkpoint, tmp_path / "checkpoint-epoch2.pth")
    with pytest.raises(ConfigError, match="first: python"):
        keep(tmp_path / "checkpoint-epoch2.pth", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_run_with_a_class_from_outside_is_kept_when_it_is_named(digits_run, tmp_path, monkeypatch, call_cli):
    models = shutil.copytree(digits_run.models, tmp_path / "models" / "digits" / "run")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kept_loss.py").write_text("from model.loss import RIDELoss\nclass Loss(RIDELoss):\n    pass\n")
    file = models / "checkpoint-epoch2.pth"
    loaded = torch.load(file, weights_only=True)
    loaded["config"]["loss"]["type"] = "kept_loss:Loss"
    torch.save(loaded, file)
    os.utime(models / "test_metrics.json")
    command = ["-m", "tools.keep", models, tmp_path / "results", "--name", "own"]
    done = call_cli(command)
    named = ["--set", "loss.type=kept_loss:Loss"]
    assert done.returncode == 2 and done.stderr.endswith(f"name it too: {' '.join(named)}\n")
    done = call_cli([*command, *named, "--set", "trainer.epochs=9"])
    assert done.returncode == 2 and "--set trainer.epochs: would change what the run's config says" in done.stderr
    done = call_cli([*command, *named], check=True)
    assert done.stdout.endswith(f"--data_dir data {' '.join(named)}\n")
    assert json.loads((tmp_path / "results/own/config.json").read_text())["loss"]["type"] == "kept_loss:Loss"


KEPT = sorted((Path(__file__).resolve().parents[2] / "results").glob("*/weights.pth"))


@pytest.mark.parametrize("path", KEPT, ids=[path.parent.name for path in KEPT])
def test_kept_weights_open(path):
    if "timm" in (path.parent / "config.json").read_text().lower():
        pytest.importorskip("timm")
    run = open_run(path)
    size = run.data["preprocess"]["image_size"]
    with torch.no_grad():
        assert torch.isfinite(run.model(torch.rand(2, 3, size, size))["output"]).all()
