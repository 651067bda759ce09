"""fold_norm: equal outputs, an unchanged argument, and right about dataflow."""
import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from model.norm import CenConv2d, convert_norm, fold_norm
from model.norm.facts import is_norm


def shake(net):
    torch.manual_seed(3)
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_var is not None:
            layer.running_mean.normal_(0, 0.1), layer.running_var.uniform_(0.5, 1.5)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias, 0, 0.2)
    return net


def left(net):
    """What folding was to take away and is still there."""
    return [name for name, m in net.named_modules()
            if is_norm(m) or isinstance(m, CenConv2d | nn.BatchNorm1d | nn.BatchNorm3d)]


@torch.no_grad()
def folded_equal(net, x, atol=1e-5):
    """Fold `net`, hold the outputs and `net` itself to what they were, and return the folded copy."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    kinds, mode = [type(m) for m in net.modules()], net.training
    folded = fold_norm(net)
    assert not folded.training and net.training == mode and [type(m) for m in net.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    expected = copy.deepcopy(net).eval()(x)
    assert torch.allclose(folded(x), expected, atol=atol * max(1.0, expected.abs().max().item()))
    return folded


@pytest.mark.parametrize("kind", ["BatchNorm2d", "NBN", "MABN", "BatchRenorm", "SyncBatchNorm", "Frozen"])
def test_nothing_is_left_in_torchvisions_resnet(kind):
    net = convert_norm(shake(torchvision.models.resnet18(num_classes=10)), kind)
    folded = folded_equal(net, torch.randn(2, 3, 40, 40))
    assert left(folded) == []
    assert not any(name.endswith("scale_factor") for name in folded.state_dict())
    assert {type(m) for name, m in folded.named_modules() if "conv" in name or "bn" in name} == {nn.Conv2d, nn.Identity}


def test_bottlenecks_too():
    net = convert_norm(shake(torchvision.models.resnet50(num_classes=10)), "BatchRenorm")
    assert left(folded_equal(net, torch.randn(1, 3, 40, 40))) == []


def test_pre_activation_norms_stay():
    net = shake(torchvision.models.densenet121(num_classes=10, memory_efficient=False))
    folded = folded_equal(net, torch.randn(1, 3, 40, 40))
    remaining = left(folded)
    assert "features.denseblock1.denselayer1.norm1" in remaining and "features.norm5" in remaining
    assert "features.denseblock1.denselayer1.norm2" not in remaining and "features.norm0" not in remaining


def test_grouped_statistics_and_other_layers():
    net = shake(nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, padding_mode="reflect", padding=1), nn.BatchNorm2d(6),
                              nn.Flatten(), nn.Linear(6 * 25, 5), nn.BatchNorm1d(5, affine=False), nn.ReLU()))
    net = convert_norm(net, "BatchNorm2d", normalization_batch_size=2)
    assert left(folded_equal(net, torch.randn(4, 3, 5, 5))) == []


def test_double_precision_and_memory_format_stay():
    net = shake(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double().to(memory_format=torch.channels_last)
    folded = folded_equal(net, torch.randn(2, 3, 5, 5, dtype=torch.double), atol=1e-12)
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)


class Used(nn.Module):
    """A convolution and a norm wired in a way that `mode` names."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        if self.mode == "output used twice":
            y = self.conv(x)
            return self.bn(y) + y
        if self.mode == "norm called twice":
            return self.bn(self.conv(x)) + self.bn(self.other(x))
        if self.mode == "convolution called twice":
            return self.bn(self.conv(x)) + self.bn2(self.conv(x + 1))
        if self.mode == "something between":
            return self.bn(F.relu(self.conv(x)))
        if self.mode == "weights read":
            return self.bn(self.conv(x)) * self.conv.weight.sum()
        if self.mode == "norm first":
            return self.conv(self.bn(x))
        if self.mode == "changed in place":
            y = self.conv(x)
            y += 1
            return self.bn(y)
        if self.mode == "registration order misleads":
            return self.bn2(self.conv(x)) + self.bn(self.other(x))
        raise AssertionError(self.mode)


@pytest.mark.parametrize(("mode", "stay"), [
    ("output used twice", {"bn"}), ("norm called twice", {"bn"}), ("convolution called twice", {"bn", "bn2"}),
    ("something between", {"bn"}), ("weights read", {"bn"}), ("norm first", {"bn"}), ("changed in place", {"bn"}),
    ("registration order misleads", set())])
def test_only_where_the_dataflow_allows(mode, stay):
    folded = folded_equal(shake(Used(mode)), torch.randn(2, 3, 4, 4))
    assert stay <= set(left(folded))
    assert mode != "registration order misleads" or not left(folded)


def test_subclasses_and_hooked_layers_stay():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    net = shake(nn.Sequential(nn.Conv2d(3, 3, 1), Activated(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3),
                              nn.utils.spectral_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)))
    net[3].register_forward_hook(lambda module, inputs, output: output * 2)
    assert left(folded_equal(net, torch.randn(2, 3, 4, 4))) == ["1", "3", "5"]


def test_parts_that_cannot_be_traced():
    class Choosy(nn.Module):
        """Control flow that depends on the data, around blocks that have none."""

        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)) for _ in range(2))
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                if x.mean() > -100:
                    x = block(x)
            return self.bn(self.conv(x))

    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), shake(Choosy()), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert left(folded_equal(shake(net), torch.randn(2, 3, 8, 8))) == ["2.bn"]      # its order is never seen


@pytest.mark.parametrize(("arch", "args"), [
    ("ResNet32Model", {"num_experts": 2, "norm": "MABN", "reduce_dimension": True}),
    ("ResNet32Model", {"classifier": "linear_fcbn", "norm": "NBN"}),
    ("ResNet32EAModel", {"num_experts": 3, "classifier": "linear_fcbn_notaffine"}),
    ("ResNet10Model", {"num_experts": 2, "norm": "BatchRenorm", "add_bt": 1})])
def test_our_models(arch, args):
    """Several experts, gates, norms on the logits: nothing of them stays."""
    from model.model import build_model
    torch.manual_seed(4)
    net = shake(build_model({"type": arch, "args": {"num_classes": 7, **args}})).eval()
    folded = fold_norm(net)
    assert left(folded) == []
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = net(x), folded(x)
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            largest = max(1.0, theirs[key].abs().max().item())     # sums round otherwise on each processor
            assert torch.allclose(value.float(), theirs[key].float(), atol=1e-5 * largest), key
