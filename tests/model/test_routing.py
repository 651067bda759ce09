"""Expert assignment: gates learn and nothing else moves; routing equals asking image by image."""
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.model import build_model
from utils.errors import ConfigError


def model_of(kind="ResNet32EAModel", classes=9, experts=3, **args):
    torch.manual_seed(0)
    return build_model({"type": kind, "args": {"num_experts": experts, "reduce_dimension": True, **args}}, classes)


def lively(model):
    """Settled norms and loud gates, so that images differ and the gates disagree about them; float64."""
    backbone = model.double().backbone
    norms = [part for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = None
    with torch.no_grad():
        shared = backbone.trunk(torch.randn(16, 3, 32, 32).double())
        for expert in range(backbone.num_experts):
            backbone.expert_feat(shared, expert)
        for norm in norms:
            norm.eval()
        for name, parameter in backbone.named_parameters():
            if "expert_help_pred" in name:
                parameter.normal_(0, 1)
    return model


def slow_route(model, images, threshold):
    """One image at a time, straight from the formulas."""
    backbone, outputs, counts = model.backbone, [], []
    for image in images:
        shared = backbone.trunk(image[None])
        total, used = 0, 0
        for i in range(backbone.num_experts):
            feat = backbone.expert_feat(shared, i)
            total, used = total + backbone.linears[i](feat), used + 1
            if used == backbone.num_experts:
                break
            hidden = F.relu(backbone.expert_help_pred_hidden_fcs[i](feat / feat.norm(dim=1, keepdim=True)))
            best = (total / used).sort(dim=1, descending=True).values[:, :backbone.top_choices_num]
            gate = backbone.expert_help_pred_fcs[i] if hasattr(backbone, "expert_help_pred_fcs") else (
                backbone.expert_help_pred_fc)
            if torch.sigmoid(gate(torch.cat([best, hidden], dim=1))).item() <= threshold:
                break
        outputs.append(total / used)
        counts.append(used)
    return torch.cat(outputs), torch.tensor(counts)


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind,args", [("ResNet32EAModel", {}), ("ResNet10EAModel", {"share_layer3": True}),
                                       ("ResNet32EAModel", {"share_expert_help_pred_fc": False, "use_norm": True})])
def test_routing_equals_one_image_at_a_time(kind, args, fmt):
    model = lively(model_of(kind, **args)).eval().to(memory_format=fmt)
    images = torch.randn(10, 3, 32, 32).double().to(memory_format=fmt)
    backbone = model.backbone
    with torch.no_grad():
        feat = backbone.expert_feat(backbone.trunk(images), 0)
        asked = backbone.ask(0, feat, backbone.linears[0](feat)).sigmoid().sort().values
        backbone.route_threshold = asked[4:6].mean().item()   # half of the images go on to expert 2
        expected, counts = slow_route(model, images, backbone.route_threshold)
        fast = model(images)
        model.route = False
        everyone = model(images)
    assert len(counts.unique()) > 1
    for outputs in (fast, everyone):
        assert torch.equal(outputs["sample_num_experts"], counts)
        torch.testing.assert_close(outputs["output"], expected)
    assert everyone["logits"].shape == (10, 3, 9) and everyone["feat"].shape == (10, 3, model.feat_dim)


def test_only_images_that_ask_are_computed():
    model = model_of().eval()
    seen = []
    model.backbone.ask = lambda i, feat, logits: torch.tensor([9.0, -9.0] * 8)[:len(feat)]
    for i in range(3):
        model.backbone.layer2s[i].register_forward_pre_hook(lambda part, x: seen.append(len(x[0])))
    with torch.no_grad():
        outputs = model(torch.randn(8, 3, 32, 32))
    assert seen == [8, 4, 2]
    assert outputs["sample_num_experts"].tolist() == [3, 1, 2, 1, 3, 1, 2, 1]


def test_everyone_stops_at_once():
    model = model_of().eval()
    model.backbone.route_threshold = 1.0
    with torch.no_grad():
        images = torch.randn(4, 3, 32, 32)
        outputs = model(images)
        model.route = False
        first = model(images)["logits"][:, 0]
    assert outputs["sample_num_experts"].tolist() == [1] * 4
    torch.testing.assert_close(outputs["output"], first)


