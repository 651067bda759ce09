"""Going on with other settings: what is asked is in force and recorded, and no image is skipped or seen twice."""
from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from base.base_data_loader import BaseDataLoader
from base.changes import config_changes, place_steps
from data_loader.detection.loaders import CocoDataLoader
from logger.metrics_csv import read_table
from trainer.trainer import Trainer
from utils.errors import ConfigError

SCHEDULES = {
    "StepLR": {"step_size": 2}, "MultiStepLR": {"milestones": [2, 4]}, "ConstantLR": {"total_iters": 3},
    "LinearLR": {"total_iters": 3}, "ExponentialLR": {"gamma": 0.8}, "PolynomialLR": {"total_iters": 6},
    "CosineAnnealingLR": {"T_max": 5}, "CosineAnnealingWarmRestarts": {"T_0": 2}, "OneCycleLR": {"max_lr": 0.1},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1}, "ReduceLROnPlateau": {"patience": 0, "factor": 0.5},
    "CustomLR": {"step1": 2, "step2": 4, "warmup_epoch": 3}, "CosLR": {"warmup_epoch": 2},
    "LinearLR0": {"by": "step", "warmup_epoch": 0.5}}


@pytest.fixture
def quick(monkeypatch):
    """Runs in which nothing is computed: a step changes no weights, and a validation is a fixed falling loss."""
    def step(self, parts):
        if getattr(self.lr_scheduler, "unit", "epoch") == "step":
            self.lr_scheduler.step()
        return {"loss": torch.tensor(1.0)}
    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "validate", lambda self, epoch: {"loss": (1.0, 0.8, 0.9, 0.95, 0.7)[(epoch - 1) % 5]})


def rates(folder: Path) -> list[float]:
    return [row["lr"] for row in read_table(folder / "metrics.csv")]


def as_ride_wrote(path: Path) -> None:
    """Leave in a checkpoint what the RIDE template writes: no schedule, no position, no random states."""
    file = torch.load(path, weights_only=True)
    file["config"].pop("lr_scheduler")
    kept = {key: file[key] for key in ("arch", "epoch", "state_dict", "optimizer", "monitor_best", "config")}
    torch.save(kept, path)


@pytest.mark.parametrize("kind", ["StepLR", "OneCycleLR", "ReduceLROnPlateau", "CosLR", "CustomLR"])
def test_a_file_without_a_schedule_goes_on_at_the_rates_of_an_uninterrupted_run(quick, runs, kind: str) -> None:
    flags = ("--epochs", 5, "--set", f"lr_scheduler={json.dumps({'type': kind, 'args': SCHEDULES[kind]})}")
    runs("whole", *flags)
    models = runs("half", *flags)
    path = models / "checkpoint-epoch3.pth"
    as_ride_wrote(path)
    runs(None, "-c", runs.config(), "-r", path, *flags)
    found, whole = rates(runs.log("half")), rates(runs.log("whole"))
    known = 4 if kind == "ReduceLROnPlateau" else 5   # such a file doesn't say what was the best so far
    assert len(whole) == 5 and found[:known] == pytest.approx(whole[:known], rel=1e-12)
    assert len(set(whole)) > 1


ASKED = {
    "rate, decay, momentum": (["--lr", 0.02, "--set", "optimizer.args.weight_decay=0", "--set",
                               "optimizer.args.momentum=0.5"],
                              {"lr": 0.0002, "initial_lr": 0.02, "weight_decay": 0, "momentum": 0.5},
                              ["optimizer.args.lr 0.05 -> 0.02", "optimizer.args.momentum 0.9 -> 0.5",
                               "optimizer.args.weight_decay 0.0005 -> 0"]),
    "nesterov, which wasn't named": (["--set", "optimizer.args.nesterov=true"], {"nesterov": True},
                                     ["optimizer.args.nesterov null -> true"]),
    "steps": (["--step1", 5], {"lr": 0.005}, ["lr_scheduler.args.step1 3 -> 5"]),
    "warm-up": (["--warmup", 8], {"lr": 0.05 * 5 / 8 * 0.1 ** 2}, ["lr_scheduler.args.warmup_epoch 2.0 -> 8.0"]),
    "another schedule": (["--set", 'lr_scheduler={"type": "StepLR", "args": {"step_size": 1, "gamma": 0.5}}'],
                         {"lr": 0.05 / 2 ** 4}, ["lr_scheduler.type \"CustomLR\" -> \"StepLR\""]),
    "a plateau": (["--set", 'lr_scheduler={"type": "ReduceLROnPlateau", "args": {"patience": 9}}'], {"lr": 0.05},
                  ["lr_scheduler.type"]),
    "a cosine, longer": (["--set", 'lr_scheduler={"type": "CosLR", "args": {}}', "--epochs", 8],
                         {"lr": 0.025}, ["trainer.epochs 4 -> 8"]),
    "none at all": (["--set", "lr_scheduler={}"], {"lr": 0.05}, ["lr_scheduler"])}


