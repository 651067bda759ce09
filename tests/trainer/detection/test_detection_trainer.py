"""Detectors through the trainer and the command line: schedules by iteration, exact resume, AP in the run's files."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from base.run_paths import new_run
from tests.conftest import ROOT, call_python
from tests.scenes import SCENES, SMALL, coco_content
from trainer.detection.evaluate import KINDS
from trainer.detection.trainer import DetectionTrainer
from trainer.hooks.curves import Statistics
from trainer.schedules import build_optimizer, build_scheduler
from utils.config.load import check_config
from utils.errors import ConfigError
from utils.seed import seed_everything

pytest.importorskip("pycocotools")
CONFIGS = ("coco_maskrcnn_mabn_scratch_2x", "coco_maskrcnn_syncbn_scratch_2x", "coco_maskrcnn_bn_scratch_2x")


def config_for(scenes, save_dir, epochs=2, norm="BatchNorm2d", **trainer):
    return check_config({
        "name": "scenes", "arch": {"type": "MaskRCNNR50FPNModel", "args": {**SMALL, "norm": norm}},
        "data_loader": {"type": "DigitScenesDataLoader",
                        "args": {**SCENES, "data_dir": str(scenes), "batch_size": 2, "min_size": [48, 64]}},
        "optimizer": {"type": "SGD", "args": {"lr": 0.01, "momentum": 0.9}},
        "lr_scheduler": {"type": "IterationLR", "args": {"milestones": [4], "gamma": 0.1, "warmup_iters": 2}},
        "trainer": {"epochs": epochs, "save_dir": str(save_dir), "save_period": 1, "histograms": False, **trainer}})


def make(config, run_id, checkpoint=None, dry=False):
    from tools import parts, session
    seed_everything(0)
    loader = parts.make_loader(config)
    model = parts.make_model(config, loader.num_classes)
    if checkpoint is not None:
        session.load_weights(model, checkpoint, name="checkpoint")
    optimizer = build_optimizer(config["optimizer"], model, config["trainer"])
    scheduler = build_scheduler(config["lr_scheduler"], optimizer, config["trainer"]["epochs"])
    paths = None if dry else new_run(config["trainer"]["save_dir"], config["name"], run_id)
    trainer = DetectionTrainer(model, parts.make_criterion(config, loader.cls_num_list), optimizer, config,
                               train_loader=loader, valid_loader=loader.split_validation(), lr_scheduler=scheduler,
                               paths=paths, data_facts=session.data_facts(loader))
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return trainer


MABN = {"type": "MABN", "args": {"B": 2, "real_B": 4, "warmup_iters": 1}}


@pytest.mark.parametrize("norm", ["BatchNorm2d", pytest.param(MABN, id="MABN", marks=pytest.mark.slow)])
def test_a_run_stopped_inside_an_epoch_goes_on_exactly(scenes, tmp_path, norm):
    from utils.checkpoint.store import load_checkpoint
    config = config_for(scenes, tmp_path, norm=norm)
    whole = make(config, "whole")
    assert len(whole.train_loader) >= 3
    whole.train()
    stopped = make(config, "stopped")
    stopped.stop.agreed = lambda *_: stopped.global_step >= 2
    path = stopped.train()
    checkpoint = load_checkpoint(path)
    assert checkpoint["batch"] == 2
    resumed = make(config, "resumed", checkpoint)
    torch.manual_seed(99)  # whatever else was drawn meanwhile
    resumed.resume(checkpoint)
    resumed.train()
    for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    files = [(tmp_path / f"log/scenes/{run}/metrics.csv").read_text().splitlines() for run in ("whole", "resumed")]
    assert files[0] == files[1]


def test_iterations_end_the_run_and_the_schedule_follows_steps(scenes, tmp_path):
    config = config_for(scenes, tmp_path, epochs=9, iterations=5)
    trainer = make(config, "short")
    per_epoch = len(trainer.train_loader)
    assert trainer.epochs == -(-5 // per_epoch)
    rates = []
    step = trainer.step
    trainer.step = lambda *args: (rates.append(trainer.optimizer.param_groups[0]["lr"]), step(*args))[1]
    last = trainer.train()
    assert trainer.global_step == 5 and last.name == f"checkpoint-epoch{trainer.epochs}.pth"
    assert rates == pytest.approx([0.01 / 3, 0.01 * 2 / 3, 0.01, 0.01, 0.001])
    rows = list(csv.DictReader((tmp_path / "log/scenes/short/metrics.csv").read_text().splitlines()))
    assert len(rows) == trainer.epochs
    assert {"epoch", "lr", "loss", "val_loss", "loss_mask", "val_bbox_AP", "val_segm_AP"} <= set(rows[0])


@pytest.mark.parametrize("kind", ["now", pytest.param("of an older version", marks=pytest.mark.slow)])
def test_more_iterations_go_on_inside_the_epoch_that_fewer_cut_short(kind, scenes, tmp_path):
    from utils.checkpoint.store import load_checkpoint
    more = {"epochs": 9, "monitor": "max val_bbox_AP"}
    whole = make(config_for(scenes, tmp_path, iterations=6, **more), "whole")
    assert 2 < whole.steps_an_epoch < 6
    whole.train()
    short = make(config_for(scenes, tmp_path, iterations=2, **more), "short")
    checkpoint = load_checkpoint(short.train())
    assert checkpoint["batch"] is None and checkpoint["cut"]["batch"] == 2      # whole, for all but a longer run
    if kind != "now":
        del checkpoint["cut"]
    resumed = make(config_for(scenes, tmp_path, iterations=6, **more), "resumed", checkpoint)
    assert (resumed.start_epoch, resumed.start_batch, resumed.global_step) == (1, 2, 2)
    resumed.train()
    assert resumed.global_step == 6
    for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    files = [(tmp_path / f"log/scenes/{run}/metrics.csv").read_text().splitlines() for run in ("whole", "resumed")]
    assert files[0] == files[1]
    rates = [trainer.optimizer.param_groups[0]["lr"] for trainer in (whole, resumed)]
    assert rates[0] == rates[1]
    if kind == "now":
        assert make(config_for(scenes, tmp_path, **more), "free", checkpoint, dry=True).start_batch == 2
    same = make(config_for(scenes, tmp_path, iterations=2, **more), "same", checkpoint, dry=True)
    assert not same._epochs_left() and same.last_epoch == 1
    if kind != "now":
        wider = config_for(scenes, tmp_path, iterations=6, **more)
        wider["data_loader"]["args"]["batch_size"] = 3
        with pytest.raises(ConfigError, match=r"data_loader\.args\.batch_size: 3, but .* cut short .* go on with 2"):
            make(wider, "wider", checkpoint, dry=True)


def test_losses_and_pictures_go_to_tensorboard(scenes, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make(config_for(scenes, tmp_path, epochs=1), "drawn")
    trainer.train()
    events = reader.EventAccumulator(str(tmp_path / "log/scenes/drawn"))
    events.Reload()
    tags = events.Tags()
    assert {"loss_mask/train", "bbox_AP/val", "step/loss_box_reg"} <= set(tags["scalars"])
    assert {"input/0", "detections/0"} <= set(tags["images"])


def test_epochs_that_end_before_the_iterations_win(scenes, tmp_path):
    assert make(config_for(scenes, tmp_path, epochs=1, iterations=10_000), "x", dry=True).epochs == 1


def test_a_stop_during_validation_does_not_wait_for_its_end(scenes, tmp_path):
    from utils.checkpoint.store import load_checkpoint
    config = config_for(scenes, tmp_path, epochs=1)
    whole = make(config, "whole")
    assert len(whole.valid_loader) > 1
    whole.train()
    stopped, seen = make(config, "stopped"), []
    stopped.model.register_forward_hook(lambda model, *_: None if model.training else seen.append(1))
    stopped.stop.agreed = lambda *_: bool(seen)
    checkpoint = load_checkpoint(stopped.train())
    assert len(seen) == 1 and checkpoint["batch"] == len(stopped.train_loader)
    resumed = make(config, "resumed", checkpoint)
    resumed.train()
    one, other = ((tmp_path / f"log/scenes/{run}/metrics.csv").read_text() for run in ("whole", "resumed"))
    assert one == other


def test_statistics_are_recorded_once_and_of_the_last_norm(scenes, tmp_path):
    trainer = make(config_for(scenes, tmp_path, record_statistics=True), "statistics", dry=True)
    recorders = [hook.recorder for hook in trainer.hooks if isinstance(hook, Statistics)]
    norms = [name for name, module in trainer.model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert [recorder.layer for recorder in recorders] == [norms[-1]]
    assert len(trainer.model.get_submodule(norms[-1])._forward_hooks) == 1


# ---- the command line ------------------------------------------------------------------------------------------------

def settings(values):
    return [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def flags(**more):
    small = {f"arch.args.{key}": value for key, value in SMALL.items()}
    return settings({**small, "data_loader.args.min_size": 64, "data_loader.args.num_workers": 0, **more})


def test_a_coco_config_passes_its_dry_run_on_three_pictures(coco_folder):
    done = call_python(["train.py", "-c", f"configs/{CONFIGS[0]}.json", "--data_dir", coco_folder(), "--dry_run", "-d",
                        "cpu", *flags()], check=True)
    assert "a training step on 2 images" in done.stdout and "nothing was written" in done.stdout


def test_a_wrong_annotation_ends_the_command_with_one_line(coco_folder):
    content = coco_content()
    content["annotations"][0]["category_id"] = 5
    done = call_python(["train.py", "-c", f"configs/{CONFIGS[2]}.json", "--data_dir", coco_folder(content), "-d", "cpu",
                        *flags()])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "annotation 1: unknown category 5" in done.stderr


@pytest.mark.parametrize("value", ["loss.type=FocalLoss", 'metrics=["macro_f1"]'])
def test_a_loss_and_metrics_that_a_detector_ignores_are_refused(value, scenes, tmp_path):
    """But a run that goes on may have been begun with them, by a version that said nothing."""
    key = value.partition("=")[0].partition(".")[0]
    done = call_python(["train.py", "-c", "configs/digit_scenes_maskrcnn_bn.json", "--data_dir", scenes, "--save_dir",
                        tmp_path / "none", "-d", "cpu", "--set", value])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "none").exists()
    assert f"{key}: would have no effect, as " in done.stderr
    config = config_for(scenes, tmp_path, epochs=2, iterations=1, tensorboard=False)
    path = make({**config, "loss": {"type": "FocalLoss", "args": {}}, "metrics": ["macro_f1"]}, "old").train()
    call_python(["train.py", "-r", path, "-d", "cpu", "--set", "trainer.iterations=2"], check=True)
    call_python(["train.py", "-c", path.parent / "config.json", "--dry_run", "-d", "cpu", "--set",
                 "loss={\"type\": \"CrossEntropyLoss\"}", "--set", "metrics=[\"accuracy\"]"], check=True)
    refused = call_python(["train.py", "-r", path, "-d", "cpu", "--set", value])
    assert refused.returncode == 2 and f"{key}: would have no effect" in refused.stderr


def test_train_and_test_from_the_command_line(scenes, tmp_path):
    scene = {f"data_loader.args.{key}": value for key, value in SCENES.items()}
    call_python(["train.py", "-c", "configs/digit_scenes_maskrcnn_mabn.json", "--data_dir", scenes, "--save_dir",
                 tmp_path, "--run_id", "a", "--epochs", 1, "-d", "cpu", *flags(**scene)], check=True)
    models = tmp_path / "models/digit_scenes_maskrcnn_mabn/a"
    done = call_python(["test.py", "-r", models / "checkpoint-epoch1.pth", "-d", "cpu"], check=True)
    assert "AP50" in done.stdout
    figures = json.loads((models / "test_metrics.json").read_text())
    for kind in KINDS:
        assert 0 <= figures[f"{kind}_AP"] <= 1 and len(figures[f"{kind}_per_class_AP"]) == 10
        assert f"{kind}_AP_few" in figures
        assert isinstance(json.loads((models / f"detections_{kind}.json").read_text()), list)
    call_python(["-m", "tools.report", models, "-d", "cpu"], check=True)
    assert "bbox AP50" in (models / "report.html").read_text()
    refused = call_python(["test.py", "-r", models / "checkpoint-epoch1.pth", "-d", "cpu", "--classifier", "ncm"])
    assert refused.returncode == 2 and "--classifier" in refused.stderr


def test_other_data_and_splits_have_files_of_their_own(coco_folder, tmp_path, tmp_path_factory):
    """And classes are matched by name, groups the training's."""
    from utils.checkpoint.store import load_checkpoint, save_checkpoint
    data, save_dir = coco_folder(), tmp_path_factory.mktemp("saved")
    call_python(["train.py", "-c", f"configs/{CONFIGS[2]}.json", "--data_dir", data, "--save_dir", save_dir, "--name",
                 "coco", "--run_id", "a", "--epochs", 1, "-d", "cpu", *flags(**{
                     "trainer.tensorboard": False, "data_loader.args.batch_size": 2, "trainer.figures": False,
                     "data_loader.args.min_size": 48})], check=True)
    models = save_dir / "models/coco/a"
    checkpoint = models / "checkpoint-epoch1.pth"
    own = {name: (models / name).read_text() for name in ("test_metrics.json", "detections_bbox.json",
                                                          "detections_segm.json")}
    others = tmp_path_factory.mktemp("others")
    for name in ("swapped", "else"):
        shutil.copytree(data, others / name)
        for image in (others / name).glob("*2017/*.png"):
            image.write_bytes(image.read_bytes() + b" ")
        for file in (others / name / "annotations").iterdir():
            content = json.loads(file.read_text())
            for category in content["categories"]:      # the ids the other way round, or other names
                category["name"] = {"swapped": {"cat": "dog", "dog": "cat"}, "else": {"cat": "ant", "dog": "bee"}}[
                    name][category["name"]]
            file.write_text(json.dumps(content))
    call_python(["test.py", "-r", checkpoint, "-d", "cpu", "-q", "--split", "val"], check=True)
    call_python(["test.py", "-r", checkpoint, "-d", "cpu", "-q", "--data_dir", others / "swapped"], check=True)
    assert {name: (models / name).read_text() for name in own} == own
    for part in ("val_metrics", "val_detections_bbox", "val_detections_segm", "test_metrics.swapped.checkpoint-epoch1",
                 "detections_bbox.swapped.checkpoint-epoch1", "detections_segm.swapped.checkpoint-epoch1"):
        assert (models / f"{part}.json").is_file(), part
    # Other annotations in the same folder; the run's own, by another spelling, are no other ones.
    shutil.copy(data / "annotations/instances_val2017.json", data / "annotations/cats.json")
    for file in ("annotations/cats.json", "./annotations/instances_val2017.json"):
        call_python(["test.py", "-r", checkpoint, "-d", "cpu", "-q", "--set", f"data_loader.args.val_annotations={file}"
                     ], check=True)
        if "cats" in file:
            assert {name: (models / name).read_text() for name in own} == own
    own["test_metrics.json"] = (models / "test_metrics.json").read_text()
    assert {file.name for file in models.glob("*.checkpoint-epoch1.json")} == {
        f"{part}.{data}.checkpoint-epoch1.json" for data in ("cats", "swapped")
        for part in ("test_metrics", "detections_bbox", "detections_segm")}
    for command in (["test.py", "-r", checkpoint], ["train.py", "-r", checkpoint, "--epochs", 2]):
        refused = call_python([*command, "-d", "cpu", "--data_dir", others / "else"])
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert "has the classes bee, ant, and the checkpoint's model knows dog, cat" in refused.stderr
    for name, new in (("swapped", False), ("else", True)):
        done = call_python(["train.py", "-c", models / "config.json", "--pretrained", checkpoint, "--data_dir",
                            others / name, "--dry_run", "-d", "cpu"], check=True)
        assert ("new for these classes: roi_heads.box_predictor" in done.stdout) is new
    # A checkpoint of a version that remembered none of its images.
    older = load_checkpoint(checkpoint)
    older["data"]["split"] = {"rule": "names"}
    save_checkpoint(checkpoint, older)
    shutil.rmtree(others / "else")
    shutil.copytree(others / "swapped", others / "else")
    call_python(["test.py", "-r", checkpoint, "-d", "cpu", "-q", "--data_dir", others / "else"], check=True)
    assert (models / "test_metrics.json").read_text() == own["test_metrics.json"]
    assert (models / "test_metrics.else.checkpoint-epoch1.json").is_file()
    done = call_python(["train.py", "-r", checkpoint, "--epochs", 2, "-d", "cpu"], check=True)
    assert (models / "checkpoint-epoch2.pth").is_file(), done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
def test_a_signal_to_the_whole_job_spares_the_loaders_workers(scenes, tmp_path):
    """As a batch system sends it: to every process. The checkpoint is written and nothing is said on stderr."""
    scene = {f"data_loader.args.{key}": value for key, value in SCENES.items()}
    scene |= {"data_loader.args.num_workers": 1, "trainer.epochs": 50, "trainer.log_step": 1}
    command = [sys.executable, "train.py", "-c", "configs/digit_scenes_maskrcnn_bn.json", "--data_dir", scenes,
               "--save_dir", tmp_path, "--run_id", "stopped", "-d", "cpu", *flags(**scene)]
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "step 1/" in line or "step 2/" in line:
            break
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err, (out, err)
    assert "stopped on request" in out and list((tmp_path / "models").rglob("checkpoint-epoch*.pth"))
