"""3x3 convolutions by Winograd's algorithm, against torch's in float64."""
import copy
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.model import build_model
from model.native import build, winograd
from model.native.build import Library, compiler
from model.native.winograd import Winograd, compile_convolutions, compiled, validating
from model.norm import CenConv2d, fold_norm
from utils.errors import ConfigError

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
#: N, C, K, H, W: whole tiles, cut ones, vectors cut, channels of several strips, a single tile, several blocks.
SHAPES = [(4, 16, 16, 8, 8), (2, 24, 40, 9, 7), (3, 5, 3, 4, 13), (1, 64, 8, 4, 4), (2, 100, 70, 5, 6),
          (40, 16, 32, 12, 12), (1, 1, 1, 1, 1)]


def close(found, exact, size=2e-4):
    """Alike to `size` of the values' own size."""
    scale = exact.std().clamp(min=1e-3) if exact.numel() > 1 else exact.abs().max().clamp(min=1)
    return bool(((found.double() - exact).abs().max() / scale) < size)


def rounded(found, exact):
    """Alike but for the rounding to bfloat16."""
    return bool(((found.double() - exact).abs() <= exact.abs() * 2 ** -8 + 2e-4 * max(exact.abs().max(), 1)).all())


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def exactly(x, weight, dy):
    """y and the gradients of x and weight, in float64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = torch.conv2d(x, weight, padding=1)
    y.backward(dy.double())
    return y.detach(), x.grad, weight.grad


def fast(convolutions, x, weight, dy):
    return (convolutions.forward(x, weight), convolutions.input_gradient(dy, weight),
            convolutions.filter_gradient(x, dy))


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 3, 17])
def test_outputs_and_gradients_are_those_of_float64(shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(winograd, "_GRAIN", 1)
    torch.manual_seed(0)
    n, c, k, h, w = shape
    x, weight, dy = channels_last(n, c, h, w), torch.randn(k, c, 3, 3), channels_last(n, k, h, w)
    found = fast(compiled(), x, weight, dy)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(found, exactly(x, weight, dy), strict=True):
        assert a.shape == b.shape and close(a, b)
    for a, b in zip(found, fast(compiled(), x, weight, dy), strict=True):
        assert torch.equal(a, b)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_rounds_once(shape):
    torch.manual_seed(0)
    n, c, k, h, w = shape
    x, dy = channels_last(n, c, h, w).bfloat16(), channels_last(n, k, h, w).bfloat16()
    weight = torch.randn(k, c, 3, 3)
    found, exact = fast(compiled(), x, weight, dy), exactly(x, weight, dy)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert rounded(found[0], exact[0]) and rounded(found[1], exact[1]) and close(found[2], exact[2])


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 5), c=st.integers(1, 40), k=st.integers(1, 40), h=st.integers(1, 19), w=st.integers(1, 19),
       seed=st.integers(0, 9))
def test_any_size(n, c, k, h, w, seed):
    torch.manual_seed(seed)
    x, weight, dy = channels_last(n, c, h, w), torch.randn(k, c, 3, 3), channels_last(n, k, h, w)
    for a, b in zip(fast(compiled(), x, weight, dy), exactly(x, weight, dy), strict=True):
        assert a.shape == b.shape and (a.double() - b).abs().max() <= 2e-4 * (1 + b.abs().max())


@needs_compiler
@pytest.mark.parametrize("width", [4, 8, 16])
def test_vectors_of_any_width_give_the_same(width, monkeypatch):
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, f"-DVECTOR={width}"))
    there = Winograd(Library("winograd.cpp", "-O3"))
    for n, c, k, h, w in SHAPES:
        x, weight, dy = channels_last(n, c, h, w), torch.randn(k, c, 3, 3), channels_last(n, k, h, w)
        for a, b in zip(fast(there, x, weight, dy), exactly(x, weight, dy), strict=True):
            assert close(a, b)


def pair(kind, *args, **more):
    """A layer of torch's and the same one compiled."""
    torch.manual_seed(0)
    plain = kind(*args, **more).to(memory_format=torch.channels_last)
    marked = copy.deepcopy(plain)
    return plain, marked, compile_convolutions(marked)


@needs_compiler
@pytest.mark.parametrize("kind", [nn.Conv2d, CenConv2d])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_train_as_torchs(kind, bias, monkeypatch):
    calls = []
    monkeypatch.setattr(Winograd, "_call", spying(Winograd._call, calls))
    plain, marked, count = pair(kind, 16, 24, 3, padding=1, bias=bias)
    x, dy = channels_last(8, 16, 12, 12), channels_last(8, 24, 12, 12)
    results = []
    for layer in (plain, marked):
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(inputs)
        y.backward(dy)
        results.append([y.detach(), inputs.grad, *(p.grad for p in layer.parameters())])
    assert count == 1 and len(calls) == 3
    for a, b in zip(*results, strict=True):
        assert close(b, a.double())
    marked.weight.requires_grad_(False)                                    # frozen: no gradient of its filters
    marked(x.requires_grad_()).sum().backward()
    assert len(calls) == 5


def spying(inner, calls):
    def call(self, name, *args):
        calls.append(name)
        return inner(self, name, *args)
    return call


