"""TimmModel over small networks of timm with random weights: everything that a ResNet of ours can, they can."""
import copy

import pytest
import torch

from model.model import build_model
from model.norm import NormalizedBatchNorm2d, convert_norm, fold_norm
from model.weights.remap import load_weights
from utils.errors import ConfigError

timm = pytest.importorskip("timm")
NAMES = ("test_resnet", "test_efficientnet", "test_vit", "test_convnext")
WITH_BATCH_NORM = NAMES[:2]
CLASSES = 7


def make(name, kind="TimmModel", **args):
    torch.manual_seed(0)
    return build_model({"type": kind, "args": {"model_name": name, "weights": False, **args}}, CLASSES)


def images(count=4, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("experts", (1, 3))
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name, experts):
    model = make(name, num_experts=experts)
    outputs = model(images())
    assert outputs["output"].shape == (4, CLASSES)
    assert outputs["logits"].shape == (4, experts, CLASSES)
    assert outputs["feat"].shape == (4, experts, model.feat_dim)
    assert torch.allclose(outputs["output"], outputs["logits"].mean(1))
    outputs["logits"].square().sum().backward()
    # A classifier's weights see the features; of a network whose last layers start at 0 some gradients are 0.
    assert not [key for key, p in model.named_parameters() if p.grad is None]
    assert len(model.heads()) == experts


@pytest.mark.parametrize("name", NAMES)
def test_one_expert_is_timms_own_network(name):
    model = make(name).eval()
    own = timm.create_model(name, num_classes=CLASSES).eval()
    body = {key: value for key, value in model.backbone.body.state_dict().items()}
    found = own.load_state_dict(body, strict=False)
    assert not found.unexpected_keys
    own.get_classifier().load_state_dict(model.heads()[0].state_dict())
    assert torch.equal(model(images(size=160))["output"], own(images(size=160)))


@pytest.mark.parametrize("name", NAMES)
def test_the_first_expert_is_the_whole_network(name):
    """The body cut in two, put together again, computes what it did; the others differ from it a little."""
    whole, several = make(name).eval(), make(name, num_experts=2).eval()
    load_weights(several, {"state_dict": whole.state_dict()}, new_head=True)
    feats = several(images())["feat"]
    assert torch.allclose(feats[:, 0], whole(images())["feat"][:, 0], atol=1e-6)
    assert 0 < (feats[:, 1] - feats[:, 0]).norm() / feats[:, 0].norm() < 0.2


@pytest.mark.parametrize(("name", "own"), (
    ("test_resnet", ["layer4"]), ("test_efficientnet", ["blocks.4", "conv_head", "bn2"]),
    ("test_vit", ["blocks.5", "norm"]), ("test_convnext", ["stages.3", "norm_pre"])))
def test_each_expert_has_the_last_stage_and_what_follows(name, own):
    model = make(name, num_experts=2)
    assert model.backbone.private == own
    assert f"each expert has its own {', '.join(own)}" in model.summary()
    first, second = model.backbone.experts
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)      # random weights differ
    assert not {id(p) for p in first.parameters()} & {id(p) for p in model.backbone.body.parameters()}


def test_without_stages_experts_have_a_block_of_their_own():
    model = make("eva02_tiny_patch14_224", num_experts=2)    # its blocks take more than what the one before gave
    assert model.backbone.private == []
    assert "a block of its own" in model.summary()
    outputs = model(images(2, 28))
    assert outputs["logits"].shape == (2, 2, CLASSES)
    assert not torch.equal(outputs["feat"][:, 0], outputs["feat"][:, 1])


@pytest.mark.parametrize("name", NAMES)
def test_batchformer_works_in_training_only(name):
    model = make(name, num_experts=1, add_bt=1)
    model.train()
    outputs = model(images())
    assert outputs["logits_old"].shape == outputs["logits"].shape
    assert not torch.allclose(outputs["logits"], outputs["logits_old"])
    model.eval()
    alone = torch.cat([model(image[None])["output"] for image in images()])
    assert torch.allclose(model(images())["output"], alone, atol=1e-5)
    always = make(name, add_bt=1, eval_bt=True).eval()
    assert not torch.allclose(always(images())["output"], always(images()[:1])["output"][:1], atol=1e-4)


@pytest.mark.parametrize("classifier", ("linear", "cosine", "linear_fcbn", "linear_fcbn_notaffine", "lws"))
@pytest.mark.parametrize("name", NAMES)
def test_classifiers_and_stage_two(name, classifier):
    model = make(name, num_experts=2, classifier=classifier)
    assert model(images())["logits"].isfinite().all()
    model.freeze_except(model.stage2_prefixes())
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert trained and all(key.startswith("backbone.linears.") for key in trained)
    assert all(key.endswith(".scales") for key in trained) == (classifier == "lws")
    before = copy.deepcopy(model.backbone.body.state_dict())
    model.train()
    model(images())
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.body.state_dict().items())


