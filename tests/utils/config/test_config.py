"""Configs: old ones run unchanged, wrong ones are named in one line, and what comes out loads as itself."""

import copy
import json
import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.config.annotation import parse
from utils.config.check import _table, constructor
from utils.config.load import Override, check_config, load_config
from utils.config.read import MAX_BYTES
from utils.config.schema import GROUPS, REQUIRED, SECTIONS, TOP, TRAINER
from utils.config.signature import of_callable
from utils.errors import ConfigError

SGD = {"type": "SGD", "args": {"lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9, "nesterov": True}}


def old_config(arch="ResNet32Model", data="ImbalanceCIFAR100DataLoader", loss_type="RIDELoss", **changes):
    """A config with the keys and values that RIDE's and BatchFormer's have."""
    large = data in ("ImageNetLTDataLoader", "iNaturalistDataLoader")
    arch_args = {"num_classes": 1000 if large else 100, "reduce_dimension": True, "use_norm": True, "num_experts": 3,
                 **({"returns_feat": True} if large else {}), **changes.pop("arch_args", {})}
    loss_args = {"reweight": True, "reweight_epoch": 80, **({"reweight_factor": 0.02} if large else
                                                             {"additional_diversity_factor": -0.2})}
    return {
        "name": "Imbalance_CIFAR100_LT_RIDE", "n_gpu": 1,
        "arch": {"type": arch, "args": arch_args},
        "data_loader": {"type": data, "args": {"data_dir": "data", "batch_size": 128, "shuffle": True,
                                               "num_workers": 12, **changes.pop("data_args", {})}},
        "optimizer": SGD, "add_extra_info": True,
        "loss": {"type": loss_type, "args": {**loss_args, **changes.pop("loss_args", {})}},
        "metrics": ["accuracy"],
        "lr_scheduler": {"type": "CustomLR", "args": {"step1": 160, "step2": 180, "gamma": 0.01, "warmup_epoch": 5}},
        "trainer": {"epochs": 200, "save_dir": "saved/", "save_period": 40, "verbosity": 2,
                    "monitor": "max val_accuracy", "tensorboard": False},
        **changes}


EA = {"loss": {"type": "CrossEntropyLoss"}, "resume_state_dict_only": True, "metrics": ["accuracy", "top_k_acc"],
      "lr_scheduler": {"type": "CosineAnnealingLR", "args": {"T_max": 5, "eta_min": 0.0}},
      "data_args": {"balanced": True, "batch_size": 512}}
DISTILL = {"distill": True, "distill_checkpoint": "imagenet_lt_resnet50_6_experts.pth",
           "distill_arch": {"type": "ResNet50Model", "args": {"num_classes": 1000, "num_experts": 6,
                                                              "reduce_dimension": True, "use_norm": True}}}
COS = {"lr_scheduler": {"type": "CosLR", "args": {"step1": 60, "step2": 80, "gamma": 0.1, "warmup_epoch": 5}}}

OLD = {
    "cifar_ride": old_config(),
    "cifar_teacher": old_config(arch_args={"num_experts": 6}),
    "cifar_ldam": old_config(arch_args={"num_experts": 1, "reduce_dimension": False},
                             loss={"type": "LDAMLoss", "args": {"reweight_epoch": 160}}),
    "cifar_ea": old_config("ResNet32EAModel", arch_args={"top_choices_num": 30, "pos_weight": 100}, **EA),
    "imagenet_ea": old_config("ResNeXt50EAModel", "ImageNetLTDataLoader",
                              arch_args={"top_choices_num": 50, "pos_weight": 1e2}, **{**EA, "distill": False}),
    "inaturalist": old_config("ResNet50Model", "iNaturalistDataLoader", n_gpu=8, arch_args={"num_classes": 8142}),
    "distill": old_config("ResNet50Model", "ImageNetLTDataLoader", "RIDELossWithDistill",
                          loss_args={"distill_temperature": 1.5}, n_gpu=8, **DISTILL),
    "distributed": old_config("ResNeXt50Model", "ImageNetLTDataLoader", n_gpu=4, data_args={"distributed": True},
                              add_extra_info=False),
    "base": old_config("ResNet10Model", "ImageNetLTDataLoader", add_extra_info=False,
                       loss={"type": "LDAMLoss", "args": {"max_m": 0.5, "s": 30, "reweight_epoch": 80}}),
    "cosine": old_config("ResNet50Model", "ImageNetLTDataLoader", n_gpu=4, data_args={"distributed": True}, **COS),
    "no_schedule": old_config(lr_scheduler={}),
    "no_args": old_config(loss={"type": "RIDELoss"}),
}
INFERRED = {"cifar_ea": "ExpertAssignmentTrainer", "imagenet_ea": "ExpertAssignmentTrainer",
            "distill": "DistillTrainer"}


@pytest.mark.parametrize("name", OLD)
def test_old_configs_pass_unchanged(name):
    given = copy.deepcopy(OLD[name])
    config = check_config(given)
    assert given == OLD[name]
    assert config["trainer"]["type"] == INFERRED.get(name, "Trainer")
    for section in ("arch", "data_loader", "loss", "optimizer", "lr_scheduler"):
        for key, value in (given[section].get("args") or {}).items():
            if key != "distributed" and not (config[section]["type"] == "CosLR" and key in ("step1", "step2", "gamma")):
                assert config[section]["args"][key] == value
    assert config["n_gpu"] == given["n_gpu"] and config["metrics"] == given["metrics"]


@pytest.mark.parametrize("name", OLD)
def test_effective_config_gives_itself(name, tmp_path):
    first = check_config(OLD[name])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(first, allow_nan=False))
    assert load_config(file) == first


def test_defaults_are_filled_in():
    small = {"arch": {"type": "ResNet32Model"}, "data_loader": {"type": "DigitsLTDataLoader"},
             "optimizer": {"type": "SGD"}, "trainer": {"epochs": 3}}
    config = check_config(small)
    assert config["groups"] == {"many": 100, "few": 20} and config["seed"] == 0 and config["metrics"] == ["accuracy"]
    assert config["loss"] == {"type": "CrossEntropyLoss", "args": {}} and config["lr_scheduler"] == {}
    assert config["trainer"]["amp"] == "off" and config["trainer"]["monitor"] == "off"
    assert check_config({**small, "trainer": {"epochs": 3, "amp": False}})["trainer"]["amp"] == "off"
    # The defaults in the tables are not shared between configs.
    config["metrics"].append("x")
    assert check_config(small)["metrics"] == ["accuracy"]


def changed(path, value, base="cifar_ride"):
    """A deep copy with the value at a dotted path replaced; `...` deletes it."""
    config = copy.deepcopy(OLD[base])
    *parents, last = path.split(".")
    place = config
    for key in parents:
        place = place.setdefault(key, {})
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return config


WRONG = [  # path, value, what the line must hold
    ("arhc", {}, "arhc: unknown key 'arhc'; did you mean 'arch'?"),
    ("trainer.epoch", 3, "did you mean 'epochs'?"),
    ("arch.args.num_expert", 3, "arch.args.num_expert: unknown argument of ResNet32Model 'num_expert'; did you mean "
                                "'num_experts'?"),
    ("arch.arg", {}, "arch.arg: unknown key 'arg'; did you mean 'args'?"),
    ("arch.type", "ResNet32Modell", "did you mean 'ResNet32Model'?"),
    ("arch.type", "Model", "arch.type: unknown model"), ("arch.type", "build_model", "arch.type: unknown model"),
    ("arch.type", 3, "arch.type: must be text, not 3"), ("arch.type", ..., "arch.type: missing"),
    ("arch", ..., "arch: missing"), ("arch", "ResNet32Model", "arch: must be an object"),
    ("arch", None, "arch: missing"), ("arch.args", [], "arch.args: must be an object"),
    ("arch.args.num_experts", 0, "arch.args.num_experts: must be at least 1, not 0"),
    ("arch.args.num_experts", "3", 'arch.args.num_experts: must be a whole number, not "3"'),
    ("arch.args.num_experts", 3.0, "must be a whole number"), ("arch.args.num_experts", True, "must be a whole number"),
    ("arch.args.reduce_dimension", "yes", "must be true or false"),
    ("arch.args.norm", "NBM", "arch.args.norm.type: unknown norm 'NBM'; did you mean 'NBN'?"),
    ("arch.args.norm", {"type": "MABN", "arg": {}}, "arch.args.norm.arg: unknown key"),
    ("arch.args.norm", {"type": "MABN", "args": {"real_b": 4}}, "did you mean 'real_B'?"),
    ("arch.args.norm", {"args": {}}, "arch.args.norm.type: missing"),
    ("arch.args.norm", 3, "arch.args.norm: must be"),
    ("arch.args.classifier", "cosin", "did you mean 'cosine'?"),
    ("loss.type", "RIDELos", "loss.type: unknown loss 'RIDELos'; did you mean 'RIDELoss'?"),
    ("loss.type", "LongTailLoss", "loss.type: unknown loss"),
    ("loss.args.reweigth", True, "did you mean 'reweight'?"),
    ("loss.args.reweight_epoch", 1.5, "must be a whole number"),
    ("data_loader.args.batch_size", 0, "data_loader.args.batch_size: must be at least 1"),
    ("data_loader.args.batch_size", -5, "at least 1"), ("data_loader.args.batchsize", 5, "did you mean 'batch_size'?"),
    ("data_loader.args.num_workers", -1, "at least 0"),
    ("data_loader.args.seed", 3, "data_loader.args.seed: can't be set here; it comes from the top-level key seed"),
    ("data_loader.args.sampler", {"type": "ClassBalance"}, "did you mean 'ClassBalanced'?"),
    ("data_loader.args.sampler", {"type": "ClassAware", "args": {"num_samples": 4}}, "did you mean 'num_samples_cls'?"),
    ("data_loader.type", "ImbalanceCIFAR100Loader", "did you mean 'ImbalanceCIFAR100DataLoader'?"),
    ("data_loader.args.data_dir", ..., "data_loader.args.data_dir: missing"),
    ("data_loader.args.data_dir", 3, "data_loader.args.data_dir: must be text"),
    ("optimizer.type", "sgd", "did you mean 'SGD'?"), ("optimizer", ..., "optimizer: missing"),
    ("optimizer.args.lr", 0, "optimizer.args.lr: must be greater than 0"),
    ("optimizer.args.lr", -0.1, "greater than 0"), ("optimizer.args.lr", "0.1", "must be a number"),
    ("optimizer.args.lr", float("nan"), "optimizer.args.lr: must be a finite number"),
    ("optimizer.args.lr", float("inf"), "finite"), ("optimizer.args.lr", None, "must be a number"),
    ("optimizer.args.momentun", 0.9, "did you mean 'momentum'?"),
    ("optimizer.args.params", [], "optimizer.args.params"),
    ("optimizer", {"type": "LBFGS"}, "optimizer.type: LBFGS can't be used"),
    ("optimizer", {"type": "SAM", "args": {"base": {"type": "SGD", "args": {"lr": 0}}}},
     "optimizer.args.base.args.lr: must be greater than 0, not 0"),
    ("optimizer", {"type": "SAM", "args": {"base": {"type": "SDG"}}}, "optimizer.args.base.type: unknown optimizer"),
    ("optimizer", {"type": "Muon", "args": {"others": {"type": "AdamW", "args": {"momentum": 1}}}},
     "optimizer.args.others.args.momentum: unknown argument of AdamW"),
    ("lr_scheduler.type", "CustomLr", "did you mean 'CustomLR'?"),
    ("lr_scheduler.args.step3", 4, "unknown argument of CustomLR 'step3'"),
    ("lr_scheduler.args.step1", ..., "lr_scheduler.args.step1: missing; CustomLR needs it"),
    ("lr_scheduler.args.warmup_epoch", -1, "at least 0"),
    ("lr_scheduler", {"type": "LambdaLR"}, "lr_scheduler.type: LambdaLR needs lr_lambda"),
    ("lr_scheduler", {"type": "SequentialLR"}, "needs schedulers"),
    ("lr_scheduler", {"type": "StepLR", "args": {}}, "lr_scheduler.args.step_size: missing"),
    ("lr_scheduler", {"type": "CosineAnnealingLR", "args": {"T_max": 0}}, "at least 1"),
    ("lr_scheduler", {"type": "StepLR", "args": {"step_size": 3, "last_epoch": 4}}, "can't be set here"),
    ("lr_scheduler", {"args": {"step1": 3}}, "lr_scheduler.type: missing"),
    ("metrics", ["acuracy"], "metrics[0]: unknown metric 'acuracy'; did you mean 'accuracy'?"),
    ("metrics", "accuracy", "metrics: must be a list"), ("metrics", [3], "metrics[0]: must be text"),
    ("metrics", ["accuracy", "accuracy"], "metrics[1]: accuracy is there twice"),
    ("trainer", ..., "trainer.epochs: missing"), ("trainer", [], "trainer: must be an object"),
    ("trainer.epochs", 0, "trainer.epochs: must be at least 1"), ("trainer.epochs", -3, "at least 1"),
    ("trainer.epochs", "ten", "must be a whole number"), ("trainer.epochs", 2.5, "must be a whole number"),
    ("trainer.epochs", 10**30, "trainer.epochs"), ("trainer.save_period", 0, "at least 1"),
    ("trainer.type", "Trainr", "did you mean 'Trainer'?"),
    ("trainer.type", "DetectionTrainer", "trainer.type: a DetectionTrainer can't train ResNet32Model; leave"),
    ("trainer.type", "ExpertAssignmentTrainer", "or give Trainer"),
    ("arch.args.norm", {"type": "NBN", "args": {"eps": 0}}, "arch.args.norm.args.eps: must be greater than 0, not 0"),
    ("arch.args.norm", {"type": "BatchNorm2d", "args": {"momentum": 5}}, "norm.args.momentum: must be at most 1"),
    ("data_loader", {"type": "DigitScenesDataLoader", "args": {"data_dir": "x", "batch_size": 2}},
     "data_loader.type: DigitScenesDataLoader gives boxes and masks, and ResNet32Model learns classes; choose"),
    ("trainer.iterations", 500, "trainer.iterations: only detection is counted in steps; use trainer.epochs"),
    ("lr_scheduler", {"type": "IterationLR", "args": {"milestones": [3]}},
     "lr_scheduler.type: IterationLR is for detection"),
    ("trainer.monitor", "max acc val", "trainer.monitor: unknown figure"),
    ("trainer.monitor", "val_accuracy", "trainer.monitor: must be \"off\""),
    ("trainer.monitor", "max val_acuracy", "did you mean 'val_accuracy'?"),
    ("trainer.amp", True, "trainer.amp: must be one of"), ("trainer.amp", "fp8", "trainer.amp: must be one of"),
    ("trainer.tensorboard", "no", "trainer.tensorboard: must be true or false"),
    ("trainer.clip_grad_norm", 0, "greater than 0"), ("trainer.verbosity", 3, "at most 2"),
    ("n_gpu", -1, "n_gpu: must be at least 0"), ("n_gpu", "8", "n_gpu: must be a whole number"),
    ("seed", 2**32, "seed: must be at most"), ("name", "", "name:"), ("name", "a/b", "name:"), ("name", "..", "name:"),
    ("name", "a\0b", "name:"), ("name", "\ud800", "name:"), ("name", 3, "name: must be text"),
    ("groups", {"many": 10}, "groups.few: must be at most groups.many"), ("groups.medium", 3, "groups.medium: unknown"),
    ("distill", True, "distill_arch: missing"), ("distill", "yes", "distill: must be true or false"),
    ("distill_arch", {"type": "ResNet32Model", "args": {"ad_bt": 1}}, "did you mean 'add_bt'?"),
    ("add_extra_info", 2, "add_extra_info: must be true or false"),
]


@pytest.mark.parametrize("path, value, said", WRONG, ids=[f"{i}-{w[0]}" for i, w in enumerate(WRONG)])
def test_wrong_values_are_named(path, value, said):
    with pytest.raises(ConfigError) as caught:
        check_config(changed(path, value))
    message = str(caught.value)
    assert said in message and "\n" not in message
    assert message.startswith(path.split(".")[0])


BAD_FILES = {
    "empty": (b"", "not JSON at line 1, column 1"),
    "comma": (b'{"a": 1,\n "b": 2,}', "not JSON at line 2, column"),
    "list": (b"[1, 2]", "must hold one JSON object"),
    "text": (b'"x"', "must hold one JSON object"),
    "latin": (b'{"name": "\xe9"}', "isn't UTF-8 text (byte 10)"),
    "utf16": ('{"name": "x"}'.encode("utf-16"), "UTF-16"),
    "twice": (b'{"arch": {"type": "a", "type": "b"}}', 'the key "type" is there twice'),
    "nan": (b'{"optimizer": {"args": {"lr": NaN}}}', "optimizer.args.lr: must be a finite number, not nan"),
    "infinity": (b'{"a": [{"b": 1}, {"b": -Infinity}]}', "a[1].b: must be a finite number, not -inf"),
    "overflow": (b'{"optimizer": {"args": {"lr": 1e999}}}', "optimizer.args.lr: must be a finite number"),
    "long_number": (b'{"seed": ' + b"9" * 5000 + b"}", "bad"),
    "deep": (b'{"a": ' + b"[" * 100000 + b"]" * 100000 + b"}", "nested deeper"),
    "less_deep": (b'{"a": ' + b"[" * 50 + b"]" * 50 + b"}", "nested deeper"),
    "huge": (b'{"a": "' + b"x" * (MAX_BYTES + 10) + b'"}', "larger than 4 MB"),
    "binary": (bytes(range(256)), "isn't UTF-8"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(name, tmp_path):
    data, said = BAD_FILES[name]
    file = tmp_path / "bad.json"
    file.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    if said == "bad":
        said = str(file)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_folder_and_odd_names(tmp_path):
    (tmp_path / "digits.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"digit\.json: no such file; did you mean .*digits\.json"):
        load_config(tmp_path / "digit.json")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    for odd in ("a\0b", "x" * 5000, "", "\ud800"):
        with pytest.raises(ConfigError):
            load_config(odd)


def test_byte_order_mark_is_no_mistake(tmp_path):
    file = tmp_path / "bom.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(OLD["cifar_ride"]).encode())
    assert load_config(file) == check_config(OLD["cifar_ride"])


def over(*items, base="cifar_ride"):
    return check_config(OLD[base], items)


def test_overrides_set_values_in_order():
    config = over(("trainer.epochs", 3), Override("trainer.epochs", 5, "--epochs", "5"), ("arch.args.add_bt", 1),
                  ("arch.args.norm.type", "NBN"), ("lr_scheduler.args.gamma", 1), ("groups.many", 50))
    assert config["trainer"]["epochs"] == 5 and config["arch"]["args"]["add_bt"] == 1
    assert config["arch"]["args"]["norm"] == {"type": "NBN", "args": {}} and config["groups"]["many"] == 50
    # A name in short form is opened up.
    named = check_config(changed("arch.args.norm", "BatchNorm2d"), [("arch.args.norm.type", "MABN"),
                                                                    ("arch.args.norm.args.B", 4)])
    assert named["arch"]["args"]["norm"] == {"type": "MABN", "args": {"B": 4}}


def test_text_typed_for_a_name_stays_text():
    assert over(Override("name", 5, "--name", "5"))["name"] == "5"
    assert over(Override("data_loader.args.data_dir", 1e5, "--data_dir", "1e5"))["data_loader"]["args"][
        "data_dir"] == "1e5"


@pytest.mark.parametrize("items, said", [
    ([("optimizer.args.lr", 0, "--lr")], "optimizer.args.lr: must be greater than 0, not 0 (from --lr)"),
    ([("trainer.epoch", 1, "--set")], "did you mean 'epochs'?"),
    ([("optimizer.args.lr.x", 1, "--set")], "optimizer.args.lr: is 0.1, not an object"),
    ([("metrics.0", 1, "--set")], "metrics: is [\"accuracy\"], not an object"),
    ([("distill_arch.args.add_bt", 1, "--add_bt_teacher")],
     "distill_arch.args.add_bt: the config has no distill_arch.type, so there is nothing to change "
     "(from --add_bt_teacher)"),
    ([("lr_scheduler", {}, "--set"), ("lr_scheduler.args.step1", 1, "--step1")],
     "lr_scheduler.args.step1: the config has no lr_scheduler.type"),
    ([("lr_scheduler", {"type": "StepLR", "args": {"step_size": 3}}, "--set"),
      ("lr_scheduler.args.step1", 1, "--step1")], "unknown argument of StepLR 'step1'; did you mean 'step_size'? "),
    ([("a..b", 1, "--set")], "--set a..b: write keys with dots"), ([("", 1, "--set")], "write keys with dots"),
    ([(".".join("a" * 100), 1, "--set")], "write keys with dots"),
    ([("seed", float("nan"), "--seed")], "seed: must be a finite number, not nan (from --seed)"),
])
def test_wrong_overrides_name_the_flag(items, said):
    with pytest.raises(ConfigError) as caught:
        over(*items)
    assert said in str(caught.value)


def test_schema_is_sound():
    for row in (*TOP, *GROUPS, *TRAINER):
        kind = parse(row.type)
        assert kind.jsonable and row.doc, row.name
        if row.default is not REQUIRED and row.default is not None:
            from utils.config.annotation import convert
            assert convert(row.default, kind) == row.default, row.name
    assert len({row.name for row in TRAINER}) == len(TRAINER)
    from tools.keys import reference
    assert "| `trainer.epochs` | (must be given) |" in reference()


CONTRACT = {
    "arch": [f"{net}{kind}" for net in ("ResNet10", "ResNet32", "ResNet50", "ResNet101", "ResNet152", "ResNeXt50",
                                        "ResNeXt101", "ResNeXt152") for kind in ("Model", "EAModel")],
    "loss": ["CrossEntropyLoss", "FocalLoss", "LDAMLoss", "RIDELoss", "RIDELossWithDistill", "BalancedSoftmaxLoss",
             "RIDEBalancedSoftmaxLoss", "HCMLoss", "LogitAdjustmentLoss", "LabelSmoothingLoss"],
    "data_loader": ["DigitsLTDataLoader", "CIFAR100DataLoader", "ImbalanceCIFAR100DataLoader",
                    "ImbalanceCIFAR10DataLoader", "ImageNetLTDataLoader", "iNaturalistDataLoader", "PlacesLTDataLoader",
                    "ImageFolderLTDataLoader", "ListFileDataLoader"],
}


@pytest.mark.parametrize("section", CONTRACT)
def test_every_public_type_is_known_and_takes_its_arguments(section):
    known_types = _table(SECTIONS[section])
    assert known_types.keys() >= set(CONTRACT[section])
    for name in known_types:
        found = of_callable(constructor(SECTIONS[section], name, section))
        assert not found.open, name
        for key, item in found.parameters.items():
            known = item.type.jsonable or key in SECTIONS[section].reserved
            assert known, f"{name}.{key} can't be given in a config; annotate it"
    if section == "arch":
        for name in CONTRACT[section]:
            takes = of_callable(constructor(SECTIONS[section], name, section)).parameters
            assert {"num_classes", "num_experts", "reduce_dimension", "layer2_output_dim", "layer3_output_dim",
                    "layer4_output_dim", "use_norm", "s", "share_layer3", "use_experts", "dropout", "returns_feat",
                    "add_bt", "eval_bt", "top_choices_num", "pos_weight", "share_expert_help_pred_fc", "force_all",
                    "norm", "classifier", "shared_classifier"} <= set(takes), name


# ---------------------------------------------------------------------- anything at all

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
    ["SGD", "NBN", "off", "max val_loss", 1e308, -1, 0, 10**20, "\0", "\ud800", "x" * 300])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=6) | st.sampled_from(["type", "args", "lr", "norm"]), inner, max_size=3), max_leaves=8)


