"""Fine-tuning with few parameters: each kind against a slow twin in float64, what is trained, and what is refused."""

import copy
import json
import logging
import re

import pytest
import torch
import torch.nn.functional as F

import train
from model.model import build_model
from model.tuning import TUNINGS, default_width, install_tuning
from model.tuning_parts import merge_lora
from model.weights.remap import load_weights
from tools import export, gflops
from tools.opened import open_run
from utils.errors import ConfigError

timm = pytest.importorskip("timm")

SIZE, DEPTH, CLASSES = 32, 3, 50


def vit(seed=0, name="test_vit", **args):
    torch.manual_seed(seed)
    args = {"img_size": SIZE, "patch_size": 16, "depth": DEPTH, "num_classes": 0, **args}
    return timm.create_model(name, **args).double().eval()


def trained(network):
    return [name for name, p in network.named_parameters() if p.requires_grad]


def tuned(kind, seed=0, moved=True, **args):
    """A tuned vit; `moved`: what is trained has left its starting point."""
    network = vit(seed)
    install_tuning(network, {"type": kind, "args": args}, CLASSES)
    names = trained(network.double())
    if moved:
        for name, p in network.named_parameters():
            if name in names:
                p.data += 0.3 * torch.randn_like(p)
    return network, names


def images(n=4):
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).double()


