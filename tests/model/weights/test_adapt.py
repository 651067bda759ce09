"""Weights to start from in a model that isn't quite theirs: several experts, norms without running statistics."""
import re

import pytest
import torch

from model.loss import build_loss
from model.model import build_model
from model.weights.remap import load_weights
from trainer.head_start import set_weights
from utils.checkpoint.store import save_checkpoint
from utils.errors import ConfigError

CLASSES = 5


def make(experts=1, seed=0, name="test_resnet", kind="TimmModel", **args):
    torch.manual_seed(seed)
    named = {"model_name": name, "weights": False} if kind == "TimmModel" else {}
    return build_model({"type": kind, "args": {**named, "num_experts": experts, **args}}, CLASSES)


def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def grown(source, seed=0, experts=3, **args):
    """A model of several experts on the weights of one."""
    model = make(experts, seed, **args)
    torch.manual_seed(seed)
    load_weights(model, {"state_dict": source.state_dict()}, new_head=True)
    return model


@pytest.mark.parametrize("kind, name", (("TimmModel", "test_resnet"), ("TimmModel", "test_vit"), ("ResNet32Model", "")))
def test_experts_of_one_files_weights_part(kind, name, caplog):
    """With equal heads too, as the names of the classes make them, RIDE's diversity has something to drive apart."""
    source = make(name=name, kind=kind, use_norm=True)     # cosines: random features are as large as they like
    with caplog.at_level("INFO", "ltr"):
        model = grown(source, name=name, kind=kind, use_norm=True)
    assert "experts 2 to 3 start from the first one's weights" in caplog.text
    whole, outputs = source.eval()(images()), model.eval()(images())
    assert torch.allclose(outputs["logits"][:, 0], whole["output"], atol=1e-6)
    for expert in (1, 2):
        assert 0 < (outputs["feat"][:, expert] - outputs["feat"][:, 0]).norm() / outputs["feat"][:, 0].norm() < 0.2
    directions = torch.randn(CLASSES, model.feat_dim)
    for head in model.heads():
        set_weights(head, directions, torch.ones(CLASSES, dtype=torch.bool))
    criterion = build_loss({"type": "RIDELoss", "args": {"additional_diversity_factor": -0.2}},
                           cls_num_list=[9, 7, 5, 3, 1])
    own = [[p for key, p in model.named_parameters() if p.dim() == 1 and re.search(
        rf"\.(experts|layer\ds)\.{expert}\.", key)] for expert in range(3)]     # norms and biases, which begin equal
    assert all(torch.equal(first, other) for first, *others in zip(*own) for other in others)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(images()), torch.arange(4)).backward()       # in evaluation: four images make no statistics
        optimizer.step()
    assert all((first - other).abs().max() > 1e-5 for first, *others in zip(*own) for other in others)
    probs = model(images())["logits"].softmax(2)
    assert (probs[:, 1:] - probs[:, :1]).abs().max() > 1e-4


def test_what_a_filter_moves_by():
    source = make()
    model = grown(source)
    weights, tail = source.backbone.body.state_dict(), model.backbone.experts
    for key, value in tail[0].state_dict().items():
        assert torch.equal(value, weights[key])
        for other in tail[1:]:
            moved = (other.state_dict()[key] - value).flatten(1) if value.dim() > 1 else None
            assert torch.equal(other.state_dict()[key], value) if moved is None else torch.allclose(
                moved.std(1) / value.flatten(1).std(1), torch.tensor(0.02), atol=0.01)
    again, other = grown(source), grown(source, seed=1)
    same = [torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())]
    assert all(same)
    assert not torch.equal(other.backbone.experts[1].layer4[0].conv1.weight, tail[1].layer4[0].conv1.weight)


def test_what_a_file_has_for_each_expert_stays_exact():
    source = grown(make())
    back = make(3, seed=7)
    load_weights(back, {"state_dict": {f"module.{key}": value for key, value in source.state_dict().items()}},
                 new_head=True)
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize("norm", ("GroupNorm", "InstanceNorm", "LayerNorm"))
@pytest.mark.parametrize("name", ("test_resnet", "test_efficientnet"))      # the second's norms activate too
def test_norms_without_running_statistics_take_weights_and_biases(name, norm, tmp_path, caplog):
    source = make(name=name)
    for layer in source.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 2)
    save_checkpoint(tmp_path / "own.pth", {"state_dict": source.state_dict()})
    with caplog.at_level("INFO", "ltr"):
        model = make(name=name, norm=norm, weights=str(tmp_path / "own.pth"))
    count = sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in source.modules())
    assert f"the running statistics of {count} batch norms are left out" in caplog.text
    taken = model.state_dict()
    named = {key.replace(".norm.", "."): value for key, value in taken.items()}
    assert all(torch.equal(value, named[key.replace(".norm.", ".")]) for key, value in source.state_dict().items()
               if not key.endswith(("running_mean", "running_var", "num_batches_tracked")))
    with pytest.raises(ConfigError, match="the weights don't fit"):     # a whole model, nothing to start from
        load_weights(model, {"state_dict": source.state_dict()})
