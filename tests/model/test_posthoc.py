"""Classifiers made after training, against slow loops over samples, experts and classes."""
import math

import pytest
import torch
import torch.nn.functional as F

import model.posthoc as posthoc
from model.classifier import HEADS, make_head
from model.metric import EvalState
from model.posthoc import (
    LinearHead,
    TauHeads,
    best_tau,
    fit_nearest_class_mean,
    linear_head,
    model_heads,
)
from utils.errors import ConfigError

N, E, C, D = 60, 3, 5, 8


def evaluate_logits(output, labels, counts=None):
    state = EvalState(output.shape[1])
    state.update(output, labels)
    return state.compute(counts)


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % C
    centres = torch.randn(C, E, D, generator=g, dtype=torch.float64) * 2
    return centres[labels] + torch.randn(N, E, D, generator=g, dtype=torch.float64) + 3, labels


def weights(seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(C, D, generator=g, dtype=torch.float64) * (1 + torch.arange(C))[:, None] for _ in range(E)]


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("scale", [None, 30.0])
def test_tau_logits_equal_a_slow_loop(data, tau, scale):
    feats, _ = data
    heads = [LinearHead(w, scale) for w in weights()]
    got = TauHeads(heads).logits(feats, tau)
    for n in (0, 17):
        for c in range(C):
            total = 0.0
            for e in range(E):
                w, x = heads[e].weight[c].tolist(), feats[n, e].tolist()
                size = 1 if scale is None else math.sqrt(sum(v * v for v in x)) / scale
                total += sum(a * b for a, b in zip(w, x, strict=True)) / math.hypot(*w)**tau / size
            assert got[n, c].item() == pytest.approx(total / E, rel=1e-9)


def test_tau_zero_leaves_weights_and_one_makes_them_unit():
    weight = torch.cat([weights()[0], torch.zeros(1, D, dtype=torch.float64)])
    heads = TauHeads([LinearHead(weight)])
    assert torch.equal(heads.factors(0)[0], torch.ones(C + 1, dtype=torch.float64))
    assert torch.allclose(heads.factors(1)[0, :C] * weight[:C].norm(dim=1), torch.ones(C, dtype=torch.float64))
    assert heads.logits(torch.ones(2, 1, D, dtype=torch.float64), 2)[:, -1].tolist() == [0, 0]  # it stays zero


@pytest.mark.parametrize("kind", HEADS)
def test_linear_head_is_the_heads_own_map_without_bias(kind):
    head = make_head(kind, D, C).double().eval()
    with torch.no_grad():
        if kind == "lws":
            head.scales.uniform_(0.5, 2)
        if hasattr(head, "bn"):
            head.bn.running_var.uniform_(0.5, 2)
            head.bn.running_mean.uniform_(-1, 1)
            if head.bn.weight is not None:
                head.bn.weight.uniform_(-1, 1)
    x = torch.randn(7, D, dtype=torch.float64)
    bias = 0 if kind == "cosine" else head(torch.zeros(1, D, dtype=torch.float64))
    tau = 1.0 if kind == "cosine" else 0.0  # a cosine head normalises its weights itself
    got = TauHeads([linear_head(head, C)]).logits(x[:, None], tau)
    assert torch.allclose(got, head(x) - bias, atol=1e-6)


@pytest.mark.parametrize(("experts", "use"), [(1, None), (3, None), (3, "0,2")])
def test_model_heads_go_with_its_features(experts, use):
    from model.model import build_model
    model = build_model({"type": "ResNet32Model", "args": dict(num_classes=4, num_experts=experts, use_norm=True,
                                                               reduce_dimension=True, use_experts=use)}).eval()
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 16, 16))
    got = TauHeads(model_heads(model)).logits(outputs["feat"], 1.0)
    assert torch.allclose(got, outputs["output"], atol=1e-4)


def test_a_sweep_counts_what_each_tau_gets_right(data, monkeypatch):
    feats, labels = data
    heads, taus = TauHeads([LinearHead(w) for w in weights()]), [k / 10 for k in range(21)]
    expected = [evaluate_logits(heads.logits(feats, tau), labels, [200, 50, 30, 9, 2]) for tau in taus]
    for chunk in (2**24, E * C * 7):
        monkeypatch.setattr(posthoc, "CHUNK", chunk)
        states = [EvalState(C) for _ in taus]
        for part in (slice(40), slice(40, None)):
            heads.count(feats[part], labels[part], taus, states)
        for state, figures in zip(states, expected, strict=True):
            found = state.compute([200, 50, 30, 9, 2])
            assert found["per_class_acc"] == figures["per_class_acc"] and found["macro_f1"] == figures["macro_f1"]
            assert found["loss"] == pytest.approx(figures["loss"])
        assert torch.allclose(heads.logits(feats, 0.7), torch.cat([heads.logits(f, 0.7) for f in feats.split(9)]))


