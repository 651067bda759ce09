"""Moments and batch norm by given moments, against float64 and torch's own; NBN where it uses them."""
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.norm import BatchRenorm2d, NormalizedBatchNorm2d, convert_norm, kernels
from model.norm.grouped import GroupedBatchNorm2d, group_moments, normalise_groups
from model.norm.kernels import dot_and_sum, moments, normalise
from model.norm.recorder import StatisticsRecorder

FORMATS = [torch.contiguous_format, torch.channels_last]


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), c=st.integers(1, 9), h=st.integers(1, 6), w=st.integers(1, 6),
       offset=st.sampled_from([0.0, -3.0, 1e3]), memory_format=st.sampled_from(FORMATS), seed=st.integers(0, 9))
def test_moments_are_those_of_float64(n, c, h, w, offset, memory_format, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, c, h, w, generator=generator) + offset).contiguous(memory_format=memory_format)
    mean, var = moments(x)
    assert mean.shape == var.shape == (c,) and mean.dtype == var.dtype == torch.float32
    flat = x.double().transpose(0, 1).reshape(c, -1)
    assert torch.allclose(mean.double(), flat.mean(1), rtol=1e-6, atol=1e-6)
    # A difference of large numbers would be off by 0.1 at an offset of 1,000.
    assert torch.allclose(var.double(), flat.var(1, correction=0), rtol=1e-4, atol=1e-5)


