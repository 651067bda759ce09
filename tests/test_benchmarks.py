"""What the benchmarks compare is alike: RIDE's own loop trains the network that ours trains."""
import copy

import torch

from benchmarks.original import OriginalResNet, OriginalTrainer, as_original
from data_loader.data_loaders import DigitsLTDataLoader
from model.loss import build_loss
from model.model import build_model

ARCH = {"type": "ResNet32Model", "args": {"num_classes": 10, "num_experts": 2, "use_norm": True, "add_bt": 1,
                                          "layer2_output_dim": 16, "layer3_output_dim": 16}}


def networks() -> tuple:
    torch.manual_seed(0)
    ours = build_model(ARCH).double()
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    return ours, as_original(copy.deepcopy(ours))


def test_the_originals_forward_pass_gives_our_outputs_and_gradients() -> None:
    ours, theirs = networks()
    assert type(theirs.backbone) is OriginalResNet
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6)
    criterion = build_loss({"type": "RIDELoss"}, cls_num_list=[50] * 10)
    losses = []
    for model in (ours, theirs):
        losses.append(criterion(model(images), labels))
        losses[-1].backward()
    assert torch.allclose(*losses)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        if mine.grad is not None:
            assert torch.allclose(mine.grad, other.grad, atol=1e-12), name


def test_its_loop_trains_and_validates_on_the_loaders_images() -> None:
    _, theirs = networks()
    theirs.float()
    loader = DigitsLTDataLoader(batch_size=16, image_size=32)
    seen = []
    theirs.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, tuple(inputs[0].shape))))
    before = theirs.backbone.conv1.weight.clone()
    trainer = OriginalTrainer(theirs, build_loss({"type": "RIDELoss"}, cls_num_list=loader.cls_num_list),
                              {"lr": 0.01, "momentum": 0.9}, loader, loader.split_validation(), 2, 1, workers=0)
    trainer.epoch()
    assert seen == [(True, (16, 3, 32, 32))] * 2 + [(False, (16, 3, 32, 32))]
    assert not torch.equal(before, theirs.backbone.conv1.weight)
