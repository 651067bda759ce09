"""Makes what a config names: loader, model, loss. What models and data must know of each other is settled here."""
from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from base.base_data_loader import BaseDataLoader
from base.freezing import freeze_plan
from criteria.experts import ShiftedExperts
from data_loader.data_loaders import build_loader
from data_loader.samplers import power_of
from logger.log import get_logger
from model.loss import build_loss
from model.model import ARCHS, ELSEWHERE, build_model
from utils import dist
from utils.config.build import lookup
from utils.config.check import task_name
from utils.config.outside import is_outside
from utils.config.schema import SECTIONS
from utils.errors import ConfigError

log = get_logger()


def make_loader(config: dict[str, Any], device: torch.device | str = "cpu", *, training: bool = True,
                **more: Any) -> BaseDataLoader:
    """The loader of the config's training split, or of its test split (`training=False`).

    Raises ConfigError, also for an image size that the network can't take (before anything is read, if the config names
    the size), and for a loader from outside that lacks what every run needs.
    """
    named = (config["data_loader"].get("args") or {}).get("image_size")
    if isinstance(named, int):
        check_size(config, named, training)
    wanted = input_of(config)
    if wanted is not None:
        wanted["takes"] = lambda size: size_problem(config, size, training) is None
    loader = build_loader(config["data_loader"], seed=config.get("seed", 0), device=device, rank=dist.rank(),
                          world_size=dist.world_size(), epochs=config["trainer"]["epochs"], training=training,
                          preprocess=wanted, **more)
    lacks = next((name for name in ("num_classes", "cls_num_list") if not hasattr(loader, name)), None)
    if lacks is not None:
        raise ConfigError(f"data_loader.type: {config['data_loader']['type']} must set {lacks} (see "
                          "base.base_data_loader.BaseDataLoader)")
    if hasattr(loader, "image_size"):    # where the data decide it
        check_size(config, loader.image_size, training)
    return loader


def check_size(config: dict[str, Any], size: int, training: bool = False) -> None:
    """Raise ConfigError where the config's network, in training also its teacher, can't take `size` x `size` images."""
    problem = size_problem(config, size, training)
    if problem is not None:
        raise ConfigError(f"data_loader.args.image_size: {problem}")


def size_problem(config: dict[str, Any], size: int, training: bool = False) -> str | None:
    """Why the config's network, in training also its teacher, can't take `size` (None: it can); see `TimmModel`."""
    for section in ("arch", "distill_arch") if training and config.get("distill") else ("arch",):
        spec = config.get(section) or {}
        asks = "type" in spec and getattr(lookup(ARCHS | ELSEWHERE, spec["type"], f"{section}.type", "model"),
                                          "size_problem", None)
        problem = asks((spec.get("args") or {})["model_name"], size) if asks else None
        if problem is not None:
            return problem
    return None


def input_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The preprocessing that the arch's pretrained weights expect (`TimmModel.preprocess`); None where it has none."""
    arch = config["arch"]
    asks = getattr(lookup(ARCHS | ELSEWHERE, arch["type"], "arch.type", "model"), "preprocess", None)
    return None if asks is None else asks((arch.get("args") or {})["model_name"])


def settled(config: dict[str, Any], loader: BaseDataLoader) -> dict[str, Any]:
    """The config with what it left to the data filled in, so that it means the same for every split and on any machine:
    the number of classes, and an `image_size` of "auto"."""
    arch, data = config["arch"].get("args") or {}, config["data_loader"].get("args") or {}
    arch = {**arch, "num_classes": arch.get("num_classes") or loader.num_classes}
    if data.get("image_size") == "auto":
        data = {**data, "image_size": loader.image_size}
    return {**config, "arch": {**config["arch"], "args": arch}, "data_loader": {**config["data_loader"], "args": data}}


def make_model(config: dict[str, Any], num_classes: int | None = None, section: str = "arch",
               bare: bool = False) -> nn.Module:
    """The model that a section names, on the CPU; `num_classes` comes from the data where the config leaves it out.
    bare: without the arch's pretrained weights, because others will be loaded. Raises ConfigError."""
    return build_model(config[section], num_classes=num_classes, path=section, bare=bare)


def make_criterion(config: dict[str, Any], cls_num_list: list[int]) -> nn.Module:
    """The loss that a config names; one that takes `epochs` gets the run's. cls_num_list: training images per class.
    Raises ConfigError."""
    epochs = (config["loss"].get("args") or {}).get("epochs", config["trainer"].get("epochs"))
    return build_loss(config["loss"], cls_num_list=cls_num_list, path="loss", epochs=epochs)


