"""Stages of networks that name them in ways of their own, and what experts of torchvision's networks have."""
import pytest
import torch

from model.model import build_model
from model.weights.remap import load_weights

timm = pytest.importorskip("timm")
CLASSES = 7


def make(name, experts=1, device="meta", **args):
    with torch.device(device):
        return build_model({"type": "TimmModel", "args": {"model_name": name, "weights": False, "num_experts": experts,
                                                          **args}}, CLASSES)


@pytest.mark.parametrize("experts", (1, 2))
@pytest.mark.parametrize("name, count", (
    ("dla34", 7), ("torchvision/vit_b_32", 13), ("coat_lite_tiny", 12), ("pit_ti_224", 4),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        ("inception_v3", 13), ("volo_d1_224", 5), ("torchvision/shufflenet_v2_x0_5", 4), ("torchvision/densenet121", 5),
        ("torchvision/efficientnet_b0", 8)))))
def test_half_of_the_stages_can_be_frozen(name, count, experts):
    model = make(name, experts)
    stages, heads = model.stage_prefixes(), tuple(model.classifier_prefixes())
    assert len(stages) == count + (experts > 1 and not model.backbone.private)
    for key, _ in model.named_parameters():
        assert sum(key.startswith(starts) for starts in stages) == (0 if key.startswith(heads) else 1), key
    model.freeze({"until": 30, "then": 0.5})          # as configs/image_folder.json
    model.thaw()
    assert 0 < len(model.frozen) < len(list(model.parameters())) - 2


def test_of_one_stage_no_share_is_frozen(monkeypatch, caplog):
    model = make("test_resnet")
    monkeypatch.setattr(model, "stage_prefixes", lambda: [("backbone.",)])
    with caplog.at_level("WARNING", "ltr"):
        model.freeze({"until": 30, "then": 0.5})
    assert "this network is one stage, of which there is no share: 0.5 freezes none of it" in caplog.text
    model.thaw()
    assert not model.frozen


@pytest.mark.parametrize("name, own", (
    ("dla34", ["level5"]), ("torchvision/shufflenet_v2_x0_5", ["stage4", "conv5"]),
    ("mobilenetv3_small_100", ["blocks.4", "blocks.5"]),                  # not the head's convolution alone
    *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        ("inception_v3", ["Mixed_7c"]), ("torchvision/densenet121", ["features.denseblock4", "features.norm5"]),
        ("torchvision/swin_t", ["features.7"]), ("torchvision/efficientnet_b0", ["features.7", "features.8"]),
        ("torchvision/mobilenet_v2", ["features.17", "features.18"]),
        ("torchvision/vit_b_16", ["encoder.layers.encoder_layer_11", "encoder.ln"])))))
def test_experts_own_stages(name, own):
    assert make(name, 2).backbone.private == own


@pytest.mark.parametrize("name", (
    "shufflenet_v2_x0_5", *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "regnet_y_400mf", "densenet121", "vit_b_32", "swin_t", "efficientnet_b0", "mobilenet_v2"))))
def test_torchvisions_networks_in_two_halves(name):
    import torchvision
    torch.manual_seed(0)
    own = torchvision.models.get_model(name, weights=None, num_classes=CLASSES).eval()
    images = torch.randn(1, 3, 224, 224)
    for experts in (1, 2):
        model = make(f"torchvision/{name}", experts, "cpu").eval()
        load_weights(model, {"state_dict": own.state_dict()}, new_head=True)
        assert torch.allclose(model(images)["logits"][:, 0], own(images), atol=1e-5)


@pytest.mark.parametrize("name, experts", (("pit_ti_224", 2), ("levit_128s", 1)))
def test_blocks_and_classifiers_that_no_file_has_start_anew(name, experts, caplog):
    """An expert's own block; a classifier that has a norm of its own, LeViT's, which isn't loaded in part either."""
    with torch.device("cpu"):
        own = timm.create_model(name, num_classes=CLASSES)
    model = make(name, experts, "cpu")
    with caplog.at_level("INFO", "ltr"):
        load_weights(model, {"state_dict": own.state_dict()}, new_head=True)
    assert "these start anew" in caplog.text
    key = next(key for key in own.state_dict() if key.endswith("weight"))
    assert torch.equal(model.backbone.body.state_dict()[key], own.state_dict()[key])


@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")
def test_a_name_that_timm_keeps_for_old_code():
    assert make("xception").preprocess("xception")["image_size"] == 224
