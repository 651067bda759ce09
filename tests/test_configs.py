"""Every config in configs/: it reads, its model and loss build, and its numbers are the published ones."""

from pathlib import Path

import pytest

from utils.config.read import read_config

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.json"))
IDS = [path.stem for path in CONFIGS]
CLASSIFIERS = [path for path in CONFIGS if "maskrcnn" not in path.stem]  # detection has tests of its own


def read(name: str) -> dict:
    return read_config(CONFIGS[0].parent / f"{name}.json")[0]


def step(step1, step2, gamma, warmup):
    return {"type": "CustomLR", "args": {"step1": step1, "step2": step2, "gamma": gamma, "warmup_epoch": warmup}}


def cosine(epochs):
    return {"type": "CosineAnnealingLR", "args": {"T_max": epochs, "eta_min": 0.0}}


def crossed(names: str, *, heads=("",)) -> list[str]:
    return [f"{name}{head}" for name in names.split() for head in heads]


RIDE = {"type": "RIDELoss", "reweight": True}
DISTILLED = {"type": "RIDELossWithDistill", "reweight": True, "distill_temperature": 1.5}
CIFAR = {"additional_diversity_factor": -0.45, "reweight_epoch": 160}
IMAGENET = {"additional_diversity_factor": -0.2, "reweight_epoch": 80, "reweight_factor": 0.02}
INAT = {**IMAGENET, "reweight_factor": 0.015}
CE = {"type": "CrossEntropyLoss"}
BIG = crossed("imagenet_lt_resnet10 imagenet_lt_resnet50 imagenet_lt_resnext50")

# names, epochs, batch, learning rate, weight decay, nesterov, schedule, loss (its type and the arguments that matter)
PUBLISHED = [
    (crossed("cifar100_lt_ride cifar100_lt_ride_teacher cifar100_lt_ride_bt"),
     200, 128, 0.1, 5e-4, True, step(160, 180, 0.01, 5), {**RIDE, **CIFAR}),
    (["cifar100_lt_ride_distill"], 200, 128, 0.1, 5e-4, True, step(160, 180, 0.01, 20), {**DISTILLED, **CIFAR}),
    (["cifar100_lt_ldam_drw"], 200, 128, 0.1, 2e-4, False, step(160, 180, 0.01, 5),
     {"type": "LDAMLoss", "reweight_epoch": 160, "max_m": 0.5, "s": 30}),
    (["cifar100_lt_ride_ea", *(f"{name}_ride_ea" for name in BIG), "inaturalist_resnet50_ride_ea"],
     5, 512, 0.01, 5e-4, True, cosine(5), CE),
    ([f"{name}_ride{kind}" for name in BIG for kind in ("", "_teacher")] + ["imagenet_lt_resnext50_ride_bt"],
     100, 256, 0.1, 2e-4, True, step(60, 80, 0.1, 5), {**RIDE, **IMAGENET}),
    (["imagenet_lt_resnet10_ride_bt"], 120, 512, 0.1, 2e-4, True, step(60, 80, 0.1, 5), {**RIDE, **IMAGENET}),
    (["imagenet_lt_resnet50_ride_bt"], 100, 400, 0.1, 2e-4, True, step(60, 80, 0.1, 5), {**RIDE, **IMAGENET}),
    (["imagenet_lt_resnet50_ride_bt_cosine"], 100, 400, 0.1, 2e-4, True,
     {"type": "CosLR", "args": {"warmup_epoch": 5}}, {**RIDE, **IMAGENET}),
    ([f"{name}_ride_distill" for name in BIG], 100, 256, 0.1, 2e-4, True, step(60, 80, 0.1, 5),
     {**DISTILLED, **IMAGENET}),
    (["inaturalist_resnet50_ride", "inaturalist_resnet50_ride_teacher"], 100, 512, 0.2, 2e-4, True,
     step(60, 80, 0.1, 5), {**RIDE, **INAT}),
    (["inaturalist_resnet50_ride_bt"], 100, 128, 0.2, 2e-4, True, step(60, 80, 0.1, 5), {**RIDE, **INAT}),
    (["inaturalist_resnet50_ride_distill"], 100, 512, 0.2, 2e-4, True, step(60, 80, 0.1, 5), {**DISTILLED, **INAT}),
    ([f"{name}_ce" for name in BIG], 90, 512, 0.2, 5e-4, False, cosine(90), CE),
    ([f"{name}_crt" for name in BIG], 10, 512, 0.2, 5e-4, False, cosine(10), CE),
    ([f"{name}_lws" for name in BIG], 5, 512, 0.2, 5e-4, False, cosine(5), CE),
    (["inaturalist_resnet50_ce", "inaturalist_resnet152_ce"], 90, 512, 0.2, 1e-4, False, cosine(90), CE),
    (["inaturalist_resnet50_crt", "inaturalist_resnet152_crt"], 30, 512, 0.2, 1e-4, False, cosine(30), CE),
    (["inaturalist_resnet50_lws", "inaturalist_resnet152_lws"], 5, 512, 0.2, 1e-4, False, cosine(5), CE),
    (["places_lt_resnet152_ce"], 30, 256, 0.01, 5e-4, False, cosine(30), CE),
    (["places_lt_resnet152_crt"], 10, 256, 0.1, 5e-4, False, cosine(10), CE),
    (["places_lt_resnet152_lws"], 5, 256, 0.1, 5e-4, False, cosine(5), CE),
    (["imagenet_lt_resnet50_nbn", "imagenet_lt_resnext50_nbn"], 90, 512, 0.2, 5e-4, False, cosine(90), CE),
    (["imagenet_lt_resnet50_ride_nbn"], 200, 256, 0.1, 5e-4, False, cosine(200),
     {"type": "RIDELoss", "max_m": 0.0, "additional_diversity_factor": 0.0, "reweight": False, "collaborative": False}),
    (["imagenet_lt_lift", "places_lt_lift", "cifar100_lt_lift"], 10, 128, 0.01, 5e-4, False, cosine(10),
     {"type": "LogitAdjustmentLoss", "tau": 1.0}),
    (["inaturalist_lift"], 20, 128, 0.01, 5e-4, False, cosine(20), {"type": "LogitAdjustmentLoss", "tau": 1.0}),
    (["imagenet_resnet50_mabn"], 120, 256, 0.1, 1e-4, False,
     {"type": "MultiStepLR", "args": {"milestones": [30, 60, 90], "gamma": 0.1}},
     {"type": "LabelSmoothingLoss", "smoothing": 0.1}),
]
ROWS = [(name, *row) for names, *row in PUBLISHED for name in names]


