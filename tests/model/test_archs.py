"""Every public architecture: RIDE's keys in RIDE's order, shapes, gradients, and the mistakes a config can make."""
import copy

import pytest
import torch
import torchvision

from model.model import ARCHS, build_model
from utils.errors import ConfigError

BLOCKS = {"32": ("basic", (5, 5, 5)), "10": ("basic", (1, 1, 1, 1)), "50": ("bottleneck", (3, 4, 6, 3)),
          "101": ("bottleneck", (3, 4, 23, 3)), "152": ("bottleneck", (3, 8, 36, 3))}


def norm_keys(name):
    return [f"{name}.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def ride_keys(arch, experts, add_bt=0, share_layer3=False, shared_gate=True, cosine=False):
    """The state_dict keys of RIDE's and BatchFormer's models in their order, spelt out from the names alone."""
    depth = arch.removeprefix("ResNeXt").removeprefix("ResNet").removesuffix("Model").removesuffix("EA")
    kind, depths = BLOCKS[depth]
    convs = 2 if kind == "basic" else 3
    keys = ["conv1.weight", *norm_keys("bn1")]
    for n, blocks in enumerate(depths, start=1):
        private = experts > 1 and n >= (2 if depth == "32" else 4 if share_layer3 else 3)
        for stage in [f"layer{n}s.{e}" for e in range(experts)] if private else [f"layer{n}"]:
            for b in range(blocks):
                for c in range(1, convs + 1):
                    keys += [f"{stage}.{b}.conv{c}.weight", *norm_keys(f"{stage}.{b}.bn{c}")]
                changes_shape = n > 1 or kind == "bottleneck"
                if b == 0 and depth != "32" and changes_shape:
                    keys += [f"{stage}.0.downsample.0.weight", *norm_keys(f"{stage}.0.downsample.1")]
    layers = {0: [], 1: [""], 33: [""], 32: [""], 12: [f"layers.{i}." for i in range(8)],
              13: [f"layers.{i}." for i in range(6)]}[add_bt]
    for layer in layers:
        keys += [f"encoder_layers.{layer}{key}" for key in (
            "self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight",
            "self_attn.out_proj.bias", "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias",
            "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")]
    for head in ["linear"] if experts == 1 else [f"linears.{e}" for e in range(experts)]:
        keys += [f"{head}.weight"] if cosine else [f"{head}.weight", f"{head}.bias"]
    if "EA" in arch:
        last = ["expert_help_pred_fc"] if shared_gate else [f"expert_help_pred_fcs.{i}" for i in range(experts - 1)]
        gates = [f"expert_help_pred_hidden_fcs.{i}" for i in range(experts - 1)] + last
        keys += [f"{gate}.{part}" for gate in gates for part in ("weight", "bias")]
    return [f"backbone.{key}" for key in keys]


def small(arch, experts, **args):
    """Narrow private stages, so that the deepest models are quick; the structure is whole."""
    widths = {} if "32" in arch else {"layer2_output_dim": 16, "layer3_output_dim": 16, "layer4_output_dim": 16}
    return build_model({"type": arch, "args": {"num_experts": experts, **widths, **args}}, num_classes=7)


def test_all_public_names_are_there():
    names = {f"{kind}{depth}{ea}Model" for kind, depths in (("ResNet", (10, 32, 50, 101, 152)),
                                                            ("ResNeXt", (50, 101, 152)))
             for depth in depths for ea in ("", "EA")}
    assert names == set(ARCHS)


def test_the_detector_is_found_by_its_name_but_imported_only_then():
    import model.model
    with pytest.raises(ConfigError, match="MaskRCNNR50FPNModel"):
        build_model({"type": "MaskRCNNModel"}, 7)
    assert model.model.MaskRCNNR50FPNModel.__name__ == "MaskRCNNR50FPNModel"
    with pytest.raises(AttributeError):
        _ = model.model.ResNet31Model


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("arch", [name for name in ARCHS if name.startswith("ResNe")])
def test_keys_and_their_order_are_rides(arch, experts):
    with torch.device("meta"):
        assert list(small(arch, experts).state_dict()) == ride_keys(arch, experts)


@pytest.mark.parametrize("arch,experts,args", [
    ("ResNet32Model", 3, dict(add_bt=1)), ("ResNet32Model", 1, dict(add_bt=12)), ("ResNet10Model", 2, dict(add_bt=13)),
    ("ResNeXt50Model", 2, dict(add_bt=33)), ("ResNet50Model", 2, dict(share_layer3=True)),
    ("ResNeXt50Model", 3, dict(share_layer3=True)), ("ResNet32EAModel", 3, dict(share_expert_help_pred_fc=False)),
    ("ResNet50EAModel", 3, dict(share_layer3=True, add_bt=1)), ("ResNeXt50Model", 1, dict(use_norm=True))])
def test_keys_with_options(arch, experts, args):
    with torch.device("meta"):
        model = small(arch, experts, **args)
    options = {"share_layer3": args.get("share_layer3", False), "add_bt": args.get("add_bt", 0),
               "shared_gate": args.get("share_expert_help_pred_fc", True), "cosine": args.get("use_norm", False)}
    assert list(model.state_dict()) == ride_keys(arch, experts, **options)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("arch", [name for name in ARCHS if name.startswith("ResNe")])
def test_forward_and_backward_reach_every_parameter(arch, experts):
    torch.manual_seed(0)
    routed = "EA" in arch
    model = small(arch, experts, **({"force_all": True} if routed else {}))
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    outputs = model(images, target=labels) if routed else model(images)
    assert outputs["output"].shape == (4, 7)
    assert outputs["logits"].shape == (4, experts, 7)
    assert outputs["feat"].shape == (4, experts, model.feat_dim)
    torch.testing.assert_close(outputs["output"], outputs["logits"].mean(1))
    loss = torch.nn.functional.cross_entropy(outputs["output"], labels) + outputs.get("loss", 0)
    loss.backward()
    assert loss.isfinite()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing


@pytest.mark.parametrize("arch,twin", [("ResNet50Model", "resnet50"), ("ResNet101Model", "resnet101"),
                                       ("ResNet152Model", "resnet152"), ("ResNeXt50Model", "resnext50_32x4d")])
def test_one_full_expert_has_torchvisions_shapes(arch, twin):
    with torch.device("meta"):
        ours = build_model({"type": arch}, num_classes=1000)
        theirs = torchvision.models.get_model(twin, weights=None)
    renamed = {f"backbone.{key.replace('fc.', 'linear.')}": value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == renamed


@pytest.mark.parametrize("arch,twin", [("ResNet50Model", "resnet50"), ("ResNeXt50Model", "resnext50_32x4d")])
def test_one_full_expert_computes_what_torchvision_does(arch, twin):
    torch.manual_seed(0)
    ours = build_model({"type": arch}, num_classes=5).eval()
    theirs = torchvision.models.get_model(twin, weights=None, num_classes=5).eval()
    theirs.load_state_dict({key.removeprefix("backbone.").replace("linear.", "fc."): value
                            for key, value in ours.state_dict().items()})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images)["output"], theirs(images), rtol=1e-4, atol=1e-4)


