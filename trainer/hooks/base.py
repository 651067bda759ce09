"""What happens around the steps and epochs of a training: each such thing is a `Hook`."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn


class Run(Protocol):
    """What a hook may look at of the training that it accompanies."""

    model: nn.Module                    # the plain model that trains
    optimizer: torch.optim.Optimizer
    options: dict[str, Any]             # the config's `trainer`
    config: dict[str, Any]
    device: torch.device
    amp: str                            # bf16, fp16 or off
    memory_format: torch.memory_format
    train_loader: Any
    valid_loader: Any
    data_facts: dict[str, Any]
    paths: Any                          # RunPaths; None in a dry run
    writer: Any                         # TensorBoard's; false where there is none
    is_main: bool                       # rank 0
    epochs: int
    start_epoch: int
    last_epoch: int
    judged_model: nn.Module             # what is validated, tested and saved as `state_dict`

    def save_weights(self, path: Path, model: nn.Module) -> None:
        """Write a checkpoint that holds weights alone, whole or not at all; every rank calls it."""


class Hook:
    """Does nothing at each of these places; a subclass fills in its own.

    Every rank calls all of them. Whatever must survive a stop goes through `state_dict`.

    run: see `Run`. Only `model`, `options`, `config`, `device`, the loaders and `data_facts` are there in a
    constructor. Raises ConfigError for options that don't fit the model.
    """

    #: The key of its state in the checkpoint; empty where it keeps none.
    key = ""

    def __init_subclass__(cls, **more: Any):
        super().__init_subclass__(**more)
        if not cls.key and "state_dict" in vars(cls):
            cls.key = cls.__name__

    def __init__(self, run: Run):
        self.run = run

    @classmethod
    def wanted(cls, options: dict[str, Any]) -> bool:
        """Whether a key of the config's `trainer` asks for it; what `trainer.hooks` lists is there anyway."""
        return False

    def first_batch(self, images: Any) -> None:
        """The run's first training batch, before its step; on every rank, where the writer is a no-op but on rank 0."""

    def epoch_begins(self, epoch: int) -> None:
        """Before the first step of an epoch, or of the rest of one."""

    def step_taken(self, outputs: dict[str, Any], labels: torch.Tensor | None, gradient_norm: torch.Tensor) -> None:
        """After an optimizer step that changed the weights. outputs: the model's dict of the step's last part, labels
        its labels. Nothing here may wait for the device."""

    def log_step(self, step: int) -> None:
        """The figures of the last steps are being read (rank 0, with TensorBoard)."""

    def epoch_trained(self, epoch: int) -> None:
        """After an epoch's last step, before validation; once more where a run goes on after a stop in validation."""

    def epoch_ended(self, epoch: int, figures: dict[str, float | None]) -> None:
        """After validation, when the epoch's row has been written (rank 0)."""

    def run_ended(self, result: dict[str, Any]) -> None:
        """The run has trained its last epoch; result: the test split's figures, see `wants_images`."""

    @property
    def judged(self) -> nn.Module | None:
        """Another model to be validated, tested and saved in place of the one that trains."""
        return None

    @property
    def wants_images(self) -> bool:
        """Whether `run_ended` needs the test split's predictions by image. The same on every rank."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What must be known to go on, as tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; `checkpoint` is the whole of it. Not called where it has no such state."""
