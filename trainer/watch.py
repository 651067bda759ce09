"""What a run shows beside its scalars: the input grid, histograms, attention, norm statistics, NBN's scales."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from logger.figures.facts import BY_IMAGE
from logger.log import get_logger
from utils import dist
from utils.class_counts import FEW, GROUPS, MANY, shot_group
from utils.errors import ConfigError

if TYPE_CHECKING:
    from trainer.trainer import Trainer

log = get_logger()
MOST_ROWS = 240     # of the attention matrix; classes that are next to each other in frequency share one from there on


def gather_images(result: dict[str, Any]) -> dict[str, Any]:
    """What `evaluate(keep=True)` kept by image, of every rank's share: `BY_IMAGE` as far as they are known."""
    kept = {key: result[key] for key in BY_IMAGE if key in result}
    if dist.world_size() == 1:
        return kept
    shares: list[Any] = [None] * dist.world_size()
    torch.distributed.all_gather_object(shares, kept)
    shares = [share for share in shares if len(share.get("labels", ()))]  # a rank may have had no image at all
    return {key: np.concatenate([share[key] for share in shares]) for key in BY_IMAGE
            if shares and all(key in share for share in shares)}


class AttentionByClass:
    """Sums of the attention that images of one class pay to those of another, on the device, most frequent class first.

    Above MOST_ROWS classes, neighbours of one group share a row.
    """

    def __init__(self, counts: Sequence[int], groups: dict[str, float], device: torch.device):
        self.group_of = [shot_group(count, groups.get("many", MANY), groups.get("few", FEW)) for count in counts]
        order = sorted(range(len(counts)), key=lambda c: (GROUPS.index(self.group_of[c]), -counts[c]))
        together = -(-len(counts) // MOST_ROWS)
        self.rows: list[list[int]] = []                     # the classes of each row
        for group in GROUPS:
            members = [c for c in order if self.group_of[c] == group]
            self.rows += [members[i:i + together] for i in range(0, len(members), together)]
        row_of = torch.empty(len(counts), dtype=torch.long)
        for row, members in enumerate(self.rows):
            row_of[members] = row
        self.row_of = row_of.to(device)
        self.sums, self.pairs = torch.zeros(2, len(self.rows), len(self.rows), device=device)
        self.images = torch.zeros(len(self.rows), device=device)

    def add(self, weights: torch.Tensor, labels: torch.Tensor) -> None:
        """A batch. weights: [N, N], row i says how much image i looks at each; labels: [N]."""
        rows = torch.nn.functional.one_hot(self.row_of[labels], len(self.rows)).to(self.sums.dtype)
        images = rows.sum(0)
        self.sums += rows.T @ weights.to(self.sums.dtype) @ rows
        self.pairs += torch.outer(images, images)
        self.images += images

    def clear(self) -> None:
        for counter in (self.sums, self.pairs, self.images):
            counter.zero_()

    def relative(self) -> np.ndarray:
        """Mean attention of an image of one row to an image of another, over that of all pairs: 1 is even. [R, R], NaN
        for rows that never met."""
        even = self.sums.sum() / self.pairs.sum()
        return (self.sums / self.pairs / even).cpu().numpy()

    def shares(self) -> np.ndarray:
        """The share of its attention that an image of one group pays to each group's, [3, 3]; 0 without images."""
        member = np.array([[self.group_of[row[0]] == group for row in self.rows] for group in GROUPS], dtype=float)
        images = member @ self.images.cpu().numpy()
        return member @ self.sums.cpu().numpy() @ member.T / np.maximum(images, 1)[:, None]

    def labels(self, names: Sequence[str] | None) -> tuple[list[str], list[str]]:
        """Each row's name and group."""
        return ([str(names[row[0]] if names else row[0]) for row in self.rows],
                [self.group_of[row[0]] for row in self.rows])


class Watch:
    """Collects on the device during steps, draws at log steps and epoch ends. Everything off costs nothing."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.validated: dict[str, Any] = {}
        options = trainer.options
        self.gradient_norm: torch.Tensor | None = None
        self.recorder = None
        if options.get("record_statistics"):
            from model.norm import StatisticsRecorder
            self.recorder = StatisticsRecorder(trainer.model, options.get("statistics_layer"))
        self.block = None
        if options.get("log_batch_attention"):
            self.block = getattr(getattr(trainer.model, "backbone", None), "batchformer", None)
            if self.block is None:
                raise ConfigError("trainer.log_batch_attention: the model has no BatchFormer; set arch.args.add_bt 1")
            self.block.record = True
            self.attention = AttentionByClass(trainer.data_facts["cls_num_list"], trainer.config.get("groups") or {},
                                              trainer.device)

    # ------------------------------------------------------------------ steps

    def after_step(self, outputs: dict[str, Any], labels: torch.Tensor, norm: torch.Tensor) -> None:
        """Keep what the next log step will draw; no transfer to the host."""
        self.gradient_norm = norm
        if self.block is not None and self.block.last_attention is not None:
            weights = self.block.last_attention
            if weights.shape[0] == len(labels):  # the labels of other ranks' images aren't here
                self.attention.add(weights, labels)

    def log_step(self, step: int) -> None:
        """Draw the step's extras over optimizer steps."""
        writer = self.trainer.writer
        if self.gradient_norm is not None:
            writer.add_scalar("step/gradient_norm", float(self.gradient_norm), step)
        if self.recorder is not None:
            for name, value in self.recorder.read().items():
                writer.add_scalar(f"step/statistics/{name}", float(value), step)
        scale = getattr(getattr(self.trainer.model, "backbone", None), "scale_factor", None)
        if scale is not None:
            for expert, value in enumerate(scale.detach().tolist()):
                writer.add_scalar(f"step/nbn_scale/expert_{expert + 1}", value, step)

    # ------------------------------------------------------------------ epochs

    def input_grid(self, images: torch.Tensor) -> None:
        """The first training batch as the model sees it, colours put back."""
        if not self.trainer.is_main or self.trainer.options.get("image_grid") is False:
            return
        from torchvision.utils import make_grid
        loader = self.trainer.train_loader
        shown = images[:32].detach().float().cpu()
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (loader.mean, loader.std))
        self.trainer.writer.add_image("input", make_grid((shown * std + mean).clamp(0, 1), nrow=8), 0)

    def log_epoch(self, epoch: int) -> None:
        """Weight histograms ten times a run, attention and the class-by-class accuracy each epoch."""
        trainer, writer = self.trainer, self.trainer.writer
        if not writer:
            return
        if epoch == 1:
            import json
            writer.add_text("config", "    " + json.dumps(trainer.config, indent=2).replace("\n", "\n    "), 0)
        every = trainer.options.get("histograms")
        every = max(1, trainer.epochs // 10) if every is None or every is True else int(every)
        if every and (epoch % every == 0 or epoch == trainer.epochs):
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad and torch.isfinite(parameter).all():
                    writer.add_histogram(name, parameter.detach().float().cpu(), epoch)
        if self.block is not None:
            self._draw_attention(epoch)

    def _draw_attention(self, epoch: int) -> None:
        """How much an epoch's images attended to each other: shares by group, and class by class."""
        from logger.figures.classes import attention
        from logger.figures.style import to_array
        writer, shares = self.trainer.writer, self.attention.shares()
        for i, row in enumerate(GROUPS):
            for j, column in enumerate(GROUPS):
                writer.add_scalar(f"attention_{row}_to_{column}/train", float(shares[i, j]), epoch)
        names = self.trainer.data_facts["class_names"]
        figure = attention(self.attention.relative(), *self.attention.labels(names))
        writer.add_image("attention_by_class", to_array(figure), epoch, dataformats="HWC")
        self.attention.clear()

    # ------------------------------------------------------------------ the end

    @property
    def wants_figures(self) -> bool:
        """Whether `run_ended` will draw; a run that had nothing to train has its figures. The same on every rank."""
        options = self.trainer.options
        return bool(options.get("tensorboard", True) and options.get("figures", True)
                    and self.trainer.start_epoch <= self.trainer.last_epoch)

    def run_ended(self, result: dict[str, Any]) -> None:
        """Draw the report's figures of the test split. Every rank calls it; nothing that goes wrong ends the run.

        result: what `trainer.test` gave, with keep=True for all figures.
        """
        trainer = self.trainer
        if not self.wants_figures:
            return
        result = {**result, **gather_images(result)}
        if not trainer.writer:
            return
        try:
            from logger.figures.drawings import facts_of_training, figures_to_tensorboard
            figures_to_tensorboard(trainer.writer, facts_of_training(trainer, result), trainer.last_epoch)
        except Exception as error:
            log.warning("no figures in TensorBoard (trainer.figures): %s", " ".join(f"{error}".split()) or repr(error))