def test_moments_of_half_types_are_kept_wide():
    x = torch.randn(20, 3, 4, 4).bfloat16() + 5
    mean, var = moments(x)
    assert mean.dtype == var.dtype == torch.float32
    assert torch.allclose(mean, x.float().mean((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_normalising_by_moments_is_batch_norm_to_the_second_derivative(memory_format):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 2, 2, dtype=torch.double).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = (torch.randn(3, dtype=torch.double, requires_grad=True) for _ in range(2))

    def by_moments(x, weight, bias):
        return normalise(x, weight, bias, *moments(x), 1e-5)

    assert torch.allclose(by_moments(x, weight, bias), nn.functional.batch_norm(x, None, None, weight, bias, True))
    assert torch.autograd.gradcheck(by_moments, (x, weight, bias))
    assert torch.autograd.gradgradcheck(by_moments, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("n", [3, 40])
def test_nbn_with_a_unit_affine_is_batch_norm(n, memory_format, dtype):
    """Output, gradients and statistics are batch norm's."""
    torch.manual_seed(0)
    x = (torch.randn(n, 6, 40, 30, dtype=dtype) * 2 + 3).contiguous(memory_format=memory_format)
    ours, plain = NormalizedBatchNorm2d(6, momentum=None), nn.BatchNorm2d(6, momentum=None)
    nn.init.uniform_(plain.weight, 0.5, 1), nn.init.normal_(plain.bias)
    with torch.no_grad():            # of unit length, so that w' = w and b' = b
        for name in ("weight", "bias"):
            getattr(plain, name).div_(getattr(plain, name).norm())
            getattr(ours, name).copy_(getattr(plain, name))
    grads = []
    for layer in (ours, plain):
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            out = layer(leaf)
            (out.float() * leaf.detach().float().relu()).sum().backward()
        assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)
        grads.append((out.detach().float(), leaf.grad.float()))
    for ours_, plain_ in zip(*grads, strict=True):
        assert (ours_ - plain_).abs().max() < plain_.abs().max() * (1e-5 if dtype is torch.float32 else 0.01)
    for name in ("running_mean", "running_var"):
        assert torch.allclose(getattr(ours, name), getattr(plain, name), rtol=1e-4)
    assert ours.num_batches_tracked == plain.num_batches_tracked == 2


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("layer", [NormalizedBatchNorm2d, BatchRenorm2d,
                                   functools.partial(BatchRenorm2d, normalization_batch_size=2),
                                   functools.partial(GroupedBatchNorm2d, normalization_batch_size=2)])
def test_whole_models_in_half_precision_train(layer, memory_format):
    torch.manual_seed(0)
    x = torch.randn(32, 4, 48, 48).contiguous(memory_format=memory_format)
    wide, half = layer(4), layer(4).bfloat16()
    outs = []
    for one, dtype in ((wide, torch.float32), (half, torch.bfloat16)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        out = one(leaf)
        (out.float() * x.relu()).sum().backward()
        assert out.dtype == leaf.grad.dtype == one.weight.grad.dtype == dtype
        outs.append((out.float(), leaf.grad.float()))
    for ours, exact in zip(outs[1], outs[0], strict=True):
        assert (ours - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("layer", [NormalizedBatchNorm2d, BatchRenorm2d])
def test_compiled_layers_are_the_eager_ones(layer):
    torch.manual_seed(0)
    x = torch.randn(16, 4, 3, 3)
    eager, compiled = layer(4), layer(4)
    step = torch.compile(compiled, backend="aot_eager")
    for _ in range(2):
        assert torch.allclose(step(x), eager(x), atol=1e-5)
    assert torch.allclose(compiled.running_var, eager.running_var)


def test_function_transforms_see_through_it():
    torch.manual_seed(0)
    x, weight = torch.randn(16, 3, 4, 4), torch.rand(3).requires_grad_()

    def loss(weight):
        return normalise(x, weight, torch.zeros(3), *moments(x), 1e-5).pow(3).sum()

    loss(weight).backward()
    assert torch.allclose(torch.func.grad(loss)(weight.detach()), weight.grad, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 9), c=st.integers(1, 40), h=st.integers(1, 6), w=st.integers(1, 6),
       memory_format=st.sampled_from(FORMATS), per_sample=st.booleans(), seed=st.integers(0, 9))
def test_dot_and_sum_are_those_of_float64(n, c, h, w, memory_format, per_sample, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n + 1, c, h, w, generator=generator).contiguous(memory_format=memory_format)[1:]
            for _ in range(2))       # not at the start of their memory
    dims = (2, 3) if per_sample else (0, 2, 3)
    for ours, exact in zip(dot_and_sum(a, b, per_sample), ((a.double() * b).sum(dims), a.double().sum(dims)),
                           strict=True):
        assert ours.shape == exact.shape and torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("n,size", [(4, 2), (5, 2), (3, 4), (2, 1)])
def test_groups_are_batch_norms_of_their_own(n, size, memory_format):
    torch.manual_seed(0)
    x = torch.randn(n, 3, 2, 3, dtype=torch.double).contiguous(memory_format=memory_format).requires_grad_()
    groups = -(-n // size)
    weight, bias = (torch.randn(groups, 3, dtype=torch.double, requires_grad=True) for _ in range(2))

    def together(x, weight, bias):
        return normalise_groups(x, weight, bias, *group_moments(x, size), 1e-5, size)

    out = together(x, weight, bias)
    assert out.is_contiguous(memory_format=memory_format)
    for g, part in enumerate(x.split(size)):
        alone = nn.functional.batch_norm(part, None, None, weight[g], bias[g], True)
        assert torch.allclose(out[g * size:(g + 1) * size], alone)
    assert torch.autograd.gradcheck(together, (x, weight, bias))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_groups_far_from_zero_keep_their_gradient(memory_format):
    torch.manual_seed(0)
    far = (torch.randn(6, 3, 5, 5) + 1e3).contiguous(memory_format=memory_format)
    dy = torch.randn(6, 3, 5, 5)
    results = []
    for dtype in (torch.float32, torch.double):
        x = far.to(dtype, copy=True).requires_grad_()
        weight = torch.ones(3, 3, dtype=dtype, requires_grad=True)
        normalise_groups(x, weight, torch.zeros(3, dtype=dtype), *group_moments(x, 2), 1e-5, 2).backward(dy.to(dtype))
        results.append((x.grad.double(), weight.grad.double()))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() < 1e-3 * exact.abs().max()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("norm", [{"type": "MABN", "args": {"B": 2, "real_B": 4, "warmup_iters": 1}},
                                  {"type": "MABN", "args": {"normalization_batch_size": 2}},
                                  {"type": "BatchNorm2d", "args": {"normalization_batch_size": 2}},
                                  {"type": "BatchRenorm", "args": {"normalization_batch_size": 2}}])
def test_the_backward_kernel_is_given_the_statistics_that_a_gpus_needs(norm, memory_format, monkeypatch):
    """CUDA's asserts that there are saved statistics, in evaluation mode too, where a CPU's never reads them."""
    given, original = [], kernels._native_backward

    def call(dy, x, weight, mean, var, saved_mean, saved_inv_std, train, *more):
        given.append((saved_mean, saved_inv_std))
        return original(dy, x, weight, mean, var, saved_mean, saved_inv_std, train, *more)
    monkeypatch.setattr(kernels, "_native_backward", call)
    net = convert_norm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), norm["type"], **norm["args"])
    recorder = StatisticsRecorder(net)
    for _ in range(2):
        x = torch.rand(4, 3, 6, 6).to(memory_format=memory_format)
        net.train()(x).square().sum().backward()
    assert recorder.read() and given
    assert all(torch.is_tensor(value) for pair in given for value in pair)
