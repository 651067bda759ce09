"""SIGTERM, SIGINT and SIGUSR1, whenever they come: the run is saved and says how to go on."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from base.stop import StopRequest
from logger.metrics_csv import read_table
from tools import parts
from trainer.trainer import Trainer


@pytest.fixture(scope="module")
def straight(shared_runs):
    return shared_runs("not_stopped") / "checkpoint-epoch2.pth"


def hook(monkeypatch, owner, name, number=signal.SIGTERM, call=1):
    """Send ourselves a signal at the beginning of the `call`-th call of `owner.name`."""
    calls, original = [0], getattr(owner, name)

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            signal.raise_signal(number)     # to this thread: os.kill's may go to one that has to wait for a core
        return original(*args, **kwargs)
    monkeypatch.setattr(owner, name, wrapper)


@pytest.mark.parametrize("moment,epoch,batch", [
    ((parts, "make_loader", signal.SIGINT), 1, 0), ((parts, "make_model", signal.SIGTERM), 1, 0),
    ((Trainer, "validate", signal.SIGTERM), 1, 4), ((Trainer, "validate", signal.SIGINT, 2), 2, 4),
    ((parts, "make_loader", signal.SIGUSR1), 1, 0),
], ids=["loading data", "building the model", "validating", "validating the last epoch", "SIGUSR1"])
def test_at_any_moment(runs, straight, same_state, monkeypatch, capfd, recwarn, moment, epoch, batch):
    hook(monkeypatch, *moment)
    path = runs("stopped") / f"checkpoint-epoch{epoch}.pth"
    said = capfd.readouterr().out
    assert f"go on with: python train.py -r {path}" in said
    assert f"in epoch {epoch}, after {min(6 * batch, 23)} of its 23 images" in said
    assert torch.load(path, weights_only=True)["batch"] == batch
    runs(None, "-r", path)
    assert same_state(straight, runs.models("stopped") / "checkpoint-epoch2.pth") == []
    log = (runs.log("stopped") / "metrics.csv").read_text()
    assert [line.split(",")[0] for line in log.splitlines()] == ["epoch", "1", "2"]
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)], "the steps of the stopped run count too"


def test_once_training_is_complete_only_the_test_is_left_out(runs, straight, same_state, monkeypatch, capfd):
    hook(monkeypatch, Trainer, "_drop_old", call=2)
    path = runs("late") / "checkpoint-epoch2.pth"
    said = capfd.readouterr().out
    assert f"python test.py -r {path}" in said and "accuracy %" not in said and "go on with" not in said
    assert same_state(straight, path) == []


@pytest.mark.parametrize(("place", "call"), [("_update", 12), ("validate", 3)], ids=["last step", "validating"])
def test_an_epoch_without_a_step_left_counts_once_in_the_mean(runs, same_state, monkeypatch, capfd, place, call):
    """Epochs have 4 steps; the third is stopped before and after it went into the mean of the last two."""
    options = {"epochs": 3, "swa": {"epochs": 2}}
    whole = runs("whole", trainer=options)
    hook(monkeypatch, Trainer, place, call=call)
    stopped = runs("stopped", trainer=options)
    capfd.readouterr()
    runs(None, "-r", stopped / "checkpoint-epoch3.pth")
    assert "the mean of the last 2 epochs' weights" in capfd.readouterr().out
    assert same_state(whole / "checkpoint-epoch3.pth", stopped / "checkpoint-epoch3.pth") == []
    one, other = (torch.load(run / "model_swa.pth", weights_only=True)["state_dict"] for run in (whole, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)
    speeds = [row["images_per_second"] for row in read_table(runs.log("stopped") / "timing.csv")]
    assert min(speeds) > 0      # the third's images were trained by the run that was stopped


def test_an_epochs_time_is_that_of_all_the_runs_that_trained_it(runs, monkeypatch, capfd):
    """Four steps an epoch; the second epoch is stopped inside, before it has taken a second and a half."""
    folder = runs("waits", trainer={"epochs": 1})
    real, waited = Trainer._update, []

    def slow(self, *args):
        real(self, *args)
        if self.epoch == 2 and not waited:
            waited.append(time.sleep(1.5))
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(Trainer, "_update", slow)
    runs(None, "-r", folder / "checkpoint-epoch1.pth", "--epochs", "2")
    part = torch.load(folder / "checkpoint-epoch2.pth", weights_only=True)
    assert part["batch"] == 1 and part["seconds"][0] >= part["seconds"][1] >= 1.5
    capfd.readouterr()
    runs(None, "-r", folder / "checkpoint-epoch2.pth")
    shown = re.search(r"epoch 2/2 .*\[([\d.]+) s\]", capfd.readouterr().out)
    assert float(shown[1]) >= 1.5       # and "left" is judged by that
    row = read_table(runs.log("waits") / "timing.csv")[1]
    assert row["seconds"] >= part["seconds"][0] and row["images_per_second"] <= 23 / 1.5
    assert "seconds" not in torch.load(folder / "checkpoint-epoch2.pth", weights_only=True)


def test_a_dry_run_ends_at_once(runs, monkeypatch):
    hook(monkeypatch, Trainer, "_update", signal.SIGINT)
    # A script's background job, which these tests may be of, ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            runs("dry", "--dry_run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (runs.save_dir / "models").exists()


def test_a_second_interrupt_is_the_users_own(monkeypatch):
    """Ctrl-C reaches a rank of torchrun twice within milliseconds; a person's second comes later."""
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        with stop:  # nested: still listening when it ends
            pass
        assert stop.signal == signal.SIGINT
        monkeypatch.setattr(stop, "PATIENCE_S", 0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_as_a_process(runs, root, number):
    """Exit status 0; the command to go on is the last line; workers that get the signal too do no harm."""
    config = runs.config(trainer={"epochs": 500, "save_period": 500},
                         data_loader={"args": {"num_workers": 1, "cache": False}})
    process = subprocess.Popen([sys.executable, "train.py", "-c", config, "-d", "cpu", "--run_id", "p"], cwd=root,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    os.killpg(process.pid, number)  # as a batch system does: every process of the job
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    last = out.strip().splitlines()[-1]
    path = last.rpartition(" -r ")[2]
    assert "go on with: python train.py -r " in last and os.path.isfile(path)
