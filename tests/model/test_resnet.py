"""The family's own rules: shortcuts, initial weights, choice of experts, freezing, NBN's scope."""
import pytest
import torch
from torch import nn

from base import BaseModel
from model.blocks import PadShortcut
from model.classifier import make_head
from model.model import build_model
from model.weights.remap import load_weights
from trainer.schedules import build_optimizer
from utils.config.schema import TRAINER, defaults


def model_of(kind="ResNet32Model", classes=7, **args):
    return build_model({"type": kind, "args": args}, num_classes=classes)


@pytest.mark.parametrize("inputs,outputs,before,after", [(16, 32, 8, 8), (16, 24, 4, 4), (4, 7, 1, 2), (3, 3, 0, 0)])
def test_option_a_shortcut_pads_and_subsamples(inputs, outputs, before, after):
    x = torch.randn(2, inputs, 5, 6)
    out = PadShortcut(inputs, outputs, stride=2)(x)
    assert out.shape == (2, outputs, 3, 3)
    assert torch.equal(out[:, before:outputs - after], x[:, :, ::2, ::2])
    assert not out[:, :before].any() and not out[:, outputs - after:].any()


def test_option_a_shortcut_keeps_channels_last():
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    assert PadShortcut(16, 24, 2)(x).is_contiguous(memory_format=torch.channels_last)


def test_initial_weights_of_cifar():
    torch.manual_seed(0)
    model = model_of(num_experts=2, add_bt=1, classes=1000)
    checked = 0
    for name, part in model.named_modules():
        if isinstance(part, nn.Conv2d | nn.Linear) and part.weight.numel() > 2000:
            fan_in = part.weight[0].numel()
            assert part.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1), name
            checked += 1
    assert checked > 20
    gates = model_of("ResNet32EAModel", num_experts=2, layer3_output_dim=640).backbone.expert_help_pred_hidden_fcs[0]
    assert gates.weight.std().item() == pytest.approx((2 / 640) ** 0.5, rel=0.05)


def test_initial_weights_of_imagenet():
    torch.manual_seed(0)
    backbone = model_of("ResNet10Model", classes=500).backbone
    conv = backbone.layer4[0].conv1
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.02)
    bound = 512 ** -0.5
    assert backbone.linear.weight.abs().max().item() == pytest.approx(bound, rel=0.01)   # torch's default
    for part in backbone.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert torch.equal(part.weight, torch.ones_like(part.weight)) and not part.bias.any()


def test_norms_start_at_one_and_zero_whatever_their_type():
    for kind in ("GroupNorm", "BatchRenorm", "NBN"):
        for name, parameter in model_of(norm=kind).named_parameters():
            if ".bn" in name:
                assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name


def test_use_experts_picks_these():
    torch.manual_seed(0)
    model = model_of(num_experts=3).eval()
    picked = model_of(num_experts=3, use_experts="0,2").eval()
    picked.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        everything, two = model(images)["logits"], picked(images)
    assert torch.equal(two["logits"], everything[:, [0, 2]])
    torch.testing.assert_close(two["output"], everything[:, [0, 2]].mean(1))
    assert model.uses_all_parameters and not picked.uses_all_parameters


def test_use_experts_rand_drops_one_in_training_only():
    torch.manual_seed(0)
    model = model_of(num_experts=3, use_experts="rand")
    picks = {tuple(model.backbone.pick_experts()) for _ in range(60)}
    assert picks == {(0, 1), (0, 2), (1, 2)}
    assert model(torch.randn(2, 3, 32, 32))["logits"].shape == (2, 2, 7)
    assert model.eval()(torch.randn(2, 3, 32, 32))["logits"].shape == (2, 3, 7)


def test_dropout_acts_on_features_in_training():
    torch.manual_seed(0)
    model = model_of(dropout=0.5)
    images = torch.randn(4, 3, 32, 32)
    share = (model(images)["feat"] == 0).float().mean().item()
    assert 0.3 < share < 0.7
    assert (model.eval()(images)["feat"] == 0).float().mean().item() < 0.3


def test_frozen_parts_do_not_move():
    torch.manual_seed(0)
    model = model_of(num_experts=2, add_bt=1)
    model.freeze_except(model.classifier_prefixes())
    assert set(model.frozen) == {n for n, _ in model.named_parameters() if not n.startswith("backbone.linears.")}
    model.train()
    assert model.backbone.linears[0].training and not model.backbone.layer1.training
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outputs = model(torch.randn(4, 3, 32, 32))
    assert "logits_old" not in outputs        # a frozen BatchFormer is skipped, as in evaluation
    outputs["output"].square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {f"backbone.linears.{e}.{part}" for e in (0, 1) for part in ("weight", "bias")}


@pytest.mark.parametrize("kind, more", [("ResNet32Model", {"classifier": "lws"}),
                                        ("ResNet32EAModel", {"num_experts": 2})])
