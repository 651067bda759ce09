"""Disks that are full, processes that are killed, numbers that aren't: nothing that was saved is lost."""

import contextlib
import errno
import functools
import json
import logging
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

import base.base_trainer as base_trainer
from data_loader import workers
from trainer.trainer import Trainer
from utils.checkpoint.store import load_checkpoint, newest_good_checkpoint, save_checkpoint
from utils.errors import ConfigError, RunError

# ---------------------------------------------------------------------- disks

def test_killed_while_saving(tmp_path):
    """kill -9 at twenty random moments of a loop that does nothing but save: what is there is always whole."""
    path, rng = tmp_path / "checkpoint-epoch1.pth", random.Random(0)
    save_checkpoint(path, {"state_dict": {"w": torch.zeros(50_000)}, "epoch": 0})
    for _ in range(20):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                for i in range(1, 10**9):
                    save_checkpoint(path, {"state_dict": {"w": torch.full((50_000,), float(i))}, "epoch": i})
            os._exit(1)
        time.sleep(rng.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = load_checkpoint(path)
        assert torch.equal(found["state_dict"]["w"], torch.full((50_000,), float(found["epoch"])))
    assert found["epoch"] > 0 and list(tmp_path.glob(".*.tmp"))     # some saves ended, some were cut off


def test_halves_that_a_killed_run_left_are_cleared_away(runs):
    models = runs("killed", "--epochs", 1)
    (models / ".checkpoint-epoch2.pth.abc123.tmp").write_bytes(b"half")
    runs("killed", "-r", "auto", "--epochs", 2)
    assert sorted(path.name for path in models.iterdir()) == [
        "checkpoint-epoch1.pth", "checkpoint-epoch2.pth", "config.json", "test_metrics.json"]


def test_a_run_killed_before_its_first_checkpoint_starts_anew(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    flags = ("--epochs", 2, "--set", "trainer.tensorboard=true", "--set", "trainer.histograms=false")
    models = runs("anew", *flags)
    for path in models.glob("*.pth"):
        path.unlink()
    events = next(runs.log("anew").glob("events*"))
    events.write_bytes(events.read_bytes()[:-7])  # the last record was being written
    runs("anew", "-r", "auto", *flags)
    reader = EventAccumulator(str(runs.log("anew")))
    reader.Reload()
    assert [event.step for event in reader.Scalars("loss/val")] == [1, 2]
    assert [event.step for event in reader.Scalars("step/lr")] == sorted(
        {event.step for event in reader.Scalars("step/lr")})


@pytest.fixture
def small_files():
    """`small_files(bytes)`: no file of this process may grow beyond that; the nearest thing to a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_a_checkpoint(runs, small_files, monkeypatch):
    def fill(self, epoch):
        if epoch == 1:
            small_files(100_000)
    monkeypatch.setattr(Trainer, "log_epoch", lambda self, epoch, figures: fill(self, epoch - 1))
    with pytest.raises(RunError, match=r"can't write the checkpoint .*checkpoint-epoch2\.pth: File too large; "
                                       r"earlier checkpoints are intact, the newest is .*checkpoint-epoch1\.pth"):
        runs("full")
    assert sorted(path.name for path in runs.models("full").iterdir()) == ["checkpoint-epoch1.pth", "config.json"]
    assert newest_good_checkpoint(runs.models("full"))[1]["epoch"] == 1


def test_no_room_for_the_logs(runs, monkeypatch):
    def full(self, row):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
    monkeypatch.setattr(base_trainer.MetricsCSV, "append", full)
    with pytest.raises(RunError, match=r"can't write .*metrics\.csv: No space left on device; checkpoints are intact"):
        runs("full")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_room_for_the_events(runs, small_files, monkeypatch):
    """TensorBoard writes in a thread of its own: its failure ends the run all the same."""
    original = Trainer.log_epoch

    def log_epoch(self, epoch, figures):
        if epoch == 2:
            small_files(100_000)  # an epoch's histograms are more
        original(self, epoch, figures)
    monkeypatch.setattr(Trainer, "log_epoch", log_epoch)
    with pytest.raises(RunError, match=r"can't write .*: File too large; checkpoints are intact, the newest is "
                                       r".*checkpoint-epoch1\.pth"):
        runs("full", "--set", "trainer.tensorboard=true", "--set", "trainer.histograms=1")
    assert newest_good_checkpoint(runs.models("full"))[1]["epoch"] == 1


@pytest.mark.parametrize("in_the_way", ["saved", "saved/models", "saved/log"])
def test_a_place_that_cant_be_written(runs, tmp_path, in_the_way):
    path = tmp_path / "elsewhere" / in_the_way
    path.parent.mkdir(parents=True)
    path.write_text("a file, not a folder")
    with pytest.raises(ConfigError, match=r"^trainer\.save_dir: can't make the folder .*--save_dir"):
        runs("none", "--save_dir", tmp_path / "elsewhere" / "saved")


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:len(b) // 2], lambda b: b[:-30],
                                    lambda b: b[:3000] + bytes(200) + b[3200:]],
                         ids=["empty", "half", "end cut off", "zeroes inside"])
def test_damage_is_named_and_skipped(shared_runs, tmp_path, caplog, monkeypatch, damage):
    whole = (shared_runs.models("for_damage") / "checkpoint-epoch2.pth")
    if not whole.exists():
        shared_runs("for_damage")
    (tmp_path / "checkpoint-epoch2.pth").write_bytes(whole.read_bytes())
    bad = tmp_path / "checkpoint-epoch10.pth"
    bad.write_bytes(damage(whole.read_bytes()))
    monkeypatch.setattr(logging.getLogger("ltr"), "propagate", True)
    path, checkpoint = newest_good_checkpoint(tmp_path)
    assert path.name == "checkpoint-epoch2.pth" and checkpoint["epoch"] == 2
    assert str(bad) in caplog.text
    with pytest.raises(ConfigError, match=r"checkpoint-epoch10\.pth"):
        load_checkpoint(bad)


def test_keep_last_bounds_the_files(runs):
    models = runs("bounded", "--epochs", 5, "--set", "trainer.keep_last=2", "--set", "trainer.monitor=max val_accuracy")
    assert sorted(path.name for path in models.glob("*.pth")) == [
        "checkpoint-epoch4.pth", "checkpoint-epoch5.pth", "model_best.pth"]


# ---------------------------------------------------------------------- numbers

def test_a_loss_that_isnt_finite_stops_the_run(runs):
    runs.base["lr_scheduler"] = {"type": "CustomLR", "args": {"step1": 1, "step2": 9, "gamma": 1e36}}
    with pytest.raises(RunError, match=r"isn't finite at epoch 2, step \d, lr 5e\+34.*"
                                       r"Last good checkpoint: .*checkpoint-epoch1\.pth"):
        runs("nan")
    weights = load_checkpoint(runs.models("nan") / "checkpoint-epoch1.pth")["state_dict"]
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.fixture
def bad_steps(monkeypatch):
    """`bad_steps(*steps)`: the images of these training steps hold an infinity, so norm statistics would be spoilt."""
    def arm(*steps):
        taken, original = [0], Trainer.forward

        def forward(self, images, labels):
            taken[0] += 1
            if taken[0] in steps:
                images = images.clone()
                images[0, 0, 0, 0] = float("inf")
            return original(self, images, labels)
        monkeypatch.setattr(Trainer, "forward", forward)
    return arm


def test_skipping_leaves_weights_statistics_and_means_alone(runs, bad_steps, caplog):
    bad_steps(2, 3)
    path = runs("skip", "--set", "trainer.on_nonfinite=skip") / "checkpoint-epoch2.pth"
    saved = load_checkpoint(path)
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())
    assert saved["extra"]["skipped"] == 2 and saved["global_step"] == 8
    log = (runs.log("skip") / "info.log").read_text()
    assert log.count("skipped a step") == 2 and "epoch 1, step 2" in log and "2 so far" in log
    assert "nan" not in (runs.log("skip") / "metrics.csv").read_text()


def test_skipping_is_bounded(runs, bad_steps):
    bad_steps(*range(2, 100))
    with pytest.raises(RunError, match=r"more than trainer\.max_skipped = 3 steps weren't finite"):
        runs("skip", "--set", "trainer.on_nonfinite=skip", "--set", "trainer.max_skipped=3")


def test_fp16_overflow_is_the_scalers_business(runs, monkeypatch):
    """The first step's gradient overflows: the scaler leaves it out, momentum too, and halves the scale."""
    original = Trainer._backward

    def overflow(self, parts):
        result = original(self, parts)
        if self.global_step == 0:
            self.trainable[0].grad[0] = float("inf")
        return result
    monkeypatch.setattr(Trainer, "_backward", overflow)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=8.0))
    path = runs("fp16", "--set", "trainer.amp=fp16", "--epochs", 1) / "checkpoint-epoch1.pth"
    saved = load_checkpoint(path)
    assert saved["scaler"]["scale"] == 4 and all(torch.isfinite(v).all() for v in saved["state_dict"].values())
    runs(None, "-r", path, "--epochs", 2)
    assert load_checkpoint(path.with_name("checkpoint-epoch2.pth"))["scaler"]["scale"] == 4


