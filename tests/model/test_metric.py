"""Metrics against numbers worked out by hand, scikit-learn, and slow loops."""
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from model.metric import (
    EvalState,
    accuracy,
    open_set_f_measure,
    per_class_acc,
    shot_accuracy,
    top_k_acc,
)

TRAIN = [101, 100, 20, 19, 5]  # many, medium, medium, few, few


def make(n=200, num_classes=5, seed=0, experts=3):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (n,), generator=g)
    logits = torch.randn(n, experts, num_classes, generator=g) * 2
    logits[torch.arange(n), :, labels] += 1.5
    return logits, labels


def test_accuracy_and_top_k():
    output = torch.tensor([[3.0, 2, 1], [1, 2, 3], [1, 3, 2]])
    target = torch.tensor([0, 0, 2])
    assert accuracy(output, target).item() == pytest.approx(1 / 3) and accuracy(output, target).shape == ()
    assert top_k_acc(output, target, k=2).item() == pytest.approx(2 / 3)
    assert top_k_acc(output, target).item() == 1, "k is cut to the number of classes"


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_shot_accuracy_by_hand(kind):
    labels = [0, 0, 0, 0, 1, 1, 2, 2, 3, 4]
    preds = [0, 0, 0, 1, 1, 0, 2, 2, 3, 0]
    assert shot_accuracy(kind(preds), kind(labels), kind(TRAIN)) == {
        "many": 0.75, "medium": 0.75, "few": 0.5, "all": 0.7}
    assert shot_accuracy(kind(preds), kind(labels), kind(TRAIN), many=1000, few=6) == {
        "many": None, "medium": pytest.approx((0.75 + 0.5 + 1 + 1) / 4), "few": 0.0, "all": 0.7}


def test_shot_accuracy_where_there_is_nothing():
    assert shot_accuracy([], [], TRAIN) == {"many": None, "medium": None, "few": None, "all": None}
    # A class without test images doesn't enter its group's mean; a group with no other is None.
    assert shot_accuracy([0, 3], [0, 3], TRAIN) == {"many": 1.0, "medium": None, "few": 1.0, "all": 1.0}
    assert per_class_acc([0, 3], [0, 3], 5) == [1.0, None, None, 1.0, None]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60))
def test_macro_f1_is_scikit_learns(pairs):
    preds, labels = (torch.tensor(column) for column in zip(*pairs, strict=True))
    state = EvalState(9)
    state.update(torch.nn.functional.one_hot(preds, 9), labels)
    expected = f1_score(labels, preds, average="macro", zero_division=0)
    assert state.compute()["macro_f1"] == pytest.approx(expected)


def slow_ece(probs, labels, bins=15):
    total = 0.0
    for b in range(bins):
        inside = [i for i, p in enumerate(probs) if b / bins < max(p) <= (b + 1) / bins]
        if inside:
            confidence = sum(max(probs[i]) for i in inside) / len(inside)
            right = sum(int(np.argmax(probs[i]) == labels[i]) for i in inside) / len(inside)
            total += len(inside) / len(labels) * abs(confidence - right)
    return total


def test_calibration_error_by_hand():
    for probs, labels, expected in (([[0.8, 0.2]] * 10, [0] * 8 + [1] * 2, 0), ([[1.0, 1e-30]], [1], 1)):
        state = EvalState(2)
        state.update(torch.tensor(probs).log(), torch.tensor(labels))
        assert state.compute()["ece"] == pytest.approx(expected, abs=1e-6)


def test_open_set_by_hand():
    labels = [0, 0, 1, 2, -1, -1, -1]
    preds = [0, 1, 1, 2, 0, 1, 2]
    probs = [.9, .9, .5, .05, .05, .1, .9]
    # Known: one is taken as unknown, of the other three two are right. Unknown: two are taken as known.
    precision, recall = 2 / 3, 2 / 4
    assert open_set_f_measure(preds, labels, probs, 0.1) == pytest.approx(2 * precision * recall / (precision + recall))
    full = [[p, 1 - p] if p > .5 else [p / 2, p] for p in probs]
    assert open_set_f_measure(preds, labels, torch.tensor(full), 0.1) == pytest.approx(4 / 7)
    assert open_set_f_measure([0], [1], [0.9]) == 0 and open_set_f_measure([], [], []) == 0