def test_freezing_the_backbone_frees_nothing(kind, more):
    """LWS's scales and expert assignment's gates go on learning, and what they keep stays."""
    model = build_model({"type": kind, "args": more}, num_classes=5)
    if more.get("classifier"):
        model.freeze_except(model.stage2_prefixes())
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    model.freeze("backbone")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learned
    assert all("scales" in name or "expert_help" in name for name in learned)


@pytest.mark.parametrize("classifier", ["linear_fcbn", "linear_fcbn_notaffine"])
def test_a_classifier_with_a_norm_is_no_norm(classifier):
    model = model_of(classifier=classifier)
    model.freeze("norms")
    assert not {"backbone.linear.weight", "backbone.linear.bias"} & set(model.frozen)
    assert "backbone.bn1.weight" in model.frozen


@pytest.mark.parametrize("classifier", ["linear_fcbn", "linear_fcbn_notaffine"])
def test_frozen_norms_without_weights_keep_their_statistics_until_a_thaw(classifier):
    model = model_of(classifier=classifier)
    model.freeze({"until": 1, "what": "norms"})
    norm = model.train().backbone.linear.bn
    assert not norm.training
    model.thaw()
    assert model.train().backbone.linear.bn.training
    model.freeze("backbone")        # not the classifier's
    assert norm.training and not model.backbone.bn1.training


class Plain(BaseModel):
    """A backbone of somebody's own: one stage, and heads with names of their own."""

    num_experts, num_classes = 1, 5

    def __init__(self, classifier="linear"):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.tops = nn.ModuleList([make_head(classifier, 8, 5, 30.0)])

    def heads(self):
        return list(self.tops)

    def classifier_prefixes(self):
        return ["tops."]


def test_a_backbone_of_ones_own_is_one_stage():
    model = Plain()
    assert model.stage_prefixes() == [("body.",)]
    options = defaults(TRAINER, {})
    rates = {id(p): group["lr"] for group in build_optimizer({"type": "SGD", "args": {"lr": 1.0}}, model, {
        **options, "layer_decay": 0.5}).param_groups for p in group["params"]}
    assert rates[id(model.tops[0].weight)] == 1 and rates[id(model.body[0].weight)] == 0.5
    assert build_optimizer({"type": "Muon", "args": {"lr": 0.1}}, model, options)
    model.freeze(0.5)
    assert not model.frozen


@pytest.mark.parametrize("head", ["lws", "cosine"])
def test_a_second_stage_of_ones_own_backbone_may_have_another_head(head):
    stage1 = Plain().state_dict()
    model = Plain(head)
    load_weights(model, {"state_dict": stage1}, skip_prefixes=tuple(model.stage2_prefixes()), new_head=True)
    assert torch.equal(model.body[2].weight, stage1["body.2.weight"])
    assert model.stage2_prefixes() == (["tops.0.scales"] if head == "lws" else ["tops."])


def test_freezing_by_a_wrong_name_is_refused():
    from utils.errors import ConfigError
    with pytest.raises(ConfigError, match="fc"):
        model_of().freeze_except(["backbone.fc."])


@pytest.mark.parametrize("kind,experts,where,counts", [
    ("ResNet50Model", 1, "last", [4]),                          # bn3 of three blocks, one shortcut
    ("ResNet50Model", 2, "last", [10, 10]),                     # three norms in each of three blocks, one shortcut
    ("ResNet50Model", 2, [1, 4], [20, 10]),                     # stage 1 is shared: expert 0's scale
    ("ResNet50Model", 1, "all", [53]),
    ("ResNet50Model", 2, "all", [53, 29]),
    ("ResNet32Model", 1, "last", [5]), ("ResNet32Model", 3, "last", [10, 10, 10]), ("ResNet32Model", 1, [2, 3], [10])])
def test_nbn_scope(kind, experts, where, counts):
    with torch.device("meta"):
        scope = model_of(kind, num_experts=experts).backbone.nbn_scope(where)
    assert [len(norms) for norms in scope] == counts
    flat = [norm for norms in scope for norm in norms]
    assert len(set(flat)) == len(flat) and all(isinstance(norm, nn.BatchNorm2d) for norm in flat)


def test_nbn_scope_of_one_expert_is_outer_norms():
    with torch.device("meta"):
        backbone = model_of("ResNet50Model").backbone
    names = {id(part): name for name, part in backbone.named_modules()}
    assert [names[id(norm)] for norm in backbone.nbn_scope("last")[0]] == [
        "layer4.0.bn3", "layer4.0.downsample.1", "layer4.1.bn3", "layer4.2.bn3"]


def test_nbn_after_another_norm():
    from model.norm import NormalizedBatchNorm2d, convert_norm
    model = model_of(num_experts=2, norm="GroupNorm")
    convert_norm(model, "NBN")
    assert sum(isinstance(part, NormalizedBatchNorm2d) for part in model.modules()) == 20
    assert model.state_dict()["backbone.scale_factor"].shape == (2,)
