"""Mask R-CNN: every norm trains, empty pictures are survived, keys are torchvision's, foreign weights fit."""
import pytest
import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from model.detection.mask_rcnn import MaskRCNNR50FPNModel
from model.model import build_model
from model.norm import CenConv2d, MABN2d
from tests.scenes import SMALL
from utils.errors import ConfigError

MABN = {"type": "MABN", "args": {"B": 2, "real_B": 8}}
NORMS = ["BatchNorm2d", MABN, "SyncBatchNorm", "BatchRenorm", "GroupNorm", "Frozen"]


def name_of(norm):
    return norm if isinstance(norm, str) else norm["type"]


def pictures(empty=False):
    torch.manual_seed(0)
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    targets = []
    for image in images:
        n = 0 if empty else 2
        masks = torch.zeros(n, *image.shape[1:], dtype=torch.uint8)
        masks[:, 8:30, 6:26] = 1
        targets.append({"boxes": torch.tensor([[6.0, 8, 26, 30]]).repeat(n, 1), "masks": masks,
                        "labels": torch.arange(1, n + 1), "image_id": 1})
    return images, targets


def statistics(model):
    """Running statistics and counters."""
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "iters" in k or "tracked" in k}


@pytest.mark.parametrize("norm", NORMS, ids=name_of)
def test_every_norm_trains_every_parameter_and_detects(norm):
    torch.manual_seed(0)
    model = MaskRCNNR50FPNModel(num_classes=3, norm=norm, **SMALL).train()
    images, targets = pictures()
    out = model(images, targets)
    parts = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert set(out) == {"loss", *parts}
    assert torch.allclose(out["loss"], sum(out[part] for part in parts)) and torch.isfinite(out["loss"])
    out["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    before = {k: v for k, v in statistics(model).items() if k.startswith("roi_heads.")}
    model.zero_grad()
    model(*pictures(empty=True))["loss"].backward()  # no region but background: the mask head sees none
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())
    masked = {k for k in before if "mask_head" in k}
    after = statistics(model)
    assert all(torch.equal(before[k], after[k]) for k in masked) or norm == "SyncBatchNorm"
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        found = model(images)["detections"]
    assert [d["masks"].shape[1:] for d in found] == [(1, 64, 64), (1, 48, 64)]
    for d in found:
        assert len(d["boxes"]) <= SMALL["box_detections_per_img"] and (d["scores"].diff() <= 0).all()
        assert ((d["labels"] >= 1) & (d["labels"] <= 3)).all()


def test_norms_stand_in_backbone_pyramid_and_heads():
    model = MaskRCNNR50FPNModel(num_classes=3, norm=MABN, **SMALL)
    normed = {name for name, module in model.named_modules() if isinstance(module, MABN2d)}
    for part, n in (("backbone.body", 53), ("backbone.fpn", 8), ("roi_heads.box_head", 4), ("roi_heads.mask_head", 4)):
        assert sum(name.startswith(part) for name in normed) == n
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and not isinstance(m, CenConv2d)]
    assert sorted(plain) == ["roi_heads.mask_predictor.mask_fcn_logits", "rpn.head.bbox_pred", "rpn.head.cls_logits",
                             "rpn.head.conv.0.0"]
    assert {m.buffer_x2.shape[0] for m in model.modules() if isinstance(m, MABN2d)} == {4}
    linear = [m.out_features for m in model.roi_heads.box_head if isinstance(m, nn.Linear)]
    assert linear == [SMALL["fc_dim"]]


def test_the_default_sizes_are_the_papers():
    with torch.device("meta"):
        model = MaskRCNNR50FPNModel(num_classes=80)
    head = model.roi_heads.box_head
    assert [m.out_channels for m in head.modules() if isinstance(m, nn.Conv2d)] == [256] * 4
    assert [m.out_features for m in head if isinstance(m, nn.Linear)] == [1024]
    assert model.roi_heads.box_predictor.cls_score.out_features == 81
    assert model.transform.min_size == (800,) and model.transform.max_size == 1333
    assert model.num_classes == 80


