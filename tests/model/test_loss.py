"""Losses against slow float64 loops written from the formulas, against autograd's numbers, and at their edges."""
import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.loss import LOSSES, LongTailLoss, RIDELoss, RIDELossWithDistill, build_loss
from utils.errors import ConfigError

COUNTS = [200, 90, 40, 15, 6, 2]
DEFERRED = ("LDAMLoss", "RIDELoss", "RIDELossWithDistill")


# ---- slow twins: python floats, one sample, one class, one expert at a time ---------------------------------------

def log_softmax(z):
    top = max(z)
    total = math.log(math.fsum(math.exp(v - top) for v in z)) + top
    return [v - total for v in z]


def slow_weights(counts, beta=0.9999):
    raw = [(1 - beta) / (1 - beta**n) for n in counts]
    return [w * len(counts) / math.fsum(raw) for w in raw]


def slow_ce(rows, target, weights=None, smoothing=0.0):
    losses, norm = [], []
    for z, y in zip(rows, target, strict=True):
        logs = log_softmax(z)
        one = -(1 - smoothing) * logs[y] - smoothing * math.fsum(logs) / len(logs)
        w = 1.0 if weights is None else weights[y]
        losses.append(w * one)
        norm.append(w)
    return math.fsum(losses) / math.fsum(norm)


def slow_ldam(rows, target, counts, max_m=0.5, s=30, in_force=False):
    margins = [n ** -0.25 for n in counts]
    margins = [m * max_m / max(margins) for m in margins]
    moved = [[v - s * margins[y] * (c == y) for c, v in enumerate(z)] for z, y in zip(rows, target, strict=True)]
    return slow_ce(moved, target, slow_weights(counts) if in_force else None)


def slow_kl(p_logits, q_logits, temperature):
    p = log_softmax([v / t for v, t in zip(p_logits, temperature, strict=True)])
    q = log_softmax([v / t for v, t in zip(q_logits, temperature, strict=True)])
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def slow_diversity(mean, experts, temperature):
    """Of one expert: the mean over samples, times the squared mean temperature."""
    t_mean = math.fsum(temperature) / len(temperature)
    return t_mean**2 * math.fsum(slow_kl(m, z, temperature) for m, z in zip(mean, experts, strict=True)) / len(mean)


def slow_ride(output, logits, target, counts, in_force=False, factor=-0.2, base_factor=1.0, t=1.0, reweight_factor=0.05,
              max_m=0.5, s=30):
    classes = len(output[0])
    temperature = [t] * classes
    if in_force:
        d = [classes * n / sum(counts) * reweight_factor + 1 - reweight_factor for n in counts]
        temperature = [t * v / max(d) for v in d]
    total = 0.0
    for e in range(len(logits[0])):
        expert = [sample[e] for sample in logits]
        base_on = output if factor == 0 else expert
        total += base_factor * slow_ldam(base_on, target, counts, max_m, s, in_force)
        total += factor * slow_diversity(output, expert, temperature)
    return total


def slow_hcm(rows, target, counts, hcm_n):
    prior = [math.log(n / sum(counts)) for n in counts]
    balanced = [[v + p for v, p in zip(z, prior, strict=True)] for z in rows]
    mined = []
    for z, b, y in zip(rows, balanced, target, strict=True):
        order = sorted(range(len(z)), key=lambda c: math.inf if c == y else z[c], reverse=True)
        keep = set(order[:hcm_n])
        mined.append([v if c in keep else 0.0 for c, v in enumerate(b)])
    return slow_ce(balanced, target) + slow_ce(mined, target)


def slow_focal(rows, target, gamma):
    terms = []
    for z, y in zip(rows, target, strict=True):
        ce = -log_softmax(z)[y]
        terms.append((1 - math.exp(-ce)) ** gamma * ce)
    return math.fsum(terms) / len(terms)


def slow_balanced(rows, target, counts):
    return slow_ce([[v + math.log(n) for v, n in zip(z, counts, strict=True)] for z in rows], target)


def slow_distill(teacher, output, t):
    return t * t * math.fsum(slow_kl(a, b, [t] * len(a)) for a, b in zip(teacher, output, strict=True)) / len(output)


