"""Norm, addition and ReLU by compiled passes, against the same layers in float64."""
import copy
import shutil

import pytest
import torch
from torch import nn

from model.model import build_model
from model.native import build
from model.native.build import compiler
from model.native.passes import Passes, compiled
from model.norm import MABN2d, NormalizedBatchNorm2d, compile_norms, convert_norm, norm_relu
from utils.errors import ConfigError

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
FORMATS = [torch.contiguous_format, torch.channels_last]


def make(kind, channels):
    """A norm as it is in the middle of a training."""
    torch.manual_seed(0)
    norm = {"BN": nn.BatchNorm2d, "NBN": NormalizedBatchNorm2d,
            "cumulative": lambda c: nn.BatchNorm2d(c, momentum=None),
            "untracked": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
            "MABN": lambda c: MABN2d(c, B=4, real_B=16, warmup_iters=2)}[kind](channels)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    if kind == "NBN":
        owner = nn.Module()
        owner.scale_factor = nn.Parameter(torch.full((2,), 3.0))
        norm.share_scale(owner, 1)
    if kind == "MABN":
        norm.iters.fill_(1200)
        norm.buffer_x2.fill_(9.0)
        norm.buffer_gz.normal_(std=0.1)
    return norm


def run(norm, x, residual, dy, steps=2):
    """Outputs and gradients of two steps, on the same input."""
    results = []
    for _ in range(steps):
        x = x.detach().requires_grad_()
        residual = None if residual is None else residual.detach().requires_grad_()
        norm.zero_grad()
        y = norm_relu(norm, x, residual)
        y.backward(dy)
        results += [y.detach(), x.grad, norm.weight.grad, norm.bias.grad]
        results += [] if residual is None else [residual.grad]
    return results


def off_edge(norm, x, residual):
    """Where the ReLU's input isn't so close to 0 that rounding decides."""
    with torch.no_grad():
        y = norm_relu_input(copy.deepcopy(norm), x, residual)
    return (y.abs() > 1e-2).to(x.dtype)


def norm_relu_input(norm, x, residual):
    y = norm(x)
    return y if residual is None else y + residual


@needs_compiler
@pytest.mark.parametrize("kind", ["BN", "cumulative", "untracked", "NBN", "MABN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", [False, True])
def test_compiled_norms_are_those_of_float64(kind, dtype, added, monkeypatch):
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 2e-4, "atol": 1e-4}
    for shape in ((5, 3, 7, 5), (2, 24, 5, 6), (33, 16, 12, 12), (3, 70, 1, 1), (2, 1, 4, 4), (2, 200, 3, 3)):
        for memory_format in FORMATS:
            for threads in (1, 3):
                monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                slow = make(kind, shape[1]).double()
                if kind == "NBN":
                    slow.shared_scale[0].double()
                fast = make(kind, shape[1])
                compile_norms(fast)
                x, residual, dy = ((torch.randn(shape) * 3 + i).to(dtype).contiguous(memory_format=memory_format)
                                   for i in range(3))
                residual = residual if added else None
                dy *= off_edge(slow, x.double(), None if residual is None else residual.double())
                expected = run(slow, x.double(), None if residual is None else residual.double(), dy.double())
                found = run(fast, x, residual, dy)
                assert found[0].dtype == found[1].dtype == dtype and found[0].stride() == x.stride()
                assert found[0].grad_fn is None and len(found) == len(expected)
                for a, b in zip(found, expected):
                    size = b.abs().max().clamp(min=1)
                    torch.testing.assert_close(a.double() / size, b / size, **tolerance)
                for a, b in zip(fast.buffers(), slow.buffers()):
                    torch.testing.assert_close(a.double(), b.double(), rtol=2e-2 if dtype != torch.float32 else 1e-4,
                                               atol=1e-4)


@needs_compiler
def test_moments_far_from_zero():
    for memory_format in FORMATS:
        x = (torch.randn(8, 24, 9, 9) + 1000).contiguous(memory_format=memory_format)
        x[0] += 50                                           # the values that the centre is guessed from
        mean, var = compiled().moments(x)
        exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
        torch.testing.assert_close(var.double(), exact_var, rtol=1e-4, atol=0)


