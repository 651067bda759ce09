"""Sweeps: the grid that a file means, what is run in which order, and going on after a stop."""

import contextlib
import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tools import sweep
from tools.sweep import Runner
from tools.sweep_grid import check_origins, check_unchanged, read_sweep, train_command, written
from utils.errors import ConfigError

SMALL = {"arch.args.layer2_output_dim": 8, "arch.args.layer3_output_dim": 8, "trainer.epochs": 1,
         "trainer.tensorboard": False}


def write(folder, **sweep):
    path = folder / "sweep.json"
    path.write_text(json.dumps({"name": "grid", "save_dir": str(folder / "saved"), "base": "configs/digits_lt_ce.json",
                                **sweep}))
    return str(path)


# ---------------------------------------------------------------------- the file

def test_a_grid_is_methods_times_seeds(tmp_path):
    crt = {"config": "configs/digits_lt_crt.json", "set": {"load_crt": "{ce}", "optimizer.args.lr": 0.5}}
    jobs, _ = read_sweep(write(tmp_path, seeds=[0, 1], set={"trainer.epochs": 2}, methods={"crt": crt, "ce": {}}))
    assert [job.title for job in jobs] == ["ce seed 0", "ce seed 1", "crt seed 0", "crt seed 1"], "what is needed first"
    job = jobs[3]
    assert job.effective["trainer"]["epochs"] == 2 and job.effective["optimizer"]["args"]["lr"] == 0.5
    assert job.effective["seed"] == 1 and job.effective["name"] == "grid_crt"
    command = train_command(job, jobs, "cpu")
    assert f"load_crt={tmp_path}/saved/models/grid_ce/seed1/checkpoint-epochN.pth" in command
    assert command[-2:] == ["-d", "cpu"] and command[command.index("-r") + 1] == "auto"


def test_what_the_sweep_gives_a_run_wins(tmp_path):
    jobs, _ = read_sweep(write(tmp_path, methods={"ce": {}}, set={"trainer": {"epochs": 1, "save_dir": "elsewhere"}}))
    command = train_command(jobs[0], jobs, None)
    assert command.index(f"trainer.save_dir={tmp_path / 'saved'}") > next(
        at for at, word in enumerate(command) if word.startswith("trainer={"))


def test_a_range_of_shards_is_no_method(tmp_path):
    pattern = "photos-{00000..00003}.tar"
    jobs, _ = read_sweep(write(tmp_path, base="configs/image_folder_ride.json", methods={
        "ce": {"set": {"data_loader.args.shards": pattern}}}))
    assert jobs[0].needs == () and f"data_loader.args.shards={pattern}" in train_command(jobs[0], jobs, None)


def test_a_start_is_a_new_run(tmp_path):
    jobs, _ = read_sweep(write(tmp_path, methods={
        "ride": {"config": "configs/digits_lt_ride.json"},
        "ea": {"config": "configs/digits_lt_ride_ea.json", "start": "ride"}}))
    command = train_command(jobs[1], jobs, None)
    assert command[command.index("-r") + 1].endswith("grid_ride/seed0/checkpoint-epochN.pth")
    assert "resume_state_dict_only=true" in command
    jobs[1].paths.models.mkdir(parents=True)
    jobs[1].paths.best.touch()      # killed before its first epoch checkpoint was due
    command = train_command(jobs[1], jobs, None)
    assert command[command.index("-r") + 1] == "auto"


@pytest.mark.parametrize("change, said", [
    ({"methods": {}}, "methods: give at least one"),
    ({"methods": {"ce": {"confg": "x"}}}, "did you mean 'config'?"),
    ({"methods": {"ce": {}}, "sedes": [0]}, "did you mean 'seeds'?"),
    ({"methods": {"ce": {}}, "seeds": [0, 0]}, "seeds: must be different"),
    ({"methods": {"ce": {}}, "seeds": [True]}, "seeds: must be different"),
    ({"methods": {"ce": {}}, "base": None}, "has no config"),
    ({"methods": {"ce": {"config": "configs/digits_lt_cee.json"}}}, "no such file"),
    ({"methods": {"ce": {"set": {"trainer.epoch": 3}}}}, "did you mean"),
    ({"methods": {"crt": {"set": {"load_crt": "{cee}"}}, "ce": {}}}, "did you mean 'ce'?"),
    ({"methods": {"a": {"start": "b"}, "b": {"start": "a"}}}, "needs itself"),
    ({"methods": {"a/b": {}}}, "can't name a folder"),
    ({"methods": {"ce": {"set": {"seed": 7}}}}, "set: seed is the sweep's own; give \"seeds\" beside it"),
    ({"methods": {"ce": {}}, "set": {"trainer.save_dir": "x"}}, "save_dir is the sweep's own; give \"save_dir\""),
])
def test_a_mistake_in_the_file(tmp_path, change, said):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        read_sweep(write(tmp_path, **change))


