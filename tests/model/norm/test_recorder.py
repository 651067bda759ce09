"""The statistics recorder against their definitions."""
import pytest
import torch
from torch import nn

from model.norm import StatisticsRecorder, convert_norm
from utils.errors import ConfigError


@pytest.mark.parametrize("kind", ["BatchNorm2d", "NBN", "MABN", "BatchRenorm"])
@pytest.mark.parametrize("channel", [None, 1])
def test_the_four_statistics(kind, channel):
    torch.manual_seed(0)
    net = convert_norm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), kind)
    nn.init.uniform_(net[1].weight, 0.5, 1.5)
    recorder = StatisticsRecorder(net, "1", channel=channel)
    assert recorder.read() == {}
    x = torch.randn(4, 3, 6, 6) + 1
    before = {}
    hook = net[1].register_forward_hook(lambda m, inputs, y: before.update(x=inputs[0].detach()))
    net(x).pow(2).sum().backward()
    hook.remove()
    inner = before["x"].double()
    mean, var = inner.mean((0, 2, 3)), inner.var((0, 2, 3), unbiased=False)
    column = (1, -1, 1, 1)
    if kind == "MABN":
        y = inner / (inner.square().mean((0, 2, 3)) + 1e-5).sqrt().view(column)
    else:
        y = (inner - mean.view(column)) / (var + 1e-5).sqrt().view(column)
    w = net[1].weight.detach().double()
    if kind == "NBN":
        w = w / (w.norm() + 1e-6)
    out = (y * w.view(column)).clamp(min=0)            # the bias is 0
    g = 2 * out * w.view(column)
    pick = (lambda v: v.mean()) if channel is None else (lambda v: v[channel])
    expected = {"mean": mean, "var": var, "mean_g": g.mean((0, 2, 3)), "mean_gy": (g * y).mean((0, 2, 3))}
    found = recorder.read()
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].double().item() == pytest.approx(pick(value).item(), rel=1e-3, abs=1e-4), name
    net.eval()(x * 5)
    assert recorder.read()["mean"] == found["mean"]
    recorder.close()
    net.train()(x * 5)
    assert recorder.read()["mean"] == found["mean"]


def test_default_layer_and_unknown_names():
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    assert StatisticsRecorder(net).layer == "2"
    with pytest.raises(ConfigError, match="statistics_layer"):
        StatisticsRecorder(net, "bn")
