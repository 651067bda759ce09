"""Two processes (gloo) train as one does: the same gradients from the same global batches, each image counted once."""

import csv
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import train
from data_loader.data_loaders import ImageFolderLTDataLoader
from logger.metrics_csv import read_table
from model.model import FAMILIES
from tests.trainer.ranks import (
    SHARDS,
    make_temporary_folder,
    open_shards,
    run_ranks,
    stop_and_resume,
    train_and_record,
)
from tools.opened import open_run
from trainer.evaluate import evaluate
from utils import device
from utils.errors import ConfigError

GROUP = {"norm": "GroupNorm"}
TWO = {"num_experts": 2, "use_norm": True, **GROUP}
#: 23 images in batches of 10 are 10, 10 and 3; 11 validation images are 10 and 1: rank 1 has none of the last.
UNEVEN = {"data_loader": {"args": {"batch_size": 10, "retain_epoch_size": True}},
          "metrics": ["accuracy", "macro_f1", "auc"]}
KINDS = {
    "cross-entropy": ({"arch": {"args": GROUP}}, 1e-6),
    "weighted LDAM": ({"arch": {"args": {**GROUP, "use_norm": True}},
                       "loss": {"type": "LDAMLoss", "args": {"reweight_epoch": 0}}}, 1e-6),
    "two batches a step": ({"arch": {"args": {**GROUP, "use_norm": True}}, "trainer": {"accumulate": 2},
                            "loss": {"type": "LDAMLoss", "args": {"reweight_epoch": 0}}}, 1e-6),
    "RIDE": ({"arch": {"args": TWO}, "loss": {"type": "RIDELoss", "args": {"reweight_epoch": 0}}}, 1e-6),
    "BatchFormer over ranks": ({"arch": {"args": {**TWO, "add_bt": 1}}, "loss": {"type": "RIDELoss"},
                                "trainer": {"bt_gather": True}}, 1e-6),
    "SyncBatchNorm": ({"arch": {"args": {"norm": "SyncBatchNorm"}}}, 1e-4),
    "class means": ({"arch": {"args": {**GROUP, "use_norm": True}}, "init_classifier": "class_means"}, 1e-6),
    "cRT": ({}, 1e-6), "LWS": ({"arch": {"args": {"classifier": "lws"}}}, 1e-6),
    "expert assignment": ({"arch": {"type": "ResNet32EAModel", "args": {"num_experts": 2, "use_norm": True}},
                           "resume_state_dict_only": True}, 1e-6),
    "distillation": ({"arch": {"args": TWO}, "distill": True, "loss": {"type": "RIDELossWithDistill"},
                      "distill_arch": {"type": "ResNet32Model", "args": {
                          "num_experts": 2, "layer2_output_dim": 16, "layer3_output_dim": 16, "use_norm": True}}},
                     1e-6),
}


@pytest.fixture(scope="module")
def both(shared_runs):
    """All kinds, by one process and by two: [(steps, metrics row)] each, and what rank 1 wrote."""
    teacher = shared_runs("ddp_two", "--epochs", 1, arch={"args": {"num_experts": 2, "use_norm": True}}) \
        / "checkpoint-epoch1.pth"
    one = shared_runs("ddp_one", "--epochs", 1) / "checkpoint-epoch1.pth"
    flags = {"cRT": ("--load_crt", one), "LWS": ("--load_crt", one), "expert assignment": ("-r", teacher),
             "distillation": ("--distill_checkpoint", teacher)}

    def commands(who):
        # A rate so small that weights stay: later steps compare gradients, not what became of rounding.
        return [[str(part) for part in (
            "-c", shared_runs.config(**{**sections, **UNEVEN}), "-d", "cpu", "--epochs", 1, "--lr", 1e-9, "--run_id",
            f"{who}-{i}", *flags.get(kind, ()))] for i, (kind, (sections, _)) in enumerate(KINDS.items())]
    alone = train_and_record(commands("alone"))
    ranks = run_ranks(train_and_record, commands("ranks"))

    def rows(who):
        return [next(csv.DictReader((shared_runs.log(f"{who}-{i}") / "metrics.csv").open()))
                for i in range(len(KINDS))]
    return alone, ranks, rows("alone"), rows("ranks")


@pytest.mark.parametrize("index,kind", list(enumerate(KINDS)))
def test_gradients_and_figures_are_one_process_s(both, index, kind):
    alone, ranks, one_row, two_row = both
    tolerance = KINDS[kind][1]
    steps = alone["steps"][index]
    assert len(steps) == (2 if kind == "two batches a step" else 3)
    for rank in ranks:
        for one, two in zip(steps, rank["steps"][index], strict=True):
            assert torch.isfinite(two).all() and (one - two).norm() <= tolerance * one.norm()
    assert one_row[index].keys() == two_row[index].keys()
    for name, value in one_row[index].items():  # loss and accuracy, of training and validation: each image once
        if value or two_row[index][name]:
            assert float(two_row[index][name]) == pytest.approx(float(value), abs=max(tolerance, 1e-6) * 10), name


