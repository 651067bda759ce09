"""Finished and unfinished runs, read from their folders: config, figures, times. Nothing heavy is imported."""
from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from base.freezing import freeze_plan
from base.run_paths import CHECKPOINT, RunPaths, run_of
from logger.metrics_csv import read_table
from utils.class_counts import group_limits
from utils.config.read import read_json
from utils.errors import ConfigError

LOSSES = {"CrossEntropyLoss": "CE", "FocalLoss": "focal loss", "LDAMLoss": "LDAM", "RIDELoss": "RIDE",
          "RIDELossWithDistill": "RIDE + distillation", "BalancedSoftmaxLoss": "balanced softmax",
          "RIDEBalancedSoftmaxLoss": "RIDE, balanced softmax", "HCMLoss": "HCM",
          "LogitAdjustmentLoss": "logit adjustment", "LabelSmoothingLoss": "CE, label smoothing",
          "BalPoELoss": "BalPoE", "SADELoss": "SADE", "VSLoss": "VS", "GCLLoss": "GCL"}
NORMS = {"BatchNorm2d": "BN", "BatchRenorm": "BatchRenorm", "SyncBatchNorm": "SyncBN"}
MIXES = {"mixup": "mixup", "cutmix": "CutMix", "either": "mixup or CutMix"}
POLICIES = {"autoaugment": "AutoAugment", "randaugment": "RandAugment", "trivialaugment": "TrivialAugment"}
SAMPLERS = {"ClassBalanced": "class-balanced", "SquareRoot": "square-root", "ClassAware": "class-aware",
            "ProgressivelyBalanced": "progressively balanced"}
DATA = {"DigitsLT": "Digits-LT", "ImbalanceCIFAR100": "CIFAR-100-LT", "ImbalanceCIFAR10": "CIFAR-10-LT",
        "CIFAR100": "CIFAR-100", "ImageNetLT": "ImageNet-LT", "iNaturalist": "iNaturalist 2018",
        "PlacesLT": "Places-LT", "Coco": "COCO", "DigitScenes": "digit scenes"}
#: Checkpoints that a run rewrites as it goes on -> which weights they hold.
REWRITTEN = {"model_best.pth": "best epoch", "model_swa.pth": "mean of the last epochs"}


# ---------------------------------------------------------------------- what a config says, in a few words

def method_of(config: dict[str, Any]) -> str:
    """What was trained, as its authors call it: "RIDE, 3 experts + BatchFormer + NBN", "CE + cRT"."""
    arch, loss = config["arch"], config.get("loss") or {}
    args, loss_args = arch.get("args") or {}, loss.get("args") or {}
    routed = "EAModel" in arch["type"]
    name = LOSSES.get(loss.get("type"), str(loss.get("type") or "")) if not routed else "RIDE + EA"
    if name == "LDAM" and loss_args.get("reweight_epoch", -1) not in (None, -1):
        name = "LDAM-DRW"
    if name == LOSSES["RIDEBalancedSoftmaxLoss"] and loss_args.get("additional_diversity_factor") == 0:
        name = LOSSES["BalancedSoftmaxLoss"]
    experts = experts_of(config)
    if arch["type"].startswith("MaskRCNN"):
        name = "Mask R-CNN"
    parts = [f"{name}, {experts} experts" if experts > 1 else name]
    if args.get("add_bt"):
        parts.append("BatchFormer" if args["add_bt"] in (True, 1) else f"BatchFormer {args['add_bt']}")
    norm = norm_of(args.get("norm"))
    if norm:
        parts.append(norm)
    if config.get("load_crt"):
        parts.append("LWS" if args.get("classifier") == "lws" else "cRT")
    elif sampler_of(config) and not routed:
        parts.append(f"{sampler_of(config)} sampling")
    data = config["data_loader"].get("args") or {}
    parts += [MIXES.get((data.get("mix") or {}).get("type")), POLICIES.get(data.get("augment"))]
    kind = (config.get("optimizer") or {}).get("type")
    parts += [kind if kind in ("Muon", "SAM") else None, _pretraining(config)]
    return " + ".join(part for part in parts if part)


def _pretraining(config: dict[str, Any]) -> str:
    """How a pretrained network of timm's is trained: its tuning, "frozen backbone" or "fine-tuning"; else ""."""
    args, trainer = config["arch"].get("args") or {}, config.get("trainer") or {}
    if not args.get("model_name") or not (args.get("weights", True) or config.get("pretrained")):
        return ""
    if args.get("tuning"):
        return str(args["tuning"] if isinstance(args["tuning"], str) else args["tuning"].get("type"))
    try:
        plan = freeze_plan(trainer.get("freeze"))
    except ConfigError:
        plan = None
    whole = plan is not None and plan.what == "backbone" and (plan.until or math.inf) >= trainer.get("epochs", 0)
    return "frozen backbone" if whole else "fine-tuning"


def experts_of(config: dict[str, Any]) -> int:
    """How many experts the model has; 1 for a plain one."""
    return int((config["arch"].get("args") or {}).get("num_experts") or 1)


