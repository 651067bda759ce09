"""The command lines: every flag of the interface, and each mistake in one line."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.flags import parse_taus, parse_test, parse_train
from utils.config.load import load_config
from utils.errors import ConfigError

CONFIG = "configs/digits_lt_ride.json"
NAMED = {  # flag -> config path, as users of RIDE and BatchFormer know them
    "--lr": "optimizer.args.lr", "--learning_rate": "optimizer.args.lr", "--bs": "data_loader.args.batch_size",
    "--batch_size": "data_loader.args.batch_size", "--data_dir": "data_loader.args.data_dir", "--name": "name",
    "--epochs": "trainer.epochs", "--save_period": "trainer.save_period", "--step1": "lr_scheduler.args.step1",
    "--step2": "lr_scheduler.args.step2", "--gamma": "lr_scheduler.args.gamma",
    "--warmup": "lr_scheduler.args.warmup_epoch", "--reduce_dimension": "arch.args.reduce_dimension",
    "--num_experts": "arch.args.num_experts", "--add_bt": "arch.args.add_bt", "--add_global": "arch.args.add_bt",
    "--eval_bt": "arch.args.eval_bt", "--pos_weight": "arch.args.pos_weight",
    "--layer2_dimension": "arch.args.layer2_output_dim", "--layer3_dimension": "arch.args.layer3_output_dim",
    "--layer4_dimension": "arch.args.layer4_output_dim",
    "--distribution_aware_diversity_factor": "loss.args.additional_diversity_factor",
    "--add_bt_teacher": "distill_arch.args.add_bt", "--seed": "seed", "--save_dir": "trainer.save_dir",
}


@pytest.fixture
def checkpoint(tmp_path):
    file = tmp_path / "checkpoint.pth"
    file.write_bytes(b"x")
    return str(file)


@pytest.mark.parametrize("flag", NAMED)
def test_named_overrides_reach_their_path(flag, checkpoint):
    for argv in ([flag, "1"], [f"{flag}=1"]):
        for args in (parse_train(["-c", CONFIG, *argv]), parse_test(["-r", checkpoint, *argv])):
            (item,) = args.overrides
            assert (item.path, item.value, item.flag, item.text) == (NAMED[flag], 1, flag, "1")


def test_overrides_keep_the_order_of_the_command_line():
    args = parse_train(["--set", "trainer.epochs=3", "-c", CONFIG, "--epochs", "4", "--set", 'metrics=["top_k_acc"]',
                        "--set", "arch.args.norm.type=NBN", "--set", "name=a=b"])
    assert [(item.path, item.value) for item in args.overrides] == [
        ("trainer.epochs", 3), ("trainer.epochs", 4), ("metrics", ["top_k_acc"]), ("arch.args.norm.type", "NBN"),
        ("name", "a=b")]


@pytest.mark.parametrize("flag, value, parsed", [
    ("--distribution_aware_diversity_factor", "-0.45", -0.45), ("--gamma", "-2e-1", -0.2), ("--lr", "1e-3", 1e-3),
    ("--lr", "nan", "nan"), ("--lr", "NaN", "NaN"), ("--reduce_dimension", "true", True), ("--name", "007", "007"),
    ("--lr", "-inf", "-inf"),
])
def test_values_are_json_or_text(flag, value, parsed):
    assert parse_train(["-c", CONFIG, flag, value]).overrides[0].value == parsed


def test_short_and_long_names(checkpoint):
    args = parse_train(["--config", CONFIG, "--resume", checkpoint, "--device", "cpu", "--run_id", "a", "--dry_run",
                        "--pretrained", checkpoint, "--load_crt", checkpoint, "--distill_checkpoint", checkpoint])
    assert (args.config, args.resume, args.device, args.run_id, args.dry_run, args.profile) == (
        CONFIG, checkpoint, "cpu", "a", True, False)
    assert [item.path for item in args.overrides] == ["pretrained", "load_crt", "distill_checkpoint"]
    assert parse_train(["-c", CONFIG, "-d", "0,1", "--profile"]).profile
    auto = parse_train(["-r", "auto", "--run_id", "x", "-c", CONFIG])
    assert auto.resume == "auto"


def test_quiet_verbose_and_profile_are_config_values_too():
    args = parse_train(["-c", CONFIG, "-q", "--profile"])
    assert args.quiet and [(item.path, item.value) for item in args.overrides] == [
        ("trainer.verbosity", 0), ("trainer.profile", True)]
    config = load_config(CONFIG, args.overrides)
    assert config["trainer"]["verbosity"] == 0 and config["trainer"]["profile"] is True


def test_flags_of_other_launchers_do_nothing():
    args = parse_train(["-c", CONFIG, "--world-size", "2", "--rank", "0", "--dist-url", "tcp://x", "--dist-backend",
                        "nccl", "--gpu", "0", "--multiprocessing-distributed", "--local_rank=1"])
    assert args.overrides == [] and "--gpu" in args.ignored and "--multiprocessing-distributed" in args.ignored


def test_test_flags(checkpoint):
    args = parse_test(["-r", checkpoint])
    assert (args.classifier, args.tau, args.split, args.report, args.open_set) == ("joint", None, "test", False, None)
    assert parse_test(["-r", checkpoint, "--tau", "0.7"]).classifier == "tau"
    swept = parse_test(["-r", checkpoint, "--classifier", "tau"])
    assert swept.tau[-1] == 2.0 and swept.tau_metric == "class_mean_acc"
    args = parse_test(["-r", checkpoint, "--classifier", "ncm", "--feat_type", "l2n", "--open_set", checkpoint,
                       "--open_threshold", "0.2", "--allow_partial", "--split", "val"])
    assert (args.feat_type, args.open_threshold, args.allow_partial, args.split) == ("l2n", 0.2, True, "val")


def test_tau_sweeps():
    assert parse_taus("0.7") == [0.7]
    sweep = parse_taus("0:2:0.1")
    assert len(sweep) == 21 and sweep[0] == 0 and sweep[-1] == 2 and sweep[7] == 0.7
    assert parse_taus("1:1:1") == [1.0] and parse_taus("0:1:0.3") == [0, 0.3, 0.6, 0.9]


WRONG_TRAIN = [
    ([], "train.py: needs -c CONFIG.json, or -r CHECKPOINT"),
    (["-c"], "-c/--config: expected one argument"),
    (["-c", CONFIG, "--epoch", "3"], "train.py: unknown flag '--epoch'; did you mean '--epochs'?"),
    (["-c", CONFIG, "--num-experts", "3"], "did you mean '--num_experts'?"),
    (["-c", CONFIG, "--learning_rat=1"], "unknown flag '--learning_rat'; did you mean '--learning_rate'?"),
    (["-c", CONFIG, "stray"], "unexpected 'stray'"), (["-c", CONFIG, "--tau", "1"], "unknown flag '--tau'"),
    (["-c", CONFIG, "--lr"], "--lr/--learning_rate: expected one argument"),
    (["-c", CONFIG, "--set", "trainer.epochs"], "--set 'trainer.epochs': write KEY=VALUE"),
    (["-c", CONFIG, "--set", "=3"], "write KEY=VALUE"), (["-c", CONFIG, "--dry_run=1"], "--dry_run: ignored explicit"),
    (["-c", CONFIG, "-d", "gpu"], "-d/--device: 'gpu' is neither"), (["-c", CONFIG, "-d", "-1"], "-d/--device"),
    (["-r", "gone.pth"], "-r: no such file: gone.pth"), (["-r", "configs"], "-r: configs is a folder"),
    (["-r", "a\0b"], "-r: "), (["-r", ""], "-r: no such file"),
    (["-r", "auto"], "-r auto: needs -c CONFIG.json and --run_id ID"),
    (["-r", "auto", "-c", CONFIG], "-r auto: needs"), (["-c", CONFIG, "--run_id", "a/b"], "--run_id: 'a/b' can't name"),
    (["-c", CONFIG, "--run_id", ".."], "--run_id"), (["-c", CONFIG, "--pretrained", "no.pth"], "--pretrained: no such"),
    (["-c", CONFIG, "--load_crt", "no.pth"], "--load_crt: no such file"),
    (["-c", CONFIG, "--distill_checkpoint", "no.pth"], "--distill_checkpoint: no such file"),
]
WRONG_TEST = [
    ([], "test.py: needs -r CHECKPOINT"), (["-r", "gone.pth"], "-r: no such file"),
    (["-r", "HERE", "--classifier", "nmc"], "--classifier: invalid choice: 'nmc'"),
    (["-r", "HERE", "--tau", "x"], "--tau: 'x' isn't a number"), (["-r", "HERE", "--tau", "0:2"], "FIRST:LAST:STEP"),
    (["-r", "HERE", "--tau", "2:0:0.1"], "FIRST:LAST:STEP"), (["-r", "HERE", "--tau", "0:2:0"], "FIRST:LAST:STEP"),
    (["-r", "HERE", "--tau", "0:1e9:1e-9"], "more than 1000"), (["-r", "HERE", "--tau", "inf"], "isn't a number"),
    (["-r", "HERE", "--tau=-1"], "must be 0 or more"), (["-r", "HERE", "--classifier", "tau", "--tau", ""], "a number"),
    (["-r", "HERE", "--tau_metric", "accuracy"], "--tau_metric: chooses from a sweep"),
    (["-r", "HERE", "--tau", "1", "--tau_metric", "accuracy"], "--tau_metric: chooses from a sweep"),
    (["-r", "HERE", "--tau", "0:1:0.1", "--tau_metric", "f1"], "--tau_metric"),
    (["-r", "HERE", "--classifier", "ncm", "--tau", "1"], "--tau: goes with --classifier tau"),
    (["-r", "HERE", "--feat_type", "l2n"], "--feat_type: goes with --classifier ncm"),
    (["-r", "HERE", "--open_threshold", "2"], "--open_threshold: must be from 0 to 1"),
    (["-r", "HERE", "--open_threshold", "0.5"], "--open_threshold: goes with --open_set"),
    (["-r", "HERE", "--open_set", "no.txt"], "--open_set: no such file"),
    (["-r", "HERE", "--dry_run"], "unknown flag '--dry_run'"),
]


@pytest.mark.parametrize("argv, said", WRONG_TRAIN, ids=[" ".join(w[0])[:50] or "none" for w in WRONG_TRAIN])
def test_wrong_train_flags_are_named(argv, said):
    with pytest.raises(ConfigError) as caught:
        parse_train(argv)
    assert said in str(caught.value) and "usage" not in str(caught.value)


@pytest.mark.parametrize("argv, said", WRONG_TEST, ids=[" ".join(w[0])[:50] or "none" for w in WRONG_TEST])
def test_wrong_test_flags_are_named(argv, said, checkpoint):
    with pytest.raises(ConfigError) as caught:
        parse_test([checkpoint if word == "HERE" else word for word in argv])
    assert said in str(caught.value)


@given(st.lists(st.text(max_size=8) | st.sampled_from(["-c", CONFIG, "--set", "--lr", "-d", "cpu", "-r", "--tau", "-q",
                                                       "a.b=1", "--", "-", "-1", "--name="]), max_size=6))
def test_any_command_line_is_refused_or_read(argv):
    argv = [word for word in argv if word not in ("-h", "--help") and not word.startswith("-h")]
    for parse in (parse_train, parse_test):
        try:
            parse(argv)
        except ConfigError as error:
            assert str(error) and "\n" not in str(error)
        except SystemExit as done:  # clusters such as -qh ask for help
            assert done.code == 0


@pytest.mark.parametrize("script", ["train.py", "test.py"])
def test_help(script, run_cli):
    done = run_cli(["-X", "importtime", script, "--help"])
    assert done.returncode == 0
    for word in ("--set", "--add_bt", "--batch_size", "examples:"):
        assert word in done.stdout
    assert "| torch" not in done.stderr and "numpy" not in done.stderr
    if script == "test.py":
        assert "--classifier" in done.stdout


def test_mistakes_write_nothing(call_cli, tmp_path, root):
    for argv in (["--epochs", "0"], ["--set", "arch.args.num_expert=3"], ["--epoch", "1"], ["--lr", "inf"],
                 ["--add_bt_teacher", "1"], ["-d", "gpu"]):
        done = call_cli(["train.py", "-c", root / CONFIG, "--save_dir", tmp_path / "saved", *argv], cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == "", done
    assert list(tmp_path.iterdir()) == []


def test_argv_comes_from_the_process_where_none_is_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "-c", CONFIG, "--epochs", "2"])
    assert parse_train().overrides[0].value == 2
