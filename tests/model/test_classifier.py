"""Heads against their formulas, and their names in a model."""
import pytest
import torch

from model.classifier import HEADS, CosineLinear, make_head, weight_by_class
from model.model import build_model
from utils.errors import ConfigError

N, D, C = 6, 5, 4


def test_cosine_head():
    torch.manual_seed(0)
    head, x = CosineLinear(D, C, s=30.0).double(), torch.randn(N, D, dtype=torch.double)
    assert head.weight.shape == (D, C)
    torch.testing.assert_close(head.weight.norm(dim=0), torch.ones(C, dtype=torch.double), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        head.weight *= 3
        logits = head(x)
    for i in range(N):
        for j in range(C):
            w = head.weight[:, j].detach()
            assert logits[i, j].item() == pytest.approx(30 * (x[i] @ w / x[i].norm() / w.norm()).item())


def test_lws_head_scales_weight_and_bias():
    torch.manual_seed(0)
    head, x = make_head("lws", D, C), torch.randn(N, D)
    plain = x @ head.weight.t() + head.bias
    torch.testing.assert_close(head(x), plain)
    with torch.no_grad():
        head.scales.copy_(torch.arange(1.0, C + 1))
    torch.testing.assert_close(head(x), plain * torch.arange(1.0, C + 1))


@pytest.mark.parametrize("kind,affine", [("linear_fcbn", True), ("linear_fcbn_notaffine", False)])
def test_batch_norm_on_logits(kind, affine):
    torch.manual_seed(0)
    head, x = make_head(kind, D, C), torch.randn(N, D)
    logits = head(x)
    torch.testing.assert_close(logits.mean(0), torch.zeros(C), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.std(0, correction=0), torch.ones(C), rtol=1e-2, atol=1e-2)
    assert ("bn.weight" in head.state_dict()) == affine
    assert head(x[:1]).shape == (1, C)      # a last batch of one trains too
    before = head.bn.running_mean.clone()
    head(x[:1])
    assert torch.equal(head.bn.running_mean, before)
    single = head.eval()(x[:1])
    torch.testing.assert_close(single, head(x)[:1])


class OwnCosine(torch.nn.Module):
    """A user's cosine head whose weight is [C, D], as nn.Linear's."""

    def __init__(self, features, classes):
        super().__init__()
        self.weight, self.s = torch.nn.Parameter(torch.randn(classes, features)), 10.0


def test_weights_by_class_of_any_head():
    """[C, D] that share the head's memory; refused where the shape doesn't tell."""
    for head in (make_head("linear", D, C), make_head("cosine", D, C), OwnCosine(D, C), OwnCosine(C, D)):
        weight = weight_by_class(head, C)
        assert weight.shape == (C, D) and weight.data_ptr() == head.weight.data_ptr()
    square = make_head("cosine", C, C)
    assert torch.equal(weight_by_class(square, C), square.weight.t())
    for head, classes in ((OwnCosine(C, C), C), (OwnCosine(D, C), 3)):
        with pytest.raises(ConfigError, match=r"^arch\.args\.classifier: the shape \[4, [45]\] of OwnCosine's weight"):
            weight_by_class(head, classes)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("experts", [1, 2])
def test_heads_in_a_model(kind, experts):
    model = build_model({"type": "ResNet32Model", "args": {"num_experts": experts, "classifier": kind}}, num_classes=C)
    base = "backbone.linear" if experts == 1 else "backbone.linears.1"
    keys = {key.removeprefix(base + ".") for key in model.state_dict() if key.startswith(base + ".")}
    statistics = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    assert keys == {"linear": {"weight", "bias"}, "cosine": {"weight"}, "lws": {"weight", "bias", "scales"},
                    "linear_fcbn": {"weight", "bias", "bn.weight", "bn.bias"} | statistics,
                    "linear_fcbn_notaffine": {"weight", "bias"} | statistics}[kind]
    model(torch.randn(3, 3, 32, 32))["output"].square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_use_norm_is_the_cosine_head_with_scale_s():
    model = build_model({"type": "ResNet32Model", "args": {"use_norm": True, "s": 16}}, num_classes=C)
    assert isinstance(model.backbone.linear, CosineLinear) and model.backbone.linear.s == 16


def test_what_a_second_stage_trains():
    def stage2(kind):
        args = {"num_experts": 2, "classifier": kind}
        return build_model({"type": "ResNet32Model", "args": args}, C).stage2_prefixes()

    assert stage2("lws") == ["backbone.linears.0.scales", "backbone.linears.1.scales"]
    assert stage2("linear") == ["backbone.linears."]


def test_unknown_head():
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        make_head("liner", D, C)
