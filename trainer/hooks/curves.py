"""What a run shows in TensorBoard beside its scalars: gradient norms, NBN's scales, inputs, histograms, figures."""
from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from logger.figures.facts import BY_IMAGE, RunFacts
from logger.log import get_logger
from logger.metrics_csv import read_table
from trainer.hooks.base import Hook, Run
from utils import dist

log = get_logger()


class Curves(Hook):
    """Over steps: the gradient's norm and NBN's scales. Over epochs: weight histograms. Once: the config, and a grid of
    the first training batch as the model sees it, with the normalisation undone."""

    def __init__(self, run: Run):
        super().__init__(run)
        self.gradient_norm: torch.Tensor | None = None

    @classmethod
    def wanted(cls, options: dict[str, Any]) -> bool:
        return True

    def first_batch(self, images: torch.Tensor) -> None:
        if not self.run.writer or not self.run.options["image_grid"]:
            return
        loader = self.run.train_loader
        shown = images[:32].detach().float().cpu()
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (loader.mean, loader.std))
        self.run.writer.add_images("input", (shown * std + mean).clamp(0, 1), 0)  # eight per row

    def step_taken(self, outputs: dict[str, Any], labels: torch.Tensor | None, gradient_norm: torch.Tensor) -> None:
        self.gradient_norm = gradient_norm

    def log_step(self, step: int) -> None:
        if self.gradient_norm is not None:
            self.run.writer.add_scalar("step/gradient_norm", float(self.gradient_norm), step)
        scales = self.run.model.nbn_scales
        for expert, value in enumerate(() if scales is None else scales.detach().tolist()):
            self.run.writer.add_scalar(f"step/nbn_scale/expert_{expert + 1}", value, step)

    def epoch_ended(self, epoch: int, figures: dict[str, float | None]) -> None:
        run, writer = self.run, self.run.writer
        if not writer:
            return
        if epoch == 1:
            writer.add_text("config", "    " + json.dumps(run.config, indent=2).replace("\n", "\n    "), 0)
        every = run.options["histograms"]
        every = max(1, run.epochs // 10) if every is None or every is True else int(every)
        if every and (epoch % every == 0 or epoch == run.epochs):
            for name, parameter in run.model.named_parameters():
                if parameter.requires_grad and torch.isfinite(parameter).all():
                    writer.add_histogram(name, parameter.detach().float().cpu(), epoch)


class Statistics(Hook):
    """`trainer.record_statistics`: the forward and backward statistics of one norm layer over steps."""

    def __init__(self, run: Run):
        super().__init__(run)
        from model.norm import StatisticsRecorder
        self.recorder = StatisticsRecorder(run.model, run.options["statistics_layer"])

    @classmethod
    def wanted(cls, options: dict[str, Any]) -> bool:
        return options["record_statistics"]

    def log_step(self, step: int) -> None:
        for name, value in self.recorder.read().items():
            self.run.writer.add_scalar(f"step/statistics/{name}", float(value), step)


class Figures(Hook):
    """`trainer.figures`: the report's figures of the test split, drawn when the run has trained its last epoch."""

    @classmethod
    def wanted(cls, options: dict[str, Any]) -> bool:
        return options["tensorboard"] and options["figures"]

    @property
    def wants_images(self) -> bool:
        return self.run.start_epoch <= self.run.last_epoch  # a run with nothing left to train already has them

    def run_ended(self, result: dict[str, Any]) -> None:
        if not self.wants_images:
            return
        result = {**result, **gather_images(result)}  # every rank takes part
        if not self.run.writer:
            return
        try:
            from logger.figures.drawings import figures_to_tensorboard
            figures_to_tensorboard(self.run.writer, self._facts(result), self.run.last_epoch)
        except Exception as error:  # nothing that goes wrong here may end the run
            log.warning("no figures in TensorBoard (trainer.figures): %s", " ".join(f"{error}".split()) or repr(error))

    def _facts(self, result: dict[str, Any]) -> RunFacts:
        """What the figures show about the run that has just ended; result: what `evaluate(keep=True)` returned."""
        from logger.figures.norms import norm_facts
        run, data = self.run, self.run.data_facts
        history = read_table(run.paths.log / "metrics.csv") if run.paths else []
        return RunFacts(run.config, result, list(data["cls_num_list"]), data.get("class_names"), history,
                        norm_facts(run.model))


def gather_images(result: dict[str, Any]) -> dict[str, Any]:
    """The per-image arrays (`BY_IMAGE`) that `evaluate(keep=True)` returned, joined over all ranks, as far as they are
    known. Every rank must call it."""
    kept = {key: result[key] for key in BY_IMAGE if key in result}
    if dist.world_size() == 1:
        return kept
    # A rank may have had no image at all.
    shares = [share for share in dist.gather_objects(kept) if len(share.get("labels", ()))]
    return {key: np.concatenate([share[key] for share in shares]) for key in BY_IMAGE
            if shares and all(key in share for share in shares)}
