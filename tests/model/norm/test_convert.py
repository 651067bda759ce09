"""convert_norm: every type on a torchvision model, what carries over, what is left alone, and what is refused."""
import copy
import logging

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.norm import (
    NORMS,
    BatchRenorm2d,
    CenConv2d,
    GroupedBatchNorm2d,
    GroupNorm2d,
    InstanceNorm2d,
    LayerNorm2d,
    MABN2d,
    NormalizedBatchNorm2d,
    SyncBatchNorm,
    convert_norm,
)
from utils.errors import ConfigError

CLASSES = {"BatchNorm2d": nn.BatchNorm2d, "NBN": NormalizedBatchNorm2d, "MABN": MABN2d, "BatchRenorm": BatchRenorm2d,
           "GroupNorm": GroupNorm2d, "InstanceNorm": InstanceNorm2d, "LayerNorm": LayerNorm2d,
           "SyncBatchNorm": SyncBatchNorm, "Frozen": torchvision.ops.FrozenBatchNorm2d}
EQUAL_IN_EVALUATION = {"BatchNorm2d", "BatchRenorm", "SyncBatchNorm", "Frozen"}


def shake(net):
    """Statistics and parameters as if trained."""
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(0, 0.1), layer.running_var.uniform_(0.5, 1.5)
            layer.num_batches_tracked.fill_(9)
            nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias, 0, 0.2)
    return net


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return shake(torchvision.models.resnet18(num_classes=10))


def small_net():
    torch.manual_seed(1)
    return shake(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)))


@pytest.mark.parametrize("kind", NORMS)
def test_every_type_on_torchvisions_resnet18(kind, resnet18):
    net = convert_norm(copy.deepcopy(resnet18), kind)
    assert type(net.bn1) is CLASSES[kind]
    norms = [m for m in net.modules() if type(m) is CLASSES[kind]]
    assert len(norms) == 20 and (kind == "BatchNorm2d" or not any(type(m) is nn.BatchNorm2d for m in net.modules()))
    assert sum(isinstance(m, CenConv2d) for m in net.modules()) == (20 if kind == "MABN" else 0)
    assert torch.equal(net.layer4[1].conv2.weight, resnet18.layer4[1].conv2.weight)
    extra = {"NBN": 1}.get(kind, 0) - (40 if kind == "Frozen" else 0)
    assert len(list(net.parameters())) == len(list(resnet18.parameters())) + extra
    x = torch.randn(3, 3, 40, 40)
    net.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net = convert_norm(copy.deepcopy(resnet18), kind).eval()
    if kind in EQUAL_IN_EVALUATION:
        assert torch.allclose(net(x), resnet18.eval()(x), atol=1e-5)
    # and back: what evaluation computes survives the way to batch norm, where batch norm can compute it
    if kind not in {"GroupNorm", "InstanceNorm", "LayerNorm"}:
        expected = net(x)
        back = convert_norm(net, "BatchNorm2d").eval()
        assert torch.allclose(back(x), expected, atol=1e-4)
        assert list(back.state_dict()) == list(resnet18.state_dict())


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_alone_is_returned_converted(kind):
    source = shake(nn.Sequential(nn.BatchNorm2d(8)))[0]
    new = convert_norm(source, kind)
    assert type(new) is CLASSES[kind]
    assert torch.equal(new.bias, source.bias) or kind == "NBN"
    assert not any(name.startswith("scale") for name in new.state_dict())


def test_statistics_carry_over():
    source = small_net()
    bn = source[1]
    bn.eps = 1e-3
    renorm = convert_norm(copy.deepcopy(source), "BatchRenorm")[1]
    for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias", "eps"):
        assert torch.equal(torch.as_tensor(getattr(renorm, name)), torch.as_tensor(getattr(bn, name)))
    mabn = convert_norm(copy.deepcopy(source), "MABN")[1]
    assert torch.allclose(mabn.running_var.flatten(), bn.running_var + bn.running_mean ** 2)
    assert mabn.eps == 1e-3 and mabn.iters.item() == 0
    assert torch.equal(mabn.weight, bn.weight) and torch.equal(mabn.bias, bn.bias)
    back = convert_norm(nn.Sequential(mabn), "BatchNorm2d")[0]
    assert torch.equal(back.running_var, mabn.running_var.flatten()) and not back.running_mean.any()