def test_keys_are_torchvisions():
    with torch.device("meta"):
        ours = MaskRCNNR50FPNModel(num_classes=90, norm="Frozen", box_head="2fc").state_dict()
        theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    theirs = {key: tuple(value.shape) for key, value in theirs.items() if "num_batches_tracked" not in key}
    assert {key: tuple(value.shape) for key, value in ours.items()} == theirs


def test_frozen_norms_do_not_move():
    model = MaskRCNNR50FPNModel(num_classes=3, norm="Frozen", trainable_layers=3, **SMALL)
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in model.modules()) == 53
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_untrained_layers_stay_as_they_are():
    model = MaskRCNNR50FPNModel(num_classes=3, trainable_layers=2, **SMALL).train()
    frozen = {name.split(".")[2] for name in model.frozen}
    assert frozen == {"conv1", "bn1", "layer1", "layer2"}
    before = model.state_dict()["backbone.body.layer1.0.bn1.running_var"].clone()
    model(*pictures())["loss"].backward()
    assert torch.equal(before, model.state_dict()["backbone.body.layer1.0.bn1.running_var"])
    assert model.backbone.body.layer1[0].conv1.weight.grad is None
    assert model.backbone.body.layer3[0].conv1.weight.grad is not None


def test_one_tensor_of_images_and_missing_targets():
    model = MaskRCNNR50FPNModel(num_classes=2, **SMALL).eval()
    with torch.no_grad():
        assert len(model(torch.rand(2, 3, 64, 64))["detections"]) == 2
    with pytest.raises(ValueError, match="targets"):
        model.train()(torch.rand(2, 3, 64, 64))


@pytest.mark.parametrize("args, message", [
    ({"num_classes": None}, "num_classes: missing"), ({"num_classes": 0}, "num_classes"),
    ({"min_size": 0}, "min_size"), ({"max_size": 10}, "max_size"), ({"trainable_layers": 6}, "trainable_layers"),
    ({"box_head": "3fc"}, "box_head.*2fc"), ({"anchor_sizes": [8, 16]}, "anchor_sizes.*five"),
    ({"box_nms_thresh": 1.5}, "box_nms_thresh"), ({"image_std": [1.0, 0.0, 1.0]}, "image_std"),
    ({"norm": "NBM"}, "norm.type.*NBM"), ({"norm": {"type": "MABN", "args": {"C": 1}}}, "norm.args.*C"),
    ({"norm": {"kind": "MABN"}}, "norm: should be"),
])
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ConfigError, match=f"arch.args.{message}"):
        MaskRCNNR50FPNModel(**{"num_classes": 2, **SMALL, **args})


def test_the_builder_knows_the_name():
    model = build_model({"type": "MaskRCNNR50FPNModel", "args": SMALL}, num_classes=4)
    assert model.num_classes == 4 and model.classifier_prefixes()


# ---- weights ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(1)
    network = resnet50(weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.state_dict()


def fresh(norm="BatchNorm2d", num_classes=3):
    torch.manual_seed(2)
    return MaskRCNNR50FPNModel(num_classes=num_classes, norm=norm, **SMALL)


@pytest.mark.parametrize("wrap", [
    lambda w: w,
    lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}},
    lambda w: {"state_dict": {f"backbone.{k.replace('fc.', 'linear.')}": v for k, v in w.items()}, "arch": "x"},
    lambda w: {"model": {f"backbone.{k}".replace("layer4.", "layer4s.0."): v for k, v in w.items()}},
], ids=["torchvision", "wrapped", "ours", "ours with experts"])
def test_imagenet_weights_fill_the_body(wrap, classifier):
    model = fresh()
    head = model.roi_heads.box_head[0][0].weight.clone()
    line = model.load_pretrained(wrap(dict(classifier)), "weights.pth")
    body = model.backbone.body.state_dict()
    assert all(torch.equal(body[key], classifier[key]) for key in body if "num_batches" not in key)
    assert "weights.pth" in line and torch.equal(head, model.roi_heads.box_head[0][0].weight)


