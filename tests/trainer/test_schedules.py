"""Schedules that can't serve a run are named before it begins."""

import pytest
import torch

from trainer.schedules import build_scheduler
from utils.errors import ConfigError


def schedule(total_steps, epochs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    spec = {"type": "OneCycleLR", "args": {"max_lr": 1.0, "total_steps": total_steps}}
    return optimizer, build_scheduler(spec, optimizer, epochs)


def test_one_cycle_ends_with_the_run_or_later():
    with pytest.raises(ConfigError, match=r"^lr_scheduler\.args: OneCycleLR ends after 4 epochs, and trainer\.epochs "
                                          r"is 5; give total_steps: 5$"):
        schedule(4, 5)
    optimizer, whole = schedule(5, 5)
    for _ in range(5):
        optimizer.step()
        whole.step()
