"""`python -m tools.convert_checkpoint IN OUT`: another project's file becomes one of ours."""
from __future__ import annotations

import json
import os
import sys
import types

import pytest
import torch

from model.model import build_model
from model.weights.remap import load_weights
from tools.convert_checkpoint import convert, main
from utils.errors import ConfigError

ARCH = {"type": "ResNet32Model", "args": {"num_classes": 10, "num_experts": 2, "reduce_dimension": True,
                                          "use_norm": True, "s": 20, "returns_feat": True}}


def ride_file(path, monkeypatch, **more):
    """A file as RIDE's trainer writes it under DataParallel, its ConfigParser pickled in."""
    module = types.ModuleType("parse_config")
    module.ConfigParser = type("ConfigParser", (), {"__module__": "parse_config"})
    monkeypatch.setitem(sys.modules, "parse_config", module)
    config = module.ConfigParser()
    config._config = {"name": "x", "arch": ARCH, "optimizer": {"type": "SGD", "args": {"lr": 0.1}}}
    model = build_model(ARCH)
    torch.save({"arch": "DataParallel", "epoch": 7, "config": config, "monitor_best": 0.3,
                "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()},
                "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
                **more}, path)
    monkeypatch.delitem(sys.modules, "parse_config")
    return model


def test_ride(tmp_path, monkeypatch, capsys):
    model = ride_file(tmp_path / "in.pth", monkeypatch)
    main([str(tmp_path / "in.pth"), str(tmp_path / "new" / "out.pth")])
    out = capsys.readouterr().out
    assert "RIDE" in out and "ResNet32Model" in out and f"test.py -r {tmp_path}" in out
    written = torch.load(tmp_path / "new" / "out.pth", weights_only=True)
    assert {"arch", "epoch", "state_dict", "optimizer", "config"} <= set(written)
    assert (written["arch"], written["epoch"]) == ("ResNet32Model", 7)
    assert list(written["state_dict"]) == list(model.state_dict())
    assert torch.equal(written["optimizer"]["state"][0]["momentum_buffer"], torch.ones(2))
    config = written["config"]
    assert config["name"] == "x" and config["arch"]["args"]["s"] == 20
    again = build_model(config["arch"])
    assert load_weights(again, tmp_path / "new" / "out.pth").origin == "ours"
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(again.eval()(image)["output"], model.eval()(image)["output"])


@pytest.mark.parametrize("kind, args", [
    ("ResNet32Model", {"num_experts": 2, "norm": {"type": "NBN", "args": {"where": "all"}}}),
    ("ResNet32EAModel", {"num_experts": 2, "route_threshold": 0.0}), ("ResNet32Model", {"norm": "GroupNorm"}),
    ("ResNet32Model", {"add_bt": 1, "bt_weight": 0.3})])
def test_what_the_weights_dont_tell(kind, args, tmp_path):
    """A file of ours computes the same afterwards and knows its classes."""
    arch = {"type": kind, "args": {"num_classes": 3, **args}}
    model = build_model(arch).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.dim() == 1 and value.is_floating_point():
                value.add_(torch.rand(value.shape))
    facts = {"num_classes": 3, "class_names": ["ant", "bee", "crab"], "cls_num_list": [5, 4, 3]}
    torch.save({"arch": kind, "epoch": 3, "state_dict": model.state_dict(), "config": {"name": "x", "arch": arch},
                "data": facts}, tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert written["config"]["arch"] == arch and written["data"] == facts
    again = build_model(written["config"]["arch"]).eval()
    load_weights(again, written, exact=True)
    images = torch.rand(8, 3, 32, 32)
    assert torch.equal(again(images)["output"], model(images)["output"])


def test_an_arch_that_doesnt_take_the_weights_is_read_off_them(tmp_path):
    for wrong in ({"num_experts": 3, "s": 20}, {"nonesuch": 1, "s": 20}):
        file = {"state_dict": build_model(ARCH).state_dict(), "config": {"arch": {
            "type": "ResNet32Model", "args": {**ARCH["args"], **wrong}}}}
        torch.save(file, tmp_path / "in.pth")
        args = convert(tmp_path / "in.pth", tmp_path / "out.pth")["config"]["arch"]["args"]
        assert (args["num_experts"], args["s"]) == (2, 20) and "nonesuch" not in args


def test_an_arch_outside_the_repo_isnt_imported(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"state_dict": build_model(ARCH).state_dict(), "config": {"arch": {"type": "theirs:Model"}}},
               tmp_path / "in.pth")
    assert convert(tmp_path / "in.pth", tmp_path / "out.pth")["arch"] == "ResNet32Model"
    assert not (tmp_path / "ran").exists()


def test_config_beside(tmp_path):
    model = build_model(ARCH)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "in.pth")
    (tmp_path / "config.json").write_text(json.dumps({"name": "beside", "arch": ARCH}))
    assert convert(tmp_path / "in.pth", tmp_path / "out.pth")["config"]["name"] == "beside"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: isn't readable JSON"):
        convert(tmp_path / "in.pth", tmp_path / "out.pth")


def test_nothing_is_overwritten_by_mistake(tmp_path):
    torch.save({"state_dict": build_model(ARCH).state_dict()}, tmp_path / "in.pth")
    before = (tmp_path / "in.pth").read_bytes()
    with pytest.raises(ConfigError, match="is the file to convert"):
        convert(tmp_path / "in.pth", tmp_path / "in.pth")
    with pytest.raises(ConfigError, match="is a folder"):
        convert(tmp_path / "in.pth", tmp_path)
    assert (tmp_path / "in.pth").read_bytes() == before


def test_other_weights_are_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "in.pth")
    with pytest.raises(ConfigError, match=r"in\.pth: its weights aren't of a ResNet"):
        convert(tmp_path / "in.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_command_line(tmp_path, run_cli):
    """One line on stderr, exit status 2, nothing written and nothing run."""
    torch.save({"state_dict": {"a": torch.ones(1)}, "config": Attack(f"touch {tmp_path / 'ran'}")}, tmp_path / "in.pth")
    done = run_cli(["-m", "tools.convert_checkpoint", tmp_path / "in.pth", tmp_path / "out.pth"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "in.pth" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.pth"]