def test_a_lent_image_isnt_counted_among_a_ranks_own(runs):
    """23 images in batches of 7, four a step: of the last 2 the third rank has none, but of those before it has."""
    sections = {"data_loader": {"args": {"retain_epoch_size": True}}, "arch": {"args": {**GROUP, "use_norm": True}},
                "trainer": {"accumulate": 4}, "loss": {"type": "LDAMLoss", "args": {"reweight_epoch": 0}}}
    commands = [["-c", str(runs.config(**sections)), "-d", "cpu", "--epochs", "1", "--bs", "7", "--run_id", who]
                for who in ("alone", "ranks")]
    (alone,), = train_and_record(commands[:1])["steps"]
    for rank in run_ranks(train_and_record, commands[1:], world_size=3):
        (step,), = rank["steps"]
        assert (alone - step).norm() <= 1e-6 * alone.norm()


def test_only_rank_0_writes(both):
    _, (first, second), _, _ = both
    assert first["written"] and not second["written"]


#: Parts of a recipe, each of which draws or remembers something on every rank.
def test_a_stop_of_one_rank_stops_all_at_the_same_step(runs, same_state):
    """With averages, mixing, policies, SAM around Muon, rates by the step. What is saved is what was validated, though
    each rank's batch norm has seen other images."""
    runs.base["optimizer"] = {"type": "SAM", "args": {"rho": 0.05, "base": {"type": "Muon", "args": {}}}}
    sections = {"arch": {"args": {"dropout": 0.2}},
                "data_loader": {"args": {"augment": "autoaugment", "cutout": 6, "random_erasing": 0.5,
                                         "flip": "alternate", "mix": {"type": "either"}}},
                "lr_scheduler": {"type": "CosLR", "args": {"by": "step", "warmup_epoch": 0.5}},
                "trainer": {"ema": {"decay": 0.9}, "swa": {"epochs": 1}, "layer_decay": 0.8, "no_decay": "norm_bias",
                            "clip_grad_norm": 1.0}}

    def command(run_id, *more):
        return [str(part) for part in ("-c", runs.config(**sections), "-d", "cpu", "--run_id", run_id, *more)]
    stopped = runs.models("stopped") / "checkpoint-epoch2.pth"
    run_ranks(stop_and_resume, [command("stopped"), ["-r", str(stopped), "-d", "cpu"], command("straight")])
    assert same_state(stopped, runs.models("straight") / "checkpoint-epoch2.pth") == []
    one, other = ((runs.log(name) / "metrics.csv").read_text() for name in ("stopped", "straight"))
    assert one == other
    one, other = (torch.load(runs.models(name) / "model_swa.pth", weights_only=True)["state_dict"]
                  for name in ("stopped", "straight"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert "stopped on request in epoch 2, after 12 of its 23 images" in (runs.log("stopped") / "info.log").read_text()
    run = open_run(stopped)
    alone = evaluate(run.model, run.loader("val"))
    assert alone["accuracy"] == pytest.approx(read_table(runs.log("stopped") / "metrics.csv")[-1]["val_accuracy"])


@pytest.mark.parametrize("machines", [1, 2])
def test_two_ranks_make_one_index_and_share_each_batch(tiny_shards, tmp_path, machines):
    """Of two machines each has its index on its own disk, though rank 0 alone reads the headers."""
    places = [tmp_path / f"disk{n}" for n in range(machines)]
    for n, place in enumerate(places):
        shutil.copytree(tiny_shards, place)
        (place / "odd.tar").write_bytes((tiny_shards / "test-00000.tar").read_bytes() + bytes(512 * n))
    one, two = run_ranks(open_shards, [str(places[0]), str(places[-1])])
    assert (one["read"], two["read"]) == (4, 0)     # two, one, and the odd one
    assert [len(list(place.glob("t*.index.npz"))) for place in places] == [2] * machines
    assert not one["said"] and ("disk1/odd.tar: has " in two["said"] if machines == 2 else not two["said"])
    alone = ImageFolderLTDataLoader(str(places[0]), batch_size=5, image_size=16, num_workers=0, cache=False,
                                    shards=SHARDS)
    for n, (images, labels) in enumerate(alone):
        for rank, (own, theirs, share) in enumerate((one["batches"][n], two["batches"][n])):
            assert torch.equal(own[:share], images[rank::2]) and torch.equal(theirs[:share], labels[rank::2])


def test_ranks_of_a_dry_run_share_a_temporary_folder():
    one, two = run_ranks(make_temporary_folder, None)
    assert one == two and one["found"] == ["0", "1"] and not one["left"]


# ---------------------------------------------------------------------- torchrun, and the launcher of our own

def torchrun(root, *args, processes=2):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                             "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *map(str, args)],
                            cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_sigterm_to_torchrun_saves(runs, root):
    process = torchrun(root, "train.py", "-c", runs.config(trainer={"epochs": 500, "save_period": 500}), "-d", "cpu",
                       "--run_id", "t")
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    found = re.search(r"go on with: torchrun --nproc_per_node 2 train\.py -r (\S+)", out)
    assert found and torch.load(found[1], weights_only=True)["state_dict"]


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(runs, root, monkeypatch):
    """Two torchruns that meet over the loopback address, a process each, as on two machines."""
    monkeypatch.setitem(FAMILIES["ResNet32"], "depths", (5, 5, 5))  # as the other processes have it
    config = runs.config(arch={"args": GROUP}, **UNEVEN, trainer={"tensorboard": False, "figures": False})
    flags = [config, "-d", "cpu", "--epochs", 1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend",
         "c10d", "--rdzv_id", "two", "--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1", "train.py",
         "-c", *map(str, flags), "--run_id", "nodes"], cwd=root, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT) for _ in range(2)]
    train.main(["-c", *map(str, flags), "--run_id", "alone"])
    said = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("epoch 1/1" in text for text in said) == 1      # rank 0 alone speaks
    alone, together = (read_table(runs.log(who) / "metrics.csv") for who in ("alone", "nodes"))
    for name in ("loss", "val_loss", "accuracy"):
        assert together[0][name] == pytest.approx(alone[0][name], rel=1e-4), name