@pytest.mark.parametrize("name, epochs, batch, lr, decay, nesterov, schedule, loss", ROWS, ids=[r[0] for r in ROWS])
def test_published_settings(name, epochs, batch, lr, decay, nesterov, schedule, loss):
    config = read(name)
    optimizer = config["optimizer"]
    assert config["trainer"]["epochs"] == epochs
    assert config["data_loader"]["args"]["batch_size"] == batch
    assert optimizer["type"] == "SGD"
    assert optimizer["args"]["momentum"] == 0.9
    assert (optimizer["args"]["lr"], optimizer["args"]["weight_decay"]) == (lr, decay)
    assert optimizer["args"].get("nesterov", False) is nesterov
    assert config["lr_scheduler"] == schedule
    actual = {"type": config["loss"]["type"], **config["loss"].get("args", {})}
    assert {key: actual.get(key) for key in loss} == loss


@pytest.mark.parametrize("name, top", [
    ("cifar100_lt_ride_ea", 30), ("imagenet_lt_resnet10_ride_ea", 30), ("imagenet_lt_resnet50_ride_ea", 50),
    ("imagenet_lt_resnext50_ride_ea", 50), ("inaturalist_resnet50_ride_ea", 50)])
def test_expert_assignment_settings(name, top):
    config = read(name)
    args = config["arch"]["args"]
    assert config["arch"]["type"].endswith("EAModel")
    assert (args["top_choices_num"], args["pos_weight"], args["num_experts"]) == (top, 100, 3)
    assert config["data_loader"]["args"]["balanced"] is True
    assert config["resume_state_dict_only"] is True


def test_nbn_ride_is_cross_entropy_summed_over_experts():
    import torch
    import torch.nn.functional as F

    from model.loss import build_loss

    config = read("imagenet_lt_resnet50_ride_nbn")
    logits = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    criterion = build_loss(config["loss"], [50, 20, 10, 5, 2])
    criterion.set_epoch(200)
    loss = criterion({"output": logits.mean(1), "logits": logits}, target)
    torch.testing.assert_close(loss, sum(F.cross_entropy(logits[:, expert], target) for expert in range(3)))


def test_two_rates_of_places():
    config = read("places_lt_resnet152_ce")
    assert (config["optimizer"]["args"]["lr"], config["trainer"]["classifier_lr"]) == (0.01, 0.1)


def shown(config: dict) -> set[str]:
    """The parts of a recipe that a config uses."""
    data, trainer = config["data_loader"]["args"], config["trainer"]
    schedule, mix = config["lr_scheduler"], data.get("mix") or {}
    found = {key for key in ("cutout", "random_erasing") if data.get(key)}
    found |= {key for key in ("ema", "swa", "no_decay", "layer_decay", "freeze", "accumulate") if trainer.get(key)}
    found |= {"off_epochs"} & mix.keys()
    found |= {str(value) for value in (data.get("augment"), mix.get("type"), trainer.get("amp"), schedule["type"],
                                       config["optimizer"]["type"], config["loss"]["type"])}
    return found | ({"by step"} if schedule.get("args", {}).get("by") == "step" else set())


