"""The main job, as a user runs it: train.py, what it leaves, test.py on it."""

import csv
import json
import shlex

import pytest
import torch

from utils.config.read import read_config

KEYS = ["accuracy", "class_mean_acc", "many_shot_acc", "medium_shot_acc", "few_shot_acc", "many_class_num",
        "medium_class_num", "few_class_num", "macro_f1", "ece", "loss", "n_samples", "per_class_acc"]


def test_ends_with_table_checkpoint_and_next_commands(digits_run):
    tail = digits_run.stdout.strip().splitlines()[-11:]
    text = "\n".join(tail)
    for word in ("all", "many", "medium", "few"):
        assert word in tail[0]
    assert f"checkpoint   {digits_run.checkpoint}" in text
    assert f"python test.py -r {digits_run.checkpoint}" in text
    assert f"tensorboard --logdir {digits_run.log}" in text
    assert f"python -m tools.report {digits_run.models}\n" in text
    assert f"python -m tools.predict -r {digits_run.checkpoint} PHOTOS\n" in text
    assert f"python -m tools.export -r {digits_run.checkpoint} --format onnx" in text


def test_the_next_commands_can_be_pasted_whatever_the_folder_is_called(tmp_path):
    from base.run_paths import new_run
    from train import next_steps
    paths = new_run(tmp_path / "my runs & more", "pets", "one")
    checkpoint = paths.models / "checkpoint-epoch1.pth"
    for line in next_steps(checkpoint, paths, is_classifier=True).splitlines()[1:]:
        words = shlex.split(line.split(maxsplit=1)[1] if "look at it" not in line else line[len("look at it"):])
        assert {str(checkpoint), str(paths.models), str(paths.log)} & set(words)


def test_says_what_there_is_to_learn_from(digits_run):
    assert "training images: 331, test images: 500" in digits_run.stdout
    assert "1 many-shot" in digits_run.stdout and "5 few-shot" in digits_run.stdout


def test_leaves_config_checkpoint_log_and_events(digits_run):
    saved = json.loads((digits_run.models / "config.json").read_text())
    assert saved["trainer"]["epochs"] == 2 and saved["arch"]["args"]["num_experts"] == 3
    info = (digits_run.log / "info.log").read_text()
    for line in ("training images: 331, test images: 500", "backbone.layer1", "epoch 2/2"):
        assert info.count(line) == 1 == digits_run.stdout.count(line)
    assert list(digits_run.log.glob("events.out.tfevents.*"))
    assert (digits_run.models / "model_best.pth").is_file()
    assert not list(digits_run.models.glob("*.tmp")) and not list(digits_run.models.glob(".*.tmp"))


def test_metrics_csv_has_a_row_an_epoch(digits_run):
    with open(digits_run.log / "metrics.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list(rows[0])[:4] == ["epoch", "lr", "loss", "val_loss"]
    for column in ("accuracy", "val_accuracy", "top_k_acc", "val_top_k_acc"):
        assert 0 <= float(rows[1][column]) <= 1


def test_tensorboard_reads_the_scalars(digits_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(digits_run.log), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    for tag in ("loss/train", "loss/val", "accuracy/train", "accuracy/val", "lr"):
        assert [point.step for point in events.Scalars(tag)] == [1, 2]
    assert len(events.Scalars("step/loss")) == 22  # 331 images in batches of 32, twice
    assert "input" in tags["images"] and tags["histograms"]
    with open(digits_run.log / "metrics.csv", newline="") as handle:
        last = list(csv.DictReader(handle))[-1]
    assert events.Scalars("accuracy/val")[-1].value == pytest.approx(float(last["val_accuracy"]), abs=1e-6)


def test_tensorboard_shows_the_reports_figures(digits_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert len(list(digits_run.log.glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(digits_run.log), size_guidance={"images": 0}).Reload()
    shown = {tag for tag in events.Tags()["images"] if tag.startswith("report/")}
    assert shown == {f"report/{name}" for name in ("groups", "group_confusion", "classes", "training", "confusion",
                                                   "reliability", "experts")}
    for tag in shown:
        picture, = events.Images(tag)
        assert picture.step == 2 and picture.width > 300 and picture.height > 150
        assert picture.encoded_image_string.startswith(b"\x89PNG")


def test_checkpoint_is_tensors_and_plain_data(digits_run):
    checkpoint = torch.load(digits_run.checkpoint, weights_only=True)
    assert {"arch", "epoch", "state_dict", "optimizer", "config"} <= set(checkpoint)
    assert checkpoint["arch"] == "ResNet32Model" and checkpoint["epoch"] == 2
    assert not any(key.startswith("module.") for key in checkpoint["state_dict"])
    assert checkpoint["data"]["cls_num_list"] == [120, 77, 50, 32, 21, 13, 8, 5, 3, 2]


def test_test_py_writes_the_metrics(call_cli, digits_run, tmp_path):
    copy = tmp_path / "copy.pth"
    copy.write_bytes(digits_run.checkpoint.read_bytes())
    done = call_cli(["test.py", "-r", copy, "-d", "cpu"], check=True)
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    assert set(KEYS) <= set(metrics)
    assert metrics["n_samples"] == 500 and len(metrics["per_class_acc"]) == 10
    assert (metrics["many_class_num"], metrics["medium_class_num"], metrics["few_class_num"]) == (1, 4, 5)
    assert metrics["accuracy"] == pytest.approx(sum(metrics["per_class_acc"]) / 10)  # 50 test images in each class
    assert metrics["few_shot_acc"] == pytest.approx(sum(metrics["per_class_acc"][5:]) / 5)
    assert len(metrics["expert_acc"]) == 3 and 0 <= metrics["expert_disagreement"] <= 1
    shown = f"{100 * metrics['accuracy']:.1f}"
    assert shown in done.stdout
    assert shown in digits_run.stdout.split("test, epoch 2")[1]  # what the training said of itself


def test_dry_run_writes_nothing(call_cli, tmp_path):
    done = call_cli(["train.py", "-c", "configs/digits_lt_ce.json", "--dry_run", "--save_dir", tmp_path / "saved",
                     "-d", "cpu"], check=True)
    assert "dry run" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_config_for_eight_gpus_warns_once_and_goes_on(call_cli):
    if torch.cuda.is_available():
        pytest.skip("there are GPUs here")
    done = call_cli(["train.py", "-c", "configs/digits_lt_ce.json", "--dry_run", "--set", "n_gpu=8"], check=True)
    assert done.stdout.count("warning: n_gpu is 8") == 1


def test_num_classes_may_be_left_out(call_cli, tmp_path):
    config, _ = read_config("configs/digits_lt_ce.json")
    config["arch"]["args"].pop("num_classes")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    done = call_cli(["train.py", "-c", file, "--dry_run"], check=True)
    assert "everything builds" in done.stdout


@pytest.mark.slow
def test_ride_learns_digits(run_cli, tmp_path):
    """The floor under all that this project is for: RIDE's 24 epochs on digits-LT are right on nine of ten."""
    run_cli(["train.py", "-c", "configs/digits_lt_ride.json", "-d", "cpu", "--seed", 0, "--run_id", "floor",
             "--save_dir", tmp_path, "--set", "trainer.figures=false"], check=True, timeout=1800)
    figures = json.loads((tmp_path / "models" / "digits_lt_ride" / "floor" / "test_metrics.json").read_text())
    assert figures["accuracy"] >= 0.9, figures