def slow_vit(state, x, heads, after_mlp=lambda i, x: 0, qkv=lambda i, x: 0, before=lambda i, x: x):
    """timm's plain vit from its state dict, a step a line; the hooks are where the tunings act."""
    patches = F.unfold(x, 16, stride=16).transpose(1, 2)                                    # [N, T, 3·16·16]
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]

    def layer(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"] \
            + state[f"{name}.bias"]

    for i in range(DEPTH):
        x, at = before(i, x), f"blocks.{i}"
        h = norm(x, f"{at}.norm1")
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2)
                   for part in (layer(h, f"{at}.attn.qkv") + qkv(i, h)).chunk(3, -1))        # [N, heads, T, d]
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + layer((weights @ v).transpose(1, 2).flatten(2), f"{at}.attn.proj")
        h = layer(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")
        h = 0.5 * h * (1 + torch.erf(h / 2 ** 0.5))
        x = x + layer(h, f"{at}.mlp.fc2") + after_mlp(i, x)
    return norm(x, "norm")


def check(network, twin):
    torch.testing.assert_close(network.forward_features(images()), twin, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [None, 0.1])
def test_adaptformer_is_its_formula(scale):
    network, _ = tuned("adaptformer", dim=5, scale=scale)
    state = network.state_dict()

    def adapter(i, x):
        get = lambda name: state[f"blocks.{i}.adapter.{name}"]  # noqa: E731
        h = F.layer_norm(x, x.shape[-1:], get("norm.weight"), get("norm.bias"))
        h = (h @ get("down.weight").T + get("down.bias")).clamp_min(0)
        return (get("scale") if scale is None else scale) * (h @ get("up.weight").T + get("up.bias"))

    check(network, slow_vit(state, images(), network.blocks[0].attn.num_heads, after_mlp=adapter))


def test_lora_is_its_formula():
    network, names = tuned("lora", rank=3, alpha=6.0)
    state = network.state_dict()

    def update(i, h):
        delta = torch.zeros(3, h.shape[-1], h.shape[-1], dtype=torch.double)
        for place, part in ((0, "q"), (2, "v")):
            a, b = (state[f"blocks.{i}.attn.qkv.lora_{ab}.{part}"] for ab in "ab")
            delta[place] = 6.0 / 3 * b @ a
        return h @ delta.flatten(0, 1).T

    check(network, slow_vit(state, images(), network.blocks[0].attn.num_heads, qkv=update))
    assert len(names) == DEPTH * 4


@pytest.mark.parametrize("targets", [["q", "v"], ["k"], ["q", "k", "v", "proj", "fc1", "fc2"]])
def test_merged_lora_is_the_plain_network(targets):
    network, _ = tuned("lora", targets=targets, rank=2)
    merged, plain = merge_lora(network), vit(3)
    assert set(merged.state_dict()) == set(plain.state_dict()) and any("lora" in key for key in network.state_dict())
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(plain(images()), network(images()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_join_the_tokens(deep):
    network, _ = tuned("prompt", tokens=2, deep=deep)
    prompts, own = network.blocks.prompts, 5                                                # class token and 2 x 2
    assert prompts.shape == (DEPTH if deep else 1, 2, 64)

    def join(i, x):
        if not deep and i:
            return x
        return torch.cat([x[:, :own], prompts[i].expand(len(x), -1, -1)], 1)

    twin = slow_vit(network.state_dict(), images(), network.blocks[0].attn.num_heads, before=join)[:, :own]
    check(network, twin.detach())


@pytest.mark.parametrize("kind", ["adaptformer", "lora", "bias", "norm"])
def test_starts_as_the_network_itself(kind):
    before = vit()
    network, _ = tuned(kind, moved=False)
    assert torch.equal(network(images()), before(images()))
    assert set(before.state_dict()) <= set(network.state_dict())
    network.load_state_dict(before.state_dict(), strict=False)                              # plain weights still fit


@pytest.mark.parametrize("kind", TUNINGS)
def test_only_what_is_named_learns(kind):
    network, names = tuned(kind)
    start = copy.deepcopy(network.state_dict())
    rate = 0.1
    network.train()(images()).pow(2).sum().backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == set(names)
    assert all(p.grad.abs().sum() > 0 for name, p in network.named_parameters() if p.grad is not None
               and "lora_" not in name)
    torch.optim.SGD(network.parameters(), rate).step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, start[name])}
    assert changed <= set(names)
    other, _ = tuned(kind, seed=5)
    other.load_state_dict(network.state_dict())                                             # round trip, strict
    assert torch.equal(other.eval()(images()), network.eval()(images()))


# LIFT, table 1 to 3: learned parameters without the classifier, in millions, of ViT-B/16: (data set's classes, width).
@pytest.mark.parametrize("classes, width, millions", [(100, 4, 0.10), (365, 8, 0.18), (1000, 32, 0.62),
                                                      (8142, 256, 4.75)])
def test_counts_are_the_papers(classes, width, millions):
    with torch.device("meta"):
        network = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert default_width(classes, 12) == width
        install_tuning(network, "adaptformer", classes)
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert count == 12 * (2 * 768 * width + 3 * 768 + width + 1)
    assert round(count / 1e6, 2) == millions


def test_counts_of_the_others():
    def count(kind, **args):
        with torch.device("meta"):
            network = timm.create_model("vit_base_patch16_224", num_classes=0)
            install_tuning(network, {"type": kind, "args": args}, 1000)
        return sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert count("lora", rank=32) == 12 * 2 * 32 * (768 + 768)
    assert count("lora", rank=4, targets=["fc1"]) == 12 * 4 * (768 + 3072)
    assert count("prompt", tokens=10) == 12 * 10 * 768
    assert count("prompt", tokens=10, deep=False) == 10 * 768
    assert count("bias") == 12 * (3 + 1 + 4 + 1 + 2) * 768
    assert count("norm") == 12 * 2 * 2 * 768


@pytest.mark.parametrize("name", ["test_vit2", "test_vit3", "test_vit4"])   # registers, no class token, other pooling
def test_other_vits(name):
    for kind in ("adaptformer", "lora", "prompt"):
        torch.manual_seed(0)
        network = timm.create_model(name, num_classes=0, depth=2).eval()
        x = torch.randn(1, 3, *network.patch_embed.img_size)
        before = network(x)
        install_tuning(network, kind, CLASSES)
        after = network(x)
        assert after.shape == before.shape
        assert kind == "prompt" or torch.allclose(after, before, atol=1e-6)


def test_norms_and_biases_of_any_network():
    network = timm.create_model("test_resnet", num_classes=0)
    install_tuning(network, "norm", CLASSES)
    norms = {name for name, layer in network.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)}
    assert set(trained(network)) == {f"{name}.{part}" for name in norms for part in ("weight", "bias")}
    install_tuning(network, "bias", CLASSES)
    assert trained(network) and all(name.endswith(".bias") for name in trained(network))


