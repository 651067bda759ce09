"""Whether a loss fits a model, asked before a run has a folder."""
from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from model.loss import LDAMLoss, build_loss
from model.model import build_model
from tools.parts import check_loss, warn_of_no_effect
from trainer.schedules import build_optimizer
from utils.config.load import Override, check_config
from utils.errors import ConfigError

COUNTS = [9, 5, 2]


class Own(LDAMLoss):
    """Somebody's, which needs more than a model's outputs."""

    def forward(self, outputs, target):
        return super().forward(outputs, target) * outputs["sample_weights"].mean()


def parts(loss: str, arch: str = "ResNet32Model", counts: list[int] = COUNTS, **args):
    config = {"arch": {"type": arch, "args": {"num_classes": 3, **args}}, "loss": {"type": loss},
              "trainer": {"type": "Trainer", "epochs": 9}}
    return config, build_loss(config["loss"], counts), build_model(config["arch"])


@pytest.mark.parametrize("loss", ["GCLLoss", "RIDELoss", "SADELoss", "HCMLoss"])
def test_asking_changes_nothing(loss: str) -> None:
    """Not the loss's own state, nor the random numbers that a run draws."""
    config, criterion, model = parts(loss, num_experts=3)
    criterion.set_epoch(2)
    before, drawn = dict(vars(criterion), _tables={}), torch.get_rng_state()
    check_loss(config, criterion, model)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert vars(criterion).keys() == before.keys() and criterion.epoch == 2 and criterion._tables == {}


@pytest.mark.parametrize(("experts", "used"), [(4, "0,1,3"), (3, None)])
def test_the_experts_that_take_part_count(experts: int, used: str | None) -> None:
    config, criterion, model = parts("SADELoss", num_experts=experts, use_experts=used)
    check_loss(config, criterion, model)
    config, criterion, model = parts("SADELoss", num_experts=4)
    with pytest.raises(ConfigError, match="SADELoss is for 3 experts"):
        check_loss(config, criterion, model)


@pytest.mark.parametrize("loss", ["SADELoss", "BalPoELoss"])
def test_experts_with_offsets_of_their_own_keep_their_places(loss: str) -> None:
    """Left out at random, an expert's offset would depend on which other one is missing."""
    config, criterion, model = parts(loss, num_experts=3, use_experts="rand")
    with pytest.raises(ConfigError, match=f'arch.args.use_experts: "rand" leaves out .* {loss} gives each expert'):
        check_loss(config, criterion, model)
    config, criterion, model = parts("RIDELoss", num_experts=3, use_experts="rand")
    check_loss(config, criterion, model)


def test_a_loss_with_a_weight_for_other_classes_is_refused() -> None:
    config, _, model = parts("FocalLoss")
    criterion = build_loss({"type": "FocalLoss", "args": {"weight": [1, 2, 3, 4, 5]}}, COUNTS)
    with pytest.raises(ConfigError, match=r"loss.args.weight: has 5 numbers, the data 3 classes"):
        check_loss(config, criterion, model)


def test_what_is_from_outside_is_left_to_the_first_step() -> None:
    config, criterion, model = parts(f"{__name__}:Own", counts=[1, 2])
    check_loss(config, criterion, model)
    assert isinstance(criterion, Own)
    config, criterion, _ = parts("SADELoss")
    check_loss({**config, "arch": {"type": "somewhere:Net"}}, criterion, nn.Linear(2, 3))


def test_gates_have_a_loss_of_their_own() -> None:
    """The config's is asked only in validation, where it is one of the mean logits."""
    config, criterion, model = parts("SADELoss", "ResNet32EAModel", num_experts=2)
    check_loss(config, criterion, model)
    config, criterion, model = parts("LDAMLoss", "ResNet32EAModel", [1, 2], num_experts=2)
    with pytest.raises(ConfigError, match="cls_num_list: has 2 classes"):
        check_loss(config, criterion, model)


