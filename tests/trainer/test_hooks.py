"""Hooks: averaged weights, and what a run shows in TensorBoard where it is asked to."""
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from logger.metrics_csv import read_table
from model.model import build_model
from tools.opened import open_run
from trainer.hooks import attention
from trainer.hooks.attention import AttentionByClass
from trainer.hooks.averages import WeightAverage
from trainer.hooks.base import Hook
from trainer.schedules import build_optimizer
from utils.errors import ConfigError

COUNTS = [5, 300, 50, 2, 120]      # few, many, medium, few, many: in order 1, 4, 2, 0, 3


def batches(n=3, size=12):
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        yield (torch.randn(size, size, generator=generator).softmax(1),
               torch.randint(4, (size,), generator=generator))     # no image of class 4


def test_attention_by_class_is_a_mean_over_pairs():
    by_class = AttentionByClass(COUNTS, {}, torch.device("cpu"))
    order = [1, 4, 2, 0, 3]
    assert by_class.labels(list("abcde")) == (list("becad"), ["many", "many", "medium", "few", "few"])
    pairs, every, paid = {}, [], {}
    for weights, labels in batches():
        by_class.add(weights, labels)
        for i, row in enumerate(labels.tolist()):
            for j, column in enumerate(labels.tolist()):
                pairs.setdefault((row, column), []).append(weights[i, j].item())
                every.append(weights[i, j].item())
            few = sum(weights[i, j].item() for j, column in enumerate(labels.tolist()) if column in (0, 3))
            paid.setdefault(row, []).append(few)
    relative = by_class.relative()
    for i, row in enumerate(order):
        for j, column in enumerate(order):
            if (row, column) in pairs:
                assert relative[i, j] == pytest.approx(np.mean(pairs[row, column]) / np.mean(every), rel=1e-4)
            else:
                assert np.isnan(relative[i, j]) and 4 in (row, column)
    shares = by_class.shares()
    assert shares.sum(1) == pytest.approx([1, 1, 1])
    assert shares[0, 2] == pytest.approx(np.mean(paid[1])) and shares[2, 2] == pytest.approx(
        np.mean(paid[0] + paid[3]))
    by_class.clear()
    assert (by_class.shares() == 0).all()


def test_many_classes_share_rows_within_their_group(monkeypatch):
    monkeypatch.setattr(attention, "MOST_ROWS", 2)
    by_class = AttentionByClass(COUNTS, {}, torch.device("cpu"))
    assert by_class.rows == [[1, 4], [2], [0, 3]]
    for weights, labels in batches():
        by_class.add(weights, labels)
    assert by_class.relative().shape == (3, 3) and by_class.shares().sum(1) == pytest.approx([1, 1, 1])