def test_experts():
    logits = torch.tensor([[[2.0, 1], [1, 2], [2, 1]], [[2, 1], [2, 1], [2, 1]]])  # predictions 0 1 0, 0 0 0
    state = EvalState(2, num_experts=3)
    state.update(logits.mean(1), torch.tensor([0, 1]), expert_logits=logits)
    figures = state.compute()
    assert figures["expert_acc"] == [0.5, 0.0, 0.5]
    assert figures["expert_disagreement"] == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_eval_state_equals_functions_on_the_whole_set(batch):
    logits, labels = make()
    output = logits.mean(1)
    used = torch.randint(1, 4, (200,), generator=torch.Generator().manual_seed(3))
    state = EvalState(5, num_experts=3)
    for rows in torch.arange(200).split(batch):
        state.update(output[rows], labels[rows], expert_logits=logits[rows], sample_num_experts=used[rows])
    result = state.compute(TRAIN)
    preds, probs = output.argmax(1), output.softmax(1)
    shots = shot_accuracy(preds, labels, TRAIN)
    assert result["accuracy"] == pytest.approx(shots["all"])
    for name in ("many", "medium", "few"):
        assert result[f"{name}_shot_acc"] == pytest.approx(shots[name])
    assert [result[f"{name}_class_num"] for name in ("many", "medium", "few")] == [1, 2, 2]
    assert result["per_class_acc"] == per_class_acc(preds, labels, 5)
    assert result["class_mean_acc"] == pytest.approx(np.mean(result["per_class_acc"]))
    assert result["macro_f1"] == pytest.approx(f1_score(labels, preds, average="macro"))
    assert result["ece"] == pytest.approx(slow_ece(probs.numpy(), labels.tolist()), rel=1e-5)
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(output, labels).item(), rel=1e-5)
    assert result["n_samples"] == 200
    assert result["expert_acc"] == pytest.approx(
        [(logits[:, e].argmax(1) == labels).double().mean().item() for e in range(3)])
    first, second, third = logits.argmax(2).unbind(1)
    differ = [(a != b).double().mean().item() for a, b in ((first, second), (first, third), (second, third))]
    assert result["expert_disagreement"] == pytest.approx(sum(differ) / 3, rel=1e-5)
    share = [(used == k).double().mean().item() for k in (1, 2, 3)]
    assert result["expert_share"]["all"] == pytest.approx(share)
    few = used[labels >= 3]
    assert result["expert_share"]["few"] == pytest.approx([(few == k).double().mean().item() for k in (1, 2, 3)])
    json.dumps(result, allow_nan=False)


def test_eval_state_leaves_out_unknown_images_and_merges_by_sum():
    logits, labels = make()
    output = logits.mean(1)
    whole = EvalState(5)
    whole.update(output[:150], labels[:150])
    parts = [EvalState(5) for _ in range(2)]
    parts[0].update(output[:100], labels[:100])
    mixed = labels[100:].clone()
    mixed[50:] = -1
    parts[1].update(output[100:], mixed)
    for into, more in zip(parts[0].tensors(), parts[1].tensors(), strict=True):
        into += more
    merged, expected = parts[0].compute(TRAIN), whole.compute(TRAIN)
    assert merged.pop("loss") == pytest.approx(expected.pop("loss"))
    assert merged.pop("ece") == pytest.approx(expected.pop("ece"))
    assert merged == expected and merged["n_samples"] == 150


def test_eval_state_without_images_or_counts_and_with_broken_logits():
    empty = EvalState(3).compute([200, 50, 2])
    assert empty["n_samples"] == 0 and empty["few_class_num"] == 1
    assert all(empty[k] is None for k in ("accuracy", "class_mean_acc", "few_shot_acc", "macro_f1", "ece", "loss"))
    assert empty["per_class_acc"] == [None] * 3
    json.dumps(empty, allow_nan=False)
    state = EvalState(3)
    state.update(torch.full((4, 3), math.nan), torch.tensor([0, 1, 2, 0]))
    broken = state.compute()
    assert broken["loss"] is None and broken["many_shot_acc"] is None
    json.dumps(broken, allow_nan=False)


def test_eval_state_memory_grows_with_classes_not_their_square():
    state = EvalState(8142, num_experts=3)
    assert sum(t.numel() for t in state.tensors()) < 8142 * 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_eval_state_on_a_gpu_never_waits_in_update():
    logits, labels = make()
    state = EvalState(5, "cuda", num_experts=3)
    there, on_gpu = logits.cuda(), labels.cuda()
    used = torch.ones_like(on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.update(there.mean(1), on_gpu, expert_logits=there, sample_num_experts=used)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.compute(TRAIN)["accuracy"] == pytest.approx(accuracy(logits.mean(1), labels).item())