CASES = {
    "CrossEntropyLoss": (dict(reweight_CE=True), lambda o, z, y, n, t, force: slow_ce(o, y, slow_weights(n))),
    "FocalLoss": (dict(gamma=1.7), lambda o, z, y, n, t, force: slow_focal(o, y, 1.7)),
    "LDAMLoss": (dict(max_m=0.4, s=7, reweight_epoch=2),
                 lambda o, z, y, n, t, force: slow_ldam(o, y, n, 0.4, 7, force)),
    "RIDELoss": (dict(additional_diversity_factor=-0.45, reweight_epoch=2, base_diversity_temperature=1.3,
                      base_loss_factor=0.7, reweight_factor=0.2, s=5),
                 lambda o, z, y, n, t, force: slow_ride(o, z, y, n, force, -0.45, 0.7, 1.3, 0.2, s=5)),
    "RIDELossWithDistill": (dict(additional_distill_loss_factor=0.6, distill_temperature=1.5, ride_loss_factor=0.9,
                                 reweight_epoch=2, s=5),
                            lambda o, z, y, n, t, force: 0.9 * slow_ride(o, z, y, n, force, s=5)
                            + 0.6 * slow_distill(t, o, 1.5)),
    "BalancedSoftmaxLoss": ({}, lambda o, z, y, n, t, force: slow_balanced(o, y, n)),
    "RIDEBalancedSoftmaxLoss": (dict(base_diversity_temperature=0.8, additional_diversity_factor=-0.3),
                                lambda o, z, y, n, t, force: sum(
                                    slow_balanced([s[e] for s in z], y, n)
                                    - 0.3 * slow_diversity(o, [s[e] for s in z], [0.8] * len(n))
                                    for e in range(len(z[0])))),
    "HCMLoss": (dict(HCM_N=3), lambda o, z, y, n, t, force: slow_hcm(o, y, n, 3)),
    "LogitAdjustmentLoss": (dict(tau=1.4), lambda o, z, y, n, t, force: slow_ce(
        [[v + 1.4 * math.log(k / sum(n)) for v, k in zip(row, n, strict=True)] for row in o], y)),
    "LabelSmoothingLoss": (dict(smoothing=0.2), lambda o, z, y, n, t, force: slow_ce(o, y, smoothing=0.2)),
}


def make(num_classes=6, experts=3, n=7, dtype=torch.float64, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(n, experts, num_classes, generator=g, dtype=torch.float64)).to(dtype)
    logits.requires_grad_(grad)
    target = torch.randint(0, num_classes, (n,), generator=g)
    teacher = (2 * torch.randn(n, num_classes, generator=g, dtype=torch.float64)).to(dtype)
    return {"output": logits.mean(1), "logits": logits, "teacher": teacher}, target


def plain(outputs, target):
    return outputs["output"].tolist(), outputs["logits"].tolist(), target.tolist(), outputs["teacher"].tolist()


def long_tail(num_classes):
    return [max(1, int(500 * 0.01 ** (j / max(num_classes - 1, 1)))) for j in range(num_classes)]


def test_every_public_loss_has_a_slow_twin():
    assert set(CASES) == set(LOSSES)
    assert all(issubclass(loss, LongTailLoss) for loss in LOSSES.values())


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_equals_slow_loop_before_and_after_deferral(name, experts):
    args, slow = CASES[name]
    outputs, target = make(experts=experts)
    o, z, y, t = plain(outputs, target)
    criterion = LOSSES[name](cls_num_list=COUNTS, **args)
    values = []
    for epoch, in_force in ((None, False), (1, False), (2, False), (3, True), (4, True)):
        if epoch is not None:
            criterion.set_epoch(epoch)
        values.append(criterion(outputs, target).item())
        assert values[-1] == pytest.approx(slow(o, z, y, COUNTS, t, in_force), rel=1e-10)
    if name in DEFERRED:
        assert values[2] != pytest.approx(values[3], rel=1e-4), "re-weighting has begun"
    else:
        assert len(set(values)) == 1


@given(num_classes=st.integers(2, 40), experts=st.integers(1, 5), n=st.integers(1, 9), seed=st.integers(0, 10_000),
       in_force=st.booleans(), name=st.sampled_from(sorted(CASES)))
