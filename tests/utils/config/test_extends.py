"""`"extends"`: one config file laid over another."""

import json

import pytest

from utils.config.load import check_config, load_config
from utils.config.read import read_config
from utils.errors import ConfigError

BASE = {"name": "base", "arch": {"type": "ResNet32Model", "args": {"num_experts": 3, "use_norm": True}},
        "data_loader": {"type": "DigitsLTDataLoader", "args": {"batch_size": 64}},
        "optimizer": {"type": "SGD", "args": {"lr": 0.1, "nesterov": True, "momentum": 0.9}},
        "loss": {"type": "RIDELoss", "args": {"reweight_epoch": 160}}, "metrics": ["accuracy", "top_k_acc"],
        "trainer": {"epochs": 5}}


def write(folder, **files):
    for name, value in files.items():
        file = folder / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    return folder


def test_objects_are_merged_and_lists_and_values_replaced(tmp_path):
    write(tmp_path, base=BASE)
    write(tmp_path / "own", middle={"extends": "../base.json", "optimizer": {"args": {"lr": 0.2}}, "seed": 1},
          top={"extends": "middle.json", "name": "top", "metrics": ["accuracy"], "trainer": {"save_period": 2},
               "seed": 3})
    config = load_config(tmp_path / "own" / "top.json")
    assert config["optimizer"]["args"] == {"lr": 0.2, "nesterov": True, "momentum": 0.9}
    assert config["metrics"] == ["accuracy"] and config["seed"] == 3 and config["name"] == "top"
    assert config["trainer"]["epochs"] == 5 and config["trainer"]["save_period"] == 2
    assert "extends" not in config
    assert check_config(config) == config  # what is saved stands alone


def test_another_type_keeps_the_arguments_unless_they_are_emptied(tmp_path):
    """Merging is by key, whatever the keys are: `"args": null` begins anew."""
    write(tmp_path, base=BASE, kept={"extends": "base.json", "loss": {"type": "LDAMLoss"}},
          wrong={"extends": "base.json", "loss": {"type": "CrossEntropyLoss"}},
          anew={"extends": "base.json", "loss": {"type": "CrossEntropyLoss", "args": None}})
    assert load_config(tmp_path / "kept.json")["loss"] == {"type": "LDAMLoss", "args": {"reweight_epoch": 160}}
    assert load_config(tmp_path / "anew.json")["loss"] == {"type": "CrossEntropyLoss", "args": {}}
    said = r'loss\.args\.reweight_epoch: .*\(from .*base\.json; "_delete_": true in args drops those\)$'
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "wrong.json")


def test_an_object_may_replace_the_inherited_one(tmp_path):
    write(tmp_path, base=BASE,
          anew={"extends": "base.json", "loss": {"type": "LDAMLoss", "args": {"_delete_": True, "max_m": 0.3}},
                "arch": {"_delete_": True, "type": "ResNet32Model"}},
          above={"extends": "anew.json", "loss": {"args": {"s": 20}}},
          wrong={"extends": "base.json", "loss": {"args": {"_delete_": 1}}},
          alone={"extends": "base.json", "lr_scheduler": {"_delete_": True, "type": "CosLR"}})
    config = load_config(tmp_path / "above.json")
    assert config["loss"] == {"type": "LDAMLoss", "args": {"max_m": 0.3, "s": 20.0}}
    assert config["arch"] == {"type": "ResNet32Model", "args": {}}
    assert load_config(tmp_path / "alone.json")["lr_scheduler"]["type"] == "CosLR"     # nothing there to replace
    with pytest.raises(ConfigError, match=r"loss\.args\._delete_: unknown argument"):
        load_config(tmp_path / "wrong.json")


def test_a_mistake_is_blamed_on_its_file_or_flag(tmp_path):
    write(tmp_path, base={**BASE, "seed": -1}, top={"extends": "base.json", "name": "top"})
    with pytest.raises(ConfigError, match=r"^seed: must be at least 0, not -1 \(from .*base\.json\)$"):
        load_config(tmp_path / "top.json")
    with pytest.raises(ConfigError, match=r"^seed: must be at least 0, not -2 \(from --seed\)$"):
        load_config(tmp_path / "top.json", [("seed", -2, "--seed")])
    assert load_config(tmp_path / "top.json", [("seed", 4)])["seed"] == 4


@pytest.mark.parametrize("files, said", [
    ({"top": {"extends": "top.json"}}, "extends itself, through 1 files"),
    ({"top": {"extends": "a.json"}, "a": {"extends": "b.json"}, "b": {"extends": "a.json"}}, "extends itself"),
    ({"top": {"extends": "bas.json"}, "base": {}}, "bas.json: no such file; did you mean"),
    ({"top": {"extends": 3}}, "extends: must be the path of a JSON file, not 3"),
    ({"top": {"extends": ["a.json"]}}, "extends: must be the path of a JSON file"),
    ({"top": {"extends": "base.json"}, "base": [1]}, "base.json: must hold one JSON object"),
    ({f"n{i}" if i else "top": {"extends": f"n{i + 1}.json"} for i in range(60)}, "extends itself"),
])
def test_what_cannot_be_extended_is_refused_in_one_line(tmp_path, files, said):
    write(tmp_path, **files)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "top.json")
    assert said in str(caught.value) and "top.json" in str(caught.value)


def test_only_files_extend():
    with pytest.raises(ConfigError, match=r"^extends: only a config file"):
        check_config({**BASE, "extends": "base.json"})
