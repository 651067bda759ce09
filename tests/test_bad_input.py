"""What a caller can get wrong: exit status 2, one line on stderr that names it, no traceback, nothing written."""

import json

import pytest

from utils.config.read import read_config

DIGITS = "configs/digits_lt_ride.json"


def config(tmp_path, text=None, **changes):
    """A digits config with changes (dotted keys with `__` for dots; `...` removes a key), as a file."""
    value, _ = read_config(DIGITS)
    for path, new in changes.items():
        *parents, last = path.split("__")
        place = value
        for key in parents:
            place = place.setdefault(key, {})
        if new is ...:
            place.pop(last, None)
        else:
            place[last] = new
    file = tmp_path / "config.json"
    file.write_text(json.dumps(value) if text is None else text, encoding="utf-8")
    return file


@pytest.mark.parametrize("loader", ["ImageFolderLTDataLoader", "ListFileDataLoader"])
def test_a_folder_that_isnt_there_is_said_before_a_network_is_looked_for(tmp_path, run_cli, loader):
    (tmp_path / "timm.py").write_text("raise SystemExit('timm was imported, which takes seconds')")
    done = run_cli(["train.py", "-c", "configs/image_folder.json", "--set", f"data_loader.type={loader}",
                    "--data_dir", "nowhere"], env={"PYTHONPATH": tmp_path})
    assert (done.returncode, done.stderr) == (2, "data_loader.args.data_dir: nowhere: no such folder; --data_dir names "
                                                 "the one to read\n")