def test_text_is_written_so_that_it_is_read_as_text():
    assert written("NBN") == "NBN" and written("5") == '"5"' and written(True) == "true"
    assert written({"type": "MABN"}) == '{"type": "MABN"}'


# ---------------------------------------------------------------------- stand-ins for train.py and test.py

TRAIN = """import json, pathlib, sys
run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True, exist_ok=True)
if sys.argv[2] == 'fail': print('no luck'); sys.exit(3)
(run / 'config.json').write_text(sys.argv[3])
(run / f"checkpoint-epoch{json.loads(sys.argv[3])['trainer']['epochs']}.pth").touch()
"""
TEST = "import pathlib, sys; pathlib.Path(sys.argv[1], 'test_metrics.json').write_text('{\"accuracy\": 0.5}')"


@pytest.fixture
def stand_ins(monkeypatch):
    """Seconds instead of minutes: commands that leave a run's files; returns the titles in order of their start."""
    started = []

    def train(job, jobs, device):
        started.append((job.title, device))
        config = json.dumps({k: v for k, v in job.effective.items() if v is not None})
        return [sys.executable, "-c", TRAIN, str(job.paths.models), job.method, config]
    monkeypatch.setattr(sweep, "train_command", train)
    monkeypatch.setattr(sweep, "evaluation_command",
                        lambda job, device: [sys.executable, "-c", TEST, str(job.paths.models)])
    return started


def run(path, devices=(None,)):
    jobs, save_dir = read_sweep(path)
    runner = Runner(jobs, devices, save_dir)
    save_dir.mkdir(parents=True, exist_ok=True)
    runner.run()
    return jobs, runner


def test_finished_runs_are_skipped(tmp_path, stand_ins, capsys):
    path = write(tmp_path, seeds=[0, 1], methods={"ce": {}})
    jobs, _ = run(path)
    assert [job.state for job in jobs] == ["done", "done"] and len(stand_ins) == 2
    (jobs[1].paths.models / "test_metrics.json").unlink()
    jobs, _ = run(path)
    assert [title for title, _ in stand_ins] == ["ce seed 0", "ce seed 1", "ce seed 1"]
    assert "was finished before" in capsys.readouterr().out


def test_a_stopped_run_that_was_tested_isnt_finished(tmp_path, stand_ins):
    path = write(tmp_path, methods={"ce": {}}, set={"trainer.epochs": 3})
    job, = run(path)[0]
    half = job.paths.checkpoint(2)
    job.last.rename(half)
    assert job.paths.models.joinpath("test_metrics.json").stat().st_mtime >= half.stat().st_mtime
    assert not read_sweep(path)[0][0].finished
    job.paths.log.mkdir(parents=True)
    (job.paths.log / "metrics.csv").write_text("epoch,loss\n1,1\n2,1\n")
    half.rename(job.paths.checkpoint(3))        # stopped inside the last epoch
    assert not read_sweep(path)[0][0].finished
    (job.paths.log / "metrics.csv").write_text("epoch,loss\n1,1\n2,1\n3,1\n")
    assert read_sweep(path)[0][0].finished


def test_a_run_that_may_stop_early_has_when_its_last_checkpoint_says_so(tmp_path, stand_ins):
    path = write(tmp_path, methods={"ce": {}}, set={"trainer.epochs": 3, "trainer.early_stop": 2,
                                                    "trainer.monitor": "max val_accuracy"})
    job, = run(path)[0]
    half = job.last.rename(job.paths.checkpoint(2))
    for batch, not_improved, ended in ((None, 1, False), (None, 2, True), (4, 2, False)):
        torch.save({"state_dict": {"w": torch.zeros(1)}, "batch": batch, "not_improved": not_improved}, half)
        assert read_sweep(path)[0][0].trained is ended
    half.write_bytes(b"cut short")
    assert not read_sweep(path)[0][0].trained