def test_attention_and_statistics_reach_tensorboard(runs):
    runs("shown", arch={"args": {"add_bt": 1, "norm": "NBN"}}, trainer={
        "tensorboard": True, "histograms": False, "log_step": 1, "log_batch_attention": True,
        "record_statistics": True, "statistics_layer": "backbone.layer1.0.bn1"})
    events = EventAccumulator(str(runs.log("shown")), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    # All classes of the tiny set have fewer than 20 images.
    attention = {f"attention_{a}_to_{b}/train": [event.value for event in events.Scalars(f"attention_{a}_to_{b}/train")]
                 for a in ("many", "medium", "few") for b in ("many", "medium", "few")}
    assert attention.pop("attention_few_to_few/train") == pytest.approx([1, 1])
    assert all(values == [0, 0] for values in attention.values())
    assert [event.step for event in events.Images("attention_by_class")] == [1, 2]
    statistics = [tag for tag in tags["scalars"] if tag.startswith("step/statistics/")]
    assert len(statistics) == 4 and all(len(events.Scalars(tag)) == 8 for tag in statistics)
    assert len(events.Scalars("step/nbn_scale/expert_1")) == 8


@pytest.mark.parametrize("spared", [True, False])
def test_the_scales_of_nbn_may_go_without_weight_decay(spared):
    model = build_model({"type": "ResNet32Model", "args": {"num_classes": 4, "norm": "NBN"}})
    optimizer = build_optimizer({"type": "SGD", "args": {"lr": 1.0, "weight_decay": 0.5}}, model,
                                {"no_decay_scale": spared})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = spared and name == "backbone.scale_factor"
        assert torch.allclose(parameter, before[name] * (1 if kept else 0.5)), name


# ---- averaged weights ---------------------------------------------------------------------------------------------

def slow_average(runs, monkeypatch, ema, *flags, **sections):
    """Train with `trainer.ema`; (the checkpoint, what a plain loop over each step's tensors says that it should be)."""
    from trainer.trainer import Trainer
    steps = []
    update = Trainer._update

    def record(self, *args):
        norm = update(self, *args)
        steps.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return norm
    monkeypatch.setattr(Trainer, "_update", record)
    start = {}
    begin = Trainer.__init__

    def remember(self, model, *args, **more):
        start.update({name: value.clone() for name, value in model.state_dict().items()})
        begin(self, model, *args, **more)
    monkeypatch.setattr(Trainer, "__init__", remember)
    models = runs("averaged", *flags, trainer={"ema": ema}, **sections)
    average = {name: value.double() for name, value in start.items()}
    every = ema.get("every", 1)
    for t, weights in enumerate(steps, 1):
        if t % every == 0:
            decay = min(ema["decay"], (1 + t) / (10 + t)) if ema.get("warmup", True) else ema["decay"]
            for name, value in weights.items():
                if value.is_floating_point():
                    average[name] = decay ** every * average[name] + (1 - decay ** every) * value.double()
                else:
                    average[name] = value.double()
    return torch.load(models / "checkpoint-epoch2.pth", weights_only=True), average, steps[-1]


@pytest.mark.parametrize(("ema", "norm"), [
    ({"decay": 0.9}, "BatchNorm2d"), ({"decay": 0.5, "warmup": False, "every": 3}, "BatchNorm2d"),
    ({"decay": 0.9}, {"type": "MABN", "args": {"B": 2, "real_B": 4, "warmup_iters": 1}}), ({"decay": 0.9}, "NBN")])
def test_the_average_of_the_weights_equals_a_plain_loop(runs, monkeypatch, ema, norm):
    checkpoint, average, last = slow_average(runs, monkeypatch, ema, arch={"args": {"norm": norm}})
    assert checkpoint["state_dict"].keys() == checkpoint["raw_state_dict"].keys() == average.keys()
    for name, value in average.items():
        assert torch.equal(checkpoint["raw_state_dict"][name], last[name]), name
        assert torch.allclose(checkpoint["state_dict"][name].double(), value, rtol=1e-4, atol=1e-6), name
    assert not torch.equal(checkpoint["state_dict"]["backbone.conv1.weight"], last["backbone.conv1.weight"])


def test_averaging_never_waits_for_the_device():
    """On a device that has no numbers, any look at one is an error."""
    model = build_model({"type": "ResNet32Model", "args": {"num_classes": 4}}).to("meta")
    average = WeightAverage(SimpleNamespace(model=model, options={"ema": {"decay": 0.9}}))
    average.step_taken({}, None, torch.zeros((), device="meta"))
    assert average.steps == 1
    with pytest.raises(RuntimeError):
        float(next(average.judged.parameters()).sum())


def test_a_step_that_the_scaler_leaves_out_isnt_averaged(runs, monkeypatch):
    """The third step's gradient overflows half precision; its loss doesn't."""
    from trainer.trainer import Trainer
    original, seen = Trainer._backward, []

    def overflow(self, parts):
        result = original(self, parts)
        if self.global_step == 2:
            self.trainable[0].grad[0] = float("inf")
        return result

    def note(self, outputs, labels, norm):
        seen.append(self.run.global_step)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=8.0))
    monkeypatch.setattr(Trainer, "_backward", overflow)
    monkeypatch.setattr("trainer.hooks.curves.Curves.step_taken", note)
    models = runs("scaled", "--epochs", 1, trainer={"ema": {"decay": 0.9}, "amp": "fp16"})
    checkpoint = torch.load(models / "checkpoint-epoch1.pth", weights_only=True)
    assert seen == [0, 1, 3] and checkpoint["extra"]["hooks"]["ema"]["steps"] == 3
    assert checkpoint["scaler"]["scale"] == 4


def test_the_mean_of_epochs_leaves_frozen_norms_alone(runs):
    one = runs("first", "--epochs", 1) / "checkpoint-epoch1.pth"
    stage1 = torch.load(one, weights_only=True)["state_dict"]
    models = runs("second", "--load_crt", one, trainer={"swa": {"epochs": 1}})
    mean = torch.load(models / "model_swa.pth", weights_only=True)["state_dict"]
    for name in stage1:
        assert torch.equal(mean[name], stage1[name]) != name.startswith("backbone.linear"), name


def test_a_stopped_run_with_averages_ends_as_if_it_never_stopped(runs, signal_at, same_state):
    options = {"ema": {"decay": 0.9}, "swa": {"epochs": 2}, "epochs": 3}
    whole = runs("whole", trainer=options)
    signal_at(6)   # once: the counter goes on in the run that continues
    stopped = runs("stopped", trainer=options)
    runs(None, "-r", stopped / "checkpoint-epoch2.pth")
    assert not same_state(whole / "checkpoint-epoch3.pth", stopped / "checkpoint-epoch3.pth")
    first, other = (torch.load(run / "checkpoint-epoch3.pth", weights_only=True) for run in (whole, stopped))
    for key in ("raw_state_dict", "state_dict"):
        assert all(torch.equal(first[key][name], other[key][name]) for name in first[key])
    first, other = (torch.load(run / "model_swa.pth", weights_only=True)["state_dict"] for run in (whole, stopped))
    assert all(torch.equal(first[name], other[name]) for name in first)