def test_mabns_file_fills_the_body():
    donor = fresh(MABN).backbone.body
    for module in donor.modules():
        if isinstance(module, MABN2d):
            module.running_var.uniform_(0.5, 2)
            module.iters.fill_(5000)
    weights = donor.state_dict()
    # The classification demo's extra sums, and buffers for another batch size.
    weights = {key: value.repeat(4, 1) if "buffer" in key else value for key, value in weights.items()}
    weights |= {"bn1.sta_matrix": torch.zeros(2, 8), "bn1.pre_x2": torch.zeros(1, 64), "fc.weight": torch.zeros(2, 2)}
    model = fresh(MABN)
    model.load_pretrained({"model": weights}, "R50-wc.pth")
    body = model.backbone.body
    assert torch.equal(body.bn1.running_var, donor.bn1.running_var)
    assert torch.equal(body.layer2[0].conv2.weight, donor.layer2[0].conv2.weight)
    assert body.bn1.iters.item() == 0 and body.bn1.buffer_x2.shape == (4, 64)  # a new run gathers its own moments
    plain = fresh()
    plain.load_pretrained({"model": weights}, "R50-wc.pth")
    assert torch.equal(plain.backbone.body.bn1.running_var, donor.bn1.running_var.flatten())


def test_batch_norms_statistics_become_second_moments(classifier):
    model = fresh(MABN)
    model.load_pretrained(dict(classifier), "weights.pth")
    norm = model.backbone.body.bn1
    expected = classifier["bn1.running_var"] + classifier["bn1.running_mean"] ** 2
    assert torch.allclose(norm.running_var.flatten(), expected) and torch.allclose(norm.buffer_x2[0], expected)


def test_a_whole_detectors_statistics_become_second_moments_too():
    """In all its parts; and MABN's own, which are second moments already, stay."""
    donor = fresh()
    for module in donor.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model, again = fresh(MABN), fresh(MABN)
    model.load_pretrained({"state_dict": donor.state_dict()}, "a.pth")
    again.load_pretrained({"state_dict": model.state_dict()}, "b.pth")
    kinds = {}
    for name, norm in model.named_modules():
        if isinstance(norm, MABN2d):
            before = donor.get_submodule(name)
            expected = before.running_var + before.running_mean ** 2
            assert torch.allclose(norm.running_var.flatten(), expected) and torch.allclose(norm.buffer_x2[0], expected)
            assert torch.equal(again.get_submodule(name).running_var, norm.running_var)
            kinds[".".join(name.split(".")[:2])] = 1
    assert len(kinds) == 4, kinds       # body, pyramid and both heads


def test_whole_detectors_fit_but_for_other_classes():
    donor = fresh(MABN)
    donor.roi_heads.box_head[0][1].iters.fill_(7)
    model = fresh(MABN)
    assert "new for" not in model.load_pretrained({"state_dict": donor.state_dict()}, "a.pth")
    assert all(torch.equal(a, b) for a, b in zip(donor.state_dict().values(), model.state_dict().values(), strict=True))
    other = fresh(MABN, num_classes=5)
    line = other.load_pretrained({"state_dict": donor.state_dict()}, "a.pth")
    assert "new for these classes" in line and "cls_score" in line
    assert torch.equal(other.rpn.head.cls_logits.weight, donor.rpn.head.cls_logits.weight)
    named, scores = fresh(MABN), donor.roi_heads.box_predictor.cls_score.weight
    with torch.no_grad():
        scores.add_(1)
    # As many classes, but others.
    line = named.load_pretrained({"state_dict": donor.state_dict()}, "a.pth", other_classes=True)
    assert "new for these classes" in line and "mask_fcn_logits" in line
    assert not torch.equal(named.roi_heads.box_predictor.cls_score.weight, scores)
    assert torch.equal(named.rpn.head.cls_logits.weight, donor.rpn.head.cls_logits.weight)


@pytest.mark.parametrize("checkpoint, message", [
    ({"state_dict": {"something": torch.zeros(1)}}, "holds neither a ResNet-50"),
    ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, r"doesn't fit .* is missing.*\(and \d+ more\)"),
    ({"rpn.head.conv.0.0.weight": torch.zeros(4, 4, 3, 3)}, "doesn't fit"),
])
def test_files_that_do_not_fit_are_named(checkpoint, message):
    with pytest.raises(ConfigError, match=f"w.pth: .*{message}|w.pth: {message}"):
        fresh().load_pretrained(checkpoint, "w.pth")
