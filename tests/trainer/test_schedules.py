"""Schedules that can't serve a run are named before it begins."""

import pytest
import torch

from logger.log import get_logger
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


@pytest.mark.parametrize("kind", ["CustomLR", "CosLR"])
def test_a_warm_up_that_is_none_is_said_once(kind, caplog, monkeypatch):
    """RIDE's (e + 1) / warmup_epoch is 1 in the first epoch for a warm-up of 1; the formula stays."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    for warmup in (0, 2, 1):
        caplog.clear()
        args = {"warmup_epoch": warmup, **({"step1": 3, "step2": 4} if kind == "CustomLR" else {})}
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        factor = build_scheduler({"type": kind, "args": args}, optimizer, 5).get_last_lr()[0] / 0.1
        assert factor == pytest.approx(0.5 if warmup == 2 else 1.0)
        assert caplog.text.count("lr_scheduler.args.warmup_epoch: 1 is no warm-up") == (warmup == 1)