@pytest.mark.parametrize(("loss", "data", "warned"), [
    ("BalPoELoss", {"sampler": {"type": "SquareRoot"}}, "sampler (SquareRoot)"),
    ("BalancedSoftmaxLoss", {"balanced": True}, "sampler (balanced)"),
    ("LogitAdjustmentLoss", {"sampler": {"type": "ProgressivelyBalanced"}}, "ProgressivelyBalanced"),
    ("BalancedSoftmaxLoss", {"sampler": {"type": "InstanceBalanced"}}, None), ("BalancedSoftmaxLoss", {}, None),
    ("RIDELoss", {"sampler": {"type": "ClassBalanced"}}, None)])
def test_rare_classes_favoured_twice_are_warned_of(loss, data, warned, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("ltr"), "propagate", True)
    config, criterion, model = parts(loss, num_experts=2)
    with caplog.at_level(logging.WARNING):
        check_loss({**config, "data_loader": {"type": "DigitsLTDataLoader", "args": data}}, criterion, model)
    assert (warned in caplog.text and "favoured twice" in caplog.text) if warned else not caplog.records


@pytest.mark.parametrize(("epoch", "warned"), [(8, False), (9, True), (-1, False)])
def test_a_re_weighting_that_never_comes_is_said(epoch, warned, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("ltr"), "propagate", True)
    config, criterion, model = parts("LDAMLoss", use_norm=True)
    criterion.reweight_epoch = epoch
    with caplog.at_level(logging.WARNING):
        check_loss(config, criterion, model)
    assert ("reweight_epoch: 9, but trainer.epochs is 9" in caplog.text) is warned


FREEZE = {"until": "epoch 2", "what": "backbone"}


@pytest.mark.parametrize(("path", "value", "trainer", "more", "says"), [
    ("lr_scheduler.args.step1", 3, {}, {"lr_scheduler": {"type": "CosLR", "args": {}}}, "no effect on CosLR"),
    ("lr_scheduler.args.step1", 3, {}, {}, None), ("arch.args.pos_weight", 7, {}, {}, "ResNet32Model has no gates"),
    ("arch.args.pos_weight", 7, {}, {"arch": {"type": "ResNet32EAModel", "args": {"num_experts": 2}}}, None),
    ("optimizer.args.lr", 0.5, {"freeze": "backbone", "classifier_lr": 0.01}, {}, "trainer.classifier_lr is 0.01"),
    ("optimizer.args.lr", 0.5, {"freeze": FREEZE, "classifier_lr": 0.01, "epochs": 2}, {}, "has no effect"),
    ("optimizer.args.lr", 0.5, {"freeze": FREEZE, "classifier_lr": 0.01, "epochs": 3}, {}, None),
    ("optimizer.args.lr", 0.5, {"freeze": "backbone"}, {}, None), ("optimizer.args.lr", 0.5, {}, {}, None)])
def test_what_a_flag_cannot_do_is_said(path, value, trainer, more, says, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("ltr"), "propagate", True)
    config = {"arch": {"type": "ResNet32Model", "args": {}}, "loss": {"type": "CrossEntropyLoss"},
              "data_loader": {"type": "DigitsLTDataLoader"}, "optimizer": {"type": "SGD", "args": {"lr": 0.1}},
              "lr_scheduler": {"type": "CustomLR", "args": {"step1": 2, "step2": 3}}, **more,
              "trainer": {"epochs": 4, **trainer}}
    given = [Override(path, value, "--set", str(value))]
    config = check_config(config, given)
    model = build_model(config["arch"], 3)
    if config["trainer"]["freeze"] is not None:
        model.freeze(config["trainer"]["freeze"])
    with caplog.at_level(logging.WARNING):
        warn_of_no_effect(given, config, model, build_optimizer(config["optimizer"], model, config["trainer"]))
    assert says in caplog.text if says else not caplog.records
