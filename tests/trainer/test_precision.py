"""What `trainer.amp` "auto" chooses on which hardware, that a run says so, and in which precision it is judged."""
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import test
from data_loader.data_loaders import DigitsLTDataLoader
from model.loss import build_loss
from model.model import build_model
from tools.opened import open_run
from trainer.evaluate import TASK, evaluate
from trainer.precision import autocast, choose_precision, set_determinism


@pytest.fixture
def cpu(monkeypatch):
    """Set what this CPU is said to have."""
    def has(*features: str) -> None:
        for question in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, question, lambda found=question in features: found, raising=False)
    return has


@pytest.mark.parametrize(("features", "precision", "why"), [
    (["_is_amx_tile_supported", "_is_avx512_bf16_supported"], "bf16", "AMX"),
    (["_is_avx512_bf16_supported"], "bf16", "AVX512-BF16"), ([], "off", "no bfloat16")])
def test_auto_follows_the_cpu(cpu, features, precision, why) -> None:
    cpu(*features)
    chosen, reason = choose_precision("auto", "cpu")
    assert chosen == precision and why in reason


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"),
                                                       ((6, 1), "off")])
def test_auto_follows_the_gpu(monkeypatch, capability, precision) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    chosen, reason = choose_precision("auto", "cuda:0")
    assert chosen == precision and "a GPU" in reason


def test_a_run_says_which_and_why(runs, cpu, capsys) -> None:
    cpu("_is_avx512_bf16_supported")
    runs("bf16", "--set", "trainer.amp=auto", "--dry_run")
    assert "precision: bf16 (this CPU has AVX512-BF16)" in capsys.readouterr().out
    cpu()
    runs("float32", "--set", "trainer.amp=auto", "--dry_run")
    assert "precision: float32 (this processor has no bfloat16 arithmetic)" in capsys.readouterr().out


def test_losses_and_metrics_of_half_precision_are_computed_in_float32() -> None:
    loader = DigitsLTDataLoader(batch_size=250, training=False, image_size=16)
    torch.manual_seed(0)
    model = build_model({"type": "ResNet32Model", "args": {"num_classes": 10, "num_experts": 2}}).eval()
    model.backbone.logits_of = lambda feat, expert: model.backbone.heads[expert](feat)   # as a model from outside may
    loss = build_loss({"type": "BalancedSoftmaxLoss"}, cls_num_list=loader.cls_num_list)
    seen = []

    def first_logit(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(output.dtype)
        return output[:, 0].mean()
    found = evaluate(model, loader, criterion=loss, metrics={"first": first_logit}, amp="bf16")
    sums = {"loss": 0.0, "first": 0.0}
    with torch.no_grad(), autocast(torch.device("cpu"), "bf16"):
        for images, labels in loader:
            outputs = model(images.contiguous(memory_format=torch.channels_last))
            assert outputs["output"].dtype == torch.bfloat16
            sums["loss"] += float(loss({"output": outputs["output"].double()}, labels)) * len(labels) / 500
            sums["first"] += float(outputs["output"][:, 0].double().mean()) * len(labels) / 500
    assert seen == [torch.float32] * 2
    assert {name: found[name] for name in sums} == pytest.approx(sums, rel=1e-5)


def test_test_figures_are_float32s_unless_test_py_is_told_otherwise(runs) -> None:
    def loss(path: Path) -> float:
        return json.loads(path.read_text())["loss"]
    models = runs("half", "--set", "trainer.amp=bf16")
    figures, checkpoint = models / "test_metrics.json", models / "checkpoint-epoch2.pth"
    at_the_end = loss(figures)
    run = open_run(checkpoint)
    expected = {amp: evaluate(run.model, run.loader("test"), amp=amp)["loss"] for amp in ("off", "bf16")}
    test.main(["-r", str(checkpoint), "-d", "cpu"])
    assert at_the_end == loss(figures) == pytest.approx(expected["off"], rel=1e-6)
    test.main(["-r", str(checkpoint), "-d", "cpu", "--set", "trainer.amp=bf16"])
    assert loss(figures) == pytest.approx(expected["bf16"], rel=1e-6) != pytest.approx(expected["off"], rel=1e-6)


def test_test_figures_know_no_tf32(runs, monkeypatch) -> None:
    """cuDNN's convolutions round to it from Ampere on, unless told not to: in training and its validation they may."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    def watched(model, loader, **more):
        seen.append(("criterion" in more, torch.backends.cudnn.allow_tf32))
        return evaluate(model, loader, **more)
    monkeypatch.setattr("trainer.trainer.evaluate", watched)
    models = runs("float32", "--epochs", 1)
    assert seen == [(True, True), (False, False)] and torch.backends.cudnn.allow_tf32
    seen.clear()
    monkeypatch.setattr("trainer.evaluate.TASK", replace(TASK, evaluate=watched))
    test.main(["-r", str(models / "checkpoint-epoch1.pth"), "-d", "cpu", "-q"])
    assert seen == [(False, False)]


@pytest.fixture
def global_settings():
    """Torch's own, put back after a test that changes them."""
    cuda, cudnn, deterministic = torch.backends.cuda, torch.backends.cudnn, torch.utils.deterministic
    kernels = {name: getattr(cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "cudnn")}
    before = (cudnn.benchmark, cudnn.deterministic, deterministic.fill_uninitialized_memory)
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.benchmark, cudnn.deterministic, deterministic.fill_uninitialized_memory = before
    for name, enabled in kernels.items():
        getattr(cuda, f"enable_{name}_sdp")(enabled)


def config_of(deterministic: bool, trainer: str = "Trainer", arch: str = "ResNet32Model") -> dict:
    return {"trainer": {"deterministic": deterministic, "type": trainer}, "arch": {"type": arch}}


def test_determinism_on_a_gpu(global_settings, monkeypatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_determinism(config_of(True), torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.flash_sdp_enabled()
    set_determinism(config_of(True, "DetectionTrainer", "MaskRCNNR50FPNModel"), torch.device("cuda"))
    assert not torch.are_deterministic_algorithms_enabled()
    set_determinism(config_of(True), torch.device("cuda"))
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory
    cuda = torch.backends.cuda
    assert not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled())
    assert cuda.math_sdp_enabled()


@pytest.mark.parametrize(("trainer", "arch", "searches"), [
    ("Trainer", "ResNet32Model", True), ("ExpertAssignmentTrainer", "ResNet32EAModel", False),
    ("DetectionTrainer", "MaskRCNNR50FPNModel", False)])
def test_cudnn_searches_where_sizes_stay(global_settings, trainer, arch, searches) -> None:
    set_determinism(config_of(False, trainer, arch), torch.device("cuda"))
    assert torch.backends.cudnn.benchmark is searches and not torch.backends.cudnn.deterministic
