"""The report's figures in TensorBoard at a training's end: of whom, and that they never cost a run."""

import re
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.hooks import curves as watch
from utils.errors import ConfigError

WANTED = {"tensorboard": True, "figures": True, "histograms": False, "image_grid": False}


def pictures(folder) -> dict[str, list[int]]:
    """TensorBoard's images, tag -> epochs."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {tag: [point.step for point in events.Images(tag)] for tag in events.Tags()["images"]}


def test_once_for_each_end(runs):
    """A run that goes on gets new ones at its new end; one with nothing left to do gets none."""
    path = runs("drawn", "--epochs", 1, trainer=WANTED) / "checkpoint-epoch1.pth"
    first = pictures(runs.log("drawn"))
    assert first and all(steps == [1] for steps in first.values())
    assert {f"report/{name}" for name in ("groups", "classes", "training", "confusion", "reliability")} <= set(first)
    runs(None, "-r", path)
    assert pictures(runs.log("drawn")) == first
    runs(None, "-r", path, "--epochs", 2)
    assert set(pictures(runs.log("drawn"))["report/groups"]) == {1, 2}


@pytest.mark.parametrize("package", ["matplotlib", "logger.figures.drawings"])
def test_what_cant_be_drawn_is_one_warning(package, runs, monkeypatch, capsys):
    drawers = (f"{package}.", "logger.figures.drawings")
    for name in [name for name in sys.modules if name == package or name.startswith(drawers)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert (runs("plain", "--epochs", 1, trainer=WANTED) / "checkpoint-epoch1.pth").is_file()
    said = capsys.readouterr().out
    assert said.count("no figures in TensorBoard (trainer.figures)") == 1 and package in said
    assert "python test.py -r" in said.splitlines()[-5]


def test_switched_off(runs):
    runs("off", "--epochs", 1, trainer={**WANTED, "figures": False})
    assert not pictures(runs.log("off"))


@pytest.mark.parametrize(("monitor", "warned"), [("off", 1), ("max val_accuracy", 0)])
def test_an_early_stop_without_a_figure_to_go_by_is_said(runs, capfd, monitor, warned):
    runs("idle", "--epochs", 1, "--set", "trainer.early_stop=3", "--set", f"trainer.monitor={monitor}")
    assert capfd.readouterr().out.count("warning: trainer.early_stop: trainer.monitor is") == warned


def test_a_figure_that_no_image_counts_for_stops_nothing(runs, capfd):
    flags = ("--set", "trainer.early_stop=1", "--set", "groups.few=0", "--set", "data_loader.args.validation=test")
    models = runs("unknown", "--epochs", 3, "--set", "trainer.monitor=max val_few_shot_acc", *flags)
    said = capfd.readouterr().out
    assert said.count("trainer.monitor: val_few_shot_acc isn't known: no image counts for it") == 1
    assert (models / "checkpoint-epoch3.pth").exists() and "early stop" not in said


@pytest.mark.parametrize(("wrong", "right"), [
    ("max val_loss", "min val_loss"), ("min val_accuracy", "max val_accuracy"), ("max val_ece", "min val_ece"),
    ("max loss", "min loss")])
def test_the_worst_epoch_isnt_monitored(runs, wrong, right):
    with pytest.raises(ConfigError, match=f"^trainer.monitor: .*worst epoch; write \"{right}\""):
        runs("worst", "--set", f"trainer.monitor={wrong}")
    assert not runs.models("worst").exists()


def test_an_early_stop_names_the_epoch_it_reached(runs, capsys):
    runs("early", "--epochs", 9, "--set", "trainer.monitor=max val_accuracy", "--set", "trainer.early_stop=1",
         optimizer={"args": {"lr": 1e-12}})
    said = capsys.readouterr().out
    epoch = re.search(r"test, epoch (\d+)", said)[1]
    assert epoch != "9" and f"checkpoint-epoch{epoch}.pth" in said and f"epoch {epoch}/9 " in said


def test_an_early_stop_waits_for_a_thaw(runs, capsys):
    """Of what hasn't been trained yet nobody knows whether it helps."""
    runs("thaw", "--epochs", 9, "--set", "trainer.monitor=max val_accuracy", "--set", "trainer.early_stop=1",
         "--set", 'trainer.freeze={"until": 4, "what": "backbone"}', optimizer={"args": {"lr": 1e-30}})
    assert 4 < int(re.search(r"test, epoch (\d+)", capsys.readouterr().out)[1]) < 9


