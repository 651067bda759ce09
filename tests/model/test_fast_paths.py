"""Each fast path of the model gives what its slow twin gives."""
import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.blocks import PadShortcut
from model.loss import build_loss
from model.metric import accuracy, top_k_acc
from model.model import build_model
from trainer.meters import Means


def sliced(x, shortcut):
    return F.pad(x[:, :, ::shortcut.stride, ::shortcut.stride], shortcut.padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs,stride,size", [(24, 2, (8, 8)), (16, 2, (7, 5)), (24, 1, (4, 4)), (8, 3, (10, 9))])
def test_the_pooled_shortcut_is_slicing(dtype, outputs, stride, size):
    torch.manual_seed(0)
    shortcut = PadShortcut(16, outputs, stride)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 16, *size).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        fast, slow = shortcut(x), sliced(x, shortcut)
        assert torch.equal(fast, slow) and fast.dtype == dtype
        upstream = torch.randn_like(slow)
        assert torch.equal(*(torch.autograd.grad(out, x, upstream)[0] for out in (fast, slow)))


def test_the_pooled_shortcut_under_autocast():
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    shortcut = PadShortcut(16, 24, 2)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            assert torch.equal(shortcut(given), sliced(given, shortcut))


def test_channels_last_trains_like_nchw():
    torch.manual_seed(0)
    slow = build_model({"type": "ResNet32Model", "args": {"num_experts": 2, "add_bt": 1}}, num_classes=5).double()
    fast = copy.deepcopy(slow).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    results = []
    for model, given in ((slow, images), (fast, images.contiguous(memory_format=torch.channels_last))):
        torch.manual_seed(1)     # BatchFormer's dropout
        outputs = model(given)
        outputs["logits"].square().sum().backward()
        results.append((outputs["logits"], dict(model.named_parameters()), dict(model.named_buffers())))
    (a, weights, buffers), (b, same_weights, same_buffers) = results
    torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    for name, parameter in weights.items():
        torch.testing.assert_close(same_weights[name].grad, parameter.grad, rtol=1e-7, atol=1e-7, msg=name)
    for name, buffer in buffers.items():
        torch.testing.assert_close(same_buffers[name], buffer, rtol=1e-9, atol=1e-9, msg=name)


class NoReads(TorchDispatchMode):
    """Refuses the operators that make the host wait for a GPU: those whose result the program must see."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind,arch,loss", [
    ("ResNet32Model", dict(num_experts=2, add_bt=1), dict(additional_diversity_factor=-0.45, reweight_epoch=0)),
    ("ResNet32Model", dict(norm="NBN"), {}),
    ("ResNet32EAModel", dict(num_experts=2), {})])
def test_a_step_reads_nothing_back(kind, arch, loss):
    model = build_model({"type": kind, "args": arch}, num_classes=7).train()
    criterion = build_loss({"type": "RIDELoss", "args": loss}, cls_num_list=[9, 8, 7, 6, 5, 4, 3])
    criterion.set_epoch(1)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, 0.1, momentum=0.9, fused=True)
    means = Means("cpu")
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    for mode in (contextlib.nullcontext(), NoReads()):      # the loss checks its tables once, in the first step
        with mode:
            outputs = model(images, target=labels)
            value = outputs["loss"] if "loss" in outputs else criterion(outputs, labels)
            value.backward()
            torch.nn.utils.get_total_norm([p.grad for p in learned])
            optimizer.step()
            means.add({"loss": value, **{m.__name__: m(outputs["output"], labels) for m in (accuracy, top_k_acc)}}, 4)
    with pytest.raises(AssertionError), NoReads():
        value.item()
