"""Going on from an older checkpoint than the newest, and after a kill: no course's files pass for another's."""

import csv
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from trainer.trainer import Trainer
from utils.checkpoint.store import load_checkpoint
from utils.errors import ConfigError

LOWEST = ("--set", "trainer.monitor=min val_loss")


class Killed(Exception):
    """In place of SIGKILL: nothing is saved any more."""


def kill_at(monkeypatch, epoch: int) -> None:
    """The next run that comes to `epoch` dies there; later ones don't."""
    original = Trainer.train_epoch

    def train_epoch(self, number, start_batch):
        if number == epoch:
            monkeypatch.setattr(Trainer, "train_epoch", original)
            raise Killed
        return original(self, number, start_batch)
    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)


def validate_as(monkeypatch, *losses: float) -> None:
    """Validations find these losses, one after the other."""
    left = iter(losses)
    monkeypatch.setattr(Trainer, "validate", lambda self, epoch: {"loss": next(left)})


def names(models) -> list[str]:
    return sorted(path.name for path in models.glob("*.pth"))


def test_leaving_a_course_sets_its_later_checkpoints_aside(runs):
    """Resumed from epoch 1 of 3 with one file kept: the new epoch 2 stays, not the old ones."""
    models = runs("course", "--epochs", 3)
    runs(None, "-r", models / "checkpoint-epoch1.pth", "--epochs", 2, "--set", "trainer.keep_last=1")
    assert names(models) == ["checkpoint-epoch2.pth", "superseded-checkpoint-epoch2.pth",
                             "superseded-checkpoint-epoch3.pth"]


def test_a_stop_inside_the_new_course_is_what_auto_goes_on_from(runs, signal_at, same_state, capfd):
    models = runs("course", "--epochs", 3)
    signal_at(2)
    runs(None, "-r", models / "checkpoint-epoch1.pth", "--save_period", 10)
    aside = ["superseded-checkpoint-epoch2.pth", "superseded-checkpoint-epoch3.pth"]
    assert names(models) == ["checkpoint-epoch1.pth", "checkpoint-epoch2.pth", *aside]
    assert load_checkpoint(models / "checkpoint-epoch2.pth")["batch"] == 2
    capfd.readouterr()
    runs("course", "-r", "auto", "--epochs", 3)
    assert "epoch 2/3" in capfd.readouterr().out
    for name in aside:      # nothing was changed, so the new course is the old one
        assert same_state(models / name, models / name.removeprefix("superseded-")) == []


def test_a_file_of_an_epochs_middle_isnt_set_aside_when_it_is_gone_on_from(runs, signal_at):
    signal_at(6)
    models = runs("course", "--epochs", 3)
    middle = models / "checkpoint-epoch2.pth"
    copy = shutil.copy(middle, models.parent)
    runs(None, "-r", middle)
    shutil.copy(copy, middle)
    signal_at(1)
    runs(None, "-r", middle, "--save_period", 10)
    assert names(models) == ["checkpoint-epoch1.pth", "checkpoint-epoch2.pth", "superseded-checkpoint-epoch3.pth"]


def test_a_kill_before_the_new_course_has_saved_leaves_what_it_began_from(runs, monkeypatch):
    """keep_last counts none of the old course's later epochs."""
    models = runs("course", "--epochs", 4)
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        runs(None, "-r", models / "checkpoint-epoch2.pth", "--save_period", 10, "--lr", 0.1, "--set",
             "trainer.keep_last=1")
    assert names(models) == ["checkpoint-epoch2.pth", "superseded-checkpoint-epoch3.pth",
                             "superseded-checkpoint-epoch4.pth"]


@pytest.mark.parametrize(("losses", "kept", "best"), [((0.5, 0.6, 0.4), True, 1), ((0.5, 0.5, 0.4), True, 2),
                                                      ((0.5, 0.6, 0.4), False, 3)],
                         ids=["its checkpoint is kept", "the later of equal ones", "its weights are gone"])
