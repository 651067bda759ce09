"""Training of detectors: separate losses, schedules by iteration, average precision, pictures of detections."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_loader.detection.dataset import to_tensor
from logger.figures.detections import as_picture, draw_detections
from logger.log import get_logger
from trainer.detection.evaluate import KINDS, evaluate_detector
from trainer.hooks import HOOKS
from trainer.hooks.curves import Curves
from trainer.precision import autocast
from trainer.step import Part
from trainer.trainer import Trainer
from utils.errors import ConfigError

log = get_logger()
#: The figures that each epoch's validation reports; test.py reports all of them.
SHOWN = ("AP", "AP50", "AP75")
PICTURES = 4
#: What the end of an epoch changes in a checkpoint; a run that resumes within that epoch needs the earlier values.
JUDGED = ("batch", "position", "monitor_best", "not_improved", "lr_scheduler")


class DetectionCurves(Curves):
    """Over steps: each of the losses. Each epoch: a few validation images with the model's detections."""

    parts: dict[str, torch.Tensor] = {}

    def first_batch(self, images: list[torch.Tensor]) -> None:
        """The first training images as the model gets them."""
        if self.run.writer and self.run.options["image_grid"]:
            for i, image in enumerate(images[:PICTURES]):
                self.run.writer.add_image(f"input/{i}", as_picture(image), 0, dataformats="HWC")

    def step_taken(self, outputs: dict[str, torch.Tensor], labels: None, gradient_norm: torch.Tensor) -> None:
        self.gradient_norm, self.parts = gradient_norm, outputs

    def log_step(self, step: int) -> None:
        super().log_step(step)
        for name, value in self.parts.items():
            if name != "loss":
                self.run.writer.add_scalar(f"step/{name}", float(value), step)

    def epoch_ended(self, epoch: int, figures: dict[str, float | None]) -> None:
        super().epoch_ended(epoch, figures)
        run, loader = self.run, self.run.valid_loader or self.run.train_loader
        if not run.writer or not run.options["image_grid"]:
            return
        model = run.judged_model.eval()
        for i in range(min(PICTURES, loader.n_samples)):
            picture = loader.raw_image(i)
            image = to_tensor(picture).to(run.device)
            with torch.no_grad(), autocast(run.device, run.amp):
                found = model([image])["detections"][0]
            drawn = draw_detections(picture, found, loader.class_names)
            run.writer.add_image(f"detections/{i}", drawn, epoch, dataformats="HWC")
        run.model.train()


class DetectionTrainer(Trainer):
    """A Trainer for models that compute their own losses (`loss` and its parts) and are scored by box and mask AP.

    With `trainer.iterations` the run ends after that many optimizer steps, in the middle of an epoch if need be (or
    after `trainer.epochs`, if that is less). The shortened epoch is validated like any other; a run that resumes with
    more iterations continues within it, as if it had never been cut short.
    """

    hook_table = {**HOOKS, "Curves": DetectionCurves}

    def __init__(self, model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer,
                 config: dict[str, Any], **more: Any):
        super().__init__(model, criterion, optimizer, config, **more)
        self.metrics = self.batch_metrics = {}
        self.iterations: int | None = self.options["iterations"]
        self.steps_an_epoch = self.steps_per_epoch
        self.cut: dict[str, Any] | None = None      # if `iterations` cut an epoch short: its state before validation
        if self.iterations:
            needed = math.ceil(self.iterations / self.steps_an_epoch)
            if needed > self.epochs:
                log.warning("trainer.epochs: %d epochs of %d steps end before trainer.iterations (%d)", self.epochs,
                            self.steps_an_epoch, self.iterations)
            self.epochs = min(self.epochs, needed)

    def compute(self, part: Part, whole: Any) -> tuple[torch.Tensor, dict[str, Any], dict[str, Any]]:
        """The detector's own losses: `loss` and its parts. images: list of [3, H, W]; labels: see the loaders."""
        losses = self.step_model(part.images, part.labels)
        figures = {name: value.detach() for name, value in losses.items()}
        return losses["loss"], figures, figures

    def _start_epoch(self, epoch: int, start_batch: int) -> None:
        if self.iterations:
            had = self.start_offset // self.train_loader.batch_size if epoch == self.start_epoch else 0
            left = self.iterations - (epoch - 1) * self.steps_an_epoch
            self.train_loader.batch_limit = left * self.accumulate - had
        super()._start_epoch(epoch, start_batch)

    def train_epoch(self, epoch: int, start_batch: int) -> dict[str, float] | None:
        """See Trainer."""
        trained = super().train_epoch(epoch, start_batch)
        if trained is not None and self.train_loader.is_cut:
            inside = super().state(epoch, self.batches_done)
            self.cut = {**{key: inside[key] for key in JUDGED}, "param_groups": inside["optimizer"]["param_groups"]}
        return trained

    # ------------------------------------------------------------------ going on

    def state(self, epoch: int, batch: int | None) -> dict[str, Any]:
        """See Resumable; if `iterations` cut the epoch short, `cut` is what a run that resumes
        within it needs instead."""
        state = super().state(epoch, batch)
        return {**state, "cut": self.cut} if batch is None and self.cut else state

    def resume(self, checkpoint: dict[str, Any], path: Path | None = None) -> None:
        """See Resumable; with more iterations than before, resume within the epoch that was cut short."""
        super().resume(self._inside_cut(checkpoint, str(path or "the checkpoint")), path)

    def _inside_cut(self, checkpoint: dict[str, Any], name: str) -> dict[str, Any]:
        """The checkpoint as one from the middle of its epoch, if `iterations` cut that short and now allows more steps.
        Raises ConfigError if it is an older version's, from which the place can't be told."""
        steps, epoch = checkpoint.get("global_step"), checkpoint.get("epoch")
        if checkpoint.get("batch") is not None or not steps or steps >= (self.iterations or math.inf):
            return checkpoint
        if checkpoint.get("cut"):
            cut = {**checkpoint["cut"]}
            return {**checkpoint, "optimizer": {**checkpoint["optimizer"], "param_groups": cut.pop("param_groups")},
                    **cut}
        saved = checkpoint.get("config") or {}
        options, args = saved.get("trainer") or {}, (saved.get("data_loader") or {}).get("args") or {}
        if steps != options.get("iterations") or not isinstance(epoch, int):
            return checkpoint
        # An older version saved such an epoch as complete: the number of steps tells.
        loader = self.train_loader
        for key, before, now in (("data_loader.args.batch_size", args.get("batch_size"), loader.batch_size),
                                 ("trainer.accumulate", options.get("accumulate"), self.accumulate)):
            if before not in (None, now):
                raise ConfigError(f"{key}: {now}, but {name} was cut short by trainer.iterations, maybe inside epoch "
                                  f"{epoch}, with {before}; go on with {before}")
        done = steps - (epoch - 1) * self.steps_an_epoch
        return {**checkpoint, "batch": done * self.accumulate} if 0 < done < self.steps_an_epoch else checkpoint

    # ------------------------------------------------------------------ evaluation

    def evaluate_split(self, loader: Any, validating: bool, **more: Any) -> dict[str, Any] | None:
        """Box and mask AP. There is no validation loss: for it, detectors would sample regions at random."""
        return evaluate_detector(self.judged_model, loader, groups=self.config.get("groups"),
                                 cls_num_list=self.train_loader.cls_num_list, **more)

    def shown(self, result: dict[str, Any]) -> dict[str, float | None]:
        names = [f"{kind}_{name}" for kind in KINDS for name in SHOWN]
        return {name: result[name] for name in dict.fromkeys((*names, self.monitor.removeprefix("val_")))
                if name in result}
