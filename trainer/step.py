"""One step of training; subclasses change what goes into the forward pass."""
from __future__ import annotations

import contextlib
import inspect
from typing import Any, NamedTuple

import torch
from torch import nn

from base.base_trainer import BaseTrainer
from base.labels import WholeBatch, join_labels, plain_labels
from logger.log import get_logger
from trainer.batch_of_one import one_value_told
from trainer.compiling import choose_compiled, compile_layers
from trainer.evaluate import metrics_of
from trainer.hooks import HOOKS, make_hooks
from trainer.meters import Means
from trainer.optim.sam import SAM
from trainer.precision import autocast, choose_precision
from utils import dist
from utils.config.check import metric_kind
from utils.config.schema import TOP, defaults
from utils.errors import RunError

log = get_logger()


class DataParallel(nn.parallel.DistributedDataParallel):
    """torch's, except that it accepts SyncBatchNorm on CPU: torch's own works on GPUs only, ours on both."""

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        if next(module.parameters()).device.type != "cpu":
            super()._passing_sync_batchnorm_handle(module)


class Part(NamedTuple):
    """A loader's batch as a step gets it: images [N, 3, H, W], labels, the number of images that are this rank's own (0
    if it only borrows one, see `BaseDataLoader.share`), and the size of the batch over all ranks."""

    images: Any
    labels: Any
    own: int
    everywhere: int