# name, config changes or text, flags, what the line must contain
CASES = [
    ("unknown_top_key", {"lerning": 1}, [], ["lerning"]),
    ("misspelt_section", {"optimiser": {"type": "SGD"}}, [], ["optimiser", "optimizer"]),
    ("unknown_trainer_key", {"trainer__epoch": 3}, [], ["trainer.epoch", "epochs"]),
    ("unknown_arch", {"arch__type": "ResNet23Model"}, [], ["arch.type", "ResNet23Model", "ResNet32Model"]),
    ("unknown_arch_arg", {"arch__args__num_expert": 3}, [], ["arch.args.num_expert", "num_experts"]),
    ("unknown_norm", {"arch__args__norm": "NBM"}, [], ["norm", "NBM", "NBN"]),
    ("unknown_norm_arg", {"arch__args__norm": {"type": "NBN", "args": {"were": 1}}}, [], ["were", "where"]),
    ("unknown_classifier", {"arch__args__classifier": "cosin"}, [], ["classifier", "cosin", "cosine"]),
    ("unknown_loss", {"loss__type": "RIDELos"}, [], ["loss.type", "RIDELos", "RIDELoss"]),
    ("unknown_loss_arg", {"loss__args__reweight_epochs": 1}, [], ["reweight_epochs", "reweight_epoch"]),
    ("unknown_loader", {"data_loader__type": "DigitLTDataLoader"}, [], ["DigitLTDataLoader", "DigitsLTDataLoader"]),
    ("unknown_loader_arg", {"data_loader__args__batchsize": 8}, [], ["batchsize", "batch_size"]),
    ("unknown_sampler", {"data_loader__args__sampler": {"type": "ClassBalance"}}, [], ["ClassBalance", "did you"]),
    ("unknown_optimizer", {"optimizer__type": "SDG"}, [], ["optimizer.type", "SDG", "SGD"]),
    ("unknown_schedule", {"lr_scheduler__type": "CustomRL"}, [], ["lr_scheduler.type", "CustomRL", "CustomLR"]),
    ("unknown_metric", {"metrics": ["acuracy"]}, [], ["metrics", "acuracy", "accuracy"]),
    ("epochs_zero", {}, ["--epochs", "0"], ["--epochs", "1"]),
    ("epochs_text", {"trainer__epochs": "ten"}, [], ["trainer.epochs", "ten"]),
    ("batch_size_zero", {}, ["--bs", "0"], ["--bs", "1"]),
    ("experts_zero", {}, ["--num_experts", "0"], ["--num_experts", "1"]),
    ("experts_fraction", {}, ["--num_experts", "2.5"], ["--num_experts", "2.5"]),
    ("lr_negative", {}, ["--lr", "-0.1"], ["--lr", "-0.1"]),
    ("lr_infinite", {}, ["--lr", "inf"], ["--lr"]),
    ("lr_nan_in_file", '{"optimizer": {"args": {"lr": NaN}}}', [], ["config.json", "optimizer.args.lr", "finite"]),
    ("extends_nothing", {"extends": "gone.json"}, [], ["config.json", "extends", "gone.json", "no such file"]),
    ("extends_itself", {"extends": "config.json"}, [], ["config.json", "extends itself"]),
    ("bad_monitor", {"trainer__monitor": "highest val_accuracy"}, [], ["trainer.monitor"]),
    ("bad_amp", {"trainer__amp": "bf8"}, [], ["trainer.amp", "bf8"]),
    ("accumulate_zero", {"trainer__accumulate": 0}, [], ["trainer.accumulate", "1"]),
    ("layer_decay_of_two", {"trainer__layer_decay": 2}, [], ["trainer.layer_decay", "1"]),
    ("bad_no_decay", {"trainer__no_decay": "bias"}, [], ["trainer.no_decay", "norm_bias"]),
    ("bad_by", {"lr_scheduler__args__by": "batch"}, [], ["lr_scheduler.args.by", "epoch", "step"]),
    ("sam_of_nothing", {"optimizer": {"type": "SAM", "args": {"rho": 0.1}}}, [], ["optimizer.args.base"]),
    ("sam_of_sam", {"optimizer": {"type": "SAM", "args": {"base": {"type": "SAM", "args": {"base": {"type": "SGD"}}}}}},
     [], ["optimizer.args.base", "SGD"]),
    ("differentiable_steps", {"optimizer__args__differentiable": True}, [], ["optimizer.args.differentiable"]),
    ("negative_peak", {"lr_scheduler": {"type": "OneCycleLR", "args": {"max_lr": -1}}}, [],
     ["lr_scheduler.args.max_lr", "greater than 0"]),
    ("negative_base_rate", {"lr_scheduler": {"type": "CyclicLR", "args": {"base_lr": -1, "max_lr": 0.1}}}, [],
     ["lr_scheduler.args.base_lr", "at least 0"]),
    ("negative_start", {"lr_scheduler": {"type": "CosLR", "args": {"warmup_start": -5}}}, [],
     ["lr_scheduler.args.warmup_start", "at least 0"]),
    ("division_by_nothing", {"lr_scheduler": {"type": "OneCycleLR", "args": {"div_factor": 0}}}, [],
     ["lr_scheduler.args.div_factor", "greater than 0"]),
    ("taus_of_text", {"loss": {"type": "BalPoELoss", "args": {"taus": ["a", 1, 2]}}}, [],
     ["loss.args.taus[0]", "a number"]),
    ("taus_of_nothing", {"loss": {"type": "BalPoELoss", "args": {"taus": [None, 1, 2]}}}, [], ["loss.args.taus"]),
    ("weights_of_lists", {"loss": {"type": "FocalLoss", "args": {"weight": [[1]] * 10}}}, [], ["loss.args.weight"]),
    ("counts_of_nothing", {"loss__args__cls_num_list": [None] * 10}, [], ["loss.args.cls_num_list"]),
    ("centre_of_text", {"arch__args__norm": {"type": "MABN", "args": {"B": 4, "real_B": 8, "centre": "no"}}}, [],
     ["norm.args.centre", "true or false"]),
    ("bad_policy", {"data_loader__args__augment": "autoagument"}, [], ["augment", "autoaugment"]),
    ("bad_mix", {"data_loader__args__mix": {"type": "mixpu"}}, [], ["mix", "mixup"]),
    ("mixed_for_gates", {"arch__type": "ResNet32EAModel", "data_loader__args__mix": {"type": "mixup"}}, [],
     ["data_loader.args.mix", "EAModel"]),
    ("not_json", "{'name': 1}", [], ["config.json", "line 1"]),
    ("not_an_object", "[1, 2]", [], ["config.json"]),
    ("duplicate_key", '{"name": "a", "name": "b"}', [], ["name"]),
    ("missing_arch", {"arch": ...}, [], ["arch"]),
    ("class_from_nowhere", {"loss__type": "no_such_package:Loss"}, [], ["loss.type", "no_such_package"]),
    ("set_without_value", {}, ["--set", "trainer.epochs"], ["--set"]),
    ("set_unknown", {}, ["--set", "trainer.epohcs=3"], ["trainer.epohcs", "epochs"]),
    ("unknown_flag", {}, ["--num_expert", "3"], ["--num_expert", "--num_experts"]),
    ("bad_device", {}, ["-d", "gpu"], ["-d", "gpu"]),
    ("bad_run_id", {}, ["--run_id", "a/b"], ["--run_id"]),
    ("distil_without_teacher", {"distill": True}, [], ["distill"]),
    ("teacher_flag_without_teacher", {}, ["--add_bt_teacher", "1"], ["--add_bt_teacher"]),
    ("teacher_without_distilling", {}, ["--distill_checkpoint", DIGITS],
     ["distill_checkpoint", "distill=true", "--distill_checkpoint"]),
    ("teacher_flag_without_distilling", {"distill_arch": {"type": "ResNet32Model"}}, ["--add_bt_teacher", "1"],
     ["distill_arch.args.add_bt", "distill=true", "--add_bt_teacher"]),
    ("monitor_of_boxes", {"trainer__monitor": "max val_bbox_AP"}, [], ["trainer.monitor", "bbox_AP", "val_accuracy"]),
    ("no_such_pretrained", {}, ["--pretrained", "nowhere.pth"], ["--pretrained", "nowhere.pth"]),
    ("no_such_load_crt", {}, ["--load_crt", "nowhere.pth"], ["--load_crt", "nowhere.pth"]),
    ("second_stage_alone", {"second_stage": True}, [], ["load_crt", "--load_crt"]),
    ("one_expert_to_assign", {"arch__type": "ResNet32EAModel"}, ["--num_experts", "1"], ["num_experts", "2 or more"]),
    ("no_such_resume", {}, ["-r", "nowhere.pth"], ["-r", "nowhere.pth"]),
    ("auto_without_run_id", {}, ["-r", "auto"], ["--run_id"]),
]