def check_loss(config: dict[str, Any], criterion: nn.Module, model: nn.Module,
               teacher: nn.Module | None = None) -> None:
    """Raise ConfigError where the loss doesn't fit the model's outputs. Warn of a teacher that nothing uses, of
    re-weighting that never begins, and of rare classes that both loss and sampler favour.

    A copy of the loss is run on made-up logits of the model's shape, before anything is written. Classes from outside
    may give or need more than these and are left to the first training step.
    """
    loss = config["loss"]["type"]
    named = (loss, config["arch"]["type"], config["trainer"]["type"])
    if task_name(model) == "detection" or any(map(is_outside, named)):
        return
    if teacher is not None and (model.routed or not criterion.uses_teacher):
        log.warning("distill: the teacher changes nothing, as %s; leave distill out%s",
                    *(("the gates learn from their experts alone", "") if model.routed else
                      (f"{loss} has no use for it", ", or train with RIDELossWithDistill")))
    if isinstance(criterion, ShiftedExperts) and model.drops_experts:
        raise ConfigError(f"arch.args.use_experts: \"rand\" leaves out another expert each step, and {loss} gives each "
                          "expert an offset of its own by its place; leave it out, or name the experts")
    asked = copy.deepcopy(criterion).train(not model.routed)    # gates have their own loss and use this in validation
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        experts = len(model.used_heads()) - model.drops_experts
        logits = torch.arange(float(model.num_classes)).repeat(2, experts, 1)
        outputs = {"output": logits.mean(1), "logits": logits}
        asked(outputs if teacher is None else {**outputs, "teacher": logits.mean(1)}, torch.zeros(2, dtype=torch.long))
    epochs = config["trainer"]["epochs"]
    if criterion.reweight_epoch >= epochs and not model.routed:
        log.warning("loss.args.reweight_epoch: %d, but trainer.epochs is %d, so that no class is ever re-weighted",
                    criterion.reweight_epoch, epochs)
    data = (config.get("data_loader") or {}).get("args") or {}
    power = power_of(data)
    if not model.routed and power is not None and power < 1 and torch.as_tensor(criterion.added(logits.shape[1])).any():
        sampler = data["sampler"]["type"] if data.get("sampler") else "balanced"
        log.warning("loss.type: %s reckons with how rare a class is, and data_loader.args.sampler (%s) shows rare "
                    "classes more often, so that they are favoured twice; leave one of the two out", loss, sampler)


#: Arguments of `arch` that only expert assignment uses.
OF_GATES = ("top_choices_num", "pos_weight", "share_expert_help_pred_fc", "force_all", "route_threshold")


def warn_of_no_effect(overrides: Iterable[Any], config: dict[str, Any], model: nn.Module,
                      optimizer: torch.optim.Optimizer) -> None:
    """Warn of values given on the command line that have no effect. overrides: the command line's (see
    `utils.config.load.Override`); optimizer: before any step."""
    schedule = (config["lr_scheduler"] or {}).get("type")
    dropped = SECTIONS["lr_scheduler"].dropped.get(schedule, ())
    for item in overrides:
        place, _, key = item.path.rpartition(".")
        flag = item.flag if item.flag != "--set" else item.path
        if place == "lr_scheduler.args" and key in dropped:
            log.warning("%s: has no effect on %s; --set lr_scheduler.type=CustomLR falls in steps", flag, schedule)
        elif place == "arch.args" and key in OF_GATES and task_name(model) != "detection" and not model.routed:
            log.warning("%s: has no effect, as %s has no gates; it is for expert assignment", flag,
                        config["arch"]["type"])
        elif item.path == "optimizer.args.lr":
            _warn_of_idle_rate(flag, config["optimizer"]["args"]["lr"], config["trainer"], model, optimizer)


def _warn_of_idle_rate(flag: str, rate: float, options: dict[str, Any], model: nn.Module,
                       optimizer: torch.optim.Optimizer) -> None:
    plan = freeze_plan(options["freeze"])
    thaws = plan is not None and plan.until is not None and plan.until < options["epochs"]
    waits = {id(p) for name, p in model.named_parameters() if name in set(model.waiting)}
    rated = [p for group in optimizer.param_groups if group["lr"] == rate for p in group["params"]]
    if not any(p.requires_grad or (thaws and id(p) in waits) for p in rated):
        log.warning("%s: has no effect, as all that is trained has a rate of its own%s", flag,
                    "" if options["classifier_lr"] is None else
                    f": trainer.classifier_lr is {options['classifier_lr']:g}")
