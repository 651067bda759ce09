"""Batch renorm, batch norm in groups, instance and layer norm against slow versions from their definitions."""
import copy
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from model.norm import (
    BatchRenorm2d,
    GroupedBatchNorm2d,
    InstanceNorm2d,
    LayerNorm2d,
    MABN2d,
    SyncBatchNorm,
    convert_norm,
)


def slow_renorm(layer, x, state, r_max, d_max):
    """Ioffe's algorithm 1 for one batch, channel by channel in float64; `state` is [(mu, variance), ...]."""
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        plane = x[:, c]
        mean, var = plane.mean(), plane.var(unbiased=False)
        mu, running = state[c]
        sigma, s = (var + layer.eps).sqrt(), (running + layer.eps) ** 0.5
        r = (sigma / s).clamp(1 / r_max, r_max).detach()
        d = ((mean - mu) / s).clamp(-d_max, d_max).detach()
        out[:, c] = ((plane - mean) / sigma * r + d) * layer.weight[c] + layer.bias[c]
        m = layer.momentum
        unbiased = plane.var(unbiased=True).item() if plane.numel() > 1 else 0.0
        state[c] = ((1 - m) * mu + m * mean.item(), (1 - m) * running + m * unbiased)
    return out


def test_batch_renorm_through_its_ramp():
    torch.manual_seed(0)
    layer = BatchRenorm2d(3, momentum=0.2, warmup_iters=4, r_ramp_iters=10, d_ramp_iters=5).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    state = [(0.0, 1.0)] * 3
    for t in range(25):
        past = max(t - 4, 0)
        r_max, d_max = 1 + 2 * min(past / 10, 1), 5 * min(past / 5, 1)
        x = (torch.randn(4, 3, 2, 2, dtype=torch.double) * 3 + 2).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        y, expected = layer(x), slow_renorm(layer, twin, state, r_max, d_max)
        assert torch.allclose(y, expected, atol=1e-6), t
        dy = torch.randn_like(y)
        grads = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
        slow = torch.autograd.grad(expected, [twin, layer.weight, layer.bias], dy)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, slow))
    assert torch.allclose(layer.running_mean, torch.tensor([m for m, _ in state], dtype=torch.double))
    assert torch.allclose(layer.running_var, torch.tensor([v for _, v in state], dtype=torch.double))
    assert layer.num_batches_tracked.item() == 25


def test_batch_renorm_is_batch_norm_before_the_ramp():
    ours, plain = BatchRenorm2d(3, momentum=0.1), nn.BatchNorm2d(3)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5)
        assert torch.allclose(ours(x), plain(x), atol=1e-6)
    assert torch.allclose(ours.running_var, plain.running_var)
    assert torch.equal(ours.eval()(x), plain.eval().requires_grad_(False)(x)) or torch.allclose(ours(x), plain(x))


def test_batch_renorm_of_one_value_uses_the_running_statistics():
    layer = BatchRenorm2d(2)
    before = layer.running_mean.clone()
    x = torch.randn(1, 2, 1, 1)
    assert torch.allclose(layer(x), x / (1 + 1e-5) ** 0.5)
    assert torch.equal(layer.running_mean, before) and layer.num_batches_tracked.item() == 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [GroupedBatchNorm2d, BatchRenorm2d])
def test_groups_are_small_batches_in_order(kind, memory_format):
    """Each group as if it were the batch; the last one short."""
    torch.manual_seed(1)
    grouped = kind(3, normalization_batch_size=2).double()
    one = (nn.BatchNorm2d if kind is GroupedBatchNorm2d else kind)(3).double()
    x = torch.randn(5, 3, 2, 2, dtype=torch.double).to(memory_format=memory_format).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    y = grouped(x)
    expected = torch.cat([one(part) for part in twin.split(2)])
    assert torch.allclose(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy), expected.backward(dy)
    assert torch.allclose(x.grad, twin.grad) and torch.allclose(grouped.weight.grad, one.weight.grad)
    means = torch.stack([part.mean((0, 2, 3)) for part in x.detach().split(2)])
    assert torch.allclose(grouped.running_mean, grouped.momentum * means.mean(0))
    assert grouped.num_batches_tracked.item() == 1


def test_layer_norm_of_maps():
    x = torch.randn(3, 4, 2, 5)
    expected = (x - x.mean((1, 2, 3), True)) / (x.var((1, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(LayerNorm2d(4)(x), expected, atol=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_instance_norm_of_single_pixels_is_its_bias(mode):
    layer = InstanceNorm2d(3).train(mode)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 1, 1, requires_grad=True)
    y = layer(x)
    assert torch.equal(y.flatten(1), layer.bias.expand(2, 3))
    y.sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("kind", ["BatchNorm2d", "NBN", "MABN", "BatchRenorm", "GroupNorm"])
@pytest.mark.parametrize("group", [None, 2])
def test_autocast_gives_finite_half_precision(kind, group):
    if group and kind not in ("BatchNorm2d", "MABN", "BatchRenorm"):
        pytest.skip("has no groups")
    args = {"normalization_batch_size": group} if group else {}
    net = convert_norm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), kind, **args)
    x = torch.randn(4, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    assert y.dtype in (torch.bfloat16, torch.float32) and y.isfinite().all()
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in net.parameters())


def test_compiled_training_equals_eager():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    for kind in ("MABN", "NBN"):
        eager = convert_norm(copy.deepcopy(net), kind)
        twin = copy.deepcopy(eager)
        compiled = torch.compile(twin, backend="aot_eager")
        for _ in range(3):
            x = torch.randn(2, 3, 8, 8)
            eager(x).square().sum().backward(), compiled(x).square().sum().backward()
        for a, b in zip([*eager.state_dict().values(), *(p.grad for p in eager.parameters())],
                        [*twin.state_dict().values(), *(p.grad for p in twin.parameters())]):
            assert torch.allclose(a, b, atol=1e-5), kind
    torch._dynamo.reset()


def _two_ranks(rank, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.double)
        mine = (x[:2] if rank == 0 else x[2:]).requires_grad_()          # uneven on purpose
        layer = SyncBatchNorm(3).double()
        y = layer(mine)
        (y * y * y).sum().backward()
        mabn = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 3, 1), MABN2d(3, 2, 4, warmup_iters=1)))
        for _ in range(4):
            mabn(mine.detach().float()).square().sum().backward()
        grads = [p.grad.flatten().tolist() for p in mabn.parameters()]
        queue.put((rank, y.detach().numpy(), mine.grad.numpy(), layer.running_var.numpy(), grads,
                   mabn.module[1].iters.item()))
    except Exception as error:
        queue.put((rank, repr(error)))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes():
    """SyncBatchNorm over gloo is batch norm of the whole batch; MABN trains under DDP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_two_ranks, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = sorted((queue.get(timeout=240) for _ in workers), key=lambda item: item[0])
    for worker in workers:
        worker.join(30)
    assert all(len(result) == 6 for result in results), results
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double).requires_grad_()
    plain = nn.BatchNorm2d(3).double()
    y = plain(x)
    (y * y * y).sum().backward()
    assert torch.allclose(torch.cat([torch.from_numpy(r[1]) for r in results]), y, atol=1e-6)
    assert torch.allclose(torch.cat([torch.from_numpy(r[2]) for r in results]), x.grad, atol=1e-5)
    assert all(torch.allclose(torch.from_numpy(r[3]), plain.running_var, atol=1e-6) for r in results)
    assert results[0][4] == results[1][4] and results[0][5] == 4