# ---------------------------------------------------------------------- other processes, other files

def test_a_killed_loader_process_ends_the_run(runs, monkeypatch):
    def die(self, key):
        os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(workers.Sources, "__getitem__", die)
    with pytest.raises(RunError, match=r"DataLoader worker .*data_loader\.args\.num_workers"):
        runs("oom", data_loader={"args": {"num_workers": 1, "cache": False}})


@pytest.mark.parametrize("flags", [
    ("--set", "distill=true", "--set", "distill_arch.type=ResNet32Model", "--set", "distill_checkpoint=gone.pth"),
    ("--set", "pretrained=gone.pth"), ("--set", "load_crt=gone.pth")], ids=["teacher", "pretrained", "stage 1"])
def test_weights_that_arent_there(runs, flags):
    with pytest.raises(ConfigError, match=r"gone\.pth"):
        runs("none", *flags)
    assert not (runs.save_dir / "models").exists()


def test_flags_of_other_launchers_are_named_once(runs, capfd):
    runs("legacy", "--dry_run", "--dist-url", "tcp://x:1", "--multiprocessing-distributed", "--gpu", "0")
    said = capfd.readouterr().out
    assert said.count("warning: --dist-url, --multiprocessing-distributed, --gpu: ") == 1


def test_the_same_seed_gives_the_same_run(runs, same_state):
    one, two = (runs(name, "--epochs", 1) / "checkpoint-epoch1.pth" for name in ("one", "two"))
    other = runs("three", "--epochs", 1, "--seed", 1) / "checkpoint-epoch1.pth"
    assert same_state(one, two) == [] and "state_dict" in same_state(one, other)


