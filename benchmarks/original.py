"""RIDE's original epoch, rebuilt: what `benchmarks.train_step` compares ours with.

After the authors' code (github.com/frank-xwang/RIDE-LongTailRecognition, `trainer/trainer.py`, `data_loader/
cifar_data_loaders.py`, `model/metric.py`, `model/ldam_drw_resnets/`), in all that takes time: torchvision's transforms
of one Pillow image after the other in the 2 loader processes of its config, NCHW, float32, a block's operations one by
one, torch's default SGD step, loss and metrics read with `.item()` each step, the grid of input images that it makes
for TensorBoard whether that is on or not, and validation on the test images in the same way.

Where there is a choice, the original is favoured: its loader processes persist from turn to turn, and its running
means are kept in a dict, not in a data frame, to which today's pandas can't add in its way.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from model.blocks import BasicBlock
from model.resnet import ResNet

WORKERS = 2     # `num_workers` of its configs


class OriginalBlock(BasicBlock):
    """The residual block as it is written there."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x
        if self.downsample is not None:
            shortcut = F.pad(x[:, :, ::self.downsample.stride, ::self.downsample.stride], self.downsample.padding)
        out += shortcut
        return F.relu(out)


class OriginalResNet(ResNet):
    """Stem and pooling as they are written there."""

    def trunk(self, x: Tensor) -> Tensor:
        return self.layer1(F.relu(self.bn1(self.conv1(x))))

    def expert_feat(self, shared: Tensor, expert: int) -> Tensor:
        out = self.layer3s[expert](self.layer2s[expert](shared))
        return F.avg_pool2d(out, out.size()[3]).view(out.size(0), -1)


def as_original(model: nn.Module) -> nn.Module:
    """A ResNet-32 of ours with several experts, its modules' forward passes replaced in place by the original ones."""
    for module in model.modules():
        if type(module) in (BasicBlock, ResNet):
            module.__class__ = OriginalBlock if type(module) is BasicBlock else OriginalResNet
    return model


class Images(torch.utils.data.Dataset):
    """A loader's images, one by one through torchvision's transforms."""

    def __init__(self, loader: Any, training: bool):
        import torchvision.transforms as T
        self.pixels, self.labels = [loader.raw_image(i) for i in range(len(loader.targets))], loader.targets
        moves = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.RandomRotation(15)] if training else []
        self.transform = T.Compose([*moves, T.ToTensor(), T.Normalize(loader.mean, loader.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


def accuracy(output: Tensor, target: Tensor) -> float:
    """The share of correct predictions, as computed there."""
    pred = torch.argmax(output, dim=1)
    return torch.sum(pred == target).item() / len(target)


def top_k_acc(output: Tensor, target: Tensor, k: int = 5) -> float:
    """The share of images whose class is among the k most likely, as computed there."""
    pred, correct = torch.topk(output, k, dim=1)[1], 0
    for i in range(k):
        correct += torch.sum(pred[:, i] == target).item()
    return correct / len(target)


class OriginalTrainer:
    """RIDE's `_train_epoch` and `_valid_epoch`.

    train_loader, valid_loader: ours, whose images it uses. steps, valid_steps: batches of each per turn.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, sgd: dict[str, Any], train_loader: Any,
                 valid_loader: Any, steps: int, valid_steps: int, workers: int = WORKERS):
        self.model, self.criterion = as_original(model), criterion
        self.optimizer = torch.optim.SGD(model.parameters(), **sgd)
        self.log_step = int(np.sqrt(train_loader.batch_size))
        self.batches, self.valid_batches = (
            self._loader(Images(loader, training), loader.batch_size, count, workers)
            for loader, count, training in ((train_loader, steps, True), (valid_loader, valid_steps, False)))

    @staticmethod
    def _loader(images: Images, batch: int, steps: int, workers: int) -> torch.utils.data.DataLoader:
        # Shuffled in validation too, as there.
        sampler = torch.utils.data.RandomSampler(images, num_samples=min(steps * batch, len(images)))
        return torch.utils.data.DataLoader(images, batch, sampler=sampler, num_workers=workers,
                                           persistent_workers=workers > 0)

    def epoch(self) -> None:
        """A turn: the training steps, then the validation steps."""
        self.model.train()
        self.criterion.train()
        self._track(self.batches, self._step, self.log_step)
        self.model.eval()
        self.criterion.eval()
        with torch.no_grad():
            self._track(self.valid_batches, self._forward, 1)

    def _forward(self, data: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(data)
        return outputs["output"], self.criterion(outputs, target)

    def _step(self, data: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        output, loss = self._forward(data, target)
        loss.backward()
        self.optimizer.step()
        return output, loss

    def _track(self, batches: Iterable, step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], log_step: int) -> None:
        from torchvision.utils import make_grid
        totals = dict.fromkeys(("loss", "accuracy", "top_k_acc"), 0.0)
        for number, (data, target) in enumerate(batches):
            output, loss = step(data, target)
            totals["loss"] += loss.item() * len(target)
            with torch.no_grad():
                for metric in (accuracy, top_k_acc):
                    totals[metric.__name__] += metric(output, target) * len(target)
            if number % log_step == 0:
                make_grid(data.cpu(), nrow=8, normalize=True)
        assert all(math.isfinite(total) for total in totals.values())