def test_best_tau_prefers_the_smaller_of_equals():
    assert best_tau([2.0, 1.0, 0.5, 0.0], [0.5, 0.7, 0.7, 0.1]) == 0.5


def test_features_of_other_experts_are_refused(data):
    with pytest.raises(ValueError, match="3 experts for 1 heads"):
        TauHeads([LinearHead(weights()[0])]).logits(data[0], 1)


def slow_ncm(train, labels, test, feat_type, distance):
    """One expert after the other, one class after the other."""
    def prepare(x, centre):
        if feat_type == "un":
            return x
        x = x - centre if feat_type == "cl2n" else x
        return x / x.norm(dim=1, keepdim=True)
    total = 0
    for e in range(E):
        centre = train[:, e].mean(0)
        have, ask = prepare(train[:, e], centre), prepare(test[:, e], centre)
        means = [have[labels == c].mean(0) for c in range(C)]
        if distance == "cosine":
            columns = [F.cosine_similarity(ask, m[None]) for m in means]
        else:
            columns = [-((ask - m) ** 2).sum(1) for m in means]
        total = total + torch.stack(columns, 1)
    return total / E


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("feat_type", ["un", "l2n", "cl2n"])
def test_nearest_class_mean_equals_a_slow_loop(data, feat_type, distance, monkeypatch):
    feats, labels = data
    train, test = feats[:40], feats[40:]
    passes = []

    def batches():
        passes.append(1)
        return zip(train.split(7), labels[:40].split(7), strict=True)

    ncm = fit_nearest_class_mean(batches, C, feat_type, distance)
    assert len(passes) == (2 if feat_type == "cl2n" else 1)
    expected = slow_ncm(train, labels[:40], test, feat_type, distance)
    assert torch.allclose(ncm.logits(test), expected, rtol=1e-8)
    monkeypatch.setattr(posthoc, "CHUNK", E * C * 3)
    assert torch.allclose(ncm.logits(test), expected, rtol=1e-8)
    assert evaluate_logits(ncm.logits(test), labels[40:])["accuracy"] > 0.5


def test_nearest_class_mean_far_from_the_origin_keeps_its_precision(data):
    """Squared distances in float32 must not drown in the features' own squares."""
    feats, labels = data
    far = (feats + 1000).float()
    near = fit_nearest_class_mean(lambda: [(feats.float(), labels)], C, "un").logits(feats.float())
    got = fit_nearest_class_mean(lambda: [(far, labels)], C, "un").logits(far)
    assert (got - near).abs().max() < 0.2 and (got.argmax(1) == near.argmax(1)).float().mean() > 0.95


@pytest.mark.parametrize("feat_type", ["un", "cl2n"])
def test_a_class_without_training_images_is_never_predicted(data, feat_type):
    feats, labels = data
    seen = labels != 2
    ncm = fit_nearest_class_mean(lambda: [(feats[seen], labels[seen])], C, feat_type)
    logits = ncm.logits(feats)
    assert not (logits.argmax(1) == 2).any() and torch.isfinite(logits[:, [0, 1, 3, 4]]).all()


def test_ranks_merge_into_the_means_of_all(data):
    feats, labels = data
    whole = fit_nearest_class_mean(lambda: [(feats, labels)], C, "un")
    other = torch.zeros(C, E, D, dtype=feats.dtype).index_add_(0, labels[30:], feats[30:])
    count = torch.bincount(labels[30:], minlength=C)
    merge = lambda t: t.add_(other if t.dim() == 3 else count)  # noqa: E731
    half = fit_nearest_class_mean(lambda: [(feats[:30], labels[:30])], C, "un", merge=merge)
    assert torch.allclose(half.logits(feats), whole.logits(feats))


def test_wrong_names_are_named(data):
    for args, says in ((("l2",), "l2n"), (("un", "cosin"), "cosine")):
        with pytest.raises(ConfigError, match=says):
            fit_nearest_class_mean(lambda: [data], C, *args)
    with pytest.raises(ValueError, match="no training features"):
        fit_nearest_class_mean(list, C, "un")