def test_a_rank_that_dies_ends_the_job_with_its_error_first(runs, root, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(root)!r})\n"
        "import train\nfrom trainer.trainer import Trainer\nfrom utils.cli import run_main\n"
        "forward = Trainer.forward\n"
        "def die(self, images, labels):\n"
        "    if self.global_step == 2 and os.environ['RANK'] == '1':\n"
        "        raise ZeroDivisionError('this is what happened')\n"
        "    return forward(self, images, labels)\n"
        "Trainer.forward = die\nrun_main(train.main)\n")
    process = torchrun(root, script, "-c", runs.config(trainer={"epochs": 500}), "-d", "cpu", "--run_id", "d")
    for line in process.stdout:
        if line.startswith("classes:"):
            break
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert err.count("Traceback") >= 1 and err.index("this is what happened") < err.index("ChildFailedError")
    assert "gloo" not in err  # the other rank's broken connection isn't what to look at


def test_a_mistake_under_the_launcher_is_one_line(runs, tmp_path, monkeypatch, capfd):
    """`n_gpu: 2` on a machine with two GPUs, as the launcher sees it; its workers find none and train on the CPU."""
    monkeypatch.setattr(device, "gpu_count", lambda: 2)
    argv = ["-c", str(runs.config(n_gpu=2, loss={"type": "LDAMLoss", "args": {"max_m": -1.0}},
                                  data_loader={"args": {"data_dir": str(tmp_path / "empty")}})), "--run_id", "x"]
    (tmp_path / "empty").mkdir()
    monkeypatch.delenv("RANK", raising=False)
    assert train.main(argv) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and str(tmp_path / "empty") in said[0]
    assert not (runs.save_dir / "models").exists()


def test_the_launcher_passes_a_sigusr1_on(root, tmp_path):
    """To the launcher alone, as `scancel --signal=USR1 --batch` sends it: its workers are told."""
    (tmp_path / "worker.py").write_text(
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "import time\nfrom tools.launch import note_stop\nfrom base.stop import StopRequest\n"
        "with StopRequest() as stop:\n    print('ready', flush=True)\n"
        "    while stop.signal is None:\n        time.sleep(0.05)\nnote_stop()\n")
    code = f"from tools.launch import run_workers; raise SystemExit(run_workers(1, [{str(tmp_path / 'worker.py')!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, text=True, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert "stopping" in process.communicate(timeout=60)[0] and process.returncode == 0


@pytest.mark.slow
def test_the_launcher_trains_and_stops(runs, monkeypatch, capfd):
    monkeypatch.setattr(device, "gpu_count", lambda: 2)
    assert train.main(["-c", str(runs.config(n_gpu=2)), "--run_id", "x"]) == 0
    assert "python test.py -r" in capfd.readouterr().out
    assert (runs.models("x") / "checkpoint-epoch2.pth").is_file()


def test_how_many_workers(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(device, "gpu_count", lambda: 4)
    assert [device.workers_to_start(None, n) for n in (1, 2, 8)] == [1, 2, 4]
    assert device.workers_to_start("0,2", 1) == 2 and device.workers_to_start("cpu", 4) == 1
    monkeypatch.setenv("RANK", "0")
    assert device.workers_to_start(None, 4) == 1
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(device, "gpu_count", lambda: 0)
    assert device.workers_to_start(None, 8) == 1


def test_half_of_torchruns_environment(monkeypatch):
    from utils import dist
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2 .* torchrun"):
        dist.setup("cpu")