@pytest.mark.parametrize("experts", (1, 2))
@pytest.mark.parametrize("norm", ("NBN", {"type": "NBN", "args": {"where": "all"}}, "GroupNorm",
                                  {"type": "MABN", "args": {"B": 4}}))
@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_norms_are_exchanged(name, norm, experts):
    model = make(name, num_experts=experts, norm=norm)
    kind = norm if isinstance(norm, str) else norm["type"]
    if kind == "NBN":
        assert any(isinstance(layer, NormalizedBatchNorm2d) for layer in model.modules())
        assert model.nbn_scales.shape == (experts,)
    else:
        assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules())
    model(images())["logits"].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    state = model.state_dict()
    again = make(name, num_experts=experts, norm=norm)
    load_weights(again, {"state_dict": state})
    assert torch.equal(again.eval()(images())["output"], model.eval()(images())["output"])


@pytest.mark.parametrize("to", ("NBN", "BatchNorm2d"))
def test_a_norm_that_activates_keeps_its_activation(to):
    """timm's BatchNormAct2d is norm and activation in one; a new norm alone would lose the latter."""
    net = timm.create_model("test_efficientnet", num_classes=3).eval()
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    wanted = net(images())
    got = convert_norm(copy.deepcopy(net), to, **({"where": "all"} if to == "NBN" else {})).eval()
    if to == "BatchNorm2d":
        assert torch.allclose(got(images()), wanted, atol=1e-6)
    acts = [[type(layer).__name__ for layer in model.modules() if "LU" in type(layer).__name__] for model in (net, got)]
    assert acts[0] == acts[1]


@pytest.mark.parametrize("name", (*NAMES, "tf_efficientnet_lite0"))
def test_folding_changes_nothing_and_leaves_no_batch_norm(name):
    model = make(name, num_experts=2).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 2)
    folded = fold_norm(model)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    assert torch.allclose(folded(images())["output"], model(images())["output"], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_stages_cover_every_parameter_once(name):
    for experts in (1, 2):
        model = make(name, num_experts=experts)
        stages = model.stage_prefixes()
        heads = tuple(model.classifier_prefixes())
        for key, _ in model.named_parameters():
            owners = [n for n, starts in enumerate(stages) if key.startswith(starts)]
            assert len(owners) == (0 if key.startswith(heads) else 1), key
        assert len(stages) >= 5


@pytest.mark.parametrize("what", ("backbone", "norms", ["backbone.body."]))
def test_freeze(what):
    model = make("test_efficientnet", num_experts=2)
    model.freeze(what)
    assert model.frozen
    assert all(p.requires_grad for key, p in model.named_parameters() if key.startswith("backbone.linears."))


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_told_by_stage_and_expert(name):
    from tools.gflops import gflops_of
    config = {"arch": {"type": "TimmModel", "args": {"model_name": name, "weights": True, "num_experts": 2}},
              "data_loader": {"type": "DigitsLTDataLoader", "args": {"image_size": 32}}}
    cost = gflops_of(config)                                          # weights are neither needed nor asked for
    model = build_model(config["arch"], 10, bare=True)
    assert cost["parameters"] == model.num_parameters()
    assert sum(part["parameters"] for part in cost["parts"]) == cost["parameters"]
    assert sum(part["gflops"] for part in cost["parts"]) == pytest.approx(cost["all_experts"], rel=1e-6)
    assert {"stem", "stage 1"} <= {part["name"] for part in cost["parts"]}


@pytest.mark.parametrize("name", NAMES)
def test_expert_assignment(name):
    model = make(name, "TimmEAModel", num_experts=3)
    target = torch.arange(4) % CLASSES
    model.train()
    outputs = model(images(), target=target)
    outputs["loss"].backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == \
        {key for key, _ in model.named_parameters() if key.startswith("backbone.expert_help_pred")}
    model.eval()
    routed = model(images())
    model.route = False
    every = model(images())
    assert torch.equal(routed["sample_num_experts"], every["sample_num_experts"])
    assert torch.allclose(routed["output"], every["output"], atol=1e-5)
    stage1 = make(name, num_experts=3)
    load_weights(model, {"state_dict": stage1.state_dict()}, skip_prefixes=("backbone.expert_help_pred",))
    assert torch.allclose(model(images())["logits"], stage1.eval()(images())["logits"], atol=1e-6)


@pytest.mark.parametrize(("args", "says"), (
    ({"model_name": "resnt18"}, "did you mean 'resnet18'"),
    ({"model_name": "resnet18.a7_in1k"}, "did you mean 'resnet18."),
    ({"model_name": "torchvision/resnet19"}, "torchvision has no network"),
    ({"model_name": "test_vit", "norm": "NBN"}, "arch.args.norm: test_vit has no batch norm"),
    ({"model_name": "poolformer_s12", "norm": "NBN"}, "arch.args.norm: poolformer_s12 has no batch norm"),
    ({"model_name": "tf_efficientnet_lite0", "norm": "MABN"}, "don't pad as tf_efficientnet_lite0's"),
    ({"model_name": "test_resnet", "norm": {"type": "NBN", "args": {"where": [9]}}}, "'all' or a list of stages"),
    ({"model_name": "test_resnet", "num_experts": 0}, "arch.args.num_experts"),
    ({"model_name": "test_resnet", "model_args": 3}, "arch.args.model_args: "),
    ({"model_name": "test_resnet", "model_args": {"drop_paths": 0.1}}, "test_resnet doesn't take them: ResNet.__init"),
    ({"model_name": "test_resnet", "model_args": {"drop_path_rate": "much"}}, "arch.args.model_args: test_resnet does"),
    ({"model_name": "test_resnet", "model_args": {"num_classes": 3}}, "num_classes is set by arch.args.num_classes"),
    ({"model_name": "test_vit", "model_args": {"checkpoint_path": "x"}}, "checkpoint_path is set by arch.args.weights"),
    ({"model_name": "test_resnet", "model_args": {"in_chans": 1}}, "in_chans can't be changed: test_resnet must"),
    ({"model_name": "test_resnet", "model_args": {"global_pool": ""}}, "a classifier needs ['N', "),
    ({"model_name": "vgg11", "grad_checkpointing": True}, "VGG has no gradient checkpointing"),
    ({"model_name": "torchvision/resnet18", "grad_checkpointing": True}, "ResNet has no gradient checkpointing"),
    ({"model_name": "test_resnet", "weights": "/"}, "arch.args.weights: /: is a folder; name the file"),
    ({"model_name": "test_resnet", "weights": None}, "arch.args.weights: must be one of true, false or text, not null"),
    ({"model_name": "test_resnet", "weights": 1}, "arch.args.weights: must be one of true, false or text, not 1"),
    ({"model_name": "test_resnet", "weights": "/no/file.pth"}, "arch.args.weights: /no/file.pth: no such file")))
def test_wrong_arguments_are_named(args, says):
    with pytest.raises(ConfigError) as error:
        build_model({"type": "TimmModel", "args": {"weights": False, **args}}, CLASSES)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("experts", (1, 3))
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_stores_less_and_changes_no_gradient(name, experts):
    stored, grads, stages = [], [], []
    for on in (False, True):
        model = make(name, num_experts=experts, grad_checkpointing=on)
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(images(size=64))["logits"]
        logits.square().sum().backward()
        stored.append(count)
        grads.append([p.grad for p in model.parameters()])
        stages.append(model.backbone.private)
        model.eval()
        outputs = model(images())["output"]
        assert torch.equal(torch.export.export(model, (images(),)).module()(images())["output"], outputs)
    assert stages[0] == stages[1]
    assert stored[1] < 0.6 * stored[0]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ("test_resnet", "test_vit", "torchvision/convnext_tiny"))