def test_the_mean_has_statistics_of_norms_that_were_thawed(runs):
    one = runs("first", "--epochs", 1) / "checkpoint-epoch1.pth"
    models = runs("second", "--pretrained", one, trainer={"swa": {"epochs": 1}, "freeze": {"until": 1}, "epochs": 2})
    mean, last = (torch.load(models / name, weights_only=True)["state_dict"]
                  for name in ("model_swa.pth", "checkpoint-epoch2.pth"))
    for name in (name for name in mean if name.endswith("running_mean")):
        assert not torch.equal(mean[name], last[name]), name      # plain means over an epoch, not moving ones


def test_the_last_epochs_mean_has_statistics_of_its_own(runs):
    models = runs("swa", trainer={"swa": {"epochs": 2}})
    mean = torch.load(models / "model_swa.pth", weights_only=True)["state_dict"]
    ends = [torch.load(models / f"checkpoint-epoch{e}.pth", weights_only=True)["state_dict"] for e in (1, 2)]
    name = "backbone.layer2.0.conv1.weight"
    assert torch.allclose(mean[name], (ends[0][name] + ends[1][name]) / 2, atol=1e-6)
    statistics = "backbone.bn1.running_mean"
    assert not torch.allclose(mean[statistics], (ends[0][statistics] + ends[1][statistics]) / 2, atol=1e-6)
    loader, run = open_run(models / "checkpoint-epoch2.pth").loader("train"), open_run(models / "model_swa.pth")
    loader.set_epoch(3)
    with torch.no_grad():
        means = [run.model.backbone.conv1(images).mean((0, 2, 3)) for images, _ in loader]
    assert torch.allclose(mean[statistics], torch.stack(means).mean(0), atol=1e-5)


def test_the_mean_of_a_shorter_run_isnt_part_of_a_longer_ones(runs, capsys):
    models = runs("longer", trainer={"swa": {"epochs": 1}})
    runs(None, "-r", models / "checkpoint-epoch2.pth", "--epochs", 4)
    assert "begins with epoch 2, which isn't one of the last 1 of 4" in capsys.readouterr().out
    mean, last = (torch.load(models / name, weights_only=True)["state_dict"]["backbone.linear.weight"]
                  for name in ("model_swa.pth", "checkpoint-epoch4.pth"))
    assert torch.equal(mean, last)
    again = runs("again", "--epochs", 3, trainer={"swa": {"epochs": 2}})
    runs(None, "-r", again / "checkpoint-epoch2.pth")       # inside the last epochs: epoch 2 stays in the mean
    mean, *ends = (torch.load(again / name, weights_only=True)["state_dict"]["backbone.linear.weight"]
                   for name in ("model_swa.pth", "checkpoint-epoch2.pth", "checkpoint-epoch3.pth"))
    assert torch.allclose(mean, sum(ends) / 2, atol=1e-6)


def test_the_average_is_what_is_tested_and_the_raw_weights_can_be(runs, capsys):
    import json

    import test as entry
    models = runs("both", trainer={"ema": {"decay": 0.99}})
    own = json.loads((models / "test_metrics.json").read_text())["loss"]
    checkpoint = models / "checkpoint-epoch2.pth"
    average = torch.load(checkpoint, weights_only=True)["state_dict"]
    opened = open_run(checkpoint).model.state_dict()   # as predict, export and report open it
    assert all(torch.equal(opened[name], value) for name, value in average.items())
    entry.main(["-r", str(checkpoint), "-d", "cpu"])
    assert json.loads((models / "test_metrics.json").read_text())["loss"] == pytest.approx(own, rel=1e-6)
    entry.main(["-r", str(checkpoint), "-d", "cpu", "--weights", "raw"])
    assert json.loads((models / "test_metrics.json").read_text())["loss"] != pytest.approx(own, rel=1e-3)