@pytest.mark.parametrize("what", ASKED)
def test_what_was_asked_is_in_force_and_recorded(quick, runs, capfd, what: str) -> None:
    """From epoch 3 of 4 on; the schedule of epoch 4's end says what epoch 5 begins with."""
    flags, numbers, said = ASKED[what]
    models = runs("one", "--epochs", 4)
    capfd.readouterr()
    runs(None, "-r", models / "checkpoint-epoch3.pth", *flags)
    told = capfd.readouterr().out
    assert all(line in told for line in said), told
    file = torch.load(models / "checkpoint-epoch4.pth", weights_only=True)
    group = file["optimizer"]["param_groups"][0]
    assert {key: group[key] for key in numbers} == pytest.approx(numbers)
    assert file["config"] == json.loads((models / "config.json").read_text())
    for key in group.keys() & file["config"]["optimizer"]["args"].keys() - {"lr"}:
        assert group[key] == file["config"]["optimizer"]["args"][key]


def test_validation_images_that_were_trained_on_are_said(quick, runs, capfd) -> None:
    """Not those of the run as it was."""
    models = runs("seen", "--epochs", 1, "--set", "data_loader.args.validation=none")
    for split, seen in (("none", 0), ("holdout", 1)):
        capfd.readouterr()
        runs(None, "-r", models / "checkpoint-epoch1.pth", "--epochs", 2, "--set",
             f"data_loader.args.validation={split}")
        assert capfd.readouterr().out.count("checkpoint-epoch1.pth may have learned from these images") == seen


def test_another_optimizer_inside_sam_is_refused(quick, runs) -> None:
    inside = 'optimizer={"type": "SAM", "args": {"base": {"type": "%s", "args": {"lr": 0.01}}}}'
    models = runs("sam", "--epochs", 1, "--set", inside % "AdamW")
    with pytest.raises(ConfigError, match=r"optimizer\.type: .* with SAM\(AdamW\), whose state SAM\(SGD\) can't"):
        runs(None, "-r", models / "checkpoint-epoch1.pth", "--epochs", 2, "--set", inside % "SGD")


@pytest.mark.parametrize(("flags", "says"), [
    (["--set", 'optimizer={"type": "AdamW", "args": {"lr": 0.01}}'], r"optimizer\.type.*SGD.*AdamW"),
    (["--set", 'trainer.freeze="norms"'], r"trainer\.freeze"), (["--set", "trainer.layer_decay=0.5"], "layer_decay"),
    (["--set", "init_classifier=class_means"], "init_classifier: has its effect where a run begins"),
    (["--set", "arch.args.weights=/gone.pth"], r"arch\.args\.weights: has its effect where a run begins"),
    (["--set", "trainer.no_decay=norm_bias"], "no_decay"), (["--set", "loss.type=SADELoss"], "for 3 experts"),
    (["--set", 'lr_scheduler={"type": "OneCycleLR", "args": {"max_lr": 1, "total_steps": 1}}'], "total_steps")])
def test_what_cant_be_gone_on_with_is_refused(quick, runs, flags: list, says: str) -> None:
    models = runs("one")
    before = (models / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=says):
        runs(None, "-r", models / "checkpoint-epoch1.pth", *flags)
    assert (models / "config.json").read_bytes() == before


def test_memory_that_isnt_there_is_refused(runs) -> None:
    runs.base["optimizer"] = {"type": "AdamW", "args": {"lr": 0.01}}
    models = runs("one", "--epochs", 1)
    with pytest.raises(ConfigError, match="max_exp_avg_sq"):
        runs(None, "-r", models / "checkpoint-epoch1.pth", "--epochs", 2, "--set", "optimizer.args.amsgrad=true")


def test_a_plateau_keeps_what_it_has_come_to(quick, runs) -> None:
    """Lowered once by epoch 3 (0.8, then 0.9); another base rate is lowered alike, another factor holds from here."""
    plateau = {"type": "ReduceLROnPlateau", "args": SCHEDULES["ReduceLROnPlateau"]}
    flags = ("--epochs", 5, "--set", f"lr_scheduler={json.dumps(plateau)}")
    models = runs("one", *flags)
    runs(None, "-r", models / "checkpoint-epoch3.pth", "--lr", 0.2, "--set", "lr_scheduler.args.factor=0.1")
    assert rates(runs.log("one")) == pytest.approx([0.05, 0.05, 0.05, 0.1, 0.01])


