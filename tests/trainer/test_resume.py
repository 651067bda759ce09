"""A run that was stopped and resumed is the run that wasn't stopped, to the last bit."""

import csv
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from model.loss import LDAMLoss
from model.native.build import compiler
from tests.trainer.ranks import SHARDS
from utils.checkpoint.store import load_checkpoint
from utils.errors import ConfigError

RIDE = {"arch": {"args": {"num_experts": 2, "add_bt": 1, "dropout": 0.2, "use_norm": True}},
        "loss": {"type": "RIDELoss", "args": {"reweight_epoch": 2}}, "add_extra_info": True}


def points(log_folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(log_folder), size_guidance={"scalars": 0})
    events.Reload()
    # Sorted: of two writers begun in one second TensorBoard may read the later one first.
    return sorted((event.step, event.value) for event in events.Scalars(tag))


@pytest.fixture(scope="module")
def straight(shared_runs):
    """Four epochs of RIDE with BatchFormer and dropout, TensorBoard on."""
    shared_runs("straight", **RIDE, trainer={"epochs": 4, "tensorboard": True, "histograms": False, "log_step": 1})
    return shared_runs


def test_two_and_two_epochs_are_four(runs, straight, same_state):
    flags = {**RIDE, "trainer": {"epochs": 2, "tensorboard": True, "histograms": False, "log_step": 1}}
    half = runs("half", **flags) / "checkpoint-epoch2.pth"
    runs(None, "-r", half, "--epochs", 4)
    for epoch in (1, 2, 3, 4):
        name = f"checkpoint-epoch{epoch}.pth"
        assert same_state(straight.models("straight") / name, runs.models("half") / name) == []
    assert (runs.log("half") / "metrics.csv").read_text() == (straight.log("straight") / "metrics.csv").read_text()


@pytest.mark.parametrize("step,number", [(1, signal.SIGTERM), (6, signal.SIGINT), (8, signal.SIGTERM)],
                         ids=["first step", "middle of an epoch", "an epoch's last step"])
def test_a_stop_loses_nothing(runs, straight, same_state, signal_at, capfd, step, number):
    """23 images in batches of 6 are 4 steps an epoch: epoch 2 is steps 5 to 8."""
    signal_at(step, number)
    runs("stopped", **RIDE, trainer={"epochs": 4, "tensorboard": True, "histograms": False, "log_step": 1})
    epoch = (step + 3) // 4
    path = runs.models("stopped") / f"checkpoint-epoch{epoch}.pth"
    said = capfd.readouterr().out
    assert f"go on with: python train.py -r {path}" in said and "test," not in said

    runs(None, "-r", path)
    name = "checkpoint-epoch4.pth"
    assert same_state(straight.models("straight") / name, runs.models("stopped") / name) == []
    assert same_state(straight.models("straight") / f"checkpoint-epoch{epoch}.pth", path) == []  # whole by now
    one, other = (folder / "metrics.csv" for folder in (straight.log("straight"), runs.log("stopped")))
    assert one.read_text() == other.read_text()
    for tag in ("loss/train", "accuracy/val", "step/loss", "lr"):
        assert points(straight.log("straight"), tag) == points(runs.log("stopped"), tag)