def test_ride_on_cifar_has_the_published_size():
    ride = build_model({"type": "ResNet32Model", "args": {"num_experts": 3, "reduce_dimension": True,
                                                          "use_norm": True}}, num_classes=100)
    assert round(ride.num_parameters() / 1e6, 2) == 0.78
    assert "0.78 M" in ride.summary()
    full = build_model({"type": "ResNet32Model"}, num_classes=10)
    assert round(full.num_parameters() / 1e6, 2) == 0.46   # He et al.'s count for ResNet-32


@pytest.mark.parametrize("arch,width", [("ResNet32Model", 48), ("ResNet50Model", 1536), ("ResNet10Model", 384)])
def test_reduced_widths(arch, width):
    with torch.device("meta"):
        model = build_model({"type": arch, "args": {"reduce_dimension": True, "num_experts": 2}}, num_classes=5)
        wide = build_model({"type": arch, "args": {"reduce_dimension": True, "num_experts": 2,
                                                   "layer3_output_dim": 40}}, num_classes=5)
    assert model.feat_dim == width
    assert wide.feat_dim == (40 if arch == "ResNet32Model" else width)


def test_any_size_that_the_stages_allow():
    model = small("ResNet32Model", 2).eval()
    for size in ((32, 32), (33, 47), (8, 8)):
        assert model(torch.randn(2, 3, *size))["output"].shape == (2, 7)
    model = small("ResNet10Model", 2).eval()
    assert model(torch.randn(1, 3, 65, 97))["output"].shape == (1, 7)


@pytest.mark.parametrize("arch", ["ResNet32Model", "ResNet10Model"])
def test_state_dict_round_trip_and_deepcopy(arch):
    torch.manual_seed(0)
    model = small(arch, 2, add_bt=1)
    model(torch.randn(4, 3, 32, 32))
    other = small(arch, 2, add_bt=1)
    other.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()(images)["logits"]
        assert torch.equal(other.eval()(images)["logits"], expected)
        assert torch.equal(copied.eval()(images)["logits"], expected)


@pytest.mark.parametrize("kind", ["GroupNorm", "InstanceNorm", "LayerNorm", "BatchRenorm", "NBN", "MABN",
                                  "SyncBatchNorm"])