def test_what_began_from_a_run_that_is_trained_anew_is_named(tmp_path, stand_ins):
    path = write(tmp_path, methods={"ce": {}, "crt": {"config": "configs/digits_lt_crt.json",
                                                      "set": {"load_crt": "{ce}"}}})
    jobs, _ = run(path)
    check_origins(read_sweep(path)[0])
    jobs[0].last.unlink()
    with pytest.raises(ConfigError, match=r"grid_crt/seed0: began from ce seed 0, .* delete this folder too"):
        check_origins(read_sweep(path)[0])


def test_a_failure_stops_only_what_needs_it(tmp_path, stand_ins, capsys):
    jobs, _ = run(write(tmp_path, methods={"fail": {}, "after": {"start": "fail"}, "ce": {}}))
    state = {job.method: job.state for job in jobs}
    assert state == {"fail": "failed", "after": "failed", "ce": "done"}
    assert "status 3: no luck" in jobs[0].problem
    assert "needs fail" in next(job.problem for job in jobs if job.method == "after")


def test_a_log_that_cant_be_written_fails_its_run(tmp_path, stand_ins, monkeypatch, call_cli):
    """The worker is a thread: without a word of its own, its error would be nobody's, and who waits would wait on."""
    path = write(tmp_path, methods={"ce": {}, "after": {"start": "ce"}, "alone": {}})
    logs = tmp_path / "saved/sweeps/sweep"
    logs.mkdir(parents=True)
    (logs / "ce_seed0.log").mkdir()
    done = call_cli(["-m", "tools.sweep", path, "--gpus", "0,1"])
    assert done.returncode == 1
    assert sorted(done.stderr.splitlines()) == ["failed: after seed 0: needs ce, which failed",
                                                f"failed: ce seed 0: {logs / 'ce_seed0.log'}: Is a directory"]
    assert sorted(title for title, _ in stand_ins) == ["alone seed 0", "ce seed 0"]
    (logs / "ce_seed0.log").rmdir()

    def broken(*_):
        raise KeyError("no such thing")
    monkeypatch.setattr(sweep, "train_command", broken)
    done = call_cli(["-m", "tools.sweep", path])
    assert done.returncode == 1 and "failed: ce seed 0: KeyError: 'no such thing'\n" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_under_the_log_fails_its_run(tmp_path, stand_ins, call_cli):
    logs = tmp_path / "saved/sweeps/sweep"
    logs.mkdir(parents=True)
    (logs / "ce_seed0.log").symlink_to("/dev/full")
    done = call_cli(["-m", "tools.sweep", write(tmp_path, methods={"ce": {}})])
    assert done.returncode == 1
    assert done.stderr == f"failed: ce seed 0: {logs / 'ce_seed0.log'}: No space left on device\n"


def test_several_devices_share_the_runs(tmp_path, stand_ins):
    jobs, _ = run(write(tmp_path, seeds=[0, 1, 2, 3], methods={"ce": {}}), devices=("0", "1"))
    assert all(job.state == "done" for job in jobs)
    assert {device for _, device in stand_ins} == {"0", "1"} and len(stand_ins) == 4


def test_a_changed_config_isnt_mixed_with_old_runs(tmp_path, stand_ins):
    run(write(tmp_path, methods={"ce": {}}))
    jobs, _ = read_sweep(write(tmp_path, methods={"ce": {}}))
    check_unchanged(jobs[0])
    jobs, _ = read_sweep(write(tmp_path, methods={"ce": {"set": {"trainer.verbosity": 0}}}))
    check_unchanged(jobs[0])
    assert jobs[0].effective["optimizer"]["args"]["lr"] == 0.003
    jobs, _ = read_sweep(write(tmp_path, methods={"ce": {"set": {"optimizer.args.lr": 0.3}}}))
    with pytest.raises(ConfigError, match=r"optimizer\.args\.lr 0\.003, the sweep now says 0\.3"):
        check_unchanged(jobs[0])


