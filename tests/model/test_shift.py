"""Logits for other class frequencies, temperatures and weights of experts, against slow loops and known truths."""
import math

import pytest
import torch

from model.loss import BalancedSoftmaxLoss, BalPoELoss, CrossEntropyLoss, FocalLoss, LDAMLoss, LogitAdjustmentLoss
from model.shift import (
    adjust_logits,
    estimate_prior,
    fit_temperature,
    frequencies,
    learn_expert_weights,
    stability,
)

C = 4


@pytest.fixture
def gaussians():
    """(logits [N, C] right for equal classes, labels [N]) of overlapping Gaussians drawn 8 : 4 : 2 : 1."""
    g = torch.Generator().manual_seed(0)
    share = torch.tensor([8, 4, 2, 1], dtype=torch.float64) / 15
    labels = torch.multinomial(share, 3000, replacement=True, generator=g)
    centres = 1.2 * torch.eye(C, dtype=torch.float64)
    x = centres[labels] + torch.randn(3000, C, dtype=torch.float64, generator=g)
    return -(x[:, None] - centres).square().sum(2) / 2, labels


def test_post_hoc_adjustment_subtracts_the_log_share():
    logits = torch.zeros(2, 3, dtype=torch.float64)
    got = adjust_logits(logits, [6, 3, 1], tau=2.0)
    assert got[1].tolist() == pytest.approx([-2 * math.log(n / 10) for n in (6, 3, 1)])
    assert torch.isfinite(adjust_logits(logits.half(), [5, 0, 0])).all()
    assert adjust_logits(logits.half(), [5, 1, 1]).dtype == torch.float16


def test_expectation_maximisation_equals_a_slow_loop(gaussians):
    logits, learned = gaussians[0][:40], [0.4, 0.3, 0.2, 0.1]
    prior = list(learned)
    for _ in range(3):
        sums = [0.0] * C
        for row in logits.tolist():
            odds = [q / a * math.exp(z) for q, a, z in zip(prior, learned, row)]
            sums = [s + o / sum(odds) for s, o in zip(sums, odds)]
        prior = [s / 40 for s in sums]
    got = estimate_prior(logits, torch.tensor(learned, dtype=torch.float64), steps=3)
    assert got.tolist() == pytest.approx(prior, rel=1e-9)


def test_the_images_class_distribution_is_found_without_labels(gaussians):
    logits, labels = gaussians
    true = labels.bincount(minlength=C) / len(labels)
    found = estimate_prior(logits, torch.full((C,), 1 / C))
    assert (found - true).abs().max() < 0.05 and float(found.sum()) == pytest.approx(1)
    # Seen through a model of other frequencies it's the same distribution.
    other = frequencies([1, 2, 4, 8])
    assert torch.allclose(estimate_prior(logits + other.log(), other, steps=2000, tolerance=1e-9),
                          estimate_prior(logits, torch.full((C,), 1 / C), steps=2000, tolerance=1e-9), atol=1e-5)


def test_the_temperature_is_the_best_of_a_fine_grid(gaussians):
    logits, labels = gaussians[0][:600] * 3.7, gaussians[1][:600]

    def loss(t):
        return sum(-row[y] / t + math.log(sum(math.exp(z / t) for z in row))
                   for row, y in zip(logits.tolist(), labels.tolist()))
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(min((t / 50 for t in range(50, 400)), key=loss), abs=0.03)
    assert fit_temperature(logits * 2, labels) == pytest.approx(2 * found, rel=1e-6)
    assert fit_temperature(torch.eye(C).double(), torch.arange(C)) == pytest.approx(0.05)    # never wrong: the bound


def test_a_class_that_no_image_can_be_has_no_part_in_the_temperature(gaussians):
    """Nearest class mean gives a class without training images -inf; images of that class are left out."""
    logits, labels = gaussians[0][:600] * 3.7, gaussians[1][:600]
    impossible = torch.full((600, 1), -math.inf, dtype=torch.float64)
    found = fit_temperature(torch.cat([logits, impossible], 1), torch.where(torch.arange(600) < 500, labels, C))
    assert found == pytest.approx(fit_temperature(logits[:500], labels[:500]), rel=1e-9)


def test_steady_experts_get_the_weight():
    g = torch.Generator().manual_seed(0)
    steady, shaky = 3 * torch.randn(200, 1, C, generator=g), torch.randn(2, 200, 1, C, generator=g)
    views = [torch.cat([steady, 3 * noise], 1) for noise in shaky]
    weights = learn_expert_weights(*views)
    assert weights[0] > 0.9 and float(weights.sum()) == pytest.approx(1)
    assert stability(weights, *views) > stability(torch.tensor([0.5, 0.5]).double(), *views)
    one, two = ([sum(w * z for w, z in zip(weights.tolist(), column)) for column in zip(*view[0].tolist())]
                for view in views)
    p, q = ([math.exp(z) / sum(map(math.exp, row)) for z in row] for row in (one, two))
    cosine = sum(a * b for a, b in zip(p, q)) / math.hypot(*p) / math.hypot(*q)
    assert float(stability(weights, *(view[:1] for view in views))) == pytest.approx(cosine, rel=1e-6)


def test_what_a_models_logits_are_right_for():
    counts, pi, even = [80, 15, 5], torch.tensor([0.8, 0.15, 0.05], dtype=torch.float64), torch.full((3,), 1 / 3)
    assert torch.allclose(CrossEntropyLoss(counts).learned_prior(pi), pi)
    assert torch.allclose(BalancedSoftmaxLoss(counts).learned_prior(pi), even.double())
    assert torch.allclose(BalPoELoss(counts).learned_prior(pi, 3), even.double())
    # Experts that are left out, or count more than others, bring their own offsets: here 0, 1 and 2 times log pi.
    for weights, power in (([0, 0, 1], -1), ([1, 0, 0], 1), ([0.5, 0, 0.5], 0), ([0.2, 0.2, 0.6], -0.4)):
        weights = torch.tensor(weights, dtype=torch.float64)
        assert torch.allclose(BalPoELoss(counts).learned_prior(pi, 3, weights), pi ** power / (pi ** power).sum())
        assert torch.allclose(BalancedSoftmaxLoss(counts).learned_prior(pi, 3, weights), even.double())
    half = LogitAdjustmentLoss(counts, tau=0.5).learned_prior(pi)
    assert torch.allclose(half, pi.sqrt() / pi.sqrt().sum())
    assert FocalLoss(counts, [1, 2, 5]).learned_prior(pi).tolist() == pytest.approx([80 / 135, 30 / 135, 25 / 135])
    assert FocalLoss(counts, [1, 2, 0]).learned_prior(pi).tolist() == pytest.approx([80 / 115, 30 / 115, 5 / 115])
    deferred = LDAMLoss(counts, reweight_epoch=5)
    deferred.set_epoch(5)
    assert torch.allclose(deferred.learned_prior(pi), pi)
    deferred.set_epoch(6)
    assert (deferred.learned_prior(pi) - 1 / 3).abs().max() < 0.01       # weights ~ 1 / n for small n
