"""The course of a run: epochs, validation, keeping the best weights, checkpoints, stopping, resuming.

What happens within an epoch is left to subclasses (`train_epoch`, `validate`).
"""
from __future__ import annotations

import contextlib
import math
import shlex
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.epoch_clock import EpochClock
from base.monitor import parse_monitor
from base.resumable import Resumable
from base.run_paths import RunPaths
from base.stop import StopRequest
from logger.log import get_logger, log_to_file
from logger.metrics_csv import MetricsCSV
from logger.tensorboard import make_writer
from logger.text import duration
from utils import dist
from utils.config.outside import outside_flags
from utils.config.schema import TRAINER, defaults
from utils.device import peak_memory
from utils.errors import ConfigError, RunError
from utils.files import write_json

log = get_logger()


class BaseTrainer(Resumable):
    """Runs epochs 1 to `trainer.epochs` and writes checkpoints, metrics.csv, TensorBoard events and a log.

    Args:
        model: the plain model (not wrapped for data parallel training), on `device`.
        optimizer, lr_scheduler: the schedule may be None; its `unit` says when it steps (epoch, step, figure).
        config: the effective config, saved with the run and in each checkpoint.
        train_loader, valid_loader: see `base.BaseDataLoader`; `valid_loader` may be None.
        paths: the run's folders; None: nothing is written at all (a dry run).
        device: where the model is.
        data_facts: plain data about the data set, kept in checkpoints so that the model can be used without the data.
        stop: the listener for SIGTERM and SIGINT; by default one that listens during `train` only.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], *,
                 train_loader: Any, valid_loader: Any = None, lr_scheduler: Any = None, paths: RunPaths | None = None,
                 device: torch.device | str = "cpu", data_facts: dict[str, Any] | None = None,
                 stop: StopRequest | None = None):
        self.model, self.optimizer, self.lr_scheduler = model, optimizer, lr_scheduler
        self.config, self.options = config, defaults(TRAINER, config["trainer"])
        self.train_loader, self.valid_loader = train_loader, valid_loader
        self.paths, self.device = paths, torch.device(device)
        self.data_facts = data_facts or {}

        self.epochs: int = self.options["epochs"]
        self.save_period: int = self.options["save_period"]
        self.keep_last: int | None = self.options["keep_last"]
        self.monitor_mode, self.monitor = parse_monitor(self.options["monitor"], self.options["early_stop"])
        self.early_stop: float = self.options["early_stop"] or math.inf
        self.best: float | None = None
        self.not_improved, self.told = 0, False      # told: warned that the monitored figure is unknown
        self.frozen_until: int | None = None         # the last epoch before `trainer.freeze` thaws
        self.start_epoch, self.start_batch, self.global_step, self.batches_done = 1, 0, 0, 0
        self.start_offset = 0        # images of the first epoch that were done in batches of another size
        self.last_epoch = 0          # the last complete epoch
        self.epoch_lr: float | None = None  # learning rate at the epoch's beginning
        self.finished = True         # False if a stop request ended the run before its last epoch was done
        self.resumed_inside = False  # in mid-epoch: the epoch's checkpoint must be replaced at its end
        self.resumed_from: Path | None = None
        self.scaler = None
        self.clock = EpochClock()
        #: train.py passes its own, which listens from the program's start.
        self.stop = StopRequest() if stop is None else stop
        self.writer: Any = make_writer(None)
        self.is_main = dist.is_main()

    # ------------------------------------------------------------------ what a subclass implements

    @abstractmethod
    def train_epoch(self, epoch: int, start_batch: int) -> dict[str, float] | None:
        """Train one epoch from batch `start_batch` on. Returns its figures, or None if a stop was requested within it.

        Sets `batches_done`.
        """

    @abstractmethod
    def validate(self, epoch: int) -> dict[str, float | None] | None:
        """Validation figures, without the `val_` prefix; None if a stop was requested before the end.

        The same on every rank. Draws no random numbers, so that it can be repeated after a stop.
        """

    def log_epoch(self, epoch: int, figures: dict[str, float | None]) -> None:
        """Write more than scalars to TensorBoard (histograms, images); called on rank 0 only."""

    # ------------------------------------------------------------------ the run

    def train(self) -> Path | None:
        """Run to the end or until a stop is requested. Returns the last checkpoint's path, None if no epoch was left.
        Raises ValueError without `paths`, ConfigError or RunError if the run's files can't be written."""
        if self.paths is None:
            raise ValueError("train() needs paths; a dry run calls dry_run()")
        self._open_run()
        began = time.monotonic() - self.clock.prepared
        last = None
        # The order of these lines matters; each step is explained where it is defined.
        with self.stop:
            for epoch in self._epochs_left():
                start_batch = self.start_batch if epoch == self.start_epoch else 0
                self.clock.begin()
                if not (self.resumed_inside and epoch == self.start_epoch and self.epoch_lr is not None):
                    self.epoch_lr = self.optimizer.param_groups[0]["lr"]
                trained = self.train_epoch(epoch, start_batch)
                if trained is None:
                    return self._stopped(epoch)
                self.clock.trained()
                self.last_epoch = epoch
                self.sync_buffers()
                validated = self.validate(epoch) if self.valid_loader is not None else {}
                if validated is None:
                    return self._stopped(epoch)
                figures = {"loss": None, "val_loss": None, **trained,
                           **{f"val_{key}": value for key, value in validated.items()}}
                self._step_schedule(figures)
                ahead = self._ahead_of_best(figures)
                best = ahead >= 0       # on a tie the later epoch, which has trained for longer
                known = figures.get(self.monitor) is not None and epoch > (self.frozen_until or 0)  # else not counted
                self.not_improved = 0 if ahead > 0 or self.monitor_mode == "off" else self.not_improved + known
                with self._writing():
                    self._report(epoch, self.epoch_lr, figures, best)
                    self._report_time(epoch, start_batch)
                self.clock.end()
                ends = epoch == self.epochs or self.not_improved >= self.early_stop
                inside = self.resumed_inside and epoch == self.start_epoch
                if epoch % self.save_period == 0 or ends or inside:
                    last = self.save(epoch)
                if best:
                    self.save(epoch, self.paths.best)
                self._drop_old(epoch)
                if self.stop.agreed(self.device, True) and not ends:
                    return self._stopped(epoch, last if last == self.paths.checkpoint(epoch) else None, complete=True)
                if ends and epoch < self.epochs:
                    log.info("early stop: %s hasn't improved for %d epochs", self.monitor, self.not_improved)
                if ends:
                    break
        if last is not None:
            peak = peak_memory(self.device)
            log.info("trained in %s%s", duration(time.monotonic() - began),
                     f", with at most {peak / 2**30:.1f} GiB of memory" if peak else "")
        elif self.not_improved >= self.early_stop:
            log.info("nothing left to train: %s hasn't improved for %d epochs (trainer.early_stop is %d)", self.monitor,
                     self.not_improved, self.early_stop)
        else:
            log.info("nothing left to train: the checkpoint is of epoch %d of %d; --epochs N trains longer",
                     self.start_epoch - 1, self.epochs)
        return last

    def close(self) -> None:
        """Close the TensorBoard writer."""
        self.writer.close()

    def dry_run(self) -> None:
        """One training and one validation step; writes nothing."""
        raise NotImplementedError

    def sync_buffers(self) -> None:
        """Copy rank 0's buffers (norm statistics) to all ranks, so that what is validated is what is saved."""
        if dist.world_size() > 1:
            for model in dict.fromkeys((self.model, self.judged_model)):
                for buffer in model.buffers():
                    torch.distributed.broadcast(buffer, 0)

    # ------------------------------------------------------------------ parts of it

    def _open_run(self) -> None:
        if dist.on_main(self._open_files):
            self.best, self.not_improved = None, 0

    def _open_files(self) -> bool:
        """Create the run's folders and logs (rank 0). Returns whether the best figure must start over
        (`_leave_course`). Raises ConfigError if they can't be written."""
        self.paths.create()
        try:
            log_to_file(self.paths.log)
            self.csv = MetricsCSV(self.paths.log / "metrics.csv", self.start_epoch - 1)
            self.times = MetricsCSV(self.paths.log / "timing.csv", self.start_epoch - 1)
            write_json(self.paths.config, self.config)
            self.writer = make_writer(self.paths.log, self.options["tensorboard"],
                                      self.start_epoch - 1, self.global_step)
            best_is_gone = bool(self._epochs_left()) and self._leave_course(self.csv.rows)
        except OSError as error:
            raise ConfigError(f"trainer.save_dir: can't write in {error.filename or self.paths.models}: "
                              f"{error.strerror}") from None
        for half in self.paths.models.glob(".*.pth.*.tmp"):  # left behind by a killed run
            half.unlink(missing_ok=True)
        return best_is_gone

    def _epochs_left(self) -> range:
        first = self.start_epoch
        return range(first, first if self.not_improved >= self.early_stop else self.epochs + 1)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Around code that writes logs: an OSError (a full disk) becomes a RunError of one line."""
        try:
            yield
        except OSError as error:
            raise RunError(f"can't write {error.filename or self.paths.log}: {error.strerror}; checkpoints are "
                           f"intact, the newest is {self._newest()}") from None

    def _step_schedule(self, figures: dict[str, Any]) -> None:
        unit = getattr(self.lr_scheduler, "unit", "epoch")
        if unit == "figure":
            value = figures.get(self.monitor) if self.monitor_mode != "off" else figures.get("val_loss")
            value = figures["loss"] if value is None and self.lr_scheduler.mode == "min" else value
            if value is not None:
                self.lr_scheduler.step(value)
        elif self.lr_scheduler is not None and unit == "epoch":
            self.lr_scheduler.step()

    def _report(self, epoch: int, lr: float, figures: dict[str, Any], best: bool) -> None:
        """Report an epoch: one line of log, one row in metrics.csv, one point per figure in TensorBoard."""
        if not self.is_main:
            return
        seconds, _ = self.clock.spent
        left = seconds * (self.epochs - epoch)    # judged by this epoch alone: epochs on features take less
        shown = "  ".join(f"{key} {value:.4f}" for key, value in figures.items()
                          if value is not None and not key.endswith(("shot_acc", "class_mean_acc")))
        groups = [figures.get(f"val_{g}_shot_acc") for g in ("many", "medium", "few")]
        if any(v is not None for v in groups):
            shown += "  many/medium/few " + "/".join("-" if v is None else f"{v:.3f}" for v in groups)
        ending = f"  {duration(left)} left" if epoch < self.epochs else ""
        log.info("epoch %d/%d  lr %.4g  %s  [%s%s]%s", epoch, self.epochs, lr, shown, duration(seconds), ending,
                 "  best" if best else "")
        self.csv.append({"epoch": epoch, "lr": lr, **figures})
        self.writer.add_scalar("lr", lr, epoch)
        for key, value in figures.items():
            if value is not None:
                tag = f"{key[4:]}/val" if key.startswith("val_") else f"{key}/train"
                self.writer.add_scalar(tag, value, epoch)
        self.log_epoch(epoch, figures)
        self.writer.flush()

    def _report_time(self, epoch: int, start_batch: int) -> None:
        """Write a row of timing.csv, which `tools.compare` shows as wall time and images/s. It is a separate file
        because metrics.csv is the same for the same seed, which times never are."""
        if self.is_main:
            seconds, trained = self.clock.spent
            done, loader = 0, self.train_loader
            if self.clock.earlier is None:      # then neither are the seconds that these images took
                done = loader.images_done(start_batch)
            images = loader.images_done(len(loader)) - done
            self.times.append({"epoch": epoch, "seconds": round(seconds, 3),
                               "images_per_second": round(images / max(trained, 1e-9), 2) if images else None})

    def _ahead_of_best(self, figures: dict[str, Any]) -> float:
        """How much the monitored figure improves on the best so far, which it then replaces: 0 if equal, negative if
        worse or unknown."""
        if self.monitor_mode == "off":
            return -math.inf
        if (unseen := self.valid_loader is None and self.monitor.startswith("val_")) or self.monitor not in figures:
            if unseen:
                log.warning("trainer.monitor: no validation split, so %s isn't known; nothing is monitored",
                            self.monitor)
            else:
                log.warning("trainer.monitor: no figure is named %s (there are %s); nothing is monitored",
                            self.monitor, ", ".join(figures))
            self.monitor_mode = "off"
            return -math.inf
        value = figures[self.monitor]
        if value is None and not self.told:
            self.told = True
            log.warning("trainer.monitor: %s isn't known: no image counts for it; such epochs are neither better nor "
                        "worse", self.monitor)
        if value is None or math.isnan(value):
            return -math.inf
        ahead = math.inf if self.best is None else value - self.best
        if self.best is not None and self.monitor_mode == "min":
            ahead = -ahead
        if ahead > 0:
            self.best = value
        return ahead

    def _stopped(self, epoch: int, saved: Path | None = None, complete: bool = False) -> Path:
        path = saved or self.save(epoch, batch=None if complete else self.batches_done)
        self.finished = False
        where = f"after epoch {epoch}" if complete else (
            f"in epoch {epoch}, after {self.train_loader.images_done(self.batches_done)} of its "
            f"{self.train_loader.epoch_size} images")
        log.info("stopped on request %s; go on with: %s -r %s%s", where, dist.command("train.py"),
                 shlex.quote(str(path)), outside_flags(self.config))
        self.writer.close()
        return path