def test_tensorboard_and_metrics_have_one_point_an_epoch(straight):
    assert [step for step, _ in points(straight.log("straight"), "accuracy/val")] == [1, 2, 3, 4]
    rows = list(csv.DictReader((straight.log("straight") / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert {"epoch", "lr", "loss", "val_loss", "accuracy", "val_accuracy"} <= rows[0].keys()


TEACHER = {"arch": {"args": {"num_experts": 2, "use_norm": True}}, "loss": {"type": "RIDELoss"}}
KINDS = {
    "crt": {"data_loader": {"args": {"sampler": {"type": "ClassBalanced", "args": {}}}}},
    "lws": {"arch": {"args": {"num_experts": 1, "classifier": "lws"}}},
    "ea": {"arch": {"type": "ResNet32EAModel", "args": {"num_experts": 2, "use_norm": True}},
           "resume_state_dict_only": True},
    "distill": {**TEACHER, "distill": True, "loss": {"type": "RIDELossWithDistill"},
                "distill_arch": {"type": "ResNet32Model", "args": {
                    "num_experts": 2, "layer2_output_dim": 16, "layer3_output_dim": 16, "use_norm": True}}},
}


@pytest.fixture(scope="module")
def stage1(shared_runs):
    """Checkpoints of a first stage: one expert, and two."""
    return {1: shared_runs("one") / "checkpoint-epoch2.pth", 2: shared_runs("two", **TEACHER) / "checkpoint-epoch2.pth"}


@pytest.mark.parametrize("kind", KINDS)
def test_second_stages_and_distillation_resume(kind, runs, stage1, same_state, signal_at, capfd):
    flags = {"crt": ("--load_crt", stage1[1]), "lws": ("--load_crt", stage1[1]), "ea": ("-r", stage1[2]),
             "distill": ("--distill_checkpoint", stage1[2])}[kind]
    whole = runs("whole", *flags, **KINDS[kind])
    signal_at(6)
    stopped = runs("stopped", *flags, **KINDS[kind])
    runs(None, "-r", stopped / "checkpoint-epoch2.pth")
    name = "checkpoint-epoch2.pth"
    assert same_state(whole / name, stopped / name) == []
    assert (runs.log("whole") / "metrics.csv").read_text() == (runs.log("stopped") / "metrics.csv").read_text()


@pytest.mark.parametrize("sections", [
    {"arch": {"args": {"norm": "BatchRenorm"}}, "optimizer": {"type": "AdamW", "args": {
        "lr": 0.01, "momentum": None, "weight_decay": 0.1}}},
    {"trainer": {"amp": "bf16", "clip_grad_norm": 1.0},
     "data_loader": {"args": {"sampler": {"type": "ProgressivelyBalanced", "args": {}}}},
     "lr_scheduler": {"type": "ReduceLROnPlateau", "args": {"patience": 0, "step1": None}}},
    {"trainer": {"amp": "fp16"}},  # its scaler's factor and how long it has held
    pytest.param({"trainer": {"compile": "norms", "amp": "bf16"}},
                 marks=pytest.mark.skipif(compiler() is None, reason="no C++ compiler")),
    pytest.param({"trainer": {"compile": "layers", "amp": "off"}},
                 marks=pytest.mark.skipif(compiler() is None, reason="no C++ compiler")),
], ids=["renorm, adamw", "bf16, progressive sampler, plateau", "fp16", "norms compiled", "layers compiled"])
def test_other_state_resumes(sections, runs, same_state, signal_at):
    sections = {name: {key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
                       for key, value in section.items()} for name, section in sections.items()}
    config = {**sections}
    for name in ("optimizer", "lr_scheduler"):
        if name in config:
            runs.base[name] = config.pop(name)
    whole = runs("whole", **config)
    signal_at(3)
    stopped = runs("stopped", **config)
    runs(None, "-r", stopped / "checkpoint-epoch1.pth")
    assert same_state(whole / "checkpoint-epoch2.pth", stopped / "checkpoint-epoch2.pth") == []


def test_worker_processes_change_nothing_and_resume(runs, same_state, signal_at):
    """Files decoded by workers, dropout on: torch's loader must not draw from the global generator."""
    sections = {"arch": {"args": {"add_bt": 1}}}

    def with_workers(count):
        return {**sections, "data_loader": {"args": {"num_workers": count, "cache": False}}}
    none = runs("none", **with_workers(0))
    two = runs("two", **with_workers(2))
    signal_at(6)
    stopped = runs("stopped", **with_workers(1))
    runs(None, "-r", stopped / "checkpoint-epoch2.pth", "--set", "data_loader.args.num_workers=2")
    for folder in (two, stopped):
        assert same_state(none / "checkpoint-epoch2.pth", folder / "checkpoint-epoch2.pth") == []


def test_a_stop_on_shards_loses_nothing(tiny_shards, runs, tmp_path, same_state, signal_at):
    """Images are read from their places, so the second half of an epoch is what it would have been; as on files."""
    data = shutil.copytree(tiny_shards, tmp_path / "shards")
    sections = {"data_loader": {"args": {"data_dir": str(data), "shards": SHARDS, "cache": False}}}
    whole = runs("whole", **sections)
    signal_at(6)
    stopped = runs("stopped", **sections)
    half = stopped / "checkpoint-epoch2.pth"
    assert torch.load(half, weights_only=True)["batch"] == 2
    runs(None, "-r", half)
    assert same_state(whole / half.name, half) == []
    assert (runs.log("whole") / "metrics.csv").read_text() == (runs.log("stopped") / "metrics.csv").read_text()


def test_auto_goes_on_or_starts_anew(runs, straight, same_state, capfd):
    sections = {**RIDE, "trainer": {"epochs": 4, "tensorboard": True, "histograms": False, "log_step": 1}}
    runs("auto", "-r", "auto", "--epochs", 2, **sections)
    capfd.readouterr()
    newest = runs.models("auto") / "checkpoint-epoch3.pth"
    newest.write_bytes((runs.models("auto") / "checkpoint-epoch2.pth").read_bytes()[:5000])  # cut short
    runs("auto", "-r", "auto", **sections)
    said = capfd.readouterr().out
    assert "epoch 3/4" in said and "epoch 2/4" not in said
    for told in (said, (runs.log("auto") / "info.log").read_text()):
        assert f"{newest}: " in told and told.count("trying an older one") == 1
    name = "checkpoint-epoch4.pth"
    assert same_state(straight.models("straight") / name, runs.models("auto") / name) == []
    assert (runs.log("auto") / "metrics.csv").read_text() == (straight.log("straight") / "metrics.csv").read_text()


def test_a_complete_run_says_so_and_can_be_extended(runs, capfd):
    path = runs("done", "--epochs", 1) / "checkpoint-epoch1.pth"
    capfd.readouterr()
    runs(None, "-r", path)
    said = capfd.readouterr().out
    assert "nothing left to train: the checkpoint is of epoch 1 of 1" in said
    assert f"python test.py -r {path}" in said and "accuracy %" in said
    runs(None, "-r", path, "--epochs", 3)
    assert (runs.models("done") / "checkpoint-epoch3.pth").is_file()


@pytest.mark.parametrize("flags, key", [
    (("--lr", 0.5, "--set", 'data_loader.args.mix={"type": "mixup"}'), "data_loader.args.mix"),
    (("--seed", 3), "seed"), (("--set", "loss.type=BalancedSoftmaxLoss"), "loss.type"),
    (("--set", "trainer.ema={\"decay\": 0.9}"), "trainer.ema")])
def test_a_complete_run_isnt_recorded_with_settings_it_never_had(runs, flags, key):
    path = runs("done", "--epochs", 1) / "checkpoint-epoch1.pth"
    files = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    for more in ((), ("--dry_run",)):
        with pytest.raises(ConfigError, match=f"^{key} .* -> .*: the run is complete, .*--epochs N"):
            runs(None, "-r", path, *flags, *more)
    assert {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()} == files


def test_a_complete_runs_photos_may_have_moved(runs, tmp_path, tiny_images):
    path = runs("done", "--epochs", 1) / "checkpoint-epoch1.pth"
    shutil.copytree(tiny_images, tmp_path / "moved")
    runs(None, "-r", path, "--data_dir", tmp_path / "moved", "--epochs", 1, "--set", "trainer.keep_last=3")
    config = json.loads((path.parent / "config.json").read_text())
    assert config["data_loader"]["args"]["data_dir"] == str(tmp_path / "moved")


def test_an_early_stopped_run_stays_stopped(runs, capfd):
    flags = ("--epochs", 5, "--lr", 1e-9, "--set", "trainer.monitor=max val_accuracy", "--set", "trainer.early_stop=1")
    runs("early", *flags)
    last = max(runs.models("early").glob("checkpoint-*"))
    capfd.readouterr()
    runs(None, "-r", last)
    assert "nothing left to train: val_accuracy hasn't improved for 1 epochs" in capfd.readouterr().out
    runs(None, "-r", last, "--set", "trainer.early_stop=2")
    assert "nothing left to train" not in capfd.readouterr().out
    assert len(list(runs.models("early").glob("checkpoint-*"))) > 2


HOLD = """
import sys, time
from pathlib import Path
from base.run_lock import hold, sole_trainer
from base.run_paths import RunPaths
with sole_trainer():
    hold(RunPaths(Path(sys.argv[1]), Path(sys.argv[2])))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX locks")
def test_one_process_at_a_time_trains_a_run(runs, root):
    """Another process has the run; killed, it lets go of it."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(runs.models("busy")), str(runs.log("busy"))], cwd=root,
                             stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        before = sorted(runs.save_dir.rglob("*"))
        for flags in ((), ("-r", "auto")):
            with pytest.raises(ConfigError, match=rf"busy: another process trains this run \(.*process {other.pid}\)"):
                runs("busy", "--epochs", 1, *flags)
        assert [path for path in sorted(runs.save_dir.rglob("*")) if path.suffix != ".json"] == before
    finally:
        other.kill()
        other.wait()
    path = runs("busy", "--epochs", 1) / "checkpoint-epoch1.pth"
    assert path.is_file() and not (path.parent / ".running").exists()


def test_a_run_is_never_written_over(runs):
    runs("mine", "--epochs", 1)
    with pytest.raises(ConfigError, match=r"--run_id: mine is a run already.*-r auto"):
        runs("mine", "--epochs", 1)


@pytest.mark.parametrize("written_before", [False, True])
def test_another_monitor_begins_anew(runs, written_before):
    """The best accuracy is no measure of a loss, and epochs without a better one don't bring the stop nearer."""
    models = runs("other", "--epochs", 1, trainer={"monitor": "max val_accuracy", "early_stop": 3})
    path = models / "checkpoint-epoch1.pth"
    checkpoint = load_checkpoint(path) | {"monitor_best": 0.0, "not_improved": 3}
    if written_before:  # by a version that kept it in the config only
        del checkpoint["monitor"]
    torch.save(checkpoint, path)
    runs(None, "-r", path, "--epochs", 2, "--set", "trainer.monitor=min val_loss")
    row = list(csv.DictReader((runs.log("other") / "metrics.csv").open()))[1]
    best = load_checkpoint(models / "model_best.pth")
    assert best["epoch"] == 2 and best["monitor_best"] == float(row["val_loss"]) and best["not_improved"] == 0
    assert (runs.log("other") / "info.log").read_text().count("the best so far begins anew") == 1


def test_a_loss_is_told_its_epoch(runs, signal_at, monkeypatch):
    """Deferred re-weighting begins by it."""
    told, original = [], LDAMLoss.set_epoch
    monkeypatch.setattr(LDAMLoss, "set_epoch", lambda self, epoch: (told.append(epoch), original(self, epoch))[1])
    signal_at(6)        # inside epoch 2
    models = runs("told", loss={"type": "LDAMLoss", "args": {"reweight_epoch": 1}}, arch={"args": {"use_norm": True}})
    assert told == [1, 2]
    runs(None, "-r", models / "checkpoint-epoch2.pth", "--epochs", 3)
    assert told == [1, 2, 2, 3]
