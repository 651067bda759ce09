"""MABN against a slow float64 twin through all its regimes, and everything a layer meets in real training."""
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.norm import CenConv2d, MABN2d
from model.norm import mabn as mabn_module
from tests.model.norm.slow_mabn import SlowMABN
from utils.errors import ConfigError

C = 3


def planes(x):
    """[N, C, H, W] -> nested lists [N][C][H * W]."""
    return x.detach().double().flatten(2).tolist()


def compare_step(layer, slow, x, dy, tolerance):
    """One training step of both, with parameters that move; every quantity that MABN defines is compared."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    slow.w, slow.b = layer.weight.tolist(), layer.bias.tolist()
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y.backward(dy)
    slow_y = slow.forward(planes(x))
    slow_dx, slow_dw, slow_db = slow.backward(planes(dy))

    def close(ours, theirs):
        theirs = torch.tensor(theirs, dtype=torch.double).view_as(ours)
        assert torch.allclose(ours.double(), theirs, rtol=tolerance, atol=tolerance), (slow.t, ours, theirs)
    close(y, slow_y), close(x.grad, slow_dx)
    close(layer.weight.grad, slow_dw), close(layer.bias.grad, slow_db)
    close(layer.running_var, slow.running_var)
    close(layer.buffer_x2.T, slow.x2), close(layer.buffer_gz.T, slow.gz)
    assert layer.iters.item() == slow.t
    with torch.no_grad():
        layer.weight -= 0.01 * layer.weight.grad.clamp(-1, 1)
        layer.bias -= 0.01 * layer.bias.grad.clamp(-1, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-9), (torch.float, 2e-4)])
@pytest.mark.parametrize("warmup_iters", [100, 2])
def test_every_regime_over_1100_iterations(dtype, tolerance, warmup_iters):
    """t <= K and the warm-up (own moments), up to 1000 (moving averages, r = 1), beyond (r clipped at both ends)."""
    torch.manual_seed(0)
    layer = MABN2d(C, B=2, real_B=8, warmup_iters=warmup_iters).to(dtype)
    slow = SlowMABN(C, K=4, warmup_iters=warmup_iters)
    spread = torch.tensor([0.3, 1.0, 3.0], dtype=dtype).view(1, C, 1, 1)
    for t in range(1, 1101):
        burst = {1020: 100.0, 1060: 1e-3}.get(t, 1.0)             # drives r to 5 and to 1/5
        x = torch.randn(2, C, 2, 1, dtype=dtype) * spread * burst + 0.2
        compare_step(layer, slow, x, torch.randn(2, C, 2, 1, dtype=dtype), tolerance)
    assert layer.iters.item() == 1100


def test_r_reaches_both_bounds():
    layer = MABN2d(1, B=1, real_B=1).double()
    layer.iters.fill_(2000)
    for size, r in ((100.0, 5.0), (1e-4, 0.2)):
        layer.running_var.fill_(1.0)
        x = torch.full((1, 1, 1, 1), size, dtype=torch.double)
        assert layer(x).item() == pytest.approx(r * size / (size ** 2 + 1e-5) ** 0.5)


def test_evaluation_formula_and_start():
    layer = MABN2d(2, B=2, real_B=32)
    assert layer.running_var.flatten().tolist() == [1, 1] and layer.iters.item() == 0
    assert layer.buffer_x2.shape == layer.buffer_gz.shape == (16, 2) and not layer.buffer_x2.any()
    assert set(layer.state_dict()) == {"weight", "bias", "running_var", "iters", "buffer_x2", "buffer_gz"}
    layer.running_var.copy_(torch.tensor([4.0, 9.0]).view(1, 2, 1, 1))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, 3.0])), layer.bias.fill_(0.5)
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    out = layer.eval()(x)
    scale = torch.tensor([2 / 4.00001 ** 0.5, 3 / 9.00001 ** 0.5]).view(1, 2, 1, 1)
    assert torch.allclose(out, x * scale + 0.5, atol=1e-6)
    out.sum().backward()
    assert torch.allclose(x.grad, scale.expand_as(x)) and layer.iters.item() == 0


def test_gradcheck_in_warmup_is_the_true_gradient():
    """With its own moments MABN is differentiation of x / sqrt(mean x^2 + eps) but for eps; eps 0 makes it exact."""
    layer = MABN2d(3, B=2, real_B=4, eps=0.0, warmup_iters=10 ** 9).double()

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 3, 2, dtype=torch.double).to(memory_format=memory_format).requires_grad_()
        assert torch.autograd.gradcheck(run, (x, torch.rand(3).double().requires_grad_(),
                                              torch.randn(3).double().requires_grad_()), nondet_tol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 1, 1), (5, 3, 7, 1), (3, 3, 1, 6)])
def test_shapes_formats_and_short_batches(shape, memory_format):
    torch.manual_seed(1)
    layer, slow = MABN2d(C, B=2, real_B=4, warmup_iters=1), SlowMABN(C, K=2, warmup_iters=1)
    for n in (shape[0], 1, shape[0] + 1, 2):
        x = torch.randn(n, *shape[1:]).to(memory_format=memory_format)
        compare_step(layer, slow, x, torch.randn(n, *shape[1:]).to(memory_format=memory_format), 1e-4)
        assert layer(x).stride() == x.stride() or 1 in x.shape[1:]
        slow.forward(planes(x))


def test_gradient_in_another_format_or_expanded():
    x = torch.randn(2, 3, 4, 4)
    grads = []
    for dy in (torch.ones(2, 3, 4, 4), torch.ones(1).expand(2, 3, 4, 4),
               torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)):
        leaf = x.clone().requires_grad_()
        MABN2d(3, 2, 4)(leaf).backward(dy)
        grads.append(leaf.grad)
    assert torch.allclose(grads[0], grads[1]) and torch.allclose(grads[0], grads[2])
    strided = torch.randn(2, 3, 4, 8)[..., ::2]
    assert torch.allclose(MABN2d(3, 2, 4)(strided), MABN2d(3, 2, 4)(strided.contiguous()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("warmup_iters", [1, 6])
def test_groups_in_a_large_batch(memory_format, warmup_iters):
    """normalization_batch_size 2: more groups than K, fewer, and a short last one."""
    torch.manual_seed(2)
    layer = MABN2d(C, B=2, real_B=6, warmup_iters=warmup_iters, normalization_batch_size=2).double()
    slow = SlowMABN(C, K=3, warmup_iters=warmup_iters, group=2)
    for n in (8, 8, 8, 8, 4, 5, 2, 1, 8, 7):
        x = torch.randn(n, C, 2, 2, dtype=torch.double).to(memory_format=memory_format) + 0.3
        compare_step(layer, slow, x, torch.randn(n, C, 2, 2, dtype=torch.double), 1e-9)
    layer.iters.fill_(1000)
    slow.t = 1000
    compare_step(layer, slow, x * 3, torch.randn(7, C, 2, 2, dtype=torch.double), 1e-9)


def test_groups_of_the_whole_batch_are_plain_mabn():
    torch.manual_seed(3)
    plain, grouped = MABN2d(C, 2, 4, warmup_iters=1), MABN2d(C, 2, 4, warmup_iters=1, normalization_batch_size=2)
    for _ in range(6):
        x = torch.randn(2, C, 3, 3)
        assert torch.allclose(plain(x), grouped(x), atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("calls", [1, 3])
def test_checkpointing_advances_once_and_changes_nothing(use_reentrant, calls):
    """A layer used once or several times a step; the recomputation must give each call its own statistics back."""
    torch.manual_seed(4)
    plain = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), MABN2d(3, 2, 8, warmup_iters=2), nn.ReLU()).double()
    plain[1].iters.fill_(998)          # passes 1000 on the way, so that r, too, has to be the first forward's
    plain[1].buffer_x2.fill_(1.0)
    saved = copy.deepcopy(plain)
    for step in range(6):
        xs = [torch.randn(2, 3, 4, 4, dtype=torch.double) * (1 + k) for k in range(calls)]
        grads = []
        for net, call in ((plain, plain), (saved, lambda x: checkpoint(saved, x, use_reentrant=use_reentrant))):
            net.zero_grad()
            leaves = [x.clone().requires_grad_() for x in xs]
            sum((call(x) ** 3).sum() for x in leaves).backward()
            grads.append([p.grad.clone() for p in net.parameters()] + [x.grad for x in leaves])
            with torch.no_grad():
                for p in net.parameters():
                    p -= 1e-3 * p.grad
        assert saved[1].iters.item() == 998 + calls * (step + 1)
        for a, b in zip(*grads):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
        for a, b in zip(plain.state_dict().values(), saved.state_dict().values()):
            assert torch.allclose(a, b, rtol=1e-9)


def test_device_side_state_equals_the_python_one(monkeypatch):
    """On a GPU the counter and all conditions stay tensors; run that path here on the CPU."""
    torch.manual_seed(5)
    first = [MABN2d(C, 2, 4, warmup_iters=3), MABN2d(C, 2, 4, warmup_iters=3, normalization_batch_size=2)]
    batches = [torch.randn(4, C, 2, 2) for _ in range(8)] + [torch.full((4, C, 2, 2), float("nan"))]
    batches += [torch.randn(4, C, 2, 2) for _ in range(4)]

    def run(layers):
        for k, x in enumerate(batches):
            for layer in layers:
                layer.iters.add_(990 if k == 4 else 0)
                layer(x.clone().requires_grad_()).sum().backward()
        return [t for layer in layers for t in [*layer.state_dict().values(), layer.weight.grad]]
    second = copy.deepcopy(first)
    expected = run(first)
    monkeypatch.setattr(mabn_module, "_iteration", lambda iters: iters.clone())
    monkeypatch.setattr(mabn_module, "_all_finite", lambda values: values.sum().isfinite())
    for a, b in zip(expected, run(second)):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_leave_the_state_alone(bad):
    layer = MABN2d(2, 1, 2, warmup_iters=1)
    for _ in range(4):
        layer(torch.randn(2, 2, 3, 3)).sum().backward()
    before = {k: v.clone() for k, v in layer.named_buffers() if k != "iters"}
    layer(torch.full((2, 2, 3, 3), bad))
    x = torch.randn(2, 2, 3, 3, requires_grad=True)
    assert all(torch.equal(v, before[k]) for k, v in layer.named_buffers() if k != "iters")
    layer(x).backward(torch.full((2, 2, 3, 3), bad))
    assert layer.buffer_gz.isfinite().all()


def test_empty_batch_changes_nothing():
    layer = MABN2d(2, 1, 2)
    assert layer(torch.zeros(0, 2, 3, 3)).shape == (0, 2, 3, 3)
    assert layer.iters.item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast(dtype, group, memory_format):
    """Half-precision maps, float32 statistics, and nearly the float32 result."""
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), MABN2d(4, 2, 4, warmup_iters=1, normalization_batch_size=group))
    twin = copy.deepcopy(net)
    for _ in range(4):
        x = torch.randn(4, 3, 6, 6).to(memory_format=memory_format)
        with torch.autocast("cpu", dtype=dtype):
            low = net(x)
        full = twin(x)
        assert low.dtype == dtype and low.is_contiguous(memory_format=memory_format)
        assert torch.allclose(low.float(), full, atol=0.1)
        (low.float() ** 2).sum().backward(), (full ** 2).sum().backward()
    assert net[1].buffer_x2.dtype == torch.float32
    assert torch.allclose(net[1].buffer_x2, twin[1].buffer_x2, rtol=0.02)
    assert torch.allclose(net[0].weight.grad, twin[0].weight.grad, rtol=0.2, atol=1.0)


def test_a_network_of_other_norms_with_one_mabn_trains():
    """Its moments are its own; all regimes are passed."""
    torch.manual_seed(7)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), MABN2d(4, 2, 8),
                        nn.ReLU(), nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(300):
        net[4].iters.add_(850 if step == 150 else 0)
        labels = torch.randint(2, (4,))
        images = torch.randn(4, 1, 7, 7) * 0.5 + labels.view(-1, 1, 1, 1) * torch.linspace(-1, 1, 7)
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(value == value for value in losses)
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50])


def test_training_goes_on_bit_identically_after_a_load():
    torch.manual_seed(8)
    first = MABN2d(C, 2, 8, warmup_iters=3)

    def steps(layer, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(7):
            layer(torch.randn(2, C, 3, 3, generator=generator)).square().sum().backward()
    steps(first, 0)
    second = MABN2d(C, 2, 8, warmup_iters=3)
    second.load_state_dict(first.state_dict())
    third = copy.deepcopy(first)
    for layer in (first, second, third):
        steps(layer, 1)
    for other in (second, third):
        for a, b in zip(first.state_dict().values(), other.state_dict().values()):
            assert torch.equal(a, b)


def test_checkpoints_of_the_authors_and_of_batch_norm_load():
    formal = {"weight": torch.rand(2), "bias": torch.rand(2), "running_var": torch.rand(1, 2, 1, 1),
              "iters": torch.tensor([7]), "buffer_x2": torch.rand(16, 2), "buffer_gz": torch.rand(16, 2)}
    layer = MABN2d(2, B=2, real_B=32)
    layer.load_state_dict(formal)
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in formal.items())

    demo = {"weight": torch.rand(2), "bias": torch.rand(2), "running_var": torch.rand(2),
            "iters": torch.tensor([600.0]), "sta_matrix": torch.ones(16, 32),
            "pre_x2": torch.ones(16, 2), "pre_gz": torch.ones(16, 2)}
    keys = set(demo)
    layer.load_state_dict(demo)
    assert set(demo) == keys                          # the caller's dict is left alone
    assert torch.equal(layer.running_var.flatten(), demo["running_var"]) and layer.iters.item() == 600
    assert torch.equal(layer.buffer_x2, demo["running_var"].expand(16, 2)) and not layer.buffer_gz.any()

    source = nn.BatchNorm2d(2)
    source.running_mean.copy_(torch.tensor([1.0, 2.0])), source.running_var.copy_(torch.tensor([3.0, 4.0]))
    layer.load_state_dict(source.state_dict())
    assert layer.running_var.flatten().tolist() == [4.0, 8.0] and layer.iters.item() == 0

    other_k = MABN2d(2, B=8, real_B=32)
    other_k.load_state_dict(formal)
    assert torch.allclose(other_k.buffer_x2.mean(0), formal["buffer_x2"].mean(0))
    with pytest.raises(RuntimeError, match="size mismatch"):
        MABN2d(3, 2, 32).load_state_dict(formal)


@pytest.mark.parametrize(("arguments", "word"), [
    ({"B": 3, "real_B": 32}, "multiple"), ({"B": 0, "real_B": 32}, "B"), ({"B": 4, "real_B": 2}, "multiple"),
    ({"B": 2, "real_B": 4, "momentum": 1.5}, "momentum"),
    ({"B": 2, "real_B": 4, "normalization_batch_size": 0}, "normalization_batch_size")])
def test_impossible_arguments(arguments, word):
    with pytest.raises(ConfigError, match=word):
        MABN2d(4, **arguments)


def test_wrong_number_of_dimensions():
    with pytest.raises(ValueError, match="4D"):
        MABN2d(4, 2, 4)(torch.zeros(2, 4, 3))


def test_cenconv_is_conv2d_with_centred_filters():
    torch.manual_seed(9)
    for arguments in ({"bias": True}, {"stride": 2, "padding": 1, "bias": False}, {"groups": 2, "dilation": 2},
                      {"padding": "same", "padding_mode": "reflect"}):
        conv = CenConv2d(4, 6, 3, **arguments)
        plain = nn.Conv2d(4, 6, 3, **arguments)
        plain.load_state_dict(conv.state_dict())          # keys and shapes agree
        with torch.no_grad():
            for filter_ in plain.weight:
                filter_ -= filter_.mean()
        x = torch.randn(2, 4, 9, 9)
        assert torch.allclose(conv(x), plain(x), atol=1e-6)
    conv = CenConv2d(1, 1, 2, bias=False).double()
    assert torch.autograd.gradcheck(conv, torch.randn(1, 1, 3, 3, dtype=torch.double, requires_grad=True))
