"""Optimizers of ours against slow twins in float64, parameter groups, freezing, and all of it in whole runs."""
from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from base.changes import missing_memory
from model.model import build_model
from trainer.optim.groups import is_hidden_matrix, param_groups
from trainer.optim.muon import Muon, orthogonalize
from trainer.optim.sam import SAM
from trainer.schedules import build_optimizer, build_scheduler
from utils.config.check import constructor
from utils.config.schema import SECTIONS
from utils.errors import ConfigError

SGD = {"type": "SGD", "args": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}}


def slow_orthogonal(u: np.ndarray, steps: int) -> np.ndarray:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = u / np.linalg.norm(u)
    if u.shape[0] > u.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (1, 5)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    u = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(u, 5)
    for one, original in zip(found, u):
        np.testing.assert_allclose(one, slow_orthogonal(original.numpy(), 5), rtol=1e-9)
        values = torch.linalg.svdvals(one)
        assert values.max() < 1.3 and values.min() > 0.4


def test_directions_of_small_gradients_keep_their_precision() -> None:
    """Squares of singular values 10,000 times as small as the largest are beyond float32's digits."""
    generator = torch.Generator().manual_seed(0)
    large, small = torch.randn(4, 48, 5, generator=generator), torch.randn(4, 48, 432, generator=generator)
    u = large @ torch.randn(4, 5, 432, generator=generator) + 1e-4 * small
    torch.testing.assert_close(orthogonalize(u), orthogonalize(u.double()).float(), rtol=0, atol=1e-4)


def test_muon_equals_a_slow_twin() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 4, 3, 3), (6, 4, 3, 3), (5, 12), (20, 3)]
    params = [nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator)) for shape in shapes]
    twins = [p.detach().numpy().copy() for p in params]
    buffers = [np.zeros_like(w) for w in twins]
    optimizer = Muon(params, lr=0.05, momentum=0.8, weight_decay=0.1, steps=4)
    for _ in range(4):
        for p, twin, buffer in zip(params, twins, buffers):
            p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator)
            g = p.grad.numpy()
            buffer[:] = 0.8 * buffer + g
            u = (g + 0.8 * buffer).reshape(len(g), -1)
            twin *= 1 - 0.05 * 0.1
            twin -= 0.05 * 0.2 * math.sqrt(max(u.shape)) * slow_orthogonal(u, 4).reshape(g.shape)
        optimizer.step()
    for p, twin in zip(params, twins):
        np.testing.assert_allclose(p.detach(), twin, rtol=1e-8)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return build_model({"type": "ResNet32Model", "args": {"num_classes": 4, "num_experts": 2, "layer2_output_dim": 16,
                                                          "layer3_output_dim": 16}})


