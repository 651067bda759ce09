"""Other projects' weights: every layout is recognised, lands under our keys, and gives the same logits as before."""
from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from model.model import ARCHS, build_model
from model.weights.infer_arch import infer_arch
from model.weights.remap import load_weights, recognise, to_ours
from utils.checkpoint.store import save_checkpoint
from utils.errors import ConfigError

GATES = ("backbone.expert_help_pred",)


def build(kind: str = "ResNet10Model", num_classes: int = 10, **args) -> nn.Module:
    return build_model({"type": kind, "args": {"num_classes": num_classes, **args}})


def filled(model: nn.Module) -> nn.Module:
    """`model` with every tensor random, so that no two are alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_((noise - 0.5) * 0.2 if "conv" in key else noise * 0.1 + 0.5)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model.eval()(images)
    return out["output"] if isinstance(out, dict) else out


def bare(model: nn.Module, head: str = "fc.") -> dict[str, torch.Tensor]:
    """A model's weights as a bare ResNet's: no prefix, another name for the classifier."""
    return {key.removeprefix("backbone.").replace("linear.", head): value for key, value in model.state_dict().items()}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in a.state_dict().items())


# ---- origins --------------------------------------------------------------------------------------------------------
def as_ride(model):
    return {"arch": "DataParallel", "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}


def as_classifier_balancing(model):
    weights = bare(model)
    classifier = {key: value for key, value in weights.items() if key.startswith("fc.")}
    if "fc.scales" in classifier:
        classifier["scales"] = classifier.pop("fc.scales")
    return {"epoch": 90, "best_acc": 0.4, "centroids": None, "state_dict_best": {
        "feat_model": {f"module.{key}": value for key, value in weights.items() if not key.startswith("fc.")},
        "classifier": {f"module.{key}": value for key, value in classifier.items()}}}


def as_nbn(model):
    weights = bare(model)
    weights["scale_factor"] = torch.cat([weights["scale_factor"], torch.full((9,), 5.0)])  # one for every norm layer
    return {"state_dict": {f"module.{key}": value for key, value in weights.items()}, "best_acc1": torch.tensor(0.5)}


def as_mabn(model):
    return {"model": bare(model)}


def as_mabn_demo(model):
    weights = bare(model)
    for key in [key for key in weights if key.endswith("buffer_x2")]:
        for name in ("sta_matrix", "pre_x2", "pre_gz"):
            weights[key.replace("buffer_x2", name)] = torch.ones(3)
    return {"model": weights}


LAYOUTS = {
    "ours": ("ours", dict(num_experts=3), lambda model: {"state_dict": model.state_dict()}),
    "ours, bare": ("ours", dict(num_experts=3, use_norm=True), lambda model: model.state_dict()),
    "RIDE": ("RIDE", dict(num_experts=3, reduce_dimension=True, use_norm=True), as_ride),
    "RIDE CIFAR": ("RIDE", dict(kind="ResNet32Model", num_experts=2, reduce_dimension=True), as_ride),
    "BatchFormer": ("RIDE", dict(num_experts=2, add_bt=1), as_ride),
    "BatchFormer, older name": ("RIDE", dict(add_bt=1), lambda model: {"state_dict": {
        key.replace("encoder_layers", "global_layers"): value for key, value in model.state_dict().items()}}),
    "RIDE EA": ("RIDE", dict(kind="ResNet10EAModel", num_experts=3), as_ride),
    "classifier-balancing": ("classifier-balancing", dict(), as_classifier_balancing),
    "classifier-balancing LWS": ("classifier-balancing", dict(classifier="lws"), as_classifier_balancing),
    "classifier-balancing, latest": ("classifier-balancing", dict(), lambda model: {
        "epoch": 3, "state_dict": as_classifier_balancing(model)["state_dict_best"]}),
    "NBN": ("NBN", dict(norm="NBN"), as_nbn),
    "NBN fcbn": ("NBN", dict(norm="NBN", classifier="linear_fcbn"), as_nbn),
    "NBN RIDE": ("NBN", dict(norm="NBN", num_experts=3, classifier="linear_fcbn_notaffine"), as_nbn),
    "NBN plain": ("ResNet", dict(num_experts=3), lambda model: {"state_dict": bare(model)}),
    "MABN": ("MABN", dict(norm="MABN"), as_mabn),
    "MABN demo": ("MABN", dict(norm="MABN"), as_mabn_demo),
    "torchvision": ("ResNet", dict(), bare),
    "LDAM-DRW": ("ResNet", dict(kind="ResNet32Model", use_norm=True),
                 lambda model: {"state_dict": {f"module.{k}": v for k, v in bare(model, "linear.").items()}}),
    "arrays": ("ResNet", dict(), lambda model: {"model": {key: value.numpy() for key, value in bare(model).items()}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    origin, args, write = LAYOUTS[layout]
    source = filled(build(**args))
    checkpoint = write(source)
    assert recognise(checkpoint) == origin
    target = build(**args)
    report = load_weights(target, checkpoint)
    assert report.fits and report.origin == origin and set(report.loaded) == set(target.state_dict())
    assert same_weights(source, target) and torch.equal(logits(source), logits(target))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arch_is_inferred(layout):
    _, args, write = LAYOUTS[layout]
    source = build(**args)
    arch = infer_arch(to_ours(write(source)))
    assert arch["type"] == args.get("kind", "ResNet10Model")
    shapes = {key: value.shape for key, value in build_model(arch).state_dict().items()}
    assert shapes == {key: value.shape for key, value in source.state_dict().items()}


@pytest.mark.parametrize("kind", ARCHS)
def test_every_arch_is_inferred(kind):
    if not hasattr(ARCHS[kind], "routed"):
        pytest.skip("not a classifier")
    args = dict(num_experts=2, reduce_dimension=True, use_norm=True)
    infers(kind, **(dict(args, top_choices_num=7, share_expert_help_pred_fc=False) if ARCHS[kind].routed else args))


@pytest.mark.parametrize("kind", ["ResNet32Model", "ResNet50Model"])
@pytest.mark.parametrize("args", [dict(add_bt=12, layer3_output_dim=40), dict(add_bt=13, classifier="linear_fcbn"),
                                  dict(num_experts=2, classifier="lws")], ids=str)
def test_args_are_inferred(kind, args):
    infers(kind, **args)


def infers(kind, **args):
    with torch.device("meta"):
        source = build(kind, **args)
        arch = infer_arch(source.state_dict())
        again = build_model(arch)
    assert arch["type"] == kind
    assert {k: v.shape for k, v in source.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}


def resnet10(num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 without the second block of each layer, filled."""
    theirs = torchvision.models.resnet18(num_classes=num_classes)
    theirs.layer1[1] = theirs.layer2[1] = theirs.layer3[1] = theirs.layer4[1] = nn.Identity()
    return filled(theirs)