def test_a_plateau_of_another_figure_begins_anew(quick, runs) -> None:
    """0.7 is the best loss there was; an accuracy, or another figure in the same direction, isn't compared with it."""
    plateau = {"type": "ReduceLROnPlateau", "args": {"patience": 0, "factor": 0.1}}
    flags = ("--epochs", 5, "--set", f"lr_scheduler={json.dumps(plateau)}", "--set", "trainer.monitor=min val_loss")
    models = runs("one", *flags)
    before = rates(runs.log("one"))[-1]     # by 0.9 and 0.95
    runs(None, "-r", models / "checkpoint-epoch5.pth", "--epochs", 7, "--set", "trainer.monitor=min loss")
    assert rates(runs.log("one"))[5:] == pytest.approx([before, before])


def test_figures_that_are_asked_for_in_the_middle_of_an_epoch(runs, signal_at) -> None:
    """Each is a mean over the images that it was computed of; one that is left out is gone."""
    signal_at(2)
    models = runs("one", "--epochs", 1, "--set", 'metrics=["accuracy"]')
    stopped = torch.load(models / "checkpoint-epoch1.pth", weights_only=True)
    assert stopped["extra"]["means"]["counts"] == {"loss": 12, "accuracy": 12}
    runs(None, "-r", models / "checkpoint-epoch1.pth", "--set", 'metrics=["top_k_acc"]')
    row = read_table(runs.log("one") / "metrics.csv")[0]
    assert row["top_k_acc"] == 1.0 and row.get("accuracy") is None      # of three classes each is among the first five


def test_another_figure_begins_anew(quick, runs, capfd) -> None:
    flags = ("--epochs", 4, "--set", "trainer.monitor=min val_loss")
    models = runs("one", *flags)
    runs(None, "-r", models / "checkpoint-epoch3.pth", "--set", "trainer.monitor=min loss")
    assert torch.load(models / "checkpoint-epoch4.pth", weights_only=True)["monitor_best"] == 1.0
    assert "the best so far begins anew" in capfd.readouterr().out


def test_changes_are_told_but_not_defaults() -> None:
    before = {"seed": 0, "name": "a", "trainer": {"epochs": 3, "save_dir": "x"}, "loss": {"type": "L", "args": {}}}
    now = {"name": "b", "trainer": {"epochs": 4, "save_dir": "y", "amp": "off", "accumulate": 2},
           "loss": {"type": "L", "args": {"gamma": 1}}}
    assert list(config_changes(before, now)) == [
        "loss.args.gamma null -> 1", "trainer.accumulate 1 -> 2", "trainer.epochs 3 -> 4"]


# ---------------------------------------------------------------------- positions

def seen_by(monkeypatch) -> dict[int, list[int]]:
    """Epoch -> positions in the epoch of the images that steps had, in their order."""
    seen: dict[int, list[int]] = {}
    original = Trainer.step

    def step(self, parts):
        begin = self.batches_done
        for batch in range(begin, begin + len(parts)):
            seen.setdefault(self.epoch, []).extend(range(*self.train_loader.span(batch)))
        return original(self, parts)
    monkeypatch.setattr(Trainer, "step", step)
    return seen


@pytest.mark.parametrize("sampler", [None, "ClassBalanced"])
@pytest.mark.parametrize(("before", "after"), [((6, 1), (4, 1)), ((4, 1), (6, 1)), ((6, 1), (23, 1)), ((3, 2), (5, 1)),
                                               ((4, 1), (4, 2)), ((4, 1), (3, 2)), ((11, 1), (2, 3)), ((6, 1), (6, 1))])
