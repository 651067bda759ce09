"""`"type": "package.module:Class"`: a user's own class in any section, and who may ask for it to be run."""

import json
import sys

import pytest
import torch

import train
from tools.classify import facts_of
from tools.opened import open_run
from tools.parts import make_criterion, make_loader, make_model
from tools.session import config_of, find_start
from trainer import trainer_class
from trainer.schedules import build_optimizer, build_scheduler
from utils.config.build import lookup
from utils.config.load import Override, check_config, load_config
from utils.config.outside import outside_flags, outside_names
from utils.errors import ConfigError

MODULE = """
import numpy as np
import torch
from base.base_data_loader import BaseDataLoader
from torch import nn
from data_loader.data_loaders import DigitsLTDataLoader
from data_loader.samplers import ClassBalancedSampler
from model.loss import LDAMLoss
from model.model import ResNet32Model
from trainer.trainer import Trainer

class Net(ResNet32Model):
    def __init__(self, extra: float = 1.0, **more):
        super().__init__(**more)
        self.extra = extra

class Digits(DigitsLTDataLoader):
    pass

class Loss(LDAMLoss):
    def __init__(self, epochs: int, cls_num_list: list | None = None, power: float = 2.0, s: float = 20.0):
        super().__init__(cls_num_list, s=s)
        self.power, self.epochs = power, epochs

class Plain(nn.Module):
    def forward(self, outputs, target):
        return nn.functional.cross_entropy(outputs["output"], target)

class Momentum(torch.optim.SGD):
    def __init__(self, weights, lr: float, momentum: float = 0.5):
        super().__init__(weights, lr=lr, momentum=momentum)

class Halving(torch.optim.lr_scheduler.StepLR):
    def __init__(self, optimizer, every: int = 1):
        super().__init__(optimizer, every, 0.5)

class Norm(nn.BatchNorm2d):
    def __init__(self, width, eps: float = 1e-3, momentum: float = 0.2, affine: bool = True):
        super().__init__(width, eps, momentum, affine)

class Draws(ClassBalancedSampler):
    pass

class Bare(BaseDataLoader):
    def __init__(self, batch_size: int = 8, training: bool = True, seed: int = 0, device="cpu", rank: int = 0,
                 world_size: int = 1):
        targets = np.repeat(np.arange(3), (30, 10, 4) if training else (5, 5, 5))
        super().__init__(targets, batch_size, shuffle=True, training=training, seed=seed, device=device, rank=rank,
                         world_size=world_size)
        self.num_classes, self.cls_num_list = 3, [30, 10, 4]

    def _batches(self, epoch, batches):
        order = self.epoch_order(epoch)
        for batch in batches:
            labels = torch.from_numpy(self.targets[order[self.positions(batch)]])
            yield labels[:, None, None, None].expand(-1, 3, 8, 8) - 1.0, labels

class Barer(Bare):
    def __init__(self, batch_size: int = 8, training: bool = True):
        super().__init__(batch_size, training)
        del self.cls_num_list

class Teacher(Trainer):
    pass

def halves(output, target):
    return 0.5

def not_a_metric(images):
    return 0

number = 3
"""
#: dotted key -> the name that goes there
PLACES = {"arch.type": "Net", "data_loader.type": "Digits", "loss.type": "Loss", "optimizer.type": "Momentum",
          "lr_scheduler.type": "Halving", "arch.args.norm": "Norm", "trainer.type": "Teacher"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working folder with a module of one's own; its name is another in each test. -> "package.module"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    package = f"mine_{abs(hash(str(tmp_path)))}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "parts.py").write_text(MODULE)
    return f"{package}.parts"


def config(own="", **changes):
    raw = {"arch": {"type": "ResNet32Model", "args": {"num_classes": 10}}, "loss": {"type": "CrossEntropyLoss"},
           "data_loader": {"type": "DigitsLTDataLoader", "args": {"batch_size": 8}},
           "optimizer": {"type": "SGD", "args": {"lr": 0.1}}, "metrics": ["accuracy"], "lr_scheduler": {},
           "trainer": {"epochs": 2}}
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = raw
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    return raw


def with_all(own):
    raw = config(arch__args__extra=3, loss__args={"power": 1}, optimizer__args={"lr": 1, "momentum": 0.25},
                 lr_scheduler={"args": {"every": 2}}, metrics=["accuracy", f"{own}:halves"],
                 data_loader__args__sampler={"type": f"{own}:Draws", "args": {"retain_epoch_size": False}},
                 trainer__monitor="max val_halves")
    for path, name in PLACES.items():
        *parents, last = path.split(".")
        place = raw
        for key in parents:
            place = place[key]
        place[last] = f"{own}:{name}"
    return raw


def test_every_section_takes_a_class_from_outside(own):
    checked = check_config(with_all(own))
    module = sys.modules[own]
    loader = make_loader(checked)
    model = make_model(checked)
    assert isinstance(loader, module.Digits) and isinstance(loader.index_sampler, module.Draws)
    assert isinstance(model, module.Net) and model.extra == 3.0
    assert any(isinstance(layer, module.Norm) for layer in model.modules())
    loss = make_criterion(checked, loader.cls_num_list)
    assert isinstance(loss, module.Loss) and loss.power == 1.0 and loss.epochs == 2
    optimizer = build_optimizer(checked["optimizer"], model, checked["trainer"])
    assert isinstance(optimizer, module.Momentum) and optimizer.defaults["momentum"] == 0.25
    assert isinstance(build_scheduler(checked["lr_scheduler"], optimizer, 2), module.Halving)
    assert trainer_class(checked["trainer"]["type"]) is module.Teacher
    assert lookup({}, checked["metrics"][1], "metrics") is module.halves
    assert model(torch.zeros(2, 3, 32, 32))["output"].shape == (2, 10)


@pytest.mark.parametrize("changes, said", [
    ({"loss__type": "OWN:Los"}, r"^loss\.type: unknown class of \S+ 'Los'; did you mean 'Loss'"),
    ({"loss__type": "OWN:number"}, r"^loss\.type: unknown class of"),
    ({"loss__type": "OWN:Loss", "loss__args": {"powr": 1}}, r"^loss\.args\.powr: .* Loss 'powr'; did you mean 'power'"),
    ({"loss__type": "OWN:Loss", "loss__args": {"power": "x"}}, r"^loss\.args\.power: must be a number"),
    ({"loss__type": "OWN:Momentum"}, r"^loss\.type: \S+ isn't a loss: it doesn't derive from torch\.nn\.Module"),
    ({"trainer__type": "OWN:Loss"}, r"^trainer\.type: \S+ isn't a trainer: it doesn't derive from base\.base_trainer"),
    ({"loss__type": "OWNER:Loss"}, r"^loss\.type: there is no module \S+, neither in "),
    ({"loss__type": "no_such_package:Loss"}, r"^loss\.type: there is no module no_such_package"),
    ({"loss__type": "OWN:"}, r"should read package\.module:Class"),
    ({"loss__type": "a b:C"}, r"should read package\.module:Class"),
    ({"metrics": ["OWN:not_a_metric"]}, r"^metrics\[0\]: \S+ isn't a metric"),
    ({"metrics": ["accuracy", "OWN:halves", "OWN:halves"]}, r"^metrics\[2\]: halves is there twice"),
])
def test_mistakes_are_named_in_one_line(own, changes, said):
    text = json.dumps(config(**changes)).replace("OWN:", f"{own}:").replace("OWNER:", f"{own}ner:")
    with pytest.raises(ConfigError, match=said) as caught:
        check_config(json.loads(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, said", [
    ("class Loss(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError"), ("import no_such_thing", "needs no_such_thing")])
def test_a_module_that_fails_says_why(own, tmp_path, text, said):
    (tmp_path / own.replace(".", "/")).with_name("broken.py").write_text(text)
    with pytest.raises(ConfigError, match=rf"^loss\.type: .*broken.*{said}"):
        check_config(config(loss__type=f"{own.partition('.')[0]}.broken:Loss"))


def test_a_run_with_them(own, tmp_path, capsys):
    """The loss is a plain module here: no counts, no epochs."""
    raw = {**with_all(own), "loss": {"type": f"{own}:Plain"}}
    (tmp_path / "own.json").write_text(json.dumps(raw))
    assert train.main(["-c", "own.json", "--dry_run", "-d", "cpu"]) == 0
    assert "everything builds and runs" in capsys.readouterr().out


def test_a_loader_needs_only_batches_classes_and_counts(own, tmp_path, capsys):
    raw = config(data_loader={"type": f"{own}:Bare", "args": {}}, trainer__save_dir="saved", trainer__epochs=1,
                 trainer__monitor="off", arch__args={})
    (tmp_path / "own.json").write_text(json.dumps(raw))
    assert train.main(["-c", "own.json", "-d", "cpu", "--run_id", "a"]) == 0
    assert "test, epoch 1" in capsys.readouterr().out
    file, same = next(tmp_path.rglob("checkpoint-epoch1.pth")), [Override("data_loader.type", f"{own}:Bare")]
    run = open_run(file, overrides=same)
    assert run.facts["cls_num_list"] == [30, 10, 4] and run.facts["class_names"] is None
    with pytest.raises(ConfigError, match="no `train_eval_loader`"):
        run.loader("train_eval")
    with pytest.raises(ConfigError, match=r"data_loader\.args\.validation: this run has no validation split"):
        run.loader("val")
    with pytest.raises(ConfigError, match="doesn't say how photos are prepared"):
        facts_of(run)


def test_a_loader_without_counts_is_told(own):
    with pytest.raises(ConfigError, match=r"data_loader\.type: .*:Barer must set cls_num_list"):
        make_loader(check_config(config(data_loader={"type": f"{own}:Barer", "args": {}})))


# ---------------------------------------------------------------------- a config that comes with a checkpoint

@pytest.fixture
def checkpoint(own, tmp_path):
    """A checkpoint whose config names a class in each section, and the file."""
    checked = check_config(with_all(own))
    model = make_model(checked)
    file = tmp_path / "model.pth"
    data = {"arch": "Net", "epoch": 1, "config": checked, "optimizer": None, "state_dict": model.state_dict()}
    torch.save(data, file)
    del model, sys.modules[own]
    return data, file


def named(own):
    """The overrides that name everything again."""
    return [Override(path, f"{own}:{name}") for path, name in PLACES.items()] + [
        Override("data_loader.args.sampler.type", f"{own}:Draws"), Override("metrics", ["accuracy", f"{own}:halves"])]


def test_a_checkpoint_cannot_choose_what_is_imported(own, checkpoint):
    data, file = checkpoint
    everything = named(own)
    with pytest.raises(ConfigError, match=r"^arch\.type: \S+:Net is code from outside.* --set arch\.type="):
        open_run(file)
    assert own not in sys.modules
    for left_out in everything:
        with pytest.raises(ConfigError, match=rf"^{left_out.path.split('.')[0]}.* is code from outside"):
            config_of(data, file, [item for item in everything if item is not left_out])
    assert own not in sys.modules
    assert type(open_run(file, overrides=everything).model).__name__ == "Net"


@pytest.mark.parametrize("as_text", [True, False])
def test_a_start_isnt_chosen_by_a_checkpoint_either(own, as_text):
    name = f"{own}:halves"
    raw = config(init_classifier=name if as_text else {"type": name})
    with pytest.raises(ConfigError, match=rf"^init_classifier\S*: {name} is code from outside"):
        config_of({"config": raw}, "model.pth")
    assert own not in sys.modules


def test_config_beside_a_checkpoint_is_no_better(own, checkpoint, tmp_path):
    data, file = checkpoint
    (tmp_path / "config.json").write_text(json.dumps(data["config"]))
    with pytest.raises(ConfigError, match="is code from outside"):
        config_of({"state_dict": {}}, file)
    assert own not in sys.modules


def test_a_config_given_by_hand_may_name_it(own, checkpoint, tmp_path):
    data, file = checkpoint
    (tmp_path / "own.json").write_text(json.dumps(data["config"]))
    assert load_config(tmp_path / "own.json")["loss"]["type"] == f"{own}:Loss"
    assert type(open_run(file, tmp_path / "own.json").model).__name__ == "Net"


def test_flags_name_what_a_config_uses(own):
    checked = check_config(with_all(own))
    flags = outside_flags(checked)
    assert f" --set loss.type={own}:Loss" in flags and f" --set arch.args.norm={own}:Norm" in flags
    assert "--set 'metrics=[" in flags and flags.count(" --set ") == len(list(outside_names(checked)))
    assert outside_flags(check_config(config())) == ""


def test_resuming_says_what_to_add_and_then_goes_on(own, checkpoint):
    from argparse import Namespace
    data, file = checkpoint
    args = Namespace(resume=str(file), run_id=None, overrides=[])
    with pytest.raises(ConfigError, match="is code from outside"):
        find_start(args, None)
    args.overrides = named(own)
    assert find_start(args, None).config["loss"]["type"] == f"{own}:Loss"