def test_torchvision_gives_the_same_logits():
    theirs, ours = resnet10(7), build(num_classes=7)
    assert load_weights(ours, theirs.state_dict()).origin == "ResNet"
    torch.testing.assert_close(logits(ours), logits(theirs))


def test_resnet50_of_torchvision():
    theirs = torchvision.models.resnet50(num_classes=7)
    ours = build("ResNet50Model", num_classes=7)
    load_weights(ours, theirs.state_dict())
    torch.testing.assert_close(logits(ours), logits(theirs))


def test_lists_of_one_expert_fit_a_single_model():
    weights = filled(build()).state_dict()
    for name in ("layer3", "layer4", "linear"):
        weights = {key.replace(f"{name}.", f"{name}s.0."): value for key, value in weights.items()}
    target = build()
    assert load_weights(target, {"state_dict": weights}).fits and same_weights(target, filled(build()))


def test_old_files_have_no_batch_counts():
    weights = {key: value for key, value in build().state_dict().items() if not key.endswith("num_batches_tracked")}
    assert load_weights(build(), {"state_dict": weights}).fits


def test_batch_norm_into_mabn_and_other_history_lengths():
    source = filled(build(norm={"type": "MABN", "args": {"B": 2, "real_B": 8}}))
    target = build(norm="MABN")
    assert load_weights(target, as_mabn(source)).fits
    assert torch.equal(target.backbone.bn1.running_var, source.backbone.bn1.running_var)
    weights = filled(build()).state_dict()
    moment = weights["backbone.bn1.running_var"] + weights["backbone.bn1.running_mean"] ** 2
    for start in (False, True):     # to start from, too
        norm = build(norm="MABN")
        assert load_weights(norm, weights, new_head=start).fits
        torch.testing.assert_close(norm.backbone.bn1.running_var.flatten(), moment)
    with pytest.raises(ConfigError, match=r"unexpected: backbone\.bn1\.running_mean"):     # to test, or under cRT
        load_weights(build(norm="MABN"), weights, exact=True)
    assert load_weights(target, as_mabn(source), exact=True).fits and load_weights(build(), weights, exact=True).fits