class StepTrainer(BaseTrainer):
    """Takes optimizer steps on one model with one criterion.

    Args:
        criterion: called as `criterion(outputs, labels)` with the model's dict; its `set_epoch`, if any, once an epoch.
        teacher: a model whose logits join the outputs as `teacher` [N, C] (distillation), or None.
        Others as in BaseTrainer.
    """

    #: The built-in hooks, called around its steps and epochs.
    hook_table = HOOKS

    def __init__(self, model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer,
                 config: dict[str, Any], *, teacher: nn.Module | None = None, **base: Any):
        super().__init__(model, optimizer, config, **base)
        self.criterion = criterion.to(self.device)
        self.teacher = teacher
        self.metrics = metrics_of(defaults(TOP, config)["metrics"], self.monitor)
        self.batch_metrics = {name: value for name, value in self.metrics.items() if metric_kind(value) == "batch"}
        options = self.options
        self.amp, reason = choose_precision(options["amp"], self.device)
        if options["amp"] not in ("off", None, False):
            log.info("precision: %s (%s)", "float32" if self.amp == "off" else self.amp, reason)
        self.compiled = choose_compiled(options, self.model, self.device, self.amp,
                                        self.epochs * self.train_loader.epoch_size)
        self.memory_format = torch.channels_last if options["channels_last"] else torch.contiguous_format
        self.clip: float | None = options["clip_grad_norm"]
        self.log_step: int = options["log_step"] or max(1, int(len(self.train_loader) ** 0.5))
        self.on_nonfinite: str = options["on_nonfinite"]
        self.max_skipped: int = options["max_skipped"]
        self.skipped, self.step_was_good = 0, True
        #: False until the optimizer has stepped, which a loss scaler may skip (it waits for the device itself).
        self.weights_changed = False
        self.optimizer.register_step_post_hook(self._note_change)
        self.model.to(memory_format=self.memory_format)
        if options["bt_gather"]:
            self.model.gather_batches()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        if self.amp == "fp16":
            self.scaler = torch.amp.GradScaler(self.device.type)
        self.means = Means(self.device)
        self.accumulate: int = options["accumulate"]
        self.step_model = self._wrap(self.model)
        # After the wrapping, which gives every rank rank 0's weights: averages begin from them.
        self.hooks = make_hooks(self, options, self.hook_table)

    @property
    def judged_model(self) -> nn.Module:
        """What is validated, tested and saved as `state_dict`: the model that trains, or a hook's average of it."""
        return next((hook.judged for hook in self.hooks if hook.judged is not None), self.model)

    def rewrap(self, model: nn.Module) -> None:
        """From now on take the steps through `model`, which has the same parameters, but perhaps others of them
        trainable, or another forward pass. Averaging of gradients over ranks is set up anew."""
        before, self.step_model = self.step_model, None
        if isinstance(before, DataParallel):
            before._remove_autograd_hooks()     # or gradients would be averaged twice
        del before
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.step_model = self._wrap(model)

    def _wrap(self, model: nn.Module) -> nn.Module:
        """The model as the step calls it: compiled, data parallel, or itself."""
        model = compile_layers(model, self.compiled)
        if dist.world_size() > 1:
            # Buffers are synced at each epoch's end (sync_buffers); until then a rank's norms see its own images only.
            known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.13
            model = DataParallel(
                model, device_ids=[self.device.index] if self.device.type == "cuda" else None, **{buffers: False},
                find_unused_parameters=not getattr(self.model, "uses_all_parameters", True))
        return model

    # ------------------------------------------------------------------ one step

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """The model's dict for a training batch (images [N, 3, H, W], labels [N])."""
        with one_value_told():
            outputs = self.step_model(images)
        if self.teacher is not None:
            with torch.no_grad():
                outputs["teacher"] = self.teacher(images)["output"]
        return outputs

    def step(self, parts: list[Part]) -> dict[str, torch.Tensor]:
        """One optimizer step on this rank's share of one or more batches (gradient accumulation); returns its figures
        as 0-d tensors on the device."""
        self._remember_buffers()
        self.weights_changed = False
        self.optimizer.zero_grad(set_to_none=True)
        loss, outputs, figures = self._backward(parts)
        norm = self._update(loss, parts)
        if getattr(self.lr_scheduler, "unit", "epoch") == "step":
            self.lr_scheduler.step()
        if self.weights_changed:
            for hook in self.hooks:
                hook.step_taken(outputs, plain_labels(parts[-1].labels), norm)
        return figures

    def _backward(self, parts: list[Part]) -> tuple[torch.Tensor, dict[str, Any], dict[str, torch.Tensor]]:
        """Forward and backward passes of the step's parts: (loss, the last part's outputs, figures).

        Each part's loss is weighted so that the gradient, averaged over ranks, is that of all images together.
        """
        everywhere, own = sum(part.everywhere for part in parts), sum(part.own for part in parts)
        ranks = dist.world_size()
        labels = None
        if ranks > 1 or len(parts) > 1:     # of its own images: another rank counts a borrowed one
            labels = join_labels([part.labels for part in parts if part.own] or [parts[-1].labels])
        total, means = 0.0, {}
        for number, part in enumerate(parts, 1):
            whole = None if labels is None else WholeBatch(labels, own, part.own, everywhere)
            # Gradients are averaged over ranks once per step, with the last part.
            quiet = ranks > 1 and number < len(parts)
            with self.step_model.no_sync() if quiet else contextlib.nullcontext():
                with autocast(self.device, self.amp):
                    loss, outputs, figures = self.compute(part, whole)
                weighted = loss if whole is None else loss * (part.own * ranks / everywhere)
                (weighted if self.scaler is None else self.scaler.scale(weighted)).backward()
            share = part.own / own if own else 1 / len(parts)
            total = loss.detach() if whole is None else total + loss.detach() * share
            for name, value in figures.items():
                means[name] = value if len(parts) == 1 else means.get(name, 0.0) + value * share
        return total, outputs, means

    def compute(self, part: Part, whole: WholeBatch | None) -> tuple[torch.Tensor, dict[str, Any], dict[str, Any]]:
        """(loss, the model's dict, figures) of a part, under autocast. whole: the step's batch, if the
        part isn't all of it."""
        # Features [N, E, D] have no memory format.
        images = part.images.contiguous(memory_format=self.memory_format) if part.images.ndim == 4 else part.images
        outputs = self.forward(images, part.labels)
        if whole is not None:  # class-weighted means are divided by the whole batch's weights
            outputs["whole"] = whole
        loss = outputs["loss"] if "loss" in outputs else self.criterion(outputs, part.labels)
        figures = {"loss": loss.detach()}
        with torch.no_grad():
            for name, function in self.batch_metrics.items():
                figures[name] = function(outputs["output"].detach(), plain_labels(part.labels))
        return loss, outputs, figures

    def _update(self, loss: torch.Tensor, parts: list[Part]) -> torch.Tensor:
        """Step the optimizer with the present gradients; returns their norm before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self._gradient_norm()
        self.step_was_good = self._is_good(loss, norm)
        sharp = isinstance(self.optimizer, SAM)
        # With a scaler: if the first gradient overflowed, the scaler will skip the step.
        if self.step_was_good and sharp and (self.scaler is None or bool(torch.isfinite(norm))):
            self._climb(parts)
        if self.step_was_good:
            if self.scaler is not None:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.optimizer.step()
        if sharp:
            self.optimizer.restore()  # in case the step was skipped
        return norm

    def _climb(self, parts: list[Part]) -> None:
        """SAM's second pass: the gradients where the loss nearby is highest. Norms keep the first pass's statistics."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self.optimizer.first_step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.update()  # the first pass's gradients are done with
        loss, _, _ = self._backward(parts)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        self._put_back(buffers)
        self.step_was_good = self._is_good(loss, self._gradient_norm())

    def _gradient_norm(self) -> torch.Tensor:
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, self.clip, norm)
        return norm

    def _is_good(self, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether loss and gradient are finite; if not, this step must not change the weights.

        On CPU every step is checked before the weights change. On a GPU the check would make the host wait at each
        step: with `on_nonfinite: stop` the first bad step is noted on the device and read at the next log step
        (checkpoints are only written after such a read); with `skip` that wait is the price.
        """
        value = loss.detach() if self.scaler is not None else loss.detach() + norm
        if self.device.type == "cuda" and self.on_nonfinite == "stop":
            here = torch.full_like(self.bad_step, self.global_step)
            self.bad_step = torch.where((self.bad_step < 0) & ~torch.isfinite(value), here, self.bad_step)
            return True
        if dist.world_size() > 1:
            # The gradients are averaged, so a bad one is bad everywhere; a bad loss may be one rank's alone.
            value = dist.all_reduce_sum(value.clone())
        if bool(torch.isfinite(value)):
            return True
        self._nonfinite(self.global_step, float(loss.detach()), float(norm))
        if self.scaler is not None:
            self.scaler.update()
        self._put_back(self.buffers_before)
        return False

    def _note_change(self, *_: Any) -> None:
        self.weights_changed = True

    def _remember_buffers(self) -> None:
        """With `on_nonfinite: skip`, keep the norms' statistics: a batch whose step is skipped mustn't spoil them."""
        self.buffers_before = [buffer.clone() for buffer in self.model.buffers()] if self.on_nonfinite == "skip" else []

    def _put_back(self, buffers: list[torch.Tensor]) -> None:
        """Restore the model's buffers from copies taken before; does nothing if the list is empty."""
        for buffer, before in zip(self.model.buffers(), buffers):
            buffer.copy_(before)

    def _nonfinite(self, step: int, loss: float | None = None, norm: float | None = None) -> None:
        where = (f"epoch {self.epoch}, step {step + 1}, lr {self.optimizer.param_groups[0]['lr']:.4g}"
                 + ("" if loss is None else f", loss {loss}, gradient norm {norm}"))
        if self.on_nonfinite == "skip":
            self.skipped += 1
            log.warning("skipped a step whose loss or gradient isn't finite (%s), %d so far", where, self.skipped)
            if self.skipped <= self.max_skipped:
                return
            raise RunError(f"more than trainer.max_skipped = {self.max_skipped} steps weren't finite ({where})")
        raise RunError(f"the loss or its gradient isn't finite at {where}; try a smaller --lr, trainer.clip_grad_norm "
                       f"or trainer.amp off. Last good checkpoint: {self._newest()}")