@pytest.mark.parametrize(("options", "says"), [
    ({"ema": {"decay": 1.0}}, "trainer.ema.decay"), ({"ema": {"decy": 0.9}}, "decay"),
    ({"ema": {"every": 0}}, "trainer.ema.every"), ({"swa": {"epochs": 0}}, "trainer.swa.epochs"),
    ({"swa": {}}, "trainer.swa.epochs"), ({"swa": {"epochs": 1}, "norm": "MABN"}, "trainer.swa: .*MABN"),
    ({"hooks": [{"type": "Profilr"}]}, "Profiler"),
    ({"hooks": [{"type": "Curves"}]}, r"hooks\[0\]: Curves is there already"),
    ({"hooks": [{"type": "WeightAverage"}]}, r"trainer\.ema switches on"),
    ({"hooks": [{"type": "EpochAverage"}]}, r"trainer\.swa switches on")])
def test_wrong_options_are_named_and_nothing_is_written(runs, options, says):
    options = dict(options)
    with pytest.raises(ConfigError, match=says):
        runs("wrong", arch={"args": {"norm": options.pop("norm", "BatchNorm2d")}}, trainer=options)
    assert not runs.models("wrong").exists()


def test_a_hook_with_state_has_a_place_for_it():
    class Counter(Hook):
        def state_dict(self):
            return {"n": 1}

    class Named(Counter):
        key = "mine"
    assert (Hook.key, Counter.key, Named.key) == ("", "Counter", "mine")


class Steps(Hook):
    """Counts every so many steps."""

    def __init__(self, run, every: int = 1):
        super().__init__(run)
        self.every, self.n = every, 0

    def step_taken(self, outputs, labels, gradient_norm):
        self.n += self.every

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state, checkpoint):
        self.n = state["n"]


def test_two_hooks_of_a_class_keep_a_state_each(runs):
    hooks = [{"type": f"{__name__}:Steps", "args": {"every": every}} for every in (1, 10)]
    models = runs("both", "--epochs", 1, trainer={"hooks": hooks})
    states = torch.load(models / "checkpoint-epoch1.pth", weights_only=True)["extra"]["hooks"]
    assert {key: state["n"] for key, state in states.items() if key.startswith("Steps")} == {"Steps": 4, "Steps-2": 40}
    runs(None, "-r", models / "checkpoint-epoch1.pth", "--epochs", 2, "--set", f"trainer.hooks={json.dumps(hooks)}")
    states = torch.load(models / "checkpoint-epoch2.pth", weights_only=True)["extra"]["hooks"]
    assert (states["Steps"]["n"], states["Steps-2"]["n"]) == (8, 80)


@pytest.mark.parametrize("batch", [6, 23])
@pytest.mark.filterwarnings("error:Profiler won't be using warmup")
def test_a_trace_of_an_epoch_of_few_steps(runs, batch):
    runs("traced", "--epochs", 1, "--profile", data_loader={"args": {"batch_size": batch}})
    trace = json.loads((runs.log("traced") / "profile/trace.pt.trace.json").read_text())
    assert any("conv" in event.get("name", "") for event in trace["traceEvents"])


# ---- several batches, one step -------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", [{"type": "CrossEntropyLoss", "args": {"reweight_CE": True}},
                                  {"type": "BalancedSoftmaxLoss", "args": {}}])
@pytest.mark.parametrize("norm", ["without statistics", "frozen"])
def test_accumulated_batches_give_the_big_batchs_gradient(runs, monkeypatch, loss, norm):
    """Then nothing but the batch's size differs. 23 images: 6 + 6, and 6 + 5, of which each counts by its images. At
    such a rate the second step is taken with the first one's weights."""
    from trainer.trainer import Trainer
    seen = []
    original = Trainer._gradient_norm

    def record(self):
        seen.append(torch.cat([p.grad.flatten() for p in self.trainable]).clone())
        return original(self)
    monkeypatch.setattr(Trainer, "_gradient_norm", record)
    args = {} if norm == "frozen" else {"norm": {"type": "GroupNorm", "args": {"num_groups": 4}}}
    common = dict(loss=loss, arch={"args": {"use_norm": True, **args}})
    freeze = {"freeze": "norms"} if norm == "frozen" else {}
    runs("parts", "--epochs", 1, "--lr", 1e-9, trainer={"accumulate": 2, **freeze}, **common)
    parts, seen = seen, []
    runs("whole", "--epochs", 1, "--lr", 1e-9, "--bs", 12, trainer=freeze, **common)
    assert len(parts) == len(seen) == 2
    for one, other in zip(parts, seen, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()))
    parts, whole = (read_table(runs.log(name) / "metrics.csv")[0]["loss"] for name in ("parts", "whole"))
    assert parts == pytest.approx(whole, rel=1e-3)


def test_mixed_batches_train_and_their_accuracy_counts_the_heavier_label(runs):
    models = runs("mixed", data_loader={"args": {"mix": {"type": "either"}}})
    assert "training accuracy counts the label that makes up more" in (runs.log("mixed") / "info.log").read_text()
    rows = (runs.log("mixed") / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3 and (models / "checkpoint-epoch2.pth").exists()