@needs_compiler
@pytest.mark.parametrize("width", [4, 8, 16])
def test_vectors_of_any_width_give_the_same(width, monkeypatch):
    """NEON's and SSE's, AVX's, AVX-512's: the compiler splits those that this processor hasn't."""
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, f"-DVECTOR={width}"))
    here, there = compiled(), compiled.__wrapped__()
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((5, 3, 7, 5), (2, 24, 5, 6), (3, 70, 1, 1), (2, 200, 3, 3)):
            for memory_format in FORMATS:
                x, residual, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
                                   for _ in range(3))
                weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
                for added in (None, residual):
                    results = []
                    for passes in (here, there):
                        y, known = passes.batch_forward(x, added, weight, bias, None, 0.1, 1e-5)
                        gradients = passes.batch_backward(dy, x, None if added is None else y, known)
                        results.append([y, known, *(value for value in gradients if value is not None)])
                    for a, b in zip(*results, strict=True):
                        torch.testing.assert_close(a, b, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-4)


@needs_compiler
def test_what_is_not_a_number_stays_so():
    for value in (float("nan"), float("inf")):
        for dtype in (torch.float32, torch.bfloat16):
            norm = make("BN", 4)
            compile_norms(norm)
            x = torch.randn(2, 4, 8, 8).to(dtype)
            x[1, 2, 3, 3] = value
            y = norm_relu(norm, x)
            assert y[:, 2].isnan().all() and y[:, [0, 1, 3]].isfinite().all() and norm.running_var[2].isnan()


@needs_compiler
def test_what_does_not_fit_goes_torchs_way(monkeypatch):
    x = torch.randn(4, 6, 5, 5)
    plain, marked = make("BN", 6), make("BN", 6)
    compile_norms(marked)
    seen = []
    for call in (lambda norm: norm_relu(norm.double(), x.double()), lambda norm: norm_relu(norm.eval().float(), x)):
        assert torch.equal(call(plain), call(marked))
    marked.train().register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(norm_relu(plain.train(), x), norm_relu(marked, x)) and seen == [1]
    with pytest.raises(ValueError, match="more than 1 value"):
        norm_relu(make_marked(), torch.randn(1, 6, 1, 1))
    gradient = torch.func.grad(lambda x: norm_relu(make_marked(), x).sum())(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(build, "_parallel", lambda: None)                   # no threads of ours beside torch's four
    monkeypatch.setattr(Passes, "_call", lambda *_, **__: pytest.fail("one thread against four"))
    assert torch.equal(norm_relu(make("BN", 6), x), norm_relu(make_marked("BN"), x))
    assert gradient.shape == x.shape


def make_marked(kind="untracked"):
    norm = make(kind, 6)
    compile_norms(norm)
    return norm


@needs_compiler
@pytest.mark.parametrize("norm", ["BatchNorm2d", {"type": "NBN", "args": {"where": "all"}},
                                  {"type": "MABN", "args": {"B": 8, "real_B": 16}}, "GroupNorm"])
def test_a_network_trains_as_without(norm):
    torch.manual_seed(0)
    spec = {"type": "ResNet10Model" if norm == "GroupNorm" else "ResNet32Model",
            "args": {"num_experts": 2, "reduce_dimension": True, "norm": norm}}
    plain = build_model(spec, 5).to(memory_format=torch.channels_last)
    marked = copy.deepcopy(plain)
    assert (compile_norms(marked) > 0) == (norm != "GroupNorm")
    images = torch.randn(8, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    losses = {}
    for name, model in (("plain", plain), ("marked", copy.deepcopy(marked))):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=step == 1):
                loss = model(images)["logits"].float().log_softmax(-1)[..., 0].neg().mean()
            optimizer.zero_grad()
            loss.backward()
            losses[name, step] = loss.item()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
    assert losses["marked", 0] == pytest.approx(losses["plain", 0], rel=1e-5)
    assert losses["marked", 1] == pytest.approx(losses["plain", 1], rel=3e-2)
    assert list(marked.state_dict()) == list(plain.state_dict())
    assert type(convert_norm(marked, "GroupNorm").backbone.bn1).__name__ == "GroupNorm2d"


def test_no_compiler_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    compiled.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"trainer\.compile: no C\+\+ compiler .* install g\+\+"):
            compile_norms(nn.BatchNorm2d(3))
    finally:
        compiled.cache_clear()