@pytest.mark.parametrize("arch,experts", [("ResNet32Model", 3), ("ResNeXt50Model", 1), ("ResNet10Model", 2)])
def test_every_norm_in_every_family(kind, arch, experts):
    torch.manual_seed(0)
    model = small(arch, experts, norm=kind, reduce_dimension=True)
    if kind == "SyncBatchNorm":
        model.eval()   # it trains in process groups only
    model(torch.randn(4, 3, 32, 32))["output"].logsumexp(1).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert ("backbone.scale_factor" in model.state_dict()) == (kind == "NBN")
    if kind == "NBN":
        assert torch.equal(model.state_dict()["backbone.scale_factor"], torch.ones(experts))


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_memory_format_and_autocast_agree_with_plain(fmt):
    torch.manual_seed(0)
    model = small("ResNet32Model", 2).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)["output"]
        model.to(memory_format=fmt)
        torch.testing.assert_close(model(images.to(memory_format=fmt))["output"], expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            close = model(images.to(memory_format=fmt))["output"].float()
    torch.testing.assert_close(close, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


@pytest.mark.parametrize("arch", ("ResNet32Model", "ResNet32EAModel"))
def test_evaluation_in_bfloat16_has_no_ties_among_logits(arch):
    """The head is in float32: bfloat16 has 8 bits, in which many of 100 logits are equal."""
    torch.manual_seed(0)
    model = build_model({"type": arch, "args": {"num_experts": 3, "use_norm": True}}, num_classes=100).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.randn(4, 3, 32, 32))
    assert outputs["output"].dtype == torch.float32
    assert all(len(row.unique()) == 100 for row in outputs["output"])
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(4, 3, 32, 32))["logits"].dtype == torch.bfloat16


@pytest.mark.parametrize("args,key,hint", [
    ({"num_experts": 0}, "num_experts", "1 or more"), ({"num_experts": -3}, "num_experts", "1 or more"),
    ({"s": 0}, "s", "above 0"), ({"dropout": 1.0}, "dropout", "below 1"), ({"dropout": -0.1}, "dropout", "at least 0"),
    ({"add_bt": 2}, "add_bt", "one of"), ({"eval_bt": 1}, "eval_bt", "add_bt"),
    ({"layer3_output_dim": 0}, "layer3_output_dim", "1 or more"), ({"layer4_output_dim": 8}, "layer4_output_dim", "3"),
    ({"classifier": "cosin"}, "classifier", "'cosine'"), ({"norm": "NBM"}, "norm.type", "'NBN'"),
    ({"norm": {"kind": "NBN"}}, "norm", "type"), ({"norm": {"type": "NBN", "args": []}}, "norm", "type"),
    ({"norm": {"type": "NBN", "args": {"where": "first"}}}, "norm.args.where", "'last'"),
    *(({"norm": {"type": "NBN", "args": {"where": where}}}, "norm.args.where", "") for where in ([True], [1.0], [[1]])),
    *(({"num_experts": 3, "use_experts": chosen}, "use_experts", "0 to 2") for chosen in ([0.5, 1.7], [True], [[0]])),
    ({"norm": {"type": "NBN", "args": {"wher": "all"}}}, "norm.args", "'where'"),
    ({"num_experts": 3, "use_experts": "0,3"}, "use_experts", "0 to 2"),
    ({"num_experts": 3, "use_experts": "0,a"}, "use_experts", "0 to 2"),
    ({"num_experts": 3, "use_experts": "1,1"}, "use_experts", "different"),
    ({"num_experts": 3, "use_experts": []}, "use_experts", "different"),
    ({"use_experts": "rand"}, "use_experts", "2 or more"), ({"share_layer3": True}, "share_layer3", "stage 1"),
    ({"use_norm": True, "classifier": "lws"}, "use_norm", "cosine"),
    ({"add_bt": 33, "shared_classifier": False}, "shared_classifier", "add_bt 1"),
    ({"add_bt": 0, "bt_weight": 0.3}, "bt_weight", "add_bt 1"),
    ({"add_bt": 1, "bt_weight": -1}, "bt_weight", "0 or more"),
    ({"num_expert": 3}, "num_expert", "'num_experts'"), ({"num_classes": 5}, "num_classes", "7"),
    ({"num_experts": "three"}, "num_experts", "whole number")])
def test_mistakes_name_the_key_and_what_is_right(args, key, hint):
    with pytest.raises(ConfigError) as error:
        build_model({"type": "ResNet32Model", "args": args}, num_classes=7, path="distill_arch")
    assert str(error.value).startswith(f"distill_arch.args.{key}")
    assert hint in str(error.value)


def test_unknown_architecture_and_missing_classes():
    with pytest.raises(ConfigError, match="did you mean 'ResNet32Model'"):
        build_model({"type": "ResNet32Mode"}, 7)
    with pytest.raises(ConfigError, match=r"arch\.args\.num_classes: missing"):
        build_model({"type": "ResNet32Model"})
    with pytest.raises(ConfigError, match="layerN_output_dim must be 16 or more"):
        build_model({"type": "ResNeXt50Model", "args": {"layer3_output_dim": 8}}, 7)