def test_the_best_is_never_of_the_course_that_was_left(runs, monkeypatch, capfd, losses, kept, best):
    """Epoch 3 was the best; after going on from epoch 2 its loss is another."""
    validate_as(monkeypatch, *losses, 0.7)
    models = runs("course", "--epochs", 3, *LOWEST)
    if not kept:
        (models / "checkpoint-epoch1.pth").unlink()
    capfd.readouterr()
    runs(None, "-r", models / "checkpoint-epoch2.pth")
    found, last = (load_checkpoint(models / name) for name in ("model_best.pth", "checkpoint-epoch3.pth"))
    value = (*losses[:2], 0.7)[best - 1]
    assert (found["epoch"], found["monitor_best"], last["monitor_best"]) == (best, value, value)
    assert load_checkpoint(models / "superseded-model_best.pth")["monitor_best"] == 0.4
    assert last["not_improved"] == (2 if kept else 0)
    assert ("are no longer there: the best so far begins anew" in capfd.readouterr().out) != kept
    with open(runs.log("course") / "metrics.csv") as handle:
        assert [float(row["val_loss"]) for row in csv.DictReader(handle)] == [*losses[:2], 0.7]


def test_a_best_from_before_stays(runs, monkeypatch):
    validate_as(monkeypatch, 0.4, 0.5, 0.6, 0.7)
    models = runs("course", "--epochs", 3, *LOWEST)
    before = (models / "model_best.pth").read_bytes()
    runs(None, "-r", models / "checkpoint-epoch2.pth")
    assert (models / "model_best.pth").read_bytes() == before and "superseded-model_best.pth" not in names(models)


def test_nothing_is_renamed_where_nothing_is_trained(runs):
    models = runs("course", "--epochs", 3, *LOWEST)
    before = names(models)
    runs(None, "-r", models / "checkpoint-epoch1.pth", "--epochs", 1)
    assert names(models) == before


def test_each_left_course_keeps_its_files(runs):
    models = runs("course", "--epochs", 2)
    first = (models / "checkpoint-epoch2.pth").read_bytes()
    for rate in (0.1, 0.2):
        runs(None, "-r", models / "checkpoint-epoch1.pth", "--lr", rate)
    aside = ["superseded-checkpoint-epoch2.pth", "superseded2-checkpoint-epoch2.pth"]
    assert names(models) == ["checkpoint-epoch1.pth", "checkpoint-epoch2.pth", *aside]
    assert (models / aside[0]).read_bytes() == first
    rates = [load_checkpoint(models / name)["optimizer"]["param_groups"][0]["lr"]
             for name in (aside[1], "checkpoint-epoch2.pth")]
    assert rates == [0.1, 0.2]


def test_all_are_renamed_or_none(runs, monkeypatch):
    models, replace = runs("course", "--epochs", 3), Path.replace

    def refuse(self, target):
        if self.name == "checkpoint-epoch2.pth":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return replace(self, target)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ConfigError, match=r"trainer\.save_dir: can't write in .*checkpoint-epoch2\.pth"):
        runs(None, "-r", models / "checkpoint-epoch1.pth")
    assert names(models) == [f"checkpoint-epoch{epoch}.pth" for epoch in (1, 2, 3)]


def test_a_run_killed_before_its_first_checkpoint_goes_on_from_its_best(runs, monkeypatch, same_state):
    flags = ("--epochs", 4, "--save_period", 10, *LOWEST)
    losses = 0.6, 0.5, 0.55, 0.4
    validate_as(monkeypatch, *losses)
    whole = runs("whole", *flags)
    validate_as(monkeypatch, *losses[:2], *losses[2:])
    kill_at(monkeypatch, 3)
    with pytest.raises(Killed):
        runs("killed", *flags)
    models = runs.models("killed")
    assert names(models) == ["model_best.pth"]
    before, rows = (models / "model_best.pth").read_bytes(), (runs.log("killed") / "metrics.csv").read_text()
    with pytest.raises(ConfigError, match=r"--run_id: killed is a run already, with .*model_best\.pth.*-r auto"):
        runs("killed", *flags)
    assert (models / "model_best.pth").read_bytes() == before
    assert (runs.log("killed") / "metrics.csv").read_text() == rows

    runs("killed", "-r", "auto", *flags)
    for name in ("checkpoint-epoch4.pth", "model_best.pth"):
        assert same_state(whole / name, models / name) == []
    assert (runs.log("killed") / "metrics.csv").read_text() == (runs.log("whole") / "metrics.csv").read_text()