@pytest.mark.parametrize("spec, said", [
    ("adaptfomer", "arch.args.tuning.type: unknown name 'adaptfomer'; did you mean 'adaptformer'?"),
    ({"type": "lora", "args": {"rnk": 4}}, "arch.args.tuning.args.rnk: unknown argument of lora 'rnk'; did you mean"),
    ({"type": "lora", "args": {"rank": 0}}, "arch.args.tuning.args: lora: rank must be 1 or more, not 0"),
    ({"type": "lora", "args": {"targets": []}}, "arch.args.tuning.args: lora: targets must name one of q, k, v"),
    ({"type": "lora", "args": {"targets": ["x"]}}, "arch.args.tuning.args.targets"),
    ({"type": "prompt", "args": {"tokens": 0}}, "tokens must be 1 or more"),
    ({"type": "adaptformer", "args": {"dim": -1}}, "dim must be 1 or more"),
    (3, "arch.args.tuning: must be"),
])
def test_refusals(spec, said):
    with pytest.raises(ConfigError) as caught:
        install_tuning(vit(), spec, CLASSES)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["adaptformer", "lora", "prompt"])
def test_vit_kinds_refuse_other_networks(kind):
    network = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(ConfigError, match=f"{kind} is for plain vision transformers.*ResNet is none"):
        install_tuning(network, kind, CLASSES)


# ---------------------------------------------------------------------- as a model of ours, and through the commands

def model_of(kind, num_experts=1, arch="TimmModel", **args):
    torch.manual_seed(0)
    return build_model({"type": arch, "args": {"model_name": "test_vit", "weights": False, "num_experts": num_experts,
                                               "classifier": "cosine", "tuning": kind, **args}}, 10)


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("kind", TUNINGS)
def test_a_tuned_model(kind, num_experts):
    model = model_of(kind, num_experts, add_bt=1).train()
    head = "backbone.linear." if num_experts == 1 else "backbone.linears."
    new = [name for name in trained(model) if name.startswith((head, "backbone.encoder_layers."))]
    tuned = set(trained(model)) - set(new)
    assert len([name for name in new if name.startswith(head)]) == num_experts and tuned
    assert all(name.startswith(("backbone.body.blocks.", "backbone.experts.")) for name in tuned)
    assert num_experts == 1 or kind == "prompt" or any(name.startswith("backbone.experts.2.") for name in tuned)
    model(torch.randn(4, 3, 32, 32))["output"].sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained(model))
    frozen = [part for part in model.modules() if list(part.parameters())
              and not any(p.requires_grad for p in part.parameters())]
    assert frozen and not any(part.training for part in frozen)
    state, other = model.state_dict(), model_of(kind, num_experts, add_bt=1)
    other.load_state_dict(state)
    assert set(model_of(None, num_experts, add_bt=1).state_dict()) <= set(state)


@pytest.mark.parametrize("prefix", ["", "model.", "backbone.body."])      # timm's own, wrapped, a run's of ours
@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("kind", TUNINGS)
def test_plain_weights_are_a_start(kind, num_experts, prefix, caplog, monkeypatch):
    """What tuning adds starts anew, as it does where the weights come with the network (`arch.args.weights`)."""
    monkeypatch.setattr(logging.getLogger("ltr"), "propagate", True)
    plain = timm.create_model("test_vit", num_classes=0).state_dict()
    model = model_of(kind, num_experts).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level("INFO", "ltr"):
        load_weights(model, {"state_dict": {prefix + key: value for key, value in plain.items()}}, new_head=True)
    after = model.state_dict()
    added = {key for key in after if re.search(r"\.adapter\.|\.lora_[ab]\.|\.prompts$", key)}
    assert model.added_names == added and bool(added) == (kind not in ("bias", "norm"))
    assert all(torch.equal(after[key], before[key]) for key in added)
    assert not added or f"what tuning adds ({len(added)} tensors)" in caplog.text
    first = "backbone.experts.0." if num_experts > 1 else "backbone.body."
    assert all(torch.equal(after.get(first + key, after.get("backbone.body." + key)), value)
               for key, value in plain.items())