# ---- what doesn't fit -----------------------------------------------------------------------------------------------
def test_keys_that_do_not_fit_are_listed_and_nothing_is_loaded():
    weights = filled(build(num_classes=12)).state_dict()
    del weights["backbone.bn1.weight"]
    weights["backbone.extra.weight"] = torch.ones(1)
    target = build()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_weights(target, {"state_dict": weights}, name="stage1.pth")
    message = str(caught.value)
    assert message.startswith("stage1.pth: ") and "\n" not in message and len(message) < 600
    for part in ("1 missing: backbone.bn1.weight", "1 unexpected: backbone.extra.weight", "2 of another shape",
                 "backbone.linear.bias [12] in the file, [10] in the model"):
        assert part in message
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_partial_loading_when_told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ltr"), "propagate", True)
    weights = filled(build(num_classes=12)).state_dict()
    target = build()
    with caplog.at_level(logging.WARNING):
        report = load_weights(target, {"state_dict": weights}, allow_partial=True)
    assert len(report.mismatched) == 2 and not report.fits and "loaded in part" in caplog.text
    assert torch.equal(target.backbone.conv1.weight, weights["backbone.conv1.weight"])
    with pytest.raises(ConfigError, match="don't fit"):
        load_weights(target, {"state_dict": {"a": torch.ones(1)}}, allow_partial=True)


def test_long_lists_are_cut():
    with pytest.raises(ConfigError) as caught:
        load_weights(build(num_experts=2), build("ResNet32Model").state_dict())
    assert len(str(caught.value)) < 1200 and "..." in str(caught.value)


def test_skipped_parts():
    stage1, target = filled(build(num_experts=3)), build("ResNet10EAModel", num_experts=3)
    with pytest.raises(ConfigError, match=r"missing: backbone\.expert_help_pred"):
        load_weights(target, stage1.state_dict())
    assert load_weights(target, stage1.state_dict(), skip_prefixes=GATES).fits
    head = target.backbone.linears[0].weight.clone()
    load_weights(target, filled(build("ResNet10EAModel", num_experts=3)).state_dict(),
                 skip_prefixes=("backbone.linears.",))
    assert torch.equal(target.backbone.linears[0].weight, head)


def test_batchformer_is_left_out_where_it_is_off_but_must_be_there_where_it_is_on():
    with_block, without = build(num_experts=2, add_bt=1), build(num_experts=2)
    assert load_weights(without, as_ride(with_block)).fits
    with pytest.raises(ConfigError, match=r"missing: backbone\.encoder_layers"):
        load_weights(with_block, as_ride(without))


def test_nbn_without_a_scale_is_refused():
    with pytest.raises(ConfigError, match=r"missing: backbone\.scale_factor"):
        load_weights(build(norm="NBN"), build().state_dict())


# ---- weights to start from ------------------------------------------------------------------------------------------
def test_new_head():
    theirs = torchvision.models.resnet50()
    target = build("ResNet50Model", num_classes=7, use_norm=True, add_bt=1, norm="NBN")
    head = target.backbone.linear.weight.clone()
    report = load_weights(target, theirs.state_dict(), new_head=True)
    assert report.fits and torch.equal(target.backbone.linear.weight, head)
    assert torch.equal(target.backbone.layer4[2].conv3.weight, theirs.layer4[2].conv3.weight)
    with pytest.raises(ConfigError, match="of another shape"):
        load_weights(build("ResNet50Model", num_classes=7, reduce_dimension=True), theirs.state_dict(), new_head=True)


def under(weights, prefix, **more):
    return {**{prefix + key: value for key, value in weights.items()}, **more}


