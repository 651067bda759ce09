"""NBN against its formula, its shared scale through copies and loads, and its gradients."""
import copy

import pytest
import torch
from torch import nn

from model.norm import NormalizedBatchNorm2d, convert_norm


def slow_nbn(x, w, b, a, eps=1e-5):
    """The formula, channel by channel, in float64."""
    x, w, b = x.double(), w.double(), b.double()
    w = w / (w.square().sum().sqrt() + 1e-6) * a
    b = b / (b.square().sum().sqrt() + 1e-6) * a
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        plane = x[:, c]
        out[:, c] = (plane - plane.mean()) / (plane.var(unbiased=False) + eps).sqrt() * w[c] + b[c]
    return out


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_output_is_the_formula(memory_format):
    torch.manual_seed(0)
    layer = NormalizedBatchNorm2d(7)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x = torch.randn(5, 7, 4, 3).to(memory_format=memory_format)
    out = layer(x)
    assert torch.allclose(out.double(), slow_nbn(x, layer.weight, layer.bias, 1.0), atol=1e-5)
    assert out.is_contiguous(memory_format=memory_format)


def test_running_statistics_are_batch_norms():
    ours, plain = NormalizedBatchNorm2d(3), nn.BatchNorm2d(3)
    for _ in range(4):
        x = torch.randn(6, 3, 5, 5) * 2 + 1
        ours(x), plain(x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(ours, name), getattr(plain, name))


def test_gradients_of_weight_bias_and_scale():
    owner = nn.Module()
    owner.scale_factor = nn.Parameter(torch.tensor([0.7, 1.3], dtype=torch.double))
    layer = NormalizedBatchNorm2d(4).double()
    layer.share_scale(owner, 1)

    def run(x, weight, bias, scales):
        parameters = {"weight": weight, "bias": bias}
        owner_scales, owner.scale_factor = owner.scale_factor, nn.Parameter(scales)
        owner._parameters["scale_factor"] = scales
        out = torch.func.functional_call(layer, parameters, (x,))
        owner._parameters["scale_factor"] = owner_scales
        return out

    arguments = [torch.randn(3, 4, 2, 2), torch.rand(4) + 0.1, torch.randn(4), torch.tensor([0.7, 1.3])]
    assert torch.autograd.gradcheck(run, [a.double().requires_grad_() for a in arguments])


def test_zero_bias_gives_no_nan():
    layer = NormalizedBatchNorm2d(4)
    layer(torch.randn(3, 4, 2, 2)).square().sum().backward()
    assert layer.bias.grad.isfinite().all() and layer.weight.grad.isfinite().all()


def two_layers():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    return convert_norm(net, "NBN")


def test_one_scale_is_registered_once_and_trained():
    net = two_layers()
    assert net.scale_factor.shape == (1,)
    assert [name for name in net.state_dict() if "scale" in name] == ["scale_factor"]
    net(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert net.scale_factor.grad.abs().item() > 0


def test_scale_follows_copies_loads_and_types():
    net = two_layers().eval()
    x = torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.scale_factor.fill_(3.0)
    assert twin[1].scale.item() == 3.0 and net[1].scale.item() == 1.0
    net.load_state_dict(twin.state_dict(), assign=True)
    assert torch.equal(net(x), twin(x))
    assert net.double()[4].scale.dtype == torch.double
    swapped = dict(twin.named_parameters()) | {"scale_factor": torch.tensor([0.0])}
    assert torch.func.functional_call(twin, swapped, (x,)).abs().max() == 0


class Staged(nn.Module):
    """A model that has stages and two experts, as our backbones do."""

    def __init__(self):
        super().__init__()
        self.stem = nn.BatchNorm2d(3)
        self.experts = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

    def nbn_scope(self, where):
        return {"last": [[e] for e in self.experts], "all": [[self.stem, e] for e in self.experts]}[where]

    def forward(self, x):
        return torch.stack([e(self.stem(x)) for e in self.experts])


@pytest.mark.parametrize(("where", "converted"), [("last", 2), ("all", 3)])
def test_scope_of_a_model_with_stages(where, converted):
    net = convert_norm(nn.ModuleDict({"backbone": Staged()}), "NBN", where=where)
    backbone = net["backbone"]
    assert list(backbone.scale_factor.shape) == [2]
    assert sum(isinstance(m, NormalizedBatchNorm2d) for m in net.modules()) == converted
    assert backbone.experts[1].shared_scale == (backbone, 1)
    if where == "all":
        assert backbone.stem.shared_scale == (backbone, 0)
    back = convert_norm(net, "BatchNorm2d")
    assert "backbone.scale_factor" not in back.state_dict()