def norm_of(spec: Any) -> str:
    """A norm that isn't plain batch norm, with its normalisation batch size where that is set; else ""."""
    if not spec:
        return ""
    kind, args = (spec, {}) if isinstance(spec, str) else (spec.get("type", ""), spec.get("args") or {})
    size = args.get("normalization_batch_size")
    if kind == "BatchNorm2d" and not size:
        return ""
    return NORMS.get(kind, kind) + (f" by {size}" if size else "")


def sampler_of(config: dict[str, Any]) -> str:
    """The sampler's name where it isn't the plain one; else ""."""
    args = config["data_loader"].get("args") or {}
    spec = args.get("sampler")
    if spec:
        return SAMPLERS.get(spec if isinstance(spec, str) else spec.get("type"), "")
    return "class-balanced" if args.get("balanced") else ""


def data_of(config: dict[str, Any]) -> str:
    """The data set's name; for a user's own images, the folder's."""
    spec = config["data_loader"]
    args, kind = spec.get("args") or {}, spec["type"].removesuffix("DataLoader")
    if kind not in DATA:
        return Path(str(args.get("data_dir") or kind)).name
    factor = args.get("imb_factor")
    return DATA[kind] + (f" {factor:g}" if kind.startswith("Imbalance") and factor not in (None, 0.01) else "")


def model_of(config: dict[str, Any]) -> str:
    """The backbone: "ResNet32", "ResNeXt50", or the name of one of timm's."""
    name = (config["arch"].get("args") or {}).get("model_name")
    return name or config["arch"]["type"].removesuffix("Model").removesuffix("EA")


def other_evaluation(figures: dict[str, Any]) -> list[str]:
    """How the evaluation behind test.py's figures differed from that of the checkpoint as it is, apart from the
    classifier: `use_experts=2`, `calibrated`, `chosen on the test images`."""
    words = [str(change) for change in figures.get("changed") or ()]
    words += [f"prior {figures['prior']}"] if figures.get("prior") else []
    words += [word for key, word in (("calibration", "calibrated"), ("expert_weights", "learned expert weights"))
              if figures.get(key)]
    return words + ["chosen on the test images"] * (figures.get("chosen_on") == "test")


def evaluation_flags(figures: dict[str, Any]) -> str:
    """The flags of test.py that give such figures, ` --classifier la --tau 1`; "" for the checkpoint as it is."""
    tau = f" --tau {figures.get('tau', 0):g}"
    flags = {"ncm": f" --classifier ncm --feat_type {figures.get('feat_type', 'cl2n')}", "tau": tau,
             "la": f" --classifier la{tau}"}.get(figures.get("classifier", "joint"), "")
    flags += " --expert_weights learn" if figures.get("expert_weights") else ""
    flags += " --calibrate" if figures.get("calibration") else ""
    return flags + (f" --prior {shlex.quote(str(figures['prior']))}" if figures.get("prior") else "")


# ---------------------------------------------------------------------- a run's folder

