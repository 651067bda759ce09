"""Reports early if a rank gets one image whose maps end 1 x 1: batch norm can't train on one value per channel."""
from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn

from base.base_data_loader import BaseDataLoader
from utils.errors import ConfigError


@contextlib.contextmanager
def one_value_told() -> Iterator[None]:
    """Turns torch's error about batch norm with one value per channel into a ConfigError that says what would help."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError("data_loader.args.batch_size: a step has one image on a process, whose maps end 1 x 1, and "
                          "batch norm can't learn from one value; give a --bs that leaves two or more, or a larger "
                          "image_size") from None


def check_least_share(model: nn.Module, loader: BaseDataLoader, image_size: int) -> None:
    """If a rank may get a batch of one image, try such a batch on a copy of the model. image_size: side in pixels.

    Raises ConfigError if the model can't train on it: before the run has a folder rather than at the end of an epoch.
    """
    if loader.least_share() > 1:
        return
    tried = copy.deepcopy(model).train()
    of = next(tried.parameters())
    devices = [of.device] if of.device.type == "cuda" else []
    with one_value_told(), torch.no_grad(), torch.random.fork_rng(devices):   # dropout draws random numbers
        tried(torch.zeros(1, 3, image_size, image_size, device=of.device))