def paths_of(value, before=()):
    yield before
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths_of(item, (*before, key))


ALL_PATHS = {name: list(paths_of(config)) for name, config in OLD.items()}


@st.composite
def mutated(draw):
    """An old config with a few keys dropped, renamed or given any value."""
    name = draw(st.sampled_from(sorted(OLD)))
    config = copy.deepcopy(OLD[name])
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(ALL_PATHS[name]))
        if not path:
            continue
        place = config
        for key in path[:-1]:
            place = place.get(key) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            continue
        action = draw(st.sampled_from(["drop", "rename", "replace", "add"]))
        if action == "drop":
            place.pop(path[-1], None)
        elif action == "rename" and path[-1] in place:
            place[path[-1][::-1]] = place.pop(path[-1])
        else:
            place[path[-1] if action == "replace" else draw(st.text(max_size=6))] = draw(values)
    return config


@settings(max_examples=300)
@given(mutated())
def test_any_config_is_refused_in_one_line_or_comes_out_stable(config):
    try:
        effective = check_config(config)
    except ConfigError as error:
        assert "\n" not in str(error) and str(error)
        return
    assert check_config(json.loads(json.dumps(effective, allow_nan=False))) == effective


@settings(max_examples=100)
@given(values, st.text(max_size=12) | st.sampled_from(["arch.args.norm", "trainer.monitor", "loss.args", "metrics",
                                                       "lr_scheduler.args.milestones", "arch.type", "arch.args.x.y"]))