@pytest.mark.parametrize("workers", [None, 0])
def test_no_image_is_skipped_or_seen_twice(quick, runs, monkeypatch, before, after, sampler, workers) -> None:
    """23 images; (batch size, accumulation). In memory, and read by a loader of files."""
    seen = seen_by(monkeypatch)
    stop = Trainer.step

    def step(self, parts):
        if self.epoch == 2 and not stopped:
            stopped.append(True)
            self.stop.signal = signal.SIGTERM
        return stop(self, parts)
    stopped: list = []
    monkeypatch.setattr(Trainer, "step", step)
    data = {"batch_size": before[0]}
    if workers is not None:
        data["cache"] = False
    if sampler:
        data["sampler"] = {"type": sampler, "args": {}}
    one_cycle = 'lr_scheduler={"type": "OneCycleLR", "args": {"max_lr": 0.1}}'
    models = runs("one", "--set", f"trainer.accumulate={before[1]}", "--set", one_cycle, data_loader={"args": data})
    had = len(seen[2])
    assert stopped and 0 < had < 23
    runs(None, "-r", models / "checkpoint-epoch2.pth", "--bs", after[0], "--set", f"trainer.accumulate={after[1]}")
    assert seen[1] == list(range(22 if before[0] == 11 else 23))
    # The last of 23 isn't trained on alone, as in any epoch of 22 and 1.
    assert seen[2] == list(range(22 if had == 22 else 23))
    file = torch.load(models / "checkpoint-epoch2.pth", weights_only=True)
    steps = -(-len(BaseDataLoader(np.zeros(23), after[0], shuffle=False, training=True)) // after[1])
    assert file["batch"] is None and file["lr_scheduler"]["last_epoch"] == 2 * steps


@pytest.mark.parametrize(("flags", "data"), [
    (["--seed", 1], {}), (["--set", 'data_loader.args.sampler={"type": "ClassBalanced", "args": {}}'], {})])
def test_another_order_inside_an_epoch_is_refused(runs, signal_at, flags, data) -> None:
    signal_at(6)
    models = runs("one")
    with pytest.raises(ConfigError, match=r"inside epoch 2.*another order"):
        runs(None, "-r", models / "checkpoint-epoch2.pth", *flags)
    runs(None, "-r", models / "checkpoint-epoch1.pth", *flags)   # between epochs it's a change like any other


def test_a_file_that_counts_batches_goes_on(runs, signal_at, same_state) -> None:
    whole = runs("whole")
    signal_at(6)
    models = runs("one")
    path = models / "checkpoint-epoch2.pth"
    file = torch.load(path, weights_only=True)
    assert file.pop("position") and file["batch"] == 2
    torch.save(file, path)
    runs(None, "-r", path)
    assert same_state(whole / "checkpoint-epoch2.pth", path) == []


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("had", "size"), [(12, 5), (6, 6), (12, 3), (22, 4), (20, 3)])
def test_ranks_share_what_is_left(ranks: int, had: int, size: int) -> None:
    loaders = [BaseDataLoader(np.zeros(23), size, shuffle=True, training=True, rank=rank, world_size=ranks)
               for rank in range(ranks)]
    for loader in loaders:
        loader.set_epoch(1, 0, had)
    positions = []
    for batch in range(len(loaders[0])):
        for loader in loaders:
            positions += loader.positions(batch)[:loader.share(batch)[0]].tolist()
    assert sorted(positions) == list(range(had, 22 if had == 22 else 23))


def test_detections_aspects_hold_only_for_batches_of_one_size(tmp_path) -> None:
    """Their order depends on the batch's size where pictures are grouped by it, and then the fingerprint does."""
    loader = CocoDataLoader.__new__(CocoDataLoader)
    loader.index_sampler, loader.shuffle, loader.training, loader.seed, loader.n_samples = None, True, True, 0, 12
    sizes = [{"width": 2 + i % 2, "height": 2 + i % 3} for i in range(12)]
    loader.split = type("Split", (), {"images": sizes})
    orders = {}
    for grouped in (True, False):
        for size in (2, 3):
            loader.options, loader.batch_size = {"group_by_aspect": grouped}, size
            orders[grouped, size] = loader.epoch_order(1).tolist()
    assert orders[True, 2] != orders[True, 3] and orders[False, 2] == orders[False, 3]


def test_what_a_file_cant_give_is_named(quick, runs, tmp_path) -> None:
    """A file without the optimizer's state, and a second file of weights in the config of a new run."""
    file = tmp_path / "checkpoint-epoch1.pth"
    trained = runs("first", "--epochs", 1) / "checkpoint-epoch1.pth"
    torch.save(torch.load(trained, weights_only=True) | {"optimizer": None}, file)
    with pytest.raises(ConfigError, match=r"its optimizer state doesn't fit .*--pretrained"):
        runs(None, "-r", file)
    for key in ("pretrained", "load_crt"):
        with pytest.raises(ConfigError, match=rf"^{key}: a run begins from one file, and -r .* leave one out"):
            runs("new", "-r", file, "--dry_run", **{key: str(trained), "resume_state_dict_only": True})


@pytest.mark.parametrize(("fused", "there"), [(True, "meta"), (None, "cpu")])
@pytest.mark.parametrize("inside", [False, True])
def test_counts_of_steps_are_where_the_present_settings_want_them(fused, there, inside) -> None:
    """A run in fp16, whose optimizer isn't fused, that goes on in bf16, where it is; "meta" stands for a GPU."""
    p = torch.nn.Parameter(torch.empty(2, device="meta"))
    optimizer = torch.optim.AdamW([p])
    optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": torch.empty_like(p)}
    optimizer.param_groups[0]["fused"] = fused
    place_steps(SimpleNamespace(param_groups=[], state={}, base=optimizer) if inside else optimizer)
    assert optimizer.state[p]["step"].device.type == there and optimizer.state[p]["exp_avg"].device.type == "meta"