def test_muon_has_the_filters_and_another_optimizer_the_rest() -> None:
    model = small_model()
    optimizer = build_optimizer({"type": "Muon", "args": {"lr": 0.02, "weight_decay": 5e-3, "others": SGD}}, model, {})
    names = {id(p): name for name, p in model.named_parameters()}
    own = {names[id(p)] for group in optimizer.param_groups[:optimizer.own] for p in group["params"]}
    rest = {names[id(p)] for group in optimizer.param_groups[optimizer.own:] for p in group["params"]}
    assert own and all(name.endswith((".conv1.weight", ".conv2.weight")) for name in own)
    assert "backbone.conv1.weight" in rest and "backbone.linears.0.weight" in rest and own | rest == set(names.values())
    schedule = build_scheduler({"type": "LinearLR0", "args": {"by": "step"}}, optimizer, 2, 5)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.018, 0.09])
    # Both move, and a loaded state goes on as the one that was saved.
    twin_model = small_model()
    twin = build_optimizer({"type": "Muon", "args": {"lr": 0.02, "weight_decay": 5e-3, "others": SGD}}, twin_model, {})
    for one, its in ((model, optimizer), (twin_model, twin)):
        for _ in range(2):
            for p in one.parameters():
                p.grad = torch.cos(p.detach())
            its.step()
            if one is twin_model:
                twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                twin_model.load_state_dict(model.state_dict())
    for _ in range(2):
        for one, its in ((model, optimizer), (twin_model, twin)):
            for p in one.parameters():
                p.grad = torch.cos(p.detach())
            its.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin_model.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), small_model().parameters()))


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_equals_a_slow_twin(adaptive: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    params = [nn.Parameter(torch.randn(3, 2, dtype=torch.float64, generator=generator)),
              nn.Parameter(torch.randn(4, dtype=torch.float64, generator=generator))]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    base = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    optimizer = SAM(base.param_groups, base, rho=0.3, adaptive=adaptive)
    plain = torch.optim.SGD(twins, lr=0.1, momentum=0.9)

    def loss(weights: list) -> torch.Tensor:
        return (weights[0] ** 4).sum() + (weights[1] ** 2 * torch.arange(1, 5)).sum()
    for _ in range(3):
        optimizer.zero_grad()
        loss(params).backward()
        optimizer.first_step()
        optimizer.zero_grad()
        loss(params).backward()
        optimizer.second_step()
        gradients = torch.autograd.grad(loss(twins), twins)
        scaled = [w.detach().abs() * g if adaptive else g for w, g in zip(twins, gradients)]
        norm = math.sqrt(sum(float((s ** 2).sum()) for s in scaled))
        with torch.no_grad():
            moved = [w + 0.3 * (w * w * g if adaptive else g) / norm for w, g in zip(twins, gradients)]
        moved = [w.requires_grad_() for w in moved]
        for twin, gradient in zip(twins, torch.autograd.grad(loss(moved), moved)):
            twin.grad = gradient
        plain.step()
    for p, twin in zip(params, twins):
        assert torch.allclose(p, twin, rtol=1e-9)
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.second_step()


def test_no_decay_and_layer_decay_by_parameter() -> None:
    model = small_model()
    optimizer = build_optimizer({"type": "SGD", "args": {"lr": 1.0, "weight_decay": 0.5}}, model,
                                {"no_decay": "norm_bias", "layer_decay": 0.5})
    found = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            found[names[id(p)]] = (group["lr"], group["weight_decay"])
    assert found["backbone.conv1.weight"] == (1 / 16, 0.5) and found["backbone.bn1.weight"] == (1 / 16, 0)
    assert found["backbone.layer1.0.conv1.weight"] == (1 / 8, 0.5)
    assert found["backbone.layer3s.1.0.conv1.weight"] == (1 / 2, 0.5)
    assert found["backbone.linears.0.weight"] == (1, 0.5) and found["backbone.linears.0.bias"] == (1, 0)
    assert found.keys() == set(names.values())


@pytest.mark.parametrize(("spec", "rates"), [
    ({"type": "AdamW"}, {0.001}), ({"type": "SAM", "args": {"base": {"type": "Adagrad"}}}, {0.01}),
    ({"type": "Muon", "args": {"others": {"type": "AdamW"}}}, {0.02, 0.001})])
def test_layer_decay_takes_the_rate_that_the_optimizer_has_by_itself(spec: dict, rates: set[float]) -> None:
    """With a decay of 1 every group has it; with 0.5 the classifier does, and what is before it has less."""
    def found(decay: float) -> list[float]:
        return [group["lr"] for group in build_optimizer(spec, small_model(), {"layer_decay": decay}).param_groups]
    assert set(found(1.0)) == rates
    halved = found(0.5)
    assert min(rates) in halved and min(rates) / 16 in halved and max(halved) <= max(rates)


class Plain(torch.optim.SGD):
    """Of somebody's, which wants a rate."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)


def test_layer_decay_without_any_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.args\.lr: missing; trainer\.layer_decay needs it"):
        build_optimizer({"type": f"{__name__}:Plain"}, small_model(), {"layer_decay": 0.5})


@pytest.mark.parametrize(("what", "trained"), [
    ("backbone", lambda name: name.startswith("backbone.linears.")),
    ("norms", lambda name: ".bn" not in name),
    (["backbone.layer1.", "backbone.bn1."], lambda name: not name.startswith(("backbone.layer1.", "backbone.bn1.")))])
def test_frozen_parts_stay_in_evaluation_mode_and_out_of_the_optimizer(what, trained) -> None:
    model = small_model()
    model.freeze(what)
    model.train()
    for name, p in model.named_parameters():
        assert p.requires_grad == trained(name), name
    for name, module in model.named_modules():
        own = [n for n, _ in module.named_parameters()]
        if own and not any(trained(f"{name}.{n}" if name else n) for n in own):
            assert not module.training, name
    optimizer = build_optimizer(SGD, model, {})
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    assert held == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("norm", ["BatchNorm2d", "NBN", "MABN", "BatchRenorm", "GroupNorm", "InstanceNorm"])
def test_norms_of_every_type_can_be_frozen(norm: str) -> None:
    model = build_model({"type": "ResNet32Model", "args": {"num_classes": 4, "norm": norm}})
    model.freeze("norms")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.dim() > 1 or name.endswith("linear.bias")}


def test_freezing_what_isnt_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.freeze.*backbone\.layer9"):
        small_model().freeze(["backbone.layer9."])
    for everything in ("backbon", ["backbone"]):
        with pytest.raises(ConfigError, match=r"trainer\.freeze: .*backbon.* leaves nothing to train"):
            small_model().freeze(everything)


def test_a_beginning_that_ends_in_a_number_means_that_number() -> None:
    model = small_model()
    model.blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(11))
    model.freeze(["blocks.1"])
    assert set(model.frozen) == {"blocks.1.weight", "blocks.1.bias"}


@pytest.mark.parametrize(("spec", "says"), [
    ({"type": "Muon", "args": {"momentum": 1.0}}, "momentum"), ({"type": "Muon", "args": {"steps": 0}}, "steps"),
    ({"type": "SAM", "args": {"rho": 0.1}}, r"optimizer\.args\.base"),
    ({"type": "SAM", "args": {"rho": 0, "base": SGD}}, "rho"),
    ({"type": "Muon", "args": {"others": {"type": "SGDD"}}}, "SGD")])
def test_wrong_optimizers_are_named(spec: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_optimizer(spec, small_model(), {})


def test_what_is_fused() -> None:
    """Adagrad's fused step refuses GPUs in older versions of torch; SGD's doesn't survive a skipped first step."""
    for kind, args, amp, fused in (("SGD", {"momentum": 0.9}, "off", True), ("AdamW", {}, "bf16", True),
                                   ("Adagrad", {}, "off", False), ("SGD", {"momentum": 0.9}, "fp16", False),
                                   ("SGD", {"fused": True}, "fp16", True)):
        optimizer = build_optimizer({"type": kind, "args": {"lr": 0.1, **args}}, small_model(), {"amp": amp})
        assert bool(optimizer.defaults.get("fused")) == fused, (kind, args, amp)
    spec = {"type": "SGD", "args": {"lr": 0.1, "momentum": 0.9, "fused": True}}
    with pytest.raises(ConfigError, match=r"optimizer\.args\.fused: .* leave it out"):
        build_optimizer(spec, small_model(), {"amp": "fp16"})


@pytest.mark.parametrize("flag", ("capturable", "fused"))
def test_memory_that_is_there_isnt_missed_with_flags_for_gpus(flag: str) -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([p])
    optimizer.step()
    optimizer.param_groups[0][flag] = True      # as a checkpoint of a GPU's run sets it
    assert missing_memory(optimizer) == []
    optimizer.param_groups[0]["amsgrad"] = True
    assert missing_memory(optimizer) == ["max_exp_avg_sq"]


def test_scales_with_places_are_vectors() -> None:
    """torchvision's ConvNeXt has scales [C, 1, 1], Swin's attention tables of biases."""
    model = torch.nn.Module()
    model.layer_scale = torch.nn.Parameter(torch.full((8, 1, 1), 1e-6))
    model.relative_position_bias_table = torch.nn.Parameter(torch.zeros(9, 2))
    model.filters = torch.nn.Parameter(torch.zeros(8, 1, 3, 3))
    hidden = is_hidden_matrix(model)
    assert [name for name, p in model.named_parameters() if hidden(name, p)] == ["filters"]
    groups = param_groups(model, {"classifier_lr": None, "layer_decay": None, "no_decay_scale": False,
                                  "no_decay": "norm_bias"})
    undecayed = [group["params"] for group in groups if group.get("weight_decay") == 0]
    assert [p.shape for p in undecayed[0]] == [(8, 1, 1)] and len(undecayed) == 1


def test_sam_takes_a_rate_for_its_base() -> None:
    """So `--lr` works with it as with any optimizer."""
    spec = {"type": "SAM", "args": {"base": {"type": "SGD", "args": {"lr": 0.5, "momentum": 0.9}}, "lr": 0.01}}
    optimizer = build_optimizer(spec, small_model(), {})
    assert {(group["lr"], group["momentum"]) for group in optimizer.param_groups} == {(0.01, 0.9)}
    assert optimizer.base.defaults["lr"] == 0.01 and spec["args"]["base"]["args"]["lr"] == 0.5


RUNS = {
    "muon": {"type": "Muon", "args": {"lr": 0.02, "weight_decay": 5e-3, "others": SGD}},
    "sam": {"type": "SAM", "args": {"rho": 0.05, "base": SGD}},
    "sam of muon": {"type": "SAM", "args": {"adaptive": True, "base": {"type": "Muon", "args": {"others": SGD}}}}}


@pytest.mark.parametrize(("kind", "amp"), [("muon", "off"), ("muon", "bf16"), ("sam", "fp16"), ("sam of muon", "bf16")])
def test_runs_that_stop_and_go_on(runs, signal_at, same_state, kind: str, amp: str) -> None:
    import json
    flags = ("--set", f"optimizer={json.dumps(RUNS[kind])}", "--set", f"trainer.amp={amp}")
    whole = runs("whole", *flags)
    signal_at(6)
    stopped = runs("stopped", *flags)
    runs(None, "-r", stopped / "checkpoint-epoch2.pth")
    assert not same_state(whole / "checkpoint-epoch2.pth", stopped / "checkpoint-epoch2.pth")


def test_sams_second_pass_leaves_the_statistics_alone(runs, monkeypatch) -> None:
    import json

    from trainer.trainer import Trainer
    passes = []
    original = Trainer._backward

    def count(self, parts):
        found = original(self, parts)
        passes.append(int(self.model.backbone.bn1.num_batches_tracked))
        return found
    monkeypatch.setattr(Trainer, "_backward", count)
    path = runs("sam", "--epochs", 1, "--set", f"optimizer={json.dumps(RUNS['sam'])}") / "checkpoint-epoch1.pth"
    assert passes == [1, 2, 2, 3, 3, 4, 4, 5]
    assert int(torch.load(path, weights_only=True)["state_dict"]["backbone.bn1.num_batches_tracked"]) == 4


def test_no_step_is_longer_than_the_clipped_gradient(runs, monkeypatch) -> None:
    from trainer.trainer import Trainer
    moved, original = [], Trainer._update

    def update(self, *args):
        before = [p.detach().clone() for p in self.trainable]
        found = original(self, *args)
        moved.append(float(torch.stack([(p.detach() - old).norm() for p, old in zip(self.trainable, before)]).norm()))
        return found
    monkeypatch.setattr(Trainer, "_update", update)
    sgd = '{"type": "SGD", "args": {"lr": 10.0}}'
    for name, clip in (("free", "null"), ("clipped", "0.001")):
        runs(name, "--epochs", 1, "--set", f"optimizer={sgd}", "--set", f"trainer.clip_grad_norm={clip}", "--set",
             "lr_scheduler={}")
    free, clipped = moved[:4], moved[4:]
    assert len(clipped) == 4 and clipped == pytest.approx([0.01] * 4, rel=1e-3) and free[0] > 0.02


@pytest.mark.parametrize("decay", [None, 0.5])
def test_the_classifier_may_have_a_rate_of_its_own(decay) -> None:
    model = small_model()
    options = {"classifier_lr": 0.1, "layer_decay": decay}
    optimizer = build_optimizer({"type": "SGD", "args": {"lr": 1.0}}, model, options)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found["backbone.linears.0.weight"] == 0.1
    assert found["backbone.layer3s.1.0.conv1.weight"] == (decay or 1)


TORCHS = [name for name, kind in vars(torch.optim).items() if isinstance(kind, type)
          and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer]


@pytest.mark.parametrize("name", TORCHS)
def test_each_of_torchs_optimizers_takes_a_step_or_is_refused(name: str) -> None:
    if name in ("LBFGS", "SparseAdam"):
        with pytest.raises(ConfigError, match=rf"optimizer\.type: {name} can't be used: it"):
            constructor(SECTIONS["optimizer"], name, "optimizer.type")
        return
    model = small_model()
    optimizer = build_optimizer({"type": name, "args": {"lr": 0.01}}, model, {})
    before = model.backbone.conv1.weight.detach().clone()
    model(torch.rand(2, 3, 8, 8))["output"].square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.backbone.conv1.weight, before) and torch.isfinite(model.backbone.conv1.weight).all()