def test_any_override_is_refused_or_taken(value, path):
    for raw in (OLD["cifar_ride"], {}, {"arch": value}):
        try:
            check_config(raw, [Override(path, value, "--set", str(value))])
        except ConfigError as error:
            assert "\n" not in str(error)


@settings(max_examples=100)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_refused_in_one_line(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "fuzz.json"
    file.write_bytes(data)
    with pytest.raises(ConfigError):
        load_config(file)


# ---------------------------------------------------------------------- at once

@pytest.mark.parametrize("path, value", [
    ("trainer.epoch", 3), ("trainer.epochs", 0), ("optimizer.args.lr", -1), ("lerning", 1), ("arch.arg", {}),
    ("arch.args.num_experts", 0), ("arch.args.norm", {"args": {}})])
def test_nothing_heavy_is_imported_for_a_slip_in_the_form(path, value, monkeypatch):
    """Only what is known by its class waits for imports."""
    def imported(name):
        raise AssertionError(name)
    monkeypatch.setattr("importlib.import_module", imported)
    with pytest.raises(ConfigError, match=path.split(".")[0]):
        check_config(changed(path, value))


def test_checking_classes_imports_no_more_than_they_need(run_cli):
    """torchvision, for detectors and large images alone, takes as long as torch."""
    code = ("import sys; from utils.config.load import load_config; load_config('configs/digits_lt_ride.json');"
            "assert 'torch' in sys.modules; heavy = {'torchvision', 'pandas', 'matplotlib', 'sklearn', 'torch._dynamo'}"
            " & set(sys.modules); assert not heavy, heavy;"
            "from data_loader.data_loaders import DigitsLTDataLoader; DigitsLTDataLoader();"
            "assert 'sklearn' not in sys.modules")
    run_cli(["-c", code], check=True)


def test_a_mistake_answers_in_under_a_second(run_cli):
    """In CPU seconds: what else runs on the machine doesn't count."""
    def spent():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    best = 60.0
    for _ in range(3):
        began = spent()
        done = run_cli(["train.py", "-c", "configs/digits_lt_ride.json", "--num_experts", "0"])
        best = min(best, spent() - began)
        assert done.returncode == 2
        assert done.stderr == "arch.args.num_experts: must be at least 1, not 0 (from --num_experts)\n"
    assert best < 1.0


def test_home_folders_are_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config = load_config("configs/image_folder_ride.json", [("trainer.save_dir", "~/runs"),
                                                            ("data_loader.args.data_dir", "~/photos")])
    assert config["trainer"]["save_dir"] == str(tmp_path / "runs")
    assert config["data_loader"]["args"]["data_dir"] == str(tmp_path / "photos")