def test_equals_slow_loop_on_any_shape(num_classes, experts, n, seed, in_force, name):
    args, slow = CASES[name]
    counts = long_tail(num_classes)
    outputs, target = make(num_classes, experts, n, seed=seed)
    o, z, y, t = plain(outputs, target)
    criterion = LOSSES[name](cls_num_list=counts, **args)
    criterion.set_epoch(3 if in_force else 2)
    assert criterion(outputs, target).item() == pytest.approx(slow(o, z, y, counts, t, in_force), rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, epoch):
    criterion = LOSSES[name](cls_num_list=COUNTS, **CASES[name][0])
    criterion.set_epoch(epoch)
    outputs, target = make(n=4, experts=2, grad=True)
    # The mean logits are detached in the diversity term: held fixed for the numeric derivative by the experts.
    output = outputs["output"].detach()
    if name.startswith("RIDE"):
        fixed = {"output": output, "teacher": outputs["teacher"]}
        assert torch.autograd.gradcheck(lambda z: criterion({**fixed, "logits": z}, target), outputs["logits"])
    else:
        assert torch.autograd.gradcheck(lambda z: criterion({"output": z}, target), output.requires_grad_())


def test_gradcheck_of_distillation_and_collaborative_base():
    outputs, target = make(n=4, experts=2)
    output = outputs["output"].clone().requires_grad_()
    rest = {"logits": outputs["logits"], "teacher": outputs["teacher"]}
    distill = RIDELossWithDistill(cls_num_list=COUNTS, additional_diversity_factor=0.0, distill_temperature=1.5)
    assert torch.autograd.gradcheck(lambda z: distill({"output": z, **rest}, target), output)


def test_mean_and_teacher_get_no_gradient_where_they_are_targets():
    outputs, target = make(grad=True)
    teacher = outputs["teacher"].requires_grad_()
    output = outputs["output"].detach().requires_grad_()
    RIDELoss(cls_num_list=COUNTS)({"output": output, "logits": outputs["logits"]}, target).backward()
    assert output.grad is None and outputs["logits"].grad is not None
    criterion = RIDELossWithDistill(cls_num_list=COUNTS)
    criterion({"output": output, "logits": outputs["logits"], "teacher": teacher}, target).backward()
    assert output.grad is not None and teacher.grad is None


@pytest.mark.parametrize("experts", [1, 3])
def test_diversity_factor_zero_is_collaborative(experts):
    outputs, target = make(experts=experts)
    o, z, y, _ = plain(outputs, target)
    loss = RIDELoss(cls_num_list=COUNTS, additional_diversity_factor=0, s=3)(outputs, target)
    assert loss.item() == pytest.approx(experts * slow_ldam(o, y, COUNTS, s=3), rel=1e-10)
    apart = RIDELoss(cls_num_list=COUNTS, additional_diversity_factor=0, s=3, collaborative=False)(outputs, target)
    assert apart.item() == pytest.approx(sum(slow_ldam([s[e] for s in z], y, COUNTS, s=3) for e in range(experts)))


def test_ride_without_counts_is_cross_entropy_plus_diversity_at_any_epoch():
    outputs, target = make()
    o, z, y, _ = plain(outputs, target)
    criterion = RIDELoss(reweight_epoch=1)
    expected = sum(slow_ce([s[e] for s in z], y) - 0.2 * slow_diversity(o, [s[e] for s in z], [1.0] * 6)
                   for e in range(3))
    for epoch in (1, 2, 3):
        criterion.set_epoch(epoch)
        assert criterion(outputs, target).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", DEFERRED)
def test_reweight_epoch_edges(name):
    outputs, target = make()
    values = {}
    for reweight_epoch in (-1, 0, 5):
        criterion = LOSSES[name](cls_num_list=COUNTS, reweight_epoch=reweight_epoch)
        for epoch in (None, 1, 5, 6, 500):
            if epoch is not None:
                criterion.set_epoch(epoch)
            values[reweight_epoch, epoch] = criterion(outputs, target).item()
    never, on = values[-1, 1], values[0, 1]
    assert never != on
    assert all(value == (on if k != -1 and epoch is not None and epoch > k else never)
               for (k, epoch), value in values.items())
    if name.startswith("RIDE"):
        off = LOSSES[name](cls_num_list=COUNTS, reweight=False, reweight_epoch=0)
        off.set_epoch(9)
        assert off(outputs, target).item() == never


