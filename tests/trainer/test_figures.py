"""The report's figures in TensorBoard at a training's end: of whom, and that they never cost a run."""

import re
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.hooks import curves as watch

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


def test_an_early_stop_names_the_epoch_it_reached(runs, capsys):
    runs("early", "--epochs", 9, "--set", "trainer.monitor=max val_accuracy", "--set", "trainer.early_stop=1",
         optimizer={"args": {"lr": 1e-12}})
    said = capsys.readouterr().out
    epoch = re.search(r"test, epoch (\d+)", said)[1]
    assert epoch != "9" and f"checkpoint-epoch{epoch}.pth" in said and f"epoch {epoch}/9 " in said


def test_every_ranks_images_are_drawn(monkeypatch):
    mine = {"labels": np.array([0, 1]), "predictions": np.array([0, 0]), "confidences": torch.ones(2).numpy()}
    other = {key: value[:1] for key, value in mine.items()}
    none = {key: value[:0] for key, value in mine.items()}

    def gather(shares, kept):
        shares[:] = [kept, none, other]
    monkeypatch.setattr(watch.dist, "world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    whole = watch.gather_images({**mine, "accuracy": 0.5})
    assert set(whole) == {"labels", "predictions", "confidences"}
    assert whole["labels"].tolist() == [0, 1, 0]
    monkeypatch.setattr(watch.dist, "world_size", lambda: 1)
    assert watch.gather_images({"accuracy": 0.5}) == {}
