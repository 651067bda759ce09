"""The interface of hooks, which are called around the steps and epochs of training."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn


class Run(Protocol):
    """What a hook may use of the trainer that calls it."""

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
    steps_per_epoch: int
    start_epoch: int
    last_epoch: int
    judged_model: nn.Module             # what is validated, tested and saved as `state_dict`

    def save_weights(self, path: Path, model: nn.Module) -> None:
        """Write a checkpoint that holds weights alone, whole or not at all; every rank calls it."""


class Hook:
    """Does nothing at any of its events; a subclass overrides those that it needs.

    Every rank calls all of them, except `log_step` and `epoch_ended`, which are rank 0's. Whatever must survive a stop
    goes through `state_dict`.

    run: see `Run`. A constructor may use only `model`, `options`, `config`, `device`, the loaders and `data_facts` of
    it. Raises ConfigError for options that don't fit the model.
    """

    #: The key of its state in the checkpoint (by default the class's name); empty if it has no `state_dict`.
    key = ""

    def __init_subclass__(cls, **more: Any):
        super().__init_subclass__(**more)
        if not cls.key and "state_dict" in vars(cls):
            cls.key = cls.__name__

    def __init__(self, run: Run):
        self.run = run

    @classmethod
    def wanted(cls, options: dict[str, Any]) -> bool:
        """Whether a key of the config's `trainer`, `options`, switches it on; those in `trainer.hooks` always are."""
        return False

    def first_batch(self, images: Any) -> None:
        """The run's first batch of images, before its step (not on cached features); on every rank, the writer a no-op
        on all but rank 0."""

    def epoch_begins(self, epoch: int) -> None:
        """Before the first step of an epoch, or of the rest of one that is resumed."""

    def step_taken(self, outputs: dict[str, Any], labels: torch.Tensor | None, gradient_norm: torch.Tensor) -> None:
        """After an optimizer step that changed the weights. Nothing here may wait for the device.

        outputs: the model's dict for the step's last batch. labels: that batch's, [N]; of mixed labels those with the
        larger weight. gradient_norm: 0-d, before clipping.
        """

    def log_step(self, step: int) -> None:
        """When the figures of the last steps are read (rank 0, with TensorBoard). step: optimizer steps so far."""

    def epoch_trained(self, epoch: int) -> None:
        """After an epoch's last step, before validation; again if the run resumes after a stop in validation."""

    def epoch_ended(self, epoch: int, figures: dict[str, float | None]) -> None:
        """After validation, when the epoch's row, `figures`, has been written (rank 0 only)."""

    def run_ended(self, result: dict[str, Any]) -> None:
        """After the run's last epoch. result: the test split's figures, by image too if any hook `wants_images`."""

    @property
    def judged(self) -> nn.Module | None:
        """A model to be validated, tested and saved in place of the one that is trained; None: no other model."""
        return None

    @property
    def wants_images(self) -> bool:
        """Whether `run_ended` needs the test split's per-image predictions. Must be the same on every rank."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """The state needed to resume, as tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; `checkpoint` is the whole checkpoint. Not called if it
        has no such state."""