@pytest.mark.parametrize("name", ["RIDELoss", "RIDELossWithDistill", "RIDEBalancedSoftmaxLoss"])
def test_outside_training_it_is_cross_entropy_of_output(name):
    criterion = LOSSES[name](cls_num_list=COUNTS)
    outputs, target = make()
    expected = slow_ce(outputs["output"].tolist(), target.tolist())
    no_experts = {"output": outputs["output"]}
    assert criterion(no_experts, target).item() == pytest.approx(expected, rel=1e-12)
    with_old = {**outputs, "output_old": outputs["output"] + 1, "logits_old": outputs["logits"]}
    assert criterion.eval()(with_old, target).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_two_streams_add_with_their_weights(name):
    criterion = LOSSES[name](cls_num_list=COUNTS, **CASES[name][0])
    after, target = make(seed=1)
    before, _ = make(seed=2)
    both = {**after, "output_old": before["output"], "logits_old": before["logits"]}
    a = criterion(after, target).item()
    b = criterion({**before, "teacher": after["teacher"]}, target).item()
    assert criterion(both, target).item() == pytest.approx(a + b, rel=1e-10)
    assert criterion({**both, "bt_weights": (0.01, 1.0)}, target).item() == pytest.approx(0.01 * a + b, rel=1e-10)


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
@pytest.mark.parametrize("name", CASES)
def test_any_class_count_gives_finite_gradients(name, num_classes):
    criterion = LOSSES[name](cls_num_list=long_tail(num_classes), **CASES[name][0])
    criterion.set_epoch(3)
    outputs, target = make(num_classes, dtype=torch.float32, grad=True)
    loss = criterion(outputs, target)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert torch.isfinite(loss) and torch.isfinite(outputs["logits"].grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_half_inputs_are_computed_in_float32(name, dtype):
    criterion = LOSSES[name](cls_num_list=COUNTS, **CASES[name][0])
    criterion.set_epoch(3)
    outputs, target = make(dtype=dtype)
    exact = criterion({k: v.double() for k, v in outputs.items()}, target)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(outputs, target)
        assert loss.dtype == torch.float32
        assert criterion({k: v.double() for k, v in outputs.items()}, target).dtype == torch.float64
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_does_not_overflow(name):
    """Logits near float16's largest number, 65504: margins, frequencies and squares must not leave float32's range."""
    criterion = LOSSES[name](cls_num_list=COUNTS, **CASES[name][0])
    outputs, target = make(dtype=torch.float16)
    big = {key: (value.sign() * 60000).requires_grad_() for key, value in outputs.items()}
    loss = criterion(big, target)
    loss.backward()
    assert torch.isfinite(loss) and all(v.grad is None or torch.isfinite(v.grad).all() for v in big.values())


def test_certain_predictions_keep_focal_gradients_finite():
    z = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    for gamma in (0.0, 0.5, 1.0, 2.0):
        z.grad = None
        LOSSES["FocalLoss"](gamma=gamma)({"output": z}, torch.tensor([0, 0])).backward()
        assert torch.isfinite(z.grad).all()


def test_focal_class_weights():
    outputs, target = make()
    weight = [0.5, 1, 2, 3, 4, 5]
    loss = LOSSES["FocalLoss"](weight=weight, gamma=2)(outputs, target).item()
    each = [weight[y] * slow_focal([z], [y], 2)
            for z, y in zip(outputs["output"].tolist(), target.tolist(), strict=True)]
    assert loss == pytest.approx(sum(each) / len(each), rel=1e-10)


def test_hcm_with_more_than_all_classes_is_balanced_softmax_twice():
    outputs, target = make()
    twice = LOSSES["HCMLoss"](cls_num_list=COUNTS)(outputs, target).item()
    assert twice == pytest.approx(2 * LOSSES["BalancedSoftmaxLoss"](cls_num_list=COUNTS)(outputs, target).item())


@pytest.mark.parametrize("name", CASES)
def test_an_empty_class_counts_as_the_rarest(name):
    outputs, target = make()
    target = target % 5
    with_empty, as_rarest = COUNTS[:5] + [0], COUNTS[:5] + [COUNTS[4]]
    losses = []
    for counts in (with_empty, as_rarest):
        criterion = LOSSES[name](cls_num_list=counts, **CASES[name][0])
        criterion.set_epoch(9)
        losses.append(criterion(outputs, target).item())
    assert losses[0] == losses[1] and math.isfinite(losses[0])


def test_share_gives_the_whole_batch_its_weighted_mean(monkeypatch):
    """Two ranks' losses, each scaled by its share of the samples, sum to the loss of the whole batch."""
    outputs, target = make(n=8)
    criterion = LOSSES["LDAMLoss"](cls_num_list=COUNTS, reweight_epoch=0)
    criterion.set_epoch(1)
    whole = criterion(outputs, target).item()
    weights = torch.tensor(slow_weights(COUNTS), dtype=torch.float64)
    monkeypatch.setattr("model.loss.all_reduce_sum", lambda t: t.copy_(weights[target].sum()))
    parts = 0.0
    for rows, here in ((slice(0, 3), 3), (slice(3, 8), 5)):
        criterion.share = (here, 8)
        parts += here / 8 * criterion({"output": outputs["output"][rows]}, target[rows]).item()
    assert parts == pytest.approx(whole, rel=1e-12)
    criterion.share = (0, 8)
    assert math.isfinite(criterion({"output": outputs["output"][:1]}, target[:1]).item())


def test_criterion_can_be_moved_copied_and_has_no_state():
    criterion = RIDELoss(cls_num_list=COUNTS, reweight_epoch=0)
    outputs, target = make()
    criterion.set_epoch(1)
    value = criterion(outputs, target).item()
    twin = copy.deepcopy(criterion).to("cpu")
    assert twin(outputs, target).item() == value
    assert not list(criterion.state_dict()) and not list(criterion.parameters())


@pytest.mark.parametrize(("name", "args", "says"), [
    ("BalancedSoftmaxLoss", {}, "cls_num_list"), ("RIDEBalancedSoftmaxLoss", {}, "cls_num_list"),
    ("HCMLoss", {}, "cls_num_list"), ("LogitAdjustmentLoss", {}, "cls_num_list"),
    ("CrossEntropyLoss", dict(reweight_CE=True), "cls_num_list"),
    ("LDAMLoss", dict(cls_num_list=[5, -1]), "cls_num_list"), ("LDAMLoss", dict(cls_num_list=[0, 0]), "cls_num_list"),
    ("LDAMLoss", dict(cls_num_list=[3, math.nan]), "cls_num_list"), ("LDAMLoss", dict(s=0), "loss.args.s"),
    ("LDAMLoss", dict(max_m=-1), "max_m"), ("LDAMLoss", dict(reweight_epoch=-2), "reweight_epoch"),
    ("FocalLoss", dict(gamma=-1), "gamma"), ("HCMLoss", dict(cls_num_list=[1, 2], HCM_N=0), "HCM_N"),
    ("LabelSmoothingLoss", dict(smoothing=1.5), "smoothing"),
    ("RIDELoss", dict(cls_num_list=[900, 1, 1], reweight_factor=1.5), "reweight_factor"),
    ("RIDELoss", dict(base_diversity_temperature=0), "base_diversity_temperature"),
    ("RIDELossWithDistill", dict(distill_temperature=-1), "distill_temperature"),
    ("LogitAdjustmentLoss", dict(cls_num_list=[1, 2], tau=math.inf), "tau"),
])
def test_wrong_arguments_are_named(name, args, says):
    with pytest.raises(ConfigError, match=says):
        LOSSES[name](**args)


def test_wrong_calls_are_named():
    outputs, target = make()
    with pytest.raises(ConfigError, match="3 classes, the model's output 6"):
        LOSSES["LDAMLoss"](cls_num_list=[3, 2, 1])(outputs, target)
    with pytest.raises(ConfigError, match="teacher"):
        RIDELossWithDistill(cls_num_list=COUNTS)({k: v for k, v in outputs.items() if k != "teacher"}, target)


def test_build_loss():
    criterion = build_loss({"type": "RIDELoss", "args": {"reweight_epoch": 160, "s": 20}}, COUNTS)
    assert criterion.counts.tolist() == COUNTS and criterion.reweight_epoch == 160
    assert build_loss({"type": "LabelSmoothingLoss"}).counts is None
    own = build_loss({"type": "BalancedSoftmaxLoss", "args": {"cls_num_list": [2, 1]}}, COUNTS)
    assert own.counts.tolist() == [2, 1]
    with pytest.raises(ConfigError, match="RIDELoss"):
        build_loss({"type": "RIDELos"}, COUNTS)
    with pytest.raises(ConfigError, match="reweight_epoch"):
        build_loss({"type": "LDAMLoss", "args": {"reweight_epoc": 3}}, COUNTS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_it_is_the_same_and_never_waits(name):
    criterion = LOSSES[name](cls_num_list=COUNTS, **CASES[name][0])
    criterion.set_epoch(3)
    outputs, target = make()
    there = {key: value.cuda() for key, value in outputs.items()}
    on_gpu = target.cuda()
    values = [criterion(there, on_gpu)]  # the tables are copied to the GPU here, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        values.append(criterion(there, on_gpu))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = criterion(outputs, target).item()
    assert [v.item() for v in values] == pytest.approx([expected] * 2, rel=1e-10)