def as_numbered(weights, prefix):
    """`nn.Sequential(*resnet.children())`, its ReLU and pooling counted, its classifier cut off."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    return {f"{prefix}{numbers[first]}.{rest}": value for key, value in weights.items()
            for first, _, rest in [key.partition(".")] if first in numbers}


QUEUE = {"module.queue": torch.zeros(8, 8)}
ENCODERS = {  # file of the bare weights, whether the classifier comes along, what is left out
    "MoCo": lambda w: ({"state_dict": {**under({k: v + 1 for k, v in w.items()}, "module.encoder_k."),
                                       **under(w, "module.encoder_q.", **QUEUE)}}, True, "encoder_k, queue"),
    "SimCLR": lambda w: ({"state_dict": under(w, "encoder.", **{"projector.0.weight": torch.ones(2)})}, True,
                         "projector"),
    "SupCon": lambda w: ({"model": under(w, "encoder.module."), "opt": {}}, True, ""),
    "Lightning": lambda w: ({"state_dict": under(w, "model.")}, True, ""),
    "Lightning, deeper": lambda w: ({"state_dict": under(w, "net.resnet.")}, True, ""),
    "mmpretrain": lambda w: ({"meta": {}, "state_dict": {
        ("head." if key.startswith("fc.") else "backbone.") + key: value for key, value in w.items()}}, True, ""),
    "SwAV": lambda w: (under(w, "module.", **{"module.prototypes.weight": torch.ones(2)}), True, "prototypes"),
    "BYOL": lambda w: ({"online_network_state_dict": under(w, "net."), "optimizer": {"state": {}}}, True, ""),
    "nested": lambda w: ({"model": {"state_dict": under(w, "backbone.")}, "epoch": 3}, True, ""),
    "numbered": lambda w: ({"state_dict": as_numbered(w, "backbone.")}, False, ""),
}


@pytest.mark.parametrize("origin", ENCODERS)
def test_encoders_of_others_are_a_start(origin, tmp_path, caplog, monkeypatch):
    """One prefix, or a nested dict, is taken off; what isn't the network is left out, and named in one line."""
    monkeypatch.setattr(logging.getLogger("ltr"), "propagate", True)
    theirs = resnet10(10)
    checkpoint, head, left = ENCODERS[origin](theirs.state_dict())
    torch.save(checkpoint, tmp_path / "a.pth")
    target = build()
    with caplog.at_level(logging.INFO):
        load_weights(target, tmp_path / "a.pth", new_head=True)
    assert torch.equal(target.backbone.layer4[0].bn2.bias, theirs.layer4[0].bn2.bias)
    assert torch.equal(target.backbone.conv1.weight, theirs.conv1.weight)
    assert torch.equal(target.backbone.linear.weight, theirs.fc.weight) is head
    # By identity: a logger that an earlier test cut off from the root is listened to at both ends.
    said = {id(record): record.getMessage() for record in caplog.records}
    said = [line.rpartition("file: ")[2] for line in said.values() if "left out of the file" in line]
    assert said == ([left] if left else [])


def test_an_encoder_of_another_depth_is_refused():
    weights = under(torchvision.models.resnet18().state_dict(), "encoder.")
    with pytest.raises(ConfigError, match=r"unexpected: backbone\.layer1\.1"):
        load_weights(build(), {"state_dict": weights}, new_head=True)


@pytest.mark.parametrize("args", [dict(), dict(share_layer3=True)], ids=["private", "shared"])
def test_one_expert_fills_all(args):
    source = filled(build(num_classes=10))
    target = build(num_experts=3, **args)
    assert load_weights(target, bare(source), new_head=True).fits
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    outputs = target.eval()(images)["logits"]
    torch.testing.assert_close(outputs[:, 0], logits(source))
    assert not torch.allclose(outputs[:, 0], outputs[:, 2])      # told apart: see test_adapt


# ---- files ----------------------------------------------------------------------------------------------------------
def test_by_path(tmp_path):
    source = filled(build())
    save_checkpoint(tmp_path / "a.pth", {"state_dict": source.state_dict(), "epoch": np.int64(1)})
    target = build()
    load_weights(target, tmp_path / "a.pth")
    assert same_weights(source, target)
    with pytest.raises(ConfigError, match=r"a\.pth: the weights don't fit"):
        load_weights(build(num_classes=3), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"gone\.pth"):
        load_weights(target, tmp_path / "gone.pth")


def test_no_weights():
    with pytest.raises(ConfigError, match="holds no weights"):
        load_weights(build(), {"epoch": 1}, name="a.pth")


@pytest.mark.parametrize("weights, why", [
    ({"backbone.conv1.weight": torch.ones(1, 3, 3, 3)}, "no layer1"), ({"a": torch.ones(1)}, "no conv1"),
    ({k: v for k, v in build().state_dict().items() if "linear" not in k}, "no classifier")])
def test_unknown_architectures(weights, why):
    with pytest.raises(ConfigError, match=why):
        infer_arch(to_ours({"state_dict": weights}))