def test_a_run_that_began_elsewhere_isnt_mixed_with_the_sweeps(tmp_path, stand_ins):
    """What `{ce}` and "start" stood for is known by the run's folder, literal files by their names."""
    def methods(load_crt="{ce}", start="ride", pretrained="a.pth"):
        return {"ce": {"set": {"pretrained": pretrained}}, "bs": {}, "ride": {"config": "configs/digits_lt_ride.json"},
                "rbt": {"config": "configs/digits_lt_ride.json"},
                "crt": {"config": "configs/digits_lt_crt.json", "set": {"load_crt": load_crt}},
                "ea": {"config": "configs/digits_lt_ride_ea.json", "start": start}}

    def check(**changes):
        for job in read_sweep(write(tmp_path, methods=methods(**changes)))[0]:
            check_unchanged(job)
    jobs = {job.method: job for job in run(write(tmp_path, methods=methods()))[0]}
    crt, ea = jobs["crt"].paths, jobs["ea"].paths
    noted = json.loads(crt.config.read_text())
    moved = "elsewhere/models/grid_ce/seed0/checkpoint-epoch7.pth"      # save_dir had another name then
    crt.config.write_text(json.dumps({**noted, "load_crt": moved}))
    check()
    check(start="rbt")      # a run of an older version, which doesn't say where it began
    ea.origin.write_text(json.dumps({"checkpoint": str(jobs["ride"].paths.checkpoint(1))}))
    check()
    for changes, said in (({"load_crt": "{bs}"}, r"grid_crt/seed0: was run with load_crt '.*', .* now says '{bs}'"),
                          ({"load_crt": "x.pth"}, "the sweep now says 'x.pth'"),
                          ({"pretrained": "b.pth"}, "was run with pretrained 'a.pth', the sweep now says 'b.pth'"),
                          ({"start": "rbt"}, "grid_ea/seed0: was run with start '.*', the sweep now says 'rbt'")):
        with pytest.raises(ConfigError, match=said):
            check(**changes)


@pytest.mark.parametrize("heeding", [{"trainer.early_stop": 2}, {"lr_scheduler": {"type": "ReduceLROnPlateau"}}, {}])
def test_another_monitor_is_a_change_where_something_heeds_it(tmp_path, stand_ins, heeding):
    run(write(tmp_path, methods={"ce": {}}, set={**heeding, "trainer.monitor": "max val_accuracy"}))
    job, = read_sweep(write(tmp_path, methods={"ce": {}}, set={**heeding, "trainer.monitor": "min val_loss"}))[0]
    with pytest.raises(ConfigError, match=r"trainer\.monitor") if heeding else contextlib.nullcontext():
        check_unchanged(job)


def test_what_auto_found_is_no_change(tmp_path, stand_ins):
    path = write(tmp_path, base="configs/image_folder_ride.json", methods={"ride": {}})
    job, = run(path)[0]
    assert job.effective["data_loader"]["args"]["image_size"] == "auto"
    noted = json.loads(job.paths.config.read_text())
    noted["data_loader"]["args"]["image_size"] = 64
    job.paths.config.write_text(json.dumps(noted))
    check_unchanged(read_sweep(path)[0][0])


def test_a_stop_reaches_the_runs(tmp_path, monkeypatch):
    """SIGTERM is passed on; the run ends by itself, nothing more is started."""
    waits = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(60)"
    monkeypatch.setattr(sweep, "train_command", lambda job, jobs, device: [sys.executable, "-c", waits])
    threading.Timer(1.0, lambda: signal.raise_signal(signal.SIGTERM)).start()
    began = time.monotonic()
    jobs, runner = run(write(tmp_path, seeds=[0, 1], methods={"ce": {}}))
    assert runner.stopping and time.monotonic() - began < 30
    assert [job.state for job in jobs] == ["waiting", "waiting"]


# ---------------------------------------------------------------------- for real

def test_from_the_command_line(tmp_path, run_cli, call_cli):
    path = write(tmp_path, set={**SMALL, "data_loader.args.image_size": 8},
                 methods={"ce": {}, "bad": {"set": {"pretrained": "nowhere.pth"}}})
    listed = call_cli(["-m", "tools.sweep", path, "--dry_run"], check=True)
    assert "2 runs, 0 finished" in listed.stdout and not (tmp_path / "saved").exists()
    done = run_cli(["-m", "tools.sweep", path, "-d", "cpu"])
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("failed: bad seed 0: train.py ended with status 2") and "nowhere.pth" in done.stderr
    assert "grid_ce/seed0" in done.stdout.split("method")[1], "ends in the table"
    assert json.loads((tmp_path / "saved/models/grid_ce/seed0/test_metrics.json").read_text())["n_samples"] == 500


@pytest.mark.parametrize("args, said", [
    (["nowhere.json"], "nowhere.json: no such file"), (["{path}", "--gpus", "0", "-d", "cpu"], "leave out -d"),
    (["{path}", "--gpus", "x"], "GPU numbers"),
])
def test_a_mistake_is_one_line(args, said, tmp_path, call_cli):
    path = write(tmp_path, methods={"ce": {}})
    done = call_cli(["-m", "tools.sweep", *(arg.replace("{path}", path) for arg in args)])
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
