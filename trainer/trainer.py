"""One epoch of training, and evaluation."""
from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from base.freezing import freeze_plan
from logger.log import get_logger
from logger.progress import progress_bar
from model.native import winograd
from trainer.batch_of_one import check_least_share
from trainer.cached import CachedFeatures, OnFeatures
from trainer.evaluate import evaluate, further, with_all_experts
from trainer.precision import in_float32
from trainer.schedules import bring_to
from trainer.step import Part, StepTrainer
from utils import dist
from utils.errors import ConfigError

log = get_logger()

#: Between two lines of steps at least, in seconds, without a terminal and if `trainer.log_step` isn't set.
LINE_SECONDS = 5.0


class Trainer(StepTrainer):
    """Trains one model with one criterion, epoch by epoch; see StepTrainer."""

    #: The figures of a validation pass that are reported besides the loss and the config's metrics.
    kept_figures = ("many_shot_acc", "medium_shot_acc", "few_shot_acc", "class_mean_acc")

    def __init__(self, model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer,
                 config: dict[str, Any], **more: Any):
        super().__init__(model, criterion, optimizer, config, **more)
        plan = freeze_plan(self.options["freeze"])
        self.frozen_until = plan and plan.until
        self.cached = CachedFeatures.wanted(self.options, self.model, self.train_loader, self.valid_loader,
                                            teacher=self.teacher)
        self.on_features = False
        self.accuracy_so_far: float | None = None
        self.next_line = 0.0
        size = self.data_facts.get("preprocess", {}).get("image_size")
        if self.train_loader.task == "classification" and size is not None:
            check_least_share(self.model, self.train_loader, size)

    # ------------------------------------------------------------------ one epoch

    def train_epoch(self, epoch: int, start_batch: int) -> dict[str, float] | None:
        """See BaseTrainer. Figures are read from the device only every `trainer.log_step` batches."""
        self._start_epoch(epoch, start_batch)
        total = len(self.train_loader)  # without its beginning if batches of another size covered that
        pending: list[torch.Tensor] = []
        self.batches_done = start_batch
        if self.stop.agreed(self.device, True) or (self.on_features and not self.prepare_features()):
            return None
        loader = self.train_loader
        if self.on_features:
            loader = self.cached.train
            loader.set_epoch(epoch, start_batch, self.train_loader.offset)
        began, images_seen = time.monotonic(), 0
        parts: list[Part] = []
        with progress_bar(total, self.shows_progress, desc=f"epoch {epoch}/{self.epochs}", initial=start_batch) as bar:
            for batch, (images, labels) in enumerate(loader, start_batch):
                if self.global_step == 0 and not parts and not self.on_features:
                    for hook in self.hooks:
                        hook.first_batch(images)
                parts.append(Part(images, labels, *self.train_loader.share(batch)))
                if len(parts) < self.accumulate and batch + 1 < total:
                    continue
                figures = self.step(parts)
                self.means.add(figures, sum(part.own for part in parts) if self.step_was_good else 0)
                pending.append(figures["loss"])
                images_seen += sum(part.everywhere for part in parts)
                self.global_step += 1
                self.batches_done = batch + 1
                bar.update(len(parts))
                parts = []
                reads = (batch + 1) % self.log_step < self.accumulate or batch + 1 == total
                if reads:
                    self._log_step(epoch, batch + 1, total, pending, images_seen, began, bar)
                if self.stop.agreed(self.device, reads):
                    if pending:  # check that what will be saved is finite
                        self._log_step(epoch, batch + 1, total, pending, images_seen, began, bar)
                    return None
        for hook in self.hooks:
            hook.epoch_trained(epoch)
        # Whole-split metrics are validation's alone. Without validation its metrics still get their columns.
        return {**self.means.read(reduce=True),
                **{name: None for name in self.metrics if name not in self.batch_metrics},
                **{f"val_{name}": None for name in self.metrics if self.valid_loader is None}}

    def _start_epoch(self, epoch: int, start_batch: int) -> None:
        self.epoch = epoch
        self._choose_phase(epoch)
        self.model.train()
        self.criterion.train()
        if hasattr(self.criterion, "set_epoch"):  # a user's plain module may lack it
            self.criterion.set_epoch(epoch)
        offset = self.start_offset if epoch == self.start_epoch else 0
        self.train_loader.set_epoch(epoch, start_batch, offset)
        self.bad_step = torch.full((), -1, dtype=torch.long, device=self.device)
        if start_batch == 0 and not offset:
            self.means.reset()
        for hook in self.hooks:
            hook.epoch_begins(epoch)

    def _choose_phase(self, epoch: int) -> None:
        """Choose whether the epoch trains on features or on images, and thaw what `trainer.freeze` held
        back if it is time."""
        thaws = self.frozen_until is not None and epoch > self.frozen_until and bool(self.model.waiting)
        # A dry run has no folder for features.
        features = self.cached is not None and self.paths is not None and (
            self.frozen_until is None or epoch <= self.frozen_until)
        if thaws:
            before = self.model.num_parameters(trainable_only=True)
            self.model.thaw()
            log.info("epoch %d: thawed, %s parameters are trained instead of %s%s%s", epoch,
                     f"{self.model.num_parameters(trainable_only=True):,}", f"{before:,}",
                     ", on images from here on" if self.cached else "", "" if self.accuracy_so_far is None else
                     f"; validation accuracy so far: {100 * self.accuracy_so_far:.1f} %")
        if thaws or features != self.on_features:
            self.rewrap(OnFeatures(self.model) if features else self.model)
        self.on_features = features

    def prepare_features(self) -> bool:
        """Open the features to train on, computing them if need be. Returns False if a stop was requested meanwhile."""
        return self.cached.prepare(
            self.model, self.paths.models / "features", self.amp, lambda: self.stop.agreed(self.device, True),
            self.shows_progress)

    @property
    def shows_progress(self) -> bool:
        """Whether progress bars are wanted; they are shown on terminals only."""
        return bool(self.options["progress"]) and self.options["verbosity"] > 0

    def _log_step(self, epoch: int, done: int, total: int, pending: list[torch.Tensor], images: int, began: float,
                  bar: Any) -> None:
        """Read and log the last steps' figures: the one place where the host waits for the device. All ranks call it.

        images: of all ranks, since the monotonic time `began`."""
        losses = torch.stack(pending).tolist()
        pending.clear()
        speed = images / (time.monotonic() - began)
        bad = -1
        if self.device.type == "cuda":
            if dist.world_size() > 1:   # a rank that ended alone would leave the others waiting
                torch.distributed.all_reduce(self.bad_step, torch.distributed.ReduceOp.MAX)
            bad = int(self.bad_step)
        if bad >= 0:
            self._nonfinite(bad)
        bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed:.0f} images/s", refresh=False)
        if bar.disable and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + (0 if self.options["log_step"] else LINE_SECONDS)
            log.debug("epoch %d  step %d/%d  loss %.4f  %.0f images/s", epoch, done, total, losses[-1], speed)
        if self.is_main and self.writer:
            first = self.global_step - len(losses) + 1
            for offset, value in enumerate(losses):
                self.writer.add_scalar("step/loss", value, first + offset)
            self.writer.add_scalar("step/lr", self.optimizer.param_groups[0]["lr"], self.global_step)
            self.writer.add_scalar("step/images_per_second", speed, self.global_step)
            for hook in self.hooks:
                hook.log_step(self.global_step)

    def evaluate(self, loader: Any, *, validating: bool = False, **more: Any) -> dict[str, Any] | None:
        """The figures on a split, over all ranks, of the model that is saved (unwrapped); None if `stop` ended it.

        validating: add the criterion's loss, in the precision of training and with its compiled layers; otherwise
        without autocast. The config's metrics are added either way. more: see `trainer.evaluate.evaluate`.
        """
        with winograd.validating(validating):
            return self.evaluate_split(loader, validating, amp=self.amp if validating else "off", **more)

    def evaluate_split(self, loader: Any, validating: bool, **more: Any) -> dict[str, Any] | None:
        """What `evaluate` returns; subclasses may override it."""
        if validating:
            more.update(criterion=self.criterion, metrics=self.metrics)
        else:
            more.update(metrics=further(self.metrics))
        model = self.judged_model
        if validating and self.on_features and self.cached.valid is not None:
            model, loader = OnFeatures(model), self.cached.valid
        return evaluate(model, loader, groups=self.config.get("groups"), memory_format=self.memory_format, **more)

    def validate(self, epoch: int) -> dict[str, float | None] | None:
        """See BaseTrainer."""
        result = self.evaluate(self.valid_loader, validating=True,
                               stop=lambda batch: self.stop.agreed(self.device, batch % 10 == 0))
        if result is None:
            return None
        self.accuracy_so_far = result.get("accuracy")
        return self.shown(result)

    def shown(self, result: dict[str, Any]) -> dict[str, float | None]:
        """The figures of a validation pass that go into the log and metrics.csv."""
        return {key: result[key] for key in dict.fromkeys(("loss", *self.metrics, *self.kept_figures))
                if key in result}

    def test(self, loader: Any, keep: bool = False) -> dict[str, Any]:
        """The figures of the present weights on `loader`'s split, in float32 as in test.py. keep: also per-image
        results, see `trainer.evaluate.evaluate`."""
        with in_float32():
            result = self.evaluate(loader, keep=keep)
            return with_all_experts(self.judged_model, loader, result, groups=self.config.get("groups"), keep=keep,
                                    amp="off", memory_format=self.memory_format)

    @property
    def wants_images(self) -> bool:
        """Whether a hook needs the test split's per-image predictions at the run's end."""
        return any(hook.wants_images for hook in self.hooks)

    def run_ended(self, result: dict[str, Any]) -> None:
        """Call the hooks at the run's end. result: the test split's figures."""
        for hook in self.hooks:
            hook.run_ended(result)

    def dry_run(self) -> None:
        """One training step and one validation step; writes nothing. Raises ConfigError if the loss isn't finite."""
        self._start_epoch(1, 0)
        images, labels = next(iter(self.train_loader))
        figures = self.step([Part(images, labels, *self.train_loader.share(0))])
        log.info("dry run: a training step on %d images, loss %.4f", len(images), float(figures["loss"]))
        if not torch.isfinite(figures["loss"]):
            raise ConfigError("the first training step's loss isn't finite; try a smaller --lr")
        if self.valid_loader is not None:
            result = self.evaluate(self.valid_loader, validating=True, max_batches=1)
            log.info("dry run: a validation step on %d images%s", result["n_samples"],
                     f", loss {result['loss']:.4f}" if "loss" in result else "")

    # ------------------------------------------------------------------ around it

    def bring_schedule_to(self, calls: int, saved: dict[str, Any] | None) -> None:
        bring_to(self.lr_scheduler, calls, saved)

    def extra_state(self) -> dict[str, Any]:
        states = {hook.key: hook.state_dict() for hook in self.hooks if hook.key}
        so_far = {} if self.frozen_until is None else {"accuracy_so_far": self.accuracy_so_far}
        return {"means": self.means.state_dict(reduce=True), "skipped": self.skipped, "hooks": states, **so_far}

    def load_extra_state(self, state: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        self.means.load_state_dict(state["means"])
        self.skipped, self.accuracy_so_far = state["skipped"], state.get("accuracy_so_far")
        for hook in self.hooks:
            if hook.key in (state.get("hooks") or {}):
                hook.load_state_dict(state["hooks"][hook.key], checkpoint)

    def log_epoch(self, epoch: int, figures: dict[str, float | None]) -> None:
        for hook in self.hooks:
            hook.epoch_ended(epoch, figures)

