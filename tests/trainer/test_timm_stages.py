"""Second stages, expert assignment and distillation on networks of timm's, by train.py and test.py."""

import json

import pytest
import torch

import test as test_script
from tests.trainer.conftest import Runs, load

pytest.importorskip("timm")

NAMES = (*(pytest.param(name, marks=pytest.mark.slow) for name in ("test_resnet", "test_convnext")),
         "test_efficientnet", "test_vit")


@pytest.fixture(scope="module")
def timm_runs(tmp_path_factory, tiny_images) -> Runs:
    """Runs on networks of timm's: the tiny config's own has arguments that theirs don't know."""
    made = Runs(tmp_path_factory.mktemp("timm"), tiny_images)
    made.base["data_loader"]["args"]["image_size"] = 32
    made.base["trainer"]["epochs"] = 1
    made.base.pop("arch")
    return made


def arch(name: str, kind: str = "TimmModel", **more) -> dict:
    return {"type": kind, "args": {"model_name": name, "weights": False, "num_experts": 2, **more}}


@pytest.fixture(scope="module", params=NAMES)
def stage1(request, timm_runs):
    """(a network's name, its checkpoint after an epoch)."""
    return request.param, timm_runs(f"one-{request.param}", arch=arch(request.param)) / "checkpoint-epoch1.pth"


def changed(before: dict, after: dict) -> set[str]:
    """The names of what is new or another number than before."""
    old, new = before["state_dict"], after["state_dict"]
    return {name for name, value in new.items() if name not in old or not torch.equal(value, old[name])}


@pytest.mark.parametrize("classifier", ["linear", "lws"])
def test_a_second_stage_changes_the_classifier_alone(stage1, timm_runs, classifier):
    name, first = stage1
    folder = timm_runs(f"{classifier}-{name}", "--load_crt", first, arch=arch(name, classifier=classifier),
                       trainer={"cache_features": True})
    after = load(folder / "checkpoint-epoch1.pth")
    learned = ("scales",) if classifier == "lws" else ("weight", "bias")
    assert changed(load(first), after) == {f"backbone.linears.{i}.{part}" for i in range(2) for part in learned}
    assert (folder / "features" / "train.f16").is_file()


@pytest.mark.parametrize("flags", [("--classifier", "tau", "--tau", "0.5"), ("--classifier", "ncm")],
                         ids=["tau", "NCM"])
def test_a_classifier_without_training(stage1, flags, capsys):
    _, first = stage1
    test_script.main(["-r", str(first), "-d", "cpu", *flags])
    assert "accuracy %" in capsys.readouterr().out
    assert json.loads((first.parent / "test_metrics.json").read_text())["n_samples"] == 11


def test_expert_assignment_trains_the_gates_alone(stage1, timm_runs):
    name, first = stage1
    folder = timm_runs(f"ea-{name}", "-r", first, arch=arch(name, "TimmEAModel"), resume_state_dict_only=True)
    found = changed(load(first), load(folder / "checkpoint-epoch1.pth"))
    assert found and all(key.startswith("backbone.expert_help_pred") for key in found)


def test_a_student_learns_from_a_network_of_timms(stage1, timm_runs):
    name, teacher = stage1
    student = arch("test_resnet", num_experts=1)
    with_teacher = {"distill": True, "distill_arch": arch(name), "distill_checkpoint": str(teacher),
                    "loss": {"type": "RIDELossWithDistill", "args": {"distill_temperature": 1.5}}}
    taught = load(timm_runs(f"taught-{name}", arch=student, **with_teacher) / "checkpoint-epoch1.pth")
    alone = load(timm_runs(f"alone-{name}", arch=student, loss={"type": "RIDELoss", "args": None})
                 / "checkpoint-epoch1.pth")
    assert changed(alone, taught) >= {"backbone.linear.weight", "backbone.linear.bias"}
    assert all(value.isfinite().all() for value in taught["state_dict"].values())


def test_predictions_and_costs(stage1, tiny_images, tmp_path, capsys):
    from tools import gflops, predict
    name, first = stage1
    predict.main(["-r", str(first), str(tiny_images / "val" / "class0"), "--csv", str(tmp_path / "said.csv")])
    assert len((tmp_path / "said.csv").read_text().splitlines()) == 1 + 5
    capsys.readouterr()
    gflops.main(["-r", str(first)])
    shown = capsys.readouterr().out
    assert "expert 2" in shown and "stem" in shown


@pytest.mark.slow
def test_a_report_and_an_exported_file(stage1, tiny_images, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from tools import export, predict, report
    name, first = stage1
    report.main([str(first.parent)])
    assert (first.parent / "report.html").stat().st_size > 50_000
    export.main(["-r", str(first), "--out", str(tmp_path / "model.onnx")])    # compares their outputs itself
    said = []
    for source, table in ((first, "a.csv"), (tmp_path / "model.onnx", "b.csv")):
        predict.main(["-r", str(source), str(tiny_images / "val"), "--csv", str(tmp_path / table)])
        said.append([line.split(",")[1] for line in (tmp_path / table).read_text().splitlines()])
    assert said[0] == said[1]
