"""Depthwise convolutions keep float32 where a CPU trains in bfloat16."""
import copy

import pytest
import torch
from torch import nn

from model.depthwise import steady_depthwise


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """(with depthwise convolutions made steady, without), of the same weights."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.Conv2d(8, 4, 1),
                          nn.Conv2d(4, 4, 3, groups=2))
    steady = copy.deepcopy(plain)
    steady_depthwise(steady)
    return steady, plain


def test_gradients_are_those_of_float32():
    steady, plain = pair()
    x = torch.randn(16, 8, 12, 12).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = steady[1](x)
    assert y.dtype == torch.bfloat16
    dy = torch.randn(y.shape).bfloat16()
    y.backward(dy)
    exact = copy.deepcopy(plain[1]).double()
    wide = x.detach().double().requires_grad_()
    exact(wide).backward(dy.double())
    torch.testing.assert_close(steady[1].weight.grad.double(), exact.weight.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2 ** -7, atol=1e-3)    # it comes back in bfloat16


def test_only_depthwise_convolutions_in_training_under_autocast_differ():
    steady, plain = pair()
    x = torch.randn(4, 3, 12, 12)
    assert torch.equal(steady(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(steady[0](x), plain[0](x)) and torch.equal(steady[3](x[:, :1].expand(4, 4, 12, 12)),
                                                                      plain[3](x[:, :1].expand(4, 4, 12, 12)))
        shown = plain[0](x)
        assert not torch.equal(steady[1](shown), plain[1](shown))
        steady.eval(), plain.eval()
        assert torch.equal(steady(x), plain(x))


def test_copies_are_their_own():
    steady, _ = pair()
    other = copy.deepcopy(steady)
    with torch.no_grad():
        other[1].weight.zero_()
        other[1].bias.zero_()
    x = torch.randn(2, 8, 6, 6)
    assert (other[1](x) == 0).all() and (steady[1](x) != 0).any()
    assert list(steady.state_dict()) == list(other.state_dict())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_a_network_of_timms_trains_so(name):
    pytest.importorskip("timm")
    from model.model import build_model
    torch.manual_seed(0)
    model = build_model({"type": "TimmModel", "args": {"model_name": name, "weights": False}}, 3).train()
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1)
    seen = []
    conv.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 3, 64, 64))["output"].float().logsumexp(1).sum()
    loss.backward()
    assert seen[0][0] == seen[0][1]
    full = conv.weight.grad
    assert full.isfinite().all() and not torch.equal(full, full.bfloat16().float())