def test_a_start_that_saved_nothing_can_be_made_again(runs):
    runs.models("again").mkdir(parents=True)
    (runs.models("again") / "config.json").write_text("{}")
    assert torch.load(runs("again", "--epochs", 1) / "checkpoint-epoch1.pth", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("tested", ["checkpoint-epoch3.pth", "model_best.pth", None])
def test_test_figures_of_the_course_that_was_left_arent_the_new_ones(runs, signal_at, monkeypatch, tested):
    """While a run has none of its own, the batch script of docs/many-machines.md puts it back into the queue."""
    validate_as(monkeypatch, 0.5, 0.6, 0.4, 0.7)
    models = runs("course", "--epochs", 3, *LOWEST)
    file, aside = models / "test_metrics.json", models / "superseded-test_metrics.json"
    figures = {key: value for key, value in json.loads(file.read_text()).items() if key != "checkpoint"}
    file.write_text(json.dumps({**figures, "checkpoint": tested} if tested else figures))
    for name in ("detections_bbox.json", "detections_bbox.other.checkpoint-epoch1.json"):
        (models / name).write_text("[]")        # as a detector's test leaves beside its figures
    signal_at(2)
    runs(None, "-r", models / "checkpoint-epoch1.pth", "--save_period", 10)
    assert aside.is_file() and not file.exists()
    assert sorted(path.name for path in models.glob("*detections*")) == [
        "detections_bbox.other.checkpoint-epoch1.json", "superseded-detections_bbox.json"]


def test_test_figures_from_before_stay(runs, signal_at):
    models = runs("course", "--epochs", 2)
    file = models / "test_metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "checkpoint": "checkpoint-epoch1.pth"}))
    before = file.read_text()
    signal_at(2)
    runs(None, "-r", models / "checkpoint-epoch1.pth", "--epochs", 3)
    assert file.read_text() == before


def test_a_path_with_dots_and_another_name_change_no_place(runs, monkeypatch, capfd):
    """Rows go to the run's own metrics.csv, and its config still says what it is called."""
    models = runs("course", "--epochs", 2)
    (models.parent / "beside").mkdir()
    monkeypatch.chdir(models.parent / "beside")
    capfd.readouterr()
    runs(None, "-r", "../course/checkpoint-epoch2.pth", "--epochs", 3, "--name", "other", "--save_dir", "elsewhere")
    assert [row["epoch"] for row in csv.DictReader((runs.log("course") / "metrics.csv").open())] == ["1", "2", "3"]
    assert names(models) == [f"checkpoint-epoch{epoch}.pth" for epoch in (1, 2, 3)]
    assert capfd.readouterr().out.count("a run that goes on stays in its own folder") == 2
    saved = json.loads((models / "config.json").read_text())
    assert (saved["name"], saved["trainer"]["save_dir"]) == ("tiny", str(runs.save_dir))
    runs(None, "-r", "../course/checkpoint-epoch2.pth", "-c", runs.config(), "--epochs", 3, "--name", "other")
    assert json.loads((models / "config.json").read_text())["name"] == "tiny"


def test_a_course_that_was_left_isnt_gone_on_with_in_its_folder(runs):
    models = runs("course", "--epochs", 2)
    aside = (models / "checkpoint-epoch2.pth").rename(models / "superseded2-checkpoint-epoch2.pth")
    with pytest.raises(ConfigError, match=r"to a folder of its own as checkpoint-epoch2\.pth, or .*--pretrained"):
        runs(None, "-r", aside)
    runs("new", "-r", aside, "--epochs", 1, resume_state_dict_only=True)


@pytest.mark.parametrize("change", [lambda text: text.replace(",", ";"), lambda text: text.replace("\n1,", "\n1.0,"),
                                    lambda text: text.replace("0.", "0;")], ids=["semicolons", "1.0", "decimal commas"])
def test_a_table_that_a_spreadsheet_saved_is_named(runs, change):
    """Before anything is written."""
    models = runs("course", "--epochs", 1)
    table, before = runs.log("course") / "metrics.csv", (models / "config.json").read_text()
    table.write_text(change(table.read_text()))
    with pytest.raises(ConfigError, match=r"metrics\.csv: isn't a metrics\.csv any more; rename it"):
        runs(None, "-r", models / "checkpoint-epoch1.pth", "--epochs", 2)
    assert (models / "config.json").read_text() == before