@dataclass
class RunRecord:
    """A run's folder, read. `figures` has test_metrics.json's keys and is of `split`: "test", "val" or None (empty)."""

    paths: RunPaths
    config: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)
    split: str | None = None

    @property
    def name(self) -> str:
        """name/run_id, as the folders have it."""
        return f"{self.paths.models.parent.name}/{self.paths.models.name}"

    @property
    def method(self) -> str:
        """What was trained, and how it was evaluated where that differs from its plain evaluation."""
        classifier = self.figures.get("classifier", "joint")
        tau = self.figures.get("tau", 0)
        how = {"joint": "", "ncm": ", NCM", "tau": f", tau {tau:g}", "la": f", adjusted {tau:g}"}.get(classifier, "")
        return ", ".join([method_of(self.config) + how, *other_evaluation(self.figures)])

    @cached_property
    def origin(self) -> str | None:
        """The methods of the runs whose checkpoints this one began from or learns from, "CE"; None where it names none,
        or one without a run's config.json beside it."""
        return self._first[0]

    @property
    def trained_first(self) -> str | None:
        """What decides how the runs that `origin` names were trained, their seeds aside; None where it is None."""
        return self._first[1]

    @cached_property
    def _first(self) -> tuple[str | None, str | None]:
        files = [self.config.get(key) for key in ("load_crt", "pretrained", "distill_checkpoint")]
        try:
            if self.paths.origin.is_file():
                files.append(read_json(self.paths.origin, "origin").get("checkpoint"))
            found = [read_json(Path(file).with_name("config.json"), "config") for file in files if file]
            settings = [[data_of(config), (config.get("trainer") or {}).get("epochs"),
                         *map(config.get, ("arch", "optimizer", "lr_scheduler", "loss"))] for config in found]
            return " and ".join(map(method_of, found)) or None, json.dumps(settings, sort_keys=True) if found else None
        except (ConfigError, TypeError, ValueError, AttributeError, KeyError):
            return None, None

    def tell(self) -> None:
        """Compute everything that tables show of a run, as files changed by hand may hold anything. Raises TypeError,
        ValueError, AttributeError or KeyError where that fails."""
        _ = self.method, data_of(self.config), model_of(self.config), experts_of(self.config)
        if type(self.config.get("seed", 0)) is not int:
            raise TypeError(f"seed: must be a whole number, not {self.config['seed']!r}")
        _ = self.epochs_done < (self.config["trainer"].get("epochs") or 1)
        _ = group_limits(self.config.get("groups")), (self.figures.get("expert_share") or {}).get("all")

    @cached_property
    def history(self) -> list[dict[str, float | None]]:
        """metrics.csv: a dict an epoch; empty fields are None. [] where there is none or it can't be read."""
        return read_table(self.paths.log / "metrics.csv")

    @cached_property
    def times(self) -> list[dict[str, float | None]]:
        """timing.csv: epoch, seconds, images_per_second."""
        return read_table(self.paths.log / "timing.csv")

    @property
    def epochs_done(self) -> int:
        """Epochs in metrics.csv, else of the newest checkpoint; 0 where there is neither."""
        if self.history:
            return int(self.history[-1].get("epoch") or 0)
        last = self.paths.checkpoints()
        return self.paths.epoch_of(last[-1]) if last else 0

    @property
    def seconds(self) -> float | None:
        """Wall time of all epochs, validation included; None where it isn't known."""
        spent = [row["seconds"] for row in self.times if row.get("seconds") is not None]
        return math.fsum(spent) if spent else None

    @property
    def images_per_second(self) -> float | None:
        """Training speed, the median over epochs; None where it isn't known, or some epochs are on cached features."""
        if self.config["trainer"].get("cache_features"):
            return None
        speeds = sorted(row["images_per_second"] for row in self.times if row.get("images_per_second") is not None)
        return speeds[len(speeds) // 2] if speeds else None


def is_older(run: RunRecord) -> bool:
    """Whether the test figures are outdated: of an epoch that the run has since trained past, of one that it discarded,
    as it was resumed from an earlier one, and hasn't reached again, or of a best epoch that a later one has replaced.
    """
    name = str(run.figures.get("checkpoint"))
    if name in REWRITTEN and (run.paths.models / name).is_file():
        written, file = ((run.paths.models / each).stat().st_mtime for each in ("test_metrics.json", name))
        return written < file
    tested, newest = CHECKPOINT.search(name), run.paths.checkpoints()[-1:]
    if not tested or not newest:
        return False
    left = int(tested[1]) > run.epochs_done and not (run.paths.models / tested[0]).exists()
    return left or int(tested[1]) < run.paths.epoch_of(newest[0])


def read_run(models: Path) -> RunRecord:
    """The run in its folder of checkpoints. Raises ConfigError, with the reason, where it is broken."""
    config_path = models / "config.json"
    if not config_path.is_file():
        raise ConfigError(f"{models}: has checkpoints but no config.json")
    config = read_json(config_path, "config")
    for section in ("arch", "data_loader", "trainer"):
        if not isinstance(config.get(section), dict) or (section != "trainer" and "type" not in config[section]):
            raise ConfigError(f"{config_path}: isn't a run's config, it has no {section}")
    run = RunRecord(run_of(models / "checkpoint"), config)
    tested = models / "test_metrics.json"
    if tested.is_file():
        try:
            run.figures, run.split = json.loads(tested.read_text(encoding="utf-8")), "test"
        except (OSError, ValueError) as error:
            raise ConfigError(f"{tested}: can't be read ({error})") from None
        if not isinstance(run.figures, dict):
            raise ConfigError(f"{tested}: doesn't hold test figures")
        if is_older(run):
            run.figures, run.split = {}, None
    if run.split is None and run.history:
        run.figures = {key[4:]: value for key, value in run.history[-1].items() if key.startswith("val_")}
        run.split = "val" if any(value is not None for value in run.figures.values()) else None
    try:
        run.tell()
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(f"{config_path}: a value in it, or in test_metrics.json, isn't of a run's kind ({error})"
                          ) from None
    return run


def run_folders(top: Path) -> Iterator[Path]:
    """Every folder under `top` (itself too) that looks like a run's models folder, in order of their names."""
    for folder, below, files in os.walk(top):
        below.sort()
        if any(name.startswith("checkpoint-epoch") or name in ("model_best.pth", "weights.pth") for name in files) \
                or ("config.json" in files and (Path(folder).parent.parent.name == "models" or "metrics.csv" in files)):
            yield Path(folder)
            below.clear()  # a run's subfolders (a report's pictures) are no runs


def find_runs(top: Path) -> tuple[list[RunRecord], list[str]]:
    """(the runs under `top`, a line for each folder that was skipped)."""
    runs, skipped = [], []
    for folder in run_folders(top):
        try:
            runs.append(read_run(folder))
        except ConfigError as error:
            skipped.append(str(error))
    return runs, skipped