def test_a_networks_own_arguments_reach_every_experts_part(name):
    key = "stochastic_depth_prob" if name.startswith("torchvision") else "drop_path_rate"
    model = make(name, num_experts=3, model_args={key: 0.3})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)                                        # blocks that start at zero would be dropped unseen
    torch.manual_seed(3)
    first = model(images(16))["feat"]
    torch.manual_seed(4)
    second = model(images(16))["feat"]
    plain = make(name, num_experts=3)
    plain.load_state_dict(model.state_dict())
    for feat, again in zip(first.unbind(1), second.unbind(1), strict=True):
        assert not torch.equal(feat, again)                     # blocks were dropped at random
    for expert in model.backbone.experts:
        shares = [getattr(part, "drop_prob", None) or getattr(part, "p", 0) for part in expert.modules()
                  if type(part).__name__ in ("DropPath", "StochasticDepth")]
        assert max(shares) == pytest.approx(0.3)
    assert torch.equal(model.eval()(images())["logits"], plain.eval()(images())["logits"])


def test_a_missing_package_is_named(monkeypatch):
    import model.timm_body
    monkeypatch.setattr(model.timm_body, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install timm"):
        make("test_resnet")


def test_torchvision_by_the_same_road():
    model = make("torchvision/resnet18", num_experts=2)
    assert model.backbone.private == ["layer4"]
    import torchvision
    own = torchvision.models.resnet18().eval()
    load_weights(model, {"state_dict": own.state_dict()}, new_head=True)
    own.fc = torch.nn.Identity()
    feats = model.eval()(images())["feat"]
    assert torch.allclose(feats[:, 0], own(images()), atol=1e-5) and not torch.equal(feats[:, 0], feats[:, 1])