@pytest.mark.parametrize("data", ["digits_lt", "cifar100_lt"])
def test_every_part_of_a_recipe_is_shown(data):
    from data_loader.policies import DRAWS
    from model.loss import LOSSES
    from trainer.schedules import OPTIMIZERS

    parts = {*DRAWS, "cutout", "random_erasing", "mixup", "cutmix", "either", "off_epochs", "ema", "swa", *OPTIMIZERS,
             "no_decay", "layer_decay", "freeze", "accumulate", "by step", "LinearLR0", "CosLR", "OneCycleLR", "auto"}
    parts |= {name for name in LOSSES if name.startswith(("BalPoE", "SADE", "VS", "GCL", "LabelAware"))}
    found = [shown(read(name)) for name in IDS if name.startswith(f"{data}_")]
    assert not parts - set().union(*found)


@pytest.mark.parametrize("name", ["imagenet_lt_lift", "places_lt_lift", "inaturalist_lift", "cifar100_lt_lift"])
def test_lift_settings(name):
    """shijxcs/LIFT: CLIP's ViT-B/16 with AdaptFormer at its default width and learned scale, cosine classifier of scale
    25 that starts from the class names; plain crops and flips."""
    config = read(name)
    args, data, start = config["arch"]["args"], config["data_loader"]["args"], config["init_classifier"]
    assert (args["model_name"], args["weights"]) == ("vit_base_patch16_clip_quickgelu_224.openai", True)
    assert (args["tuning"], args["classifier"], args["s"]) == ({"type": "adaptformer", "args": {}}, "cosine", 25)
    assert (start["type"], start["args"]["template"]) == ("text", "a photo of a {}.")
    assert (start["args"]["clip"], start["args"]["pretrained"]) == ("ViT-B-16-quickgelu", "openai")
    assert (data["image_size"], data["jitter"]) == (224, 0)


def first_stage(name: str) -> str | None:
    """The config whose checkpoint `name` starts from."""
    prefix, _, kind = name.rpartition("_")
    return {"crt": f"{prefix}_ce", "lws": f"{prefix}_ce", "ea": prefix, "distill": f"{prefix}_teacher"}.get(kind)


@pytest.mark.parametrize("name", [name for name in IDS if first_stage(name)])
def test_stages_of_one_setting_agree(name):
    """A second stage loads the first one's weights, so the backbones must be the same."""
    second, first = read(name), read(first_stage(name))
    if name.endswith("distill"):
        assert second["distill_arch"] == first["arch"]
        # Where `train.py -c configs/..._teacher.json --run_id teacher` leaves its last epoch.
        folder, last = f"saved/models/{first['name']}/teacher", first["trainer"]["epochs"]
        assert second["distill_checkpoint"] == f"{folder}/checkpoint-epoch{last}.pth"
        return
    for key in ("num_classes", "reduce_dimension", "num_experts", "use_norm"):
        assert second["arch"]["args"][key] == first["arch"]["args"][key], key
    assert second.get("second_stage", False) is name.endswith(("crt", "lws"))  # refused without stage 1
    assert second["arch"]["type"].replace("EAModel", "Model") == first["arch"]["type"]
    assert second["data_loader"]["type"] == first["data_loader"]["type"]


@pytest.mark.parametrize("path", CONFIGS, ids=IDS)
def test_config_reads(path):
    from utils.config.load import load_config

    config = load_config(path)
    assert config["name"] == path.stem
    assert config["lr_scheduler"].get("args", {}).get("warmup_epoch") != 1  # by RIDE's formula none at all
    validation = config["data_loader"]["args"].get("validation")
    if "_fast" in path.stem or path.stem.startswith("cifar100_lt_best"):
        assert validation == "none" and config["trainer"]["monitor"] == "off"   # nothing that costs time
    elif path.stem.startswith(("digits_lt", "cifar")):
        assert validation == "holdout"  # costs no training image there, and leaves the test images alone


@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda path: path.stem)
def test_model_and_loss_build(path):
    import torch

    from model.loss import build_loss
    from model.model import build_model

    config = read(path.stem)
    num_classes = config["arch"]["args"].get("num_classes", 7)
    with torch.device("meta"):  # shapes and names only: 8,142-class teachers would fill a small machine's memory
        model = build_model(config["arch"], num_classes, bare=True)
        teacher = build_model(config["distill_arch"], num_classes) if config.get("distill") else None
    assert model.num_experts == config["arch"]["args"].get("num_experts", 1)
    assert teacher is None or teacher.num_experts > model.num_experts
    build_loss(config["loss"], [max(1, 1000 // (label + 1)) for label in range(num_classes)])
