"""A network of timm's from training to an exported file, by the commands."""
import csv
import json

import pytest
from PIL import Image
from sklearn.datasets import load_digits

import train
from utils.cli import run_main

pytest.importorskip("timm")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, call_cli):
    saved = tmp_path_factory.mktemp("timm")
    done = call_cli(["train.py", "-c", "configs/digits_lt_timm.json", "--epochs", "1", "--num_experts", "2", "--add_bt",
                     "1", "--save_dir", saved, "--run_id", "run", "-d", "cpu", "--set",
                     "arch.args.model_name=test_efficientnet", "--set", "arch.args.norm=NBN"], check=True)
    assert "each expert has its own blocks.4, conv_head, bn2" in done.stdout
    return saved / "models" / "digits_lt_timm" / "run" / "checkpoint-epoch1.pth"


def test_a_checkpoint_needs_no_weights_and_no_network(trained, call_cli):
    """`weights: true` said to a checkpoint isn't followed: there is nothing to fetch."""
    before = json.loads((trained.parent / "test_metrics.json").read_text())
    done = call_cli(["test.py", "-r", trained, "-d", "cpu", "--set", "arch.args.weights=true"], check=True)
    after = json.loads((trained.parent / "test_metrics.json").read_text())
    assert done.stderr == "" and after["accuracy"] == before["accuracy"]


def test_facts_predictions_and_export(trained, tmp_path):
    from tools import export, predict
    from tools.opened import open_run
    run = open_run(trained)
    assert run.facts["preprocess"] == {"image_size": 32, "resize": 32, "crop": False, "interpolation": "bicubic",
                                       "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    Image.fromarray((load_digits().images[3] * 15).astype("uint8")).resize((48, 40)).save(tmp_path / "three.png")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export.main(["-r", str(trained), "--out", str(tmp_path / "model.onnx")])
    for source, table in ((trained, "a.csv"), (tmp_path / "model.onnx", "b.csv")):
        predict.main(["-r", str(source), str(tmp_path / "three.png"), "--csv", str(tmp_path / table)])
    rows = [next(csv.DictReader((tmp_path / table).open())) for table in ("a.csv", "b.csv")]
    assert rows[0]["class"] == rows[1]["class"]
    assert float(rows[0]["probability"]) == pytest.approx(float(rows[1]["probability"]), abs=1e-4)


ARGS = ["-c", "configs/digits_lt_timm.json", "-d", "cpu", "--set", "arch.args.weights=true"]


@pytest.fixture
def offline(monkeypatch, tmp_path, root):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **more: None)
    monkeypatch.chdir(root)


def test_weights_out_of_reach_write_nothing(offline, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: train.main([*ARGS, "--save_dir", str(tmp_path / "saved")]))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and not (tmp_path / "saved").exists()
    assert told.count("\n") == 1 and "HF_HUB_OFFLINE is set" in told and "--pretrained FILE" in told


def test_pretrained_takes_its_place(offline, trained, capsys):
    """With a file to start from the network's own weights aren't asked for."""
    train.main([*ARGS, "--pretrained", str(trained), "--dry_run", "--num_experts", "2", "--set", "arch.args.norm=NBN",
                "--set", "arch.args.model_name=test_efficientnet"])
    assert "dry run: everything builds" in capsys.readouterr().out