def check_refused(done, folder, words):
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])
    assert "Traceback" not in done.stdout + done.stderr
    assert not folder.exists(), list(folder.rglob("*"))


@pytest.mark.parametrize(("changes", "flags", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_config_and_flags(call_cli, tmp_path, changes, flags, words):
    file = config(tmp_path, changes) if isinstance(changes, str) else config(tmp_path, **changes)
    saved = tmp_path / "saved"
    # A text case may not even be an object to put save_dir into: the flag would hide the first mistake.
    place = [] if isinstance(changes, str) else ["--save_dir", saved]
    check_refused(call_cli(["train.py", "-c", file, "-d", "cpu", *place, *flags]), saved, words)


def test_detectors_have_no_mixing(call_cli, tmp_path):
    argv = ["train.py", "-c", "configs/digit_scenes_maskrcnn_bn.json", "-d", "cpu", "--save_dir", tmp_path / "saved",
            "--set", 'data_loader.args.mix={"type": "mixup"}']
    check_refused(call_cli(argv), tmp_path / "saved", ["data_loader.args", "mix"])


@pytest.mark.parametrize("name", ["unknown_loss_arg", "unknown_flag"])
def test_as_a_command(run_cli, tmp_path, name):
    """A few of them as they are typed, classes imported and not."""
    changes, flags, words = next(case[1:] for case in CASES if case[0] == name)
    saved = tmp_path / "saved"
    argv = ["train.py", "-c", config(tmp_path, **changes), "-d", "cpu", "--save_dir", saved, *flags]
    check_refused(run_cli(argv), saved, words)


# Seen only once data, models or files are read.
LATE_CASES = [
    ("no_such_data", {"data_loader__type": "ImbalanceCIFAR100DataLoader",
                      "data_loader__args__data_dir": "/nowhere/cifar", "data_loader__args__download": False}, [],
     ["/nowhere/cifar"]),
    ("classes_differ", {"arch__args__num_classes": 7}, [], ["num_classes", "7", "10"]),
    ("negative_temperature", {"loss__args__reweight_factor": 9.0}, [], ["reweight_factor"]),
    ("bad_add_bt", {}, ["--add_bt", "7"], ["add_bt", "7"]),
    ("loss_of_three_experts", {"loss": {"type": "SADELoss"}}, ["--num_experts", "2"], ["loss.type", "num_experts 3"]),
    ("taus_of_two_experts", {"loss": {"type": "BalPoELoss", "args": {"taus": [0, 1]}}}, [],
     ["loss.args.taus", "2 numbers", "3 experts"]),
    ("loss_with_a_teacher", {"loss": {"type": "RIDELossWithDistill"}}, [], ["loss.type", "distill_checkpoint"]),
    ("counts_of_two_classes", {"loss__args__cls_num_list": [3, 2]}, [], ["loss.args.cls_num_list", "2", "10"]),
    ("counts_of_two_classes_in_validation", {"loss__args__cls_num_list": [3, 2], "arch__type": "ResNet32EAModel"}, [],
     ["loss.args.cls_num_list", "2", "10"]),
    ("statistics_of_no_layer", {"trainer__record_statistics": True, "trainer__statistics_layer": "layer9.bn"}, [],
     ["layer9.bn"]),
]


@pytest.mark.parametrize(("changes", "flags", "words"), [case[1:] for case in LATE_CASES],
                         ids=[case[0] for case in LATE_CASES])
def test_data_and_models(call_cli, tmp_path, changes, flags, words):
    saved = tmp_path / "saved"
    file = config(tmp_path, **changes)
    check_refused(call_cli(["train.py", "-c", file, "-d", "cpu", "--save_dir", saved, *flags]), saved, words)


def test_checkpoints_that_are_none(call_cli, tmp_path):
    """A text file as checkpoint, for test.py and train.py."""
    text = tmp_path / "notes.pth"
    text.write_text("not a checkpoint")
    for script in ("test.py", "train.py"):
        check_refused(call_cli([script, "-r", text, "-d", "cpu"]), tmp_path / "saved", ["notes.pth"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.pth"]


@pytest.mark.parametrize("flags", [[], ["-r", "x.pth", "--tau", "a:b"], ["-r", "x.pth", "--classifier", "knn"]])
def test_flags_of_test_py(call_cli, flags):
    done = call_cli(["test.py", *flags])
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_needs_a_config(call_cli, tmp_path):
    done = call_cli(["train.py"])
    assert done.returncode == 2
    assert "-c" in done.stderr
    done = call_cli(["train.py", "-c", tmp_path / "none.json"])
    assert done.returncode == 2
    assert "none.json" in done.stderr
    assert len(done.stderr.splitlines()) == 1