def test_every_ranks_images_are_drawn(monkeypatch):
    mine = {"labels": np.array([0, 1]), "predictions": np.array([0, 0]), "confidences": torch.ones(2).numpy()}
    other = {key: value[:1] for key, value in mine.items()}
    none = {key: value[:0] for key, value in mine.items()}

    monkeypatch.setattr(watch.dist, "world_size", lambda: 3)
    monkeypatch.setattr(watch.dist, "gather_objects", lambda kept: [kept, none, other])
    whole = watch.gather_images({**mine, "accuracy": 0.5})
    assert set(whole) == {"labels", "predictions", "confidences"}
    assert whole["labels"].tolist() == [0, 1, 0]
    monkeypatch.setattr(watch.dist, "world_size", lambda: 1)
    assert watch.gather_images({"accuracy": 0.5}) == {}


def test_figures_of_the_whole_split_are_reported_and_monitored(runs):
    """The best epoch's, from the checkpoint, are those that test.py's code computes of the validation images."""
    from sklearn.metrics import f1_score, roc_auc_score

    from logger.metrics_csv import read_table
    from tools.opened import open_run
    models = runs("split", metrics=["accuracy", "auc"], trainer={"monitor": "max val_macro_f1"})
    rows = read_table(runs.log("split") / "metrics.csv")
    best = max(rows, key=lambda row: row["val_macro_f1"])
    run = open_run(models / "model_best.pth")
    assert run.checkpoint["epoch"] == best["epoch"] and run.checkpoint["monitor_best"] == best["val_macro_f1"]
    probs, labels = [], []
    with torch.no_grad():
        for images, targets in run.loader("val"):
            probs.append(run.model(images)["output"].softmax(1))
            labels.append(targets)
    probs, labels = torch.cat(probs).double().numpy(), torch.cat(labels).numpy()
    assert best["val_macro_f1"] == pytest.approx(f1_score(labels, probs.argmax(1), average="macro"))
    each = [roc_auc_score(labels == c, probs[:, c]) for c in range(3)]
    assert best["val_auc"] == pytest.approx(sum(each) / 3, abs=1e-6)
    assert all(row["auc"] is None and row["val_auc"] is not None for row in rows)  # training has no whole split


def test_of_equal_epochs_the_later_is_the_best_and_patience_still_runs_out(runs):
    """At a rate of 1e-30 no figure moves."""
    models = runs("ties", "--epochs", 9, "--set", "trainer.early_stop=2", "--lr", 1e-30,
                  data_loader={"args": {"batch_size": 23, "shuffle": False}},
                  trainer={"monitor": "max val_accuracy"}, arch={"args": {"norm": "GroupNorm"}})
    best = torch.load(models / "model_best.pth", weights_only=True)
    assert best["epoch"] == 3 and best["not_improved"] == 2
    assert (models / "checkpoint-epoch3.pth").is_file() and not (models / "checkpoint-epoch4.pth").exists()


@pytest.mark.parametrize(("monitor", "says"), [("max val_macro_f2", "val_macro_f1"), ("max auc", "val_auc")])
def test_a_figure_that_isnt_there_cant_be_monitored(runs, monitor, says):
    with pytest.raises(ConfigError, match=f"^trainer.monitor: .*{says}"):
        runs("none", trainer={"monitor": monitor})