def test_loss_by_hand():
    model = lively(model_of(pos_weight=100.0, top_choices_num=4))
    images, labels = torch.randn(12, 3, 32, 32).double(), torch.arange(12) % 9
    outputs = model(images, target=labels)
    logits, feats = outputs["logits"], outputs["feat"]
    expected, due = 0.0, 0
    for i in range(2):
        asked = model.backbone.ask(i, feats[:, i], logits[:, :i + 1].mean(1))
        for n in range(12):
            right = [logits[n, :k].mean(0).argmax() == labels[n] for k in (1, 2, 3)]
            truth = not right[i] and any(right[i + 1:])
            # -log p where help is due (100 times), -log(1 - p) where not
            expected += (-100 * F.logsigmoid(asked[n]) if truth else -F.logsigmoid(-asked[n])) / 12 / 2
            due += truth
    assert 0 < due < 24
    torch.testing.assert_close(outputs["loss"], expected)
    assert torch.equal(outputs["output"], logits.mean(1))


@pytest.mark.parametrize("kind", ["ResNet32EAModel", "ResNet10EAModel"])
@pytest.mark.parametrize("args", [{}, {"add_bt": 1, "dropout": 0.5, "classifier": "linear_fcbn"},
                                  {"norm": "NBN"}, {"norm": "MABN"}])
@pytest.mark.parametrize("prepare", [lambda model: None, lambda model: model.backbone.eval().train()])
def test_training_leaves_stage_one_alone(kind, args, prepare):
    model = model_of(kind, **args)
    prepare(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(6, 3, 32, 32), target=torch.arange(6))["loss"].backward()
        optimizer.step()
    after = model.state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved == {key for key in after if "expert_help_pred" in key}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == moved and not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_without_target_there_is_no_loss():
    outputs = model_of()(torch.randn(2, 3, 32, 32))
    assert "loss" not in outputs and outputs["output"].shape == (2, 9)


def test_force_all_runs_and_trains_everything():
    model = model_of(force_all=True)
    outputs = model(torch.randn(4, 3, 32, 32), target=torch.arange(4))
    outputs["loss"].backward()
    assert not model.frozen and model.backbone.layer1.training
    assert model.backbone.layer1[0].conv1.weight.grad is not None
    with torch.no_grad():
        outputs = model.eval()(torch.randn(4, 3, 32, 32))
    assert outputs["sample_num_experts"].tolist() == [3] * 4
    torch.testing.assert_close(outputs["output"], outputs["logits"].mean(1))


def test_top_choices_are_capped_and_one_expert_has_nothing_to_route():
    assert model_of(top_choices_num=30).backbone.expert_help_pred_fc.in_features == 16 + 9
    model = model_of(experts=1)
    model(torch.randn(2, 3, 32, 32), target=torch.tensor([0, 1]))["loss"].backward()
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 3, 32, 32))["sample_num_experts"].tolist() == [1, 1]


@pytest.mark.parametrize("args", [{"top_choices_num": 0}, {"pos_weight": 0}, {"route_threshold": 1.5},
                                  {"use_experts": "0,1"}, {"add_bt": 1, "eval_bt": 1}])
def test_mistakes(args):
    with pytest.raises(ConfigError, match=rf"arch\.args\.{list(args)[-1]}"):
        model_of(**args)


def test_a_plain_models_weights_fit():
    plain = build_model({"type": "ResNet32Model", "args": {"num_experts": 3, "reduce_dimension": True, "add_bt": 1}}, 9)
    missing, unexpected = model_of(add_bt=1).load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all("expert_help_pred" in key for key in missing)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_routing_saves_the_time_that_it_should(fmt):
    """40 / 10 / 50 % of 128 images use 1, 2, 3 experts: at most 1.15x the FLOP-weighted time of all experts."""
    model = model_of(classes=100).eval().to(memory_format=fmt)
    keep = {0: 77, 1: 64}

    def ask(i, feat, logits):
        asked = torch.full((len(feat),), -9.0)
        asked[torch.linspace(0, len(feat) - 1, keep[i]).long()] = 9.0
        return asked

    model.backbone.ask = ask
    images = torch.randn(128, 3, 32, 32).to(memory_format=fmt)

    def seconds(route):
        model.route = route
        start = time.perf_counter()
        model(images)
        return time.perf_counter() - start

    with torch.no_grad():
        for _ in range(3):
            seconds(True), seconds(False)
        pairs = [(seconds(True), seconds(False)) for _ in range(25)]
    trunk = 1024 * 9 * (3 * 16 + 10 * 16 * 16)
    expert = 256 * 9 * (16 * 24 + 9 * 24 * 24) + 64 * 9 * (24 * 48 + 9 * 48 * 48) + 4800
    share = (trunk + expert * (1 + 77 / 128 + 64 / 128)) / (trunk + 3 * expert)
    routed, everyone = (statistics.median(column) for column in zip(*pairs))
    print(f"routed {routed * 1e3:.1f} ms, all {everyone * 1e3:.1f} ms, ratio to FLOPs {routed / everyone / share:.3f}")
    assert routed / everyone / share < 1.15
