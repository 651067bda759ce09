"""python -m tools.gflops: known costs of known networks, and parts that sum to the whole."""
import json

import pytest

from tools.gflops import gflops_of, measured_shares, parse, shares, table
from utils.config.load import load_config
from utils.errors import ConfigError


def config(kind, loader="ImbalanceCIFAR100DataLoader", **args):
    return {"arch": {"type": kind, "args": {"num_classes": 100, **args}}, "data_loader": {"type": loader, "args": {}}}


def test_known_networks():
    resnet50 = gflops_of(config("ResNet50Model", "ImageNetLTDataLoader", num_classes=1000))
    assert resnet50["gmacs"] == pytest.approx(4.09, abs=0.01) and resnet50["parameters"] == 25_557_032
    assert resnet50["ratio"] == 1 and resnet50["image_size"] == 224
    resnet32 = gflops_of(config("ResNet32Model"))
    # By hand: the stem, 10 + 9.5 + 9.5 convolutions of 9.4 MFLOPs (a stage's first has half the input), the head.
    conv = 2 * 16 * 16 * 9 * 32 * 32
    by_hand = 2 * 3 * 16 * 9 * 32 * 32 + (10 + 9.5 + 9.5) * conv + 2 * 64 * 100
    assert resnet32["gflops"] == pytest.approx(by_hand / 1e9, rel=1e-9)
    assert resnet32["parts"][0] == {"name": "stem", "gflops": pytest.approx(884_736e-9), "parameters": 464}


@pytest.mark.parametrize("kind, args", [
    ("ResNet32Model", {"num_experts": 3, "reduce_dimension": True, "use_norm": True}),
    ("ResNet32Model", {"norm": "MABN", "add_bt": 1, "eval_bt": True}),
    ("ResNet32EAModel", {"num_experts": 2, "norm": "NBN", "add_bt": 1}),
    ("ResNet10EAModel", {"num_experts": 2, "classifier": "lws", "share_expert_help_pred_fc": False})])
def test_parts_sum_to_the_whole(kind, args):
    cost = gflops_of(config(kind, **args))
    assert sum(part["gflops"] for part in cost["parts"]) == pytest.approx(cost["all_experts"], rel=1e-9)
    assert sum(part["parameters"] for part in cost["parts"]) == cost["parameters"]
    assert cost["by_experts"] == sorted(cost["by_experts"])
    assert cost["by_experts"][-1] == pytest.approx(cost["all_experts"], rel=1e-9)
    assert "plain network" in table(cost)


def test_expert_assignment_costs_its_shares():
    three = config("ResNet32EAModel", num_experts=3, reduce_dimension=True)
    cost = gflops_of(three, ea=[40.0, 10.0, 50.0])
    by_hand = 0.4 * cost["by_experts"][0] + 0.1 * cost["by_experts"][1] + 0.5 * cost["by_experts"][2]
    assert cost["gflops"] == pytest.approx(by_hand) and cost["gflops"] < cost["all_experts"]
    assert gflops_of(three)["gflops"] == cost["all_experts"]
    for wrong in ([50.0, 50.0], [10.0, 10.0, 10.0], [-10.0, 60.0, 50.0]):
        with pytest.raises(ConfigError, match="3 numbers that sum to 100"):
            gflops_of(three, ea=wrong)
    with pytest.raises(ConfigError, match="ResNet32EAModel"):
        gflops_of(config("ResNet32Model", num_experts=3), ea=[40, 10, 50])
    assert shares([0.25, 0.75], 2) == [0.25, 0.75]


def test_what_isnt_known_is_asked_for(root):
    with pytest.raises(ConfigError, match=r"--set arch\.args\.num_classes=N"):
        gflops_of(load_config(root / "configs" / "image_folder_ride.json"))
    with pytest.raises(ConfigError, match="detector"):
        gflops_of(load_config(root / "configs" / "coco_maskrcnn_mabn_scratch_2x.json"))


def test_the_size_is_the_networks_own(root):
    """As training takes it; from scratch "auto" is what a CPU takes. Which, and why, is said."""
    pytest.importorskip("timm")
    own = load_config(root / "configs" / "image_folder.json")
    own["arch"]["args"].update(num_classes=4, model_name="test_resnet")
    cost = gflops_of(own)
    assert cost["image_size"] == 160
    assert "the network's own; photos under 80 pixels are taken at 80" in table(cost).splitlines()[1]
    own["data_loader"]["args"]["image_size"] = 32
    assert gflops_of(own)["image_size_why"] is None
    scratch = load_config(root / "configs" / "image_folder_ride.json")
    scratch["arch"]["args"]["num_classes"] = 4
    cost = gflops_of(scratch)
    assert cost["image_size"] == 64 and 'what "auto" is on a CPU' in table(cost)


def test_a_network_that_cannot_be_made_without_numbers():
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    arch = {"type": "TimmModel", "args": {"model_name": "torchvision/regnet_y_400mf"}}
    loader = {"type": "DigitsLTDataLoader", "args": {"image_size": 64}}
    assert gflops_of({"arch": arch, "data_loader": loader})["gflops"] > 0


def test_flags(tmp_path, root):
    name = str(root / "configs" / "digits_lt_ride_ea.json")
    for written in (["40.99,9.47,49.54"], ["40.99", "9.47", "49.54"]):
        assert parse(["-c", name, "--ea", *written]).ea == [40.99, 9.47, 49.54]
    for flags, said in ((["-c", name, "--ea", "a,b"], "--ea"), ([], "needs -c"),
                        (["-c", name, "--num_expert", "3"], "--num_experts")):
        with pytest.raises(ConfigError, match=said):
            parse(flags)
    assert measured_shares(tmp_path / "x.pth") is None
    (tmp_path / "test_metrics.json").write_text('{"expert_share": {"all": [0.4, 0.6]}}')
    assert measured_shares(tmp_path / "x.pth") == [0.4, 0.6]


def test_commands(call_cli, digits_run, tmp_path):
    done = call_cli(["-m", "tools.gflops", "-c", "configs/cifar100_lt_ride_ea.json", "--ea", "40.99,9.47,49.54",
                     "--num_experts", "3", "--json", tmp_path / "cost.json"], check=True)
    assert "mean of 41.0 / 9.5 / 49.5 %" in done.stdout and "expert 3, stage 3" in done.stdout
    assert 0.07 < json.loads((tmp_path / "cost.json").read_text())["gmacs"] < 0.08
    done = call_cli(["-m", "tools.gflops", "-r", digits_run.checkpoint], check=True)
    assert "32 x 32, 10 classes" in done.stdout