def test_tuned_weights_must_fit():
    """All of what tuning adds, or nothing: the rest of a half would be random beside what was trained."""
    def load(state, into):
        load_weights(into, {"state_dict": state}, name="a.pth", new_head=True)
        return into

    tuned = model_of({"type": "adaptformer", "args": {"dim": 2}}).state_dict()
    again = load(tuned, model_of({"type": "adaptformer", "args": {"dim": 2}})).state_dict()
    assert all(torch.equal(again[key], value) for key, value in tuned.items())
    with pytest.raises(ConfigError, match=r"a\.pth: .*1 missing: backbone\.body\.blocks\.0\.adapter\.scale"):
        load({key: value for key, value in tuned.items() if key != "backbone.body.blocks.0.adapter.scale"},
             model_of({"type": "adaptformer", "args": {"dim": 2}}))
    with pytest.raises(ConfigError, match=r"of another shape: backbone\.body\.blocks\.0\.adapter\.down"):
        load(tuned, model_of({"type": "adaptformer", "args": {"dim": 4}}))
    for kind in ("lora", None):
        with pytest.raises(ConfigError, match=r"unexpected: backbone\.body\.blocks\.0\.adapter"):
            load(tuned, model_of(kind))


def test_the_gates_alone_learn_in_a_tuned_network():
    model = model_of("adaptformer", 3, arch="TimmEAModel")
    assert all(name.startswith("backbone.expert_help_pred") for name in trained(model)) and trained(model)


def test_a_run(tmp_path):
    flags = ["-d", "cpu", "-q", "--epochs", "2", "--save_dir", str(tmp_path), "--run_id", "run",
             "--set", "trainer.tensorboard=false", "--set", "trainer.save_period=1", "--bs", "128",
             "--set", "init_classifier=class_means", "--set", 'trainer.ema={"decay": 0.9}', "--set",
             "arch=" + json.dumps({"type": "TimmModel", "args": {
                 "model_name": "test_vit", "weights": False, "classifier": "cosine", "s": 25,
                 "tuning": {"type": "lora", "args": {"rank": 2}}}}),
             "--set", "data_loader.args.image_size=32", "--set", "loss.type=LogitAdjustmentLoss"]
    train.main(["-c", "configs/digits_lt_ce.json", *flags])
    folder = next(tmp_path.glob("models/*/run"))
    first, last = (folder / f"checkpoint-epoch{n}.pth" for n in (1, 2))
    straight = torch.load(last, weights_only=True)
    last.unlink()
    train.main(["-r", str(first), "-d", "cpu", "-q"])
    again = torch.load(last, weights_only=True)
    for part in ("state_dict", "raw_state_dict"):
        assert all(torch.equal(value, again[part][key]) for key, value in straight[part].items())
    begun = torch.load(first, weights_only=True)["raw_state_dict"]
    moved = {key for key, value in again["raw_state_dict"].items() if not torch.equal(value, begun[key])}
    assert moved and all("lora_" in key or key == "backbone.linear.weight" for key in moved)

    export.main(["-r", str(last), "--format", "pt2", "-d", "cpu"])
    names = set(torch.export.load(str(folder / "model.pt2")).state_dict)
    assert not any("lora" in name for name in names)
    cost = gflops.gflops_of(open_run(last).config)
    assert cost["plain"]["parameters"] + sum(value.numel() for key, value in again["state_dict"].items()
                                             if "lora_" in key) - 10 == cost["parameters"]   # a cosine has no bias
