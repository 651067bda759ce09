"""What a run shows in TensorBoard where it is asked to: attention, norm statistics, NBN's scales."""
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.model import build_model
from trainer import watch
from trainer.schedules import build_optimizer
from trainer.watch import AttentionByClass

COUNTS = [5, 300, 50, 2, 120]      # few, many, medium, few, many: in order 1, 4, 2, 0, 3


def batches(n=3, size=12):
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        yield (torch.randn(size, size, generator=generator).softmax(1),
               torch.randint(4, (size,), generator=generator))     # no image of class 4


def test_attention_by_class_is_a_mean_over_pairs():
    attention = AttentionByClass(COUNTS, {}, torch.device("cpu"))
    order = [1, 4, 2, 0, 3]
    assert attention.labels(list("abcde")) == (list("becad"), ["many", "many", "medium", "few", "few"])
    pairs, every, paid = {}, [], {}
    for weights, labels in batches():
        attention.add(weights, labels)
        for i, row in enumerate(labels.tolist()):
            for j, column in enumerate(labels.tolist()):
                pairs.setdefault((row, column), []).append(weights[i, j].item())
                every.append(weights[i, j].item())
            few = sum(weights[i, j].item() for j, column in enumerate(labels.tolist()) if column in (0, 3))
            paid.setdefault(row, []).append(few)
    relative = attention.relative()
    for i, row in enumerate(order):
        for j, column in enumerate(order):
            if (row, column) in pairs:
                assert relative[i, j] == pytest.approx(np.mean(pairs[row, column]) / np.mean(every), rel=1e-4)
            else:
                assert np.isnan(relative[i, j]) and 4 in (row, column)
    shares = attention.shares()
    assert shares.sum(1) == pytest.approx([1, 1, 1])
    assert shares[0, 2] == pytest.approx(np.mean(paid[1])) and shares[2, 2] == pytest.approx(
        np.mean(paid[0] + paid[3]))
    attention.clear()
    assert (attention.shares() == 0).all()


def test_many_classes_share_rows_within_their_group(monkeypatch):
    monkeypatch.setattr(watch, "MOST_ROWS", 2)
    attention = AttentionByClass(COUNTS, {}, torch.device("cpu"))
    assert attention.rows == [[1, 4], [2], [0, 3]]
    for weights, labels in batches():
        attention.add(weights, labels)
    assert attention.relative().shape == (3, 3) and attention.shares().sum(1) == pytest.approx([1, 1, 1])


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
