"""Schedules: ours against their formulas, torch's against torch's own loop, going on, and what can't be served."""
from __future__ import annotations

import json
import math

import pytest
import torch
from torch.optim import lr_scheduler

from logger.metrics_csv import read_table
from trainer.schedules import BY_EPOCH, BY_FIGURE, BY_STEP, bring_to, build_scheduler
from utils.errors import ConfigError

ARGS = {"StepLR": {"step_size": 2}, "MultiStepLR": {"milestones": [2, 4]}, "ConstantLR": {"total_iters": 3},
        "LinearLR": {"total_iters": 3}, "ExponentialLR": {"gamma": 0.8}, "PolynomialLR": {"total_iters": 6},
        "CosineAnnealingLR": {"T_max": 6}, "CosineAnnealingWarmRestarts": {"T_0": 2}, "OneCycleLR": {"max_lr": 1.0},
        "CyclicLR": {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 5},
        "ReduceLROnPlateau": {"patience": 0, "factor": 0.5}}
EPOCHS, STEPS = 6, 4


def sgd(lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


def walk(optimizer: torch.optim.Optimizer, schedule: object, figures: list[float], start: int = 0) -> list[float]:
    """The rate of each optimizer step of a run whose schedule is called as its `unit` says."""
    rates = []
    for epoch in range(start, EPOCHS):
        for _ in range(STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if schedule.unit == "step":
                schedule.step()
        if schedule.unit == "epoch":
            schedule.step()
        elif schedule.unit == "figure":
            schedule.step(figures[epoch])
    return rates


def torchs_loop(kind: str, figures: list[float]) -> list[float]:
    """The same with torch's class alone, called as its documentation says."""
    optimizer = sgd()
    args = {**ARGS[kind], **({"epochs": EPOCHS, "steps_per_epoch": STEPS} if kind == "OneCycleLR" else {})}
    schedule = getattr(lr_scheduler, kind)(optimizer, **args)
    rates = []
    for epoch in range(EPOCHS):
        for _ in range(STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if kind in ("OneCycleLR", "CyclicLR"):
                schedule.step()
        if kind == "ReduceLROnPlateau":
            schedule.step(figures[epoch])
        elif kind not in ("OneCycleLR", "CyclicLR"):
            schedule.step()
    return rates


FIGURES = [1.0, 0.8, 0.9, 0.7, 0.75, 0.74]


@pytest.mark.parametrize("kind", ARGS)
def test_torchs_schedules_are_called_as_torch_says(kind: str) -> None:
    optimizer = sgd()
    schedule = build_scheduler({"type": kind, "args": ARGS[kind]}, optimizer, EPOCHS, STEPS)
    assert walk(optimizer, schedule, FIGURES) == torchs_loop(kind, FIGURES)


class HalfAStep(torch.optim.lr_scheduler.LambdaLR):
    """Half the rate at each optimizer step, as a user may write it."""

    unit = "step"

    def __init__(self, optimizer, steps_per_epoch: int, epochs: int = 1):
        super().__init__(optimizer, lambda k: 0.5 ** k)
        self.length = epochs * steps_per_epoch


class EachImage(HalfAStep):
    unit = "image"


def test_an_own_schedule_says_when_it_is_called() -> None:
    optimizer = sgd(1.0)
    schedule = build_scheduler({"type": f"{__name__}:HalfAStep"}, optimizer, EPOCHS, STEPS)
    assert schedule.unit == "step" and schedule.length == EPOCHS * STEPS
    assert walk(optimizer, schedule, FIGURES) == [0.5 ** k for k in range(EPOCHS * STEPS)]
    with pytest.raises(ConfigError, match=r"EachImage's unit must be \"epoch\", \"step\" or \"figure\", not 'image'"):
        build_scheduler({"type": f"{__name__}:EachImage"}, sgd(), EPOCHS, STEPS)


def test_every_schedule_of_torchs_is_known_or_refused_by_name() -> None:
    public = [name for name in dir(lr_scheduler) if isinstance(getattr(lr_scheduler, name), type)
              and issubclass(getattr(lr_scheduler, name), lr_scheduler.LRScheduler) and not name.startswith("_")]
    known = {*BY_EPOCH, *BY_STEP, *BY_FIGURE}
    assert known == set(ARGS) and known < set(public)
    for name in set(public) - known:
        with pytest.raises(ConfigError, match=name):
            build_scheduler({"type": name, "args": {}}, sgd(), 3)


@pytest.mark.parametrize("calls", range(EPOCHS))
@pytest.mark.parametrize("kind", [kind for kind in ARGS if kind != "ReduceLROnPlateau"])
def test_going_on_is_where_an_uninterrupted_run_is(kind: str, calls: int) -> None:
    """From a file that says nothing of its schedule, as the RIDE template's."""
    optimizer, other = sgd(), sgd()
    spec = {"type": kind, "args": ARGS[kind]}
    schedule, later = (build_scheduler(spec, one, EPOCHS, STEPS) for one in (optimizer, other))
    rates = walk(optimizer, schedule, FIGURES)
    bring_to(later, calls * (STEPS if later.unit == "step" else 1), None)
    assert walk(other, later, FIGURES, start=calls) == rates[calls * STEPS:]


def cosine(t: float, warm: float, total: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * (t - warm) / (total - warm)))


@pytest.mark.parametrize(("kind", "args", "factor"), [
    ("CosLR", {"warmup_epoch": 2}, lambda e: (e + 1) / 2 if e < 2 else cosine(e, 2, 6)),
    ("CosLR", {"warmup_epoch": 1.5, "by": "step"},
     lambda t: (t + 0.25) / 1.5 if t < 1.5 else cosine(t, 1.5, 6)),
    ("CosLR", {"by": "step"}, lambda t: cosine(t, 0, 6)),
    ("LinearLR0", {"warmup_epoch": 2}, lambda e: (e + 1) / 2 if e < 2 else 1 - (e - 2) / 4),
    ("LinearLR0", {"warmup_epoch": 0.5, "by": "step"}, lambda t: (t + 0.25) / 0.5 if t < 0.5 else 1 - (t - 0.5) / 5.5),
    ("LinearLR0", {"warmup_epoch": 1, "by": "step", "warmup_start": 0.2},
     lambda t: 0.2 + 0.8 * (t + 0.25) if t < 1 else 1 - (t - 1) / 5),
    ("CosLR", {"restart": 4}, lambda e: cosine(e, 0, 4) if e < 4 else cosine(e - 4, 0, 2)),
    ("CosLR", {"restart": [2, 9], "warmup_epoch": 0.5, "by": "step"},
     lambda t: (t % 2 + 0.25) / 0.5 if t < 0.5 or 2 <= t < 2.5 else cosine(t, 0.5, 2) if t < 2 else cosine(t, 2.5, 6)),
    ("CosLR", {"restart": 6}, lambda e: cosine(e, 0, 6)),
    ("LinearLR0", {"restart": [1, 3], "by": "step"},
     lambda t: 1 - t if t < 1 else 1 - (t - 1) / 2 if t < 3 else 1 - (t - 3) / 3),
    ("CustomLR", {"step1": 3, "step2": 5, "gamma": 0.1, "warmup_epoch": 2},
     lambda e: 0.1 ** ((e >= 3) + (e >= 5)) * ((e + 1) / 2 if e < 2 else 1)),
    ("CustomLR", {"step1": 3, "step2": 5, "warmup_epoch": 0.5, "by": "step"},
     lambda t: 0.1 ** ((t >= 3) + (t >= 5)) * ((t + 0.25) / 0.5 if t < 0.5 else 1))])
def test_our_schedules_equal_their_formulas(kind: str, args: dict, factor) -> None:
    optimizer = sgd()
    schedule = build_scheduler({"type": kind, "args": args}, optimizer, EPOCHS, STEPS)
    rates = walk(optimizer, schedule, FIGURES)
    times = [step / STEPS if args.get("by") == "step" else step // STEPS for step in range(EPOCHS * STEPS)]
    assert rates == pytest.approx([0.1 * factor(t) for t in times], rel=1e-12)


@pytest.mark.parametrize(("spec", "monitor", "says"), [
    ({"type": "OneCycleLR", "args": {"max_lr": 1.0, "total_steps": 4}}, "off", "total_steps"),
    ({"type": "OneCycleLR", "args": {"max_lr": 1.0, "total_steps": 0}}, "off", "ends after 0 steps"),
    ({"type": "OneCycleLR", "args": {"max_lr": 1.0, "epochs": 5, "steps_per_epoch": 4}}, "off", "6 epochs of 4"),
    ({"type": "ReduceLROnPlateau", "args": {"mode": "max"}}, "off", "mode"),
    ({"type": "ReduceLROnPlateau", "args": {"mode": "min"}}, "max val_accuracy", "mode"),
    ({"type": "CustomLR", "args": {"step1": 3}}, "off", "step2"),
    ({"type": "CosLR", "args": {"by": "batch"}}, "off", r"args\.by"),
    ({"type": "CosLR", "args": {"restart": 0}}, "off", r"args\.restart: must be the last epoch"),
    ({"type": "CosLR", "args": {"restart": [3, 2]}}, "off", r"args\.restart.*in order"),
    ({"type": "LinearLR0", "args": {"restart": "3"}}, "off", r"args\.restart"),
    ({"type": "CyclicLR", "args": {"base_lr": 0.1}}, "off", r"args\.max_lr: missing"),
    ({"type": "OneCycleLR", "args": {"final_div_factor": 0}}, "off", r"args\.final_div_factor: must not be 0"),
    ({"type": "SequentialLR", "args": {}}, "off", "SequentialLR")])
def test_what_cant_be_served_is_named(spec: dict, monitor: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_scheduler(spec, sgd(), EPOCHS, STEPS, monitor=monitor)


@pytest.mark.parametrize(("kind", "args"), [("OneCycleLR", {"max_lr": 1.0}),
                                            ("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 5})])
def test_groups_with_rates_of_their_own_keep_their_proportion(kind: str, args: dict) -> None:
    def walked(rate: float) -> list[float]:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]},
                  {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1 * rate}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        schedule = build_scheduler({"type": kind, "args": args}, optimizer, EPOCHS, STEPS)
        rates = [[group["lr"] for group in optimizer.param_groups]]
        for _ in range(EPOCHS * STEPS - 1):
            optimizer.step()
            schedule.step()
            rates.append([group["lr"] for group in optimizer.param_groups])
        return rates
    alike, apart = walked(1.0), walked(0.25)
    assert [own for own, _ in alike] == [own for own, _ in apart] == [other for _, other in alike]
    assert [other for _, other in apart] == pytest.approx([own / 4 for own, _ in apart])


def test_one_cycle_whose_rise_is_a_single_step():
    """torch divides by the length of the rise, less one."""
    optimizer = sgd(0.1)
    total = EPOCHS * STEPS
    schedule = build_scheduler({"type": "OneCycleLR", "args": {"pct_start": 1 / total}}, optimizer, EPOCHS, STEPS)
    rates = walk(optimizer, schedule, FIGURES)
    close = build_scheduler({"type": "OneCycleLR", "args": {"pct_start": 1.0001 / total}}, (other := sgd(0.1)), EPOCHS,
                            STEPS)
    assert rates == pytest.approx(walk(other, close, FIGURES), rel=1e-3) and all(rate > 0 for rate in rates)


@pytest.mark.parametrize(("args", "peak"), [({}, 0.1), ({"max_lr": 0.1}, 0.1), ({"max_lr": 1.0}, 1.0)])
def test_one_cycles_peak_is_the_optimizers_rate(caplog: pytest.LogCaptureFixture, capsys, args, peak) -> None:
    optimizer, rates = sgd(0.1), []
    schedule = build_scheduler({"type": "OneCycleLR", "args": args}, optimizer, EPOCHS, STEPS)
    for _ in range(EPOCHS * STEPS - 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(peak, rel=0.02)
    said = caplog.text + "".join(capsys.readouterr())
    assert ("the optimizer's own, 0.1, is without effect" in said) == (peak != 0.1)


@pytest.mark.parametrize(("epochs", "by", "says"), [(1, "epoch", "1"), (0.5, "epoch", "0.5"), (0, "epoch", None),
                                                    (1.5, "epoch", None), (0.5, "step", None)])
def test_no_warm_up_by_another_name_is_said(caplog: pytest.LogCaptureFixture, capsys, epochs, by, says) -> None:
    args = {"step1": 3, "step2": 4, "warmup_epoch": epochs, "by": by}
    build_scheduler({"type": "CustomLR", "args": args}, sgd(), EPOCHS, STEPS)
    said = caplog.text + "".join(capsys.readouterr())
    assert f"warmup_epoch: {says} is no warm-up" in said if says else "no warm-up" not in said


@pytest.mark.parametrize(("kind", "args", "says"), [
    ("CustomLR", {"step1": EPOCHS, "step2": EPOCHS}, f"step1: {EPOCHS}, but trainer.epochs is {EPOCHS}"),
    ("CustomLR", {"step1": EPOCHS - 1, "step2": EPOCHS}, None),
    ("CosLR", {"warmup_epoch": EPOCHS + 2}, f"warmup_epoch: {EPOCHS + 2}, but"),
    ("LinearLR0", {"warmup_epoch": 2}, None)])
def test_what_lies_beyond_the_runs_end_is_said(caplog: pytest.LogCaptureFixture, capsys, kind, args, says) -> None:
    build_scheduler({"type": kind, "args": args}, sgd(), EPOCHS, STEPS)
    said = caplog.text + "".join(capsys.readouterr())
    assert says in said if says else "trainer.epochs" not in said


def test_a_plateau_gets_the_monitored_figure_in_its_direction(runs) -> None:
    """Its accuracy may rise while the loss falls; what counts is what is monitored."""
    runs("plateau", "--epochs", 6, "--set", "trainer.monitor=max val_accuracy", "--set", "trainer.save_period=6",
         "--set", 'lr_scheduler={"type": "ReduceLROnPlateau", "args": {"factor": 0.1, "patience": 0}}')
    rows = read_table(runs.log("plateau") / "metrics.csv")
    optimizer = sgd(0.05)
    twin = lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=0)
    for row in rows:
        assert row["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
        twin.step(row["val_accuracy"])


@pytest.mark.parametrize("schedule", [
    {"type": "CosLR", "args": {"by": "step", "warmup_epoch": 0.5}}, {"type": "OneCycleLR", "args": {"max_lr": 0.1}},
    {"type": "MultiStepLR", "args": {"milestones": [1, 2]}}, {"type": "ReduceLROnPlateau", "args": {"patience": 0}}])
def test_a_run_stopped_in_the_middle_of_an_epoch_keeps_its_rates(runs, signal_at, same_state, schedule) -> None:
    flags = ("--epochs", 3, "--set", f"lr_scheduler={json.dumps(schedule)}")
    whole = runs("whole", *flags)
    signal_at(6)
    stopped = runs("stopped", *flags)
    runs(None, "-r", stopped / "checkpoint-epoch2.pth")
    assert not same_state(whole / "checkpoint-epoch3.pth", stopped / "checkpoint-epoch3.pth")
    assert (runs.log("whole") / "metrics.csv").read_text() == (runs.log("stopped") / "metrics.csv").read_text()


def test_a_plateau_without_validation_follows_the_loss_down(runs) -> None:
    runs("blind", "--epochs", 5, "--lr", 0.01, "--set", "trainer.monitor=max val_accuracy", "--set",
         "data_loader.args.validation=none", "--set",
         'lr_scheduler={"type": "ReduceLROnPlateau", "args": {"factor": 0.1, "patience": 0}}')
    optimizer = sgd(0.01)
    twin = lr_scheduler.ReduceLROnPlateau(optimizer, mode="min", factor=0.1, patience=0)
    for row in read_table(runs.log("blind") / "metrics.csv"):
        assert row["val_accuracy"] is row["val_loss"] is None      # which have their columns all the same
        assert row["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
        twin.step(row["loss"])