# ---------------------------------------------------------------------- for long

@pytest.mark.slow
def test_two_hundred_epochs(tmp_path, root, monkeypatch):
    """Digits-LT with a checkpoint each epoch: memory stays flat, files stay few, events can be read."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import train
    megabytes = []
    original = Trainer._drop_old

    def measure(self, epoch):
        original(self, epoch)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        megabytes.append(pages * resource.getpagesize() / 2**20)
    monkeypatch.setattr(Trainer, "_drop_old", measure)
    train.main([str(part) for part in (
        "-c", root / "configs/digits_lt_ce.json", "-d", "cpu", "--epochs", 200, "--save_dir", tmp_path, "--run_id",
        "soak", "--save_period", 1, "--set", "trainer.keep_last=3", "--set", "arch.args.layer2_output_dim=16",
        "--set", "arch.args.layer3_output_dim=16", "--bs", 64, "--lr", 0.02)])
    models, log = (tmp_path / part / "digits_lt_ce" / "soak" for part in ("models", "log"))
    assert sorted(path.name for path in models.iterdir()) == [
        "checkpoint-epoch198.pth", "checkpoint-epoch199.pth", "checkpoint-epoch200.pth", "config.json",
        "model_best.pth"]
    early, late = (sum(part) / len(part) for part in (megabytes[20:50], megabytes[-30:]))
    print(json.dumps({"early_mb": early, "late_mb": late}))
    assert late - early < 20
    events = EventAccumulator(str(log), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("accuracy/val")] == list(range(1, 201))