@needs_compiler
def test_what_does_not_fit_goes_torchs_way(monkeypatch):
    calls = []
    monkeypatch.setattr(Winograd, "_call", spying(Winograd._call, calls))
    plain, marked, _ = pair(nn.Conv2d, 16, 16, 3, padding=1)
    x = channels_last(8, 16, 12, 12)
    for inputs in (x.contiguous(), x[:1, :, :4, :4], x[:, :, :1].contiguous(memory_format=torch.channels_last)):
        assert torch.equal(plain(inputs), marked(inputs))                   # another format; few values; thin maps
    for kind, amx in ((torch.float16, False), (torch.bfloat16, True)):
        monkeypatch.setattr(winograd, "_has_amx", lambda amx=amx: amx)
        with torch.autocast("cpu", kind):
            assert torch.equal(plain(x), marked(x))
    assert torch.equal(plain.bfloat16()(x.bfloat16()), marked.bfloat16()(x.bfloat16()))
    assert torch.equal(plain.double()(x.double()), marked.double()(x.double()))
    assert torch.equal(plain.float().eval()(x), marked.float().eval()(x)) and calls == []
    with validating(), torch.no_grad():
        assert close(marked(x), plain(x).double()) and calls == ["winograd_forward"]
    assert torch.equal(plain(x), marked(x))
    calls.clear()
    marked.train()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with monkeypatch.context() as patch:
        patch.setattr(build, "_parallel", lambda: None)                     # no threads of ours beside torch's four
        assert torch.equal(plain.train()(x), marked(x))
    gradient = torch.func.grad(lambda x: marked(x).sum())(x)
    assert gradient.shape == x.shape and calls == []
    with pytest.raises(RuntimeError, match="to have 16 channels"):
        marked(channels_last(8, 8, 12, 12))
    assert calls == []
    marked(x)
    assert calls == ["winograd_forward"]


@needs_compiler
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_under_autocast_maps_are_bfloat16(bias, kind, monkeypatch):
    calls = []
    monkeypatch.setattr(Winograd, "_call", spying(Winograd._call, calls))
    monkeypatch.setattr(winograd, "_has_amx", lambda: False)
    _, marked, _ = pair(nn.Conv2d, 16, 24, 3, padding=1, bias=bias)
    x = channels_last(8, 16, 12, 12).to(kind).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = marked(x)
    y.square().sum().backward()
    halves = x.detach().bfloat16()
    dy = 2 * y.detach()
    exact = exactly(halves, marked.weight.detach(), dy)
    shift = marked.bias.detach().bfloat16()[:, None, None] if bias else 0
    assert y.dtype == torch.bfloat16 and x.grad.dtype == kind and marked.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact[0] + shift, rtol=2 ** -7, atol=1e-2)
    assert rounded(x.grad, exact[1]) and close(marked.weight.grad, exact[2])
    assert calls == ["winograd_forward", "winograd_forward", "winograd_filter_gradient"]


@needs_compiler
@pytest.mark.parametrize("more", [{"stride": 2}, {"padding": 0}, {"padding": 2, "dilation": 2}, {"groups": 2},
                                  {"padding_mode": "reflect"}, {"kernel_size": 5}])
def test_other_convolutions_are_left_alone(more):
    kept = nn.Conv2d(16, 16, **{"kernel_size": 3, "padding": 1, **more})
    few = nn.Conv2d(3, 16, 3, padding=1)
    assert compile_convolutions(nn.Sequential(kept, few)) == 0
    assert compile_convolutions(nn.Sequential(kept, nn.Conv2d(16, 16, 3, padding="same"))) == 1


@needs_compiler
def test_another_default_type_changes_nothing():
    x, weight = channels_last(4, 16, 8, 8), torch.randn(16, 16, 3, 3)
    expected = compiled().forward(x, weight)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(compiled().forward(x, weight), expected)
        assert compiled().filter_gradient(x, expected).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@needs_compiler
@pytest.mark.parametrize("norm", ["BatchNorm2d", {"type": "MABN", "args": {"B": 8, "real_B": 16}}])
def test_a_network_trains_as_without(norm, monkeypatch):
    calls = []
    monkeypatch.setattr(Winograd, "_call", spying(Winograd._call, calls))
    torch.manual_seed(0)
    spec = {"type": "ResNet32Model", "args": {"num_experts": 2, "reduce_dimension": True, "norm": norm}}
    plain = build_model(spec, 5).to(memory_format=torch.channels_last)
    marked = copy.deepcopy(plain)
    assert compile_convolutions(marked) > 30
    marked = copy.deepcopy(marked)                 # a copy convolves with its own filters
    images = channels_last(8, 3, 16, 16)
    losses = {}
    for name, model in (("plain", plain), ("marked", marked)):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(2):
            loss = model(images)["logits"].log_softmax(-1)[..., 0].neg().mean()
            optimizer.zero_grad()
            loss.backward()
            losses[name, step] = loss.item()
            optimizer.step()
        assert (len(calls) > 30) == (name == "marked")
    assert losses["marked", 0] == pytest.approx(losses["plain", 0], rel=1e-4)
    assert losses["marked", 1] == pytest.approx(losses["plain", 1], rel=1e-3)
    assert list(marked.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(marked.state_dict())
    torch.testing.assert_close(fold_norm(marked.eval())(images)["output"], fold_norm(plain.eval())(images)["output"])


def test_no_compiler_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    compiled.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"trainer\.compile: no C\+\+ compiler .* install g\+\+"):
            compile_convolutions(nn.Conv2d(8, 8, 3, padding=1))
    finally:
        compiled.cache_clear()