class Rms(nn.Module):
    """A norm of one's own without bias and running mean."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.num_features, self.eps, self.weight = num_features, eps, nn.Parameter(torch.ones(num_features))
        self.register_buffer("running_var", torch.ones(num_features))


def test_a_norm_may_lack_bias_and_running_mean():
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        norm.running_var.copy_(torch.tensor([4.0, 5.0, 6.0]))
    converted = convert_norm(norm, f"{__name__}:Rms")
    assert isinstance(converted, Rms)
    assert torch.equal(converted.weight, norm.weight) and torch.equal(converted.running_var, norm.running_var)


def test_momentum_and_its_conventions():
    def momentum(kind, source=0.1, **args):
        return convert_norm(nn.Sequential(nn.BatchNorm2d(4, momentum=source)), kind, **args)[0].momentum
    assert momentum("MABN") == 0.98 and momentum("BatchRenorm") == 0.01 and momentum("NBN") == 0.1
    assert momentum("MABN", 0.25) == 0.75 and momentum("BatchRenorm", 0.25) == 0.25
    assert momentum("SyncBatchNorm", None) is None and momentum("MABN", None) == 0.98
    assert momentum("MABN", 0.25, momentum=0.5) == 0.5
    mabn = nn.Sequential(MABN2d(4, 2, 4))
    assert convert_norm(mabn, "BatchNorm2d")[0].momentum == 0.1


def test_requires_grad_device_type_and_mode_carry_over():
    net = small_net().double().eval()
    net[1].weight.requires_grad_(False)
    for kind in ("GroupNorm", "MABN", "InstanceNorm"):
        new = convert_norm(copy.deepcopy(net), kind)
        assert new[1].weight.dtype == torch.double and not new[1].training
        assert not new[1].weight.requires_grad and new[1].bias.requires_grad and new[4].weight.requires_grad
    thawed = convert_norm(convert_norm(small_net(), "Frozen"), "BatchNorm2d")
    assert thawed[1].weight.requires_grad


def test_a_layer_used_twice_stays_shared():
    norm = nn.BatchNorm2d(4)
    net = convert_norm(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)}), "GroupNorm")
    assert net["a"] is net["b"][0] and isinstance(net["a"], GroupNorm2d)


def test_one_dimensional_and_layer_norms_are_left_alone():
    net = nn.ModuleList([nn.BatchNorm1d(4), nn.LayerNorm(4), nn.BatchNorm3d(4)])
    kinds = [type(m) for m in net]
    assert [type(m) for m in convert_norm(net, "MABN")] == kinds


def test_which_convolutions_are_centred():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(4, 4, 1)

    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 4, 3, bias=True), nn.BatchNorm2d(4), Gate(),
                        nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Conv2d(4, 2, 1))
    kinds = [type(m).__name__ for m in convert_norm(copy.deepcopy(net), "MABN").modules() if isinstance(m, nn.Conv2d)]
    #        one-element filters; biased before a norm; gate; depthwise; predictor
    assert kinds == ["Conv2d", "CenConv2d", "Conv2d", "CenConv2d", "Conv2d"]
    plain = convert_norm(net, "MABN", centre=False)
    assert not any(isinstance(m, CenConv2d) for m in plain.modules())


def test_mabn_defaults_and_groups():
    assert convert_norm(small_net(), "MABN")[1].buffer_x2.shape == (16, 8)
    grouped = convert_norm(small_net(), "MABN", normalization_batch_size=4)[1]
    assert (grouped.B, grouped.real_B, grouped.normalization_batch_size) == (4, 32, 4)
    assert isinstance(convert_norm(small_net(), "BatchNorm2d", normalization_batch_size=2)[1], GroupedBatchNorm2d)


def test_calibration_batch_tells_how_far_the_outputs_moved(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ltr"), "propagate", True)
    x = torch.randn(4, 3, 12, 12)
    with caplog.at_level(logging.INFO):
        same = convert_norm(small_net(), "BatchRenorm", calibration_batch=x)
        moved = convert_norm(small_net(), "MABN", calibration_batch=x)
    assert same.norm_shift == {"relative": 0.0, "max": 0.0} and same.training
    before, after = small_net().eval()(x), moved.eval()(x)
    assert moved.norm_shift["max"] == pytest.approx((after - before).abs().max().item(), rel=1e-5)
    assert moved.norm_shift["relative"] == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-5)
    assert "MABN" in caplog.text


@pytest.mark.parametrize(("channels", "asked", "groups"), [(64, None, 32), (24, None, 8), (48, None, 16), (16, None, 8),
                                                           (512, None, 32), (24, 5, 1), (24, 6, 6), (1, None, 1)])
def test_group_norm_finds_a_divisor(channels, asked, groups):
    args = {} if asked is None else {"num_groups": asked}
    assert convert_norm(nn.Sequential(nn.BatchNorm2d(channels)), "GroupNorm", **args)[0].num_groups == groups


@pytest.mark.parametrize(("kind", "args", "words"), [
    ("NBM", {}, ["norm.type", "NBM", "NBN"]), ("mabn", {}, ["mabn", "MABN"]),
    ("NBN", {"wher": "all"}, ["norm.args", "wher", "where"]), ("MABN", {"affine": False}, ["affine"]),
    ("MABN", {"B": 3}, ["norm.args", "real_B", "multiple"]), ("MABN", {"B": "x"}, ["norm.args"]),
    ("NBN", {"where": "last"}, ["where", "all"]), ("NBN", {"where": [4]}, ["where", "all"]),
    ("BatchNorm2d", {"normalization_batch_size": 0}, ["normalization_batch_size"]),
    ("BatchRenorm", {"r_max": 0.5}, ["r_max"]), ("GroupNorm", {"num_groups": 0}, ["num_groups"])])
def test_mistakes_are_named_and_leave_the_module_alone(kind, args, words):
    net = small_net()
    with pytest.raises(ConfigError) as caught:
        convert_norm(net, kind, **args)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert type(net[1]) is nn.BatchNorm2d


@pytest.fixture(scope="module")
def detector():
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5,
                                   norm_layer=torchvision.ops.FrozenBatchNorm2d)
    return FasterRCNN(backbone, box_head=TwoMLPHead(256 * 7 * 7, 32), box_predictor=FastRCNNPredictor(32, 3),
                      min_size=64, max_size=64, rpn_post_nms_top_n_train=100)


@pytest.mark.parametrize("kind", NORMS)
def test_detection_models(kind, detector):
    """Frozen sources, and a batch of one image."""
    net = convert_norm(copy.deepcopy(detector), kind)
    assert type(net.backbone.body.layer4[0].bn1) is CLASSES[kind]
    assert not isinstance(net.rpn.head.cls_logits, CenConv2d) and not isinstance(net.backbone.fpn.layer_blocks[0][0],
                                                                                CenConv2d)
    targets = [{"boxes": torch.tensor([[2.0, 2.0, 20.0, 20.0]]), "labels": torch.tensor([1])}]
    losses = net([torch.rand(3, 64, 64)], targets)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(set(NORMS) - {"Frozen"})), n=st.integers(1, 5), c=st.integers(1, 6),
       h=st.integers(1, 4), w=st.integers(1, 4), last=st.booleans(), group=st.sampled_from([None, 1, 2, 3]))
def test_shapes(kind, n, c, h, w, last, group):
    """Whatever the shape, outputs and gradients are finite and keep shape, type and memory format."""
    args = {"normalization_batch_size": group} if group and "normalization" in str(NORMS[kind]) else {}
    if group and kind in ("MABN", "BatchNorm2d", "BatchRenorm"):
        args = {"normalization_batch_size": group} | ({"real_B": 6} if kind == "MABN" else {})
    layer = convert_norm(nn.Sequential(nn.BatchNorm2d(c)), kind, **args)[0]
    x = torch.randn(n, c, h, w)
    x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
    one_value = n * h * w == 1 and (kind in ("NBN", "SyncBatchNorm") or (kind == "BatchNorm2d" and not args))
    if one_value or (kind in ("GroupNorm", "LayerNorm") and n * c // getattr(layer, "num_groups", 1) * h * w == 1):
        with pytest.raises(ValueError, match="more than 1 value"):      # torch's own words
            layer(x)
        return
    for _ in range(2):
        y = layer(x)
        y.square().sum().backward()
        assert y.shape == x.shape and y.dtype == x.dtype
        assert y.isfinite().all() and x.grad.isfinite().all()
    if last and kind not in ("InstanceNorm", "GroupNorm", "LayerNorm"):
        assert y.is_contiguous(memory_format=torch.channels_last)
    layer.eval()(x.detach())
