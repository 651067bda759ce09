"""Where a classifier starts: class means against a slow twin, names through a stand-in for open_clip, refusals."""

import sys
import types

import pytest
import torch

import train
from data_loader.data_loaders import DigitsLTDataLoader
from logger.log import setup_logging
from model.model import build_model
from tools.opened import open_run
from trainer.head_start import start_classifier
from utils.config.load import load_config
from utils.errors import ConfigError

SMALL = ["-d", "cpu", "-q", "--epochs", "1", "--set", "data_loader.args.image_size=8", "--set",
         "trainer.tensorboard=false", "--layer2_dimension", "16", "--layer3_dimension", "16"]


def parts(experts=1, classifier="cosine"):
    torch.manual_seed(0)
    model = build_model({"type": "ResNet32Model", "args": {
        "classifier": classifier, "num_experts": experts, "layer2_output_dim": 16, "layer3_output_dim": 24}}, 10)
    return model.train(), DigitsLTDataLoader(batch_size=50, image_size=8)


@pytest.mark.parametrize("classifier", ["cosine", "linear"])
@pytest.mark.parametrize("experts", [1, 3])
def test_class_means(classifier, experts):
    model, loader = parts(experts, classifier)
    start_classifier(model, loader, {"type": "class_means", "args": {}})
    assert model.training
    model.eval()
    seen = [(feat.double(), int(label)) for images, labels in loader.train_eval_loader()
            for feat, label in zip(model(images)["feat"].detach(), labels)]
    for expert, head in enumerate(model.heads()):
        weight = head.weight.double() if classifier == "linear" else head.weight.double().T
        for label in range(10):
            mean = torch.stack([feat[expert] for feat, y in seen if y == label]).mean(0)
            torch.testing.assert_close(weight[label], mean / mean.norm(), rtol=1e-4, atol=1e-5)
        assert classifier == "cosine" or not head.bias.any()


def test_classes_without_images_keep_their_weights():
    model, loader = parts()
    before = model.heads()[0].weight.clone()
    plain = loader.train_eval_loader()
    loader.train_eval_loader = lambda: plain
    plain.batch_size = 50
    start_classifier(model, loader, {"type": "class_means", "args": {}}, max_batches=1)
    seen = set(next(iter(plain))[1].tolist())
    after = model.heads()[0].weight
    assert seen < set(range(10))
    assert all(torch.equal(before[:, c], after[:, c]) == (c not in seen) for c in range(10))


@pytest.mark.parametrize(("verbosity", "shown"), [(0, False), (1, True)])
def test_the_bar_of_class_means_is_left_out_where_the_log_is(monkeypatch, capsys, verbosity, shown):
    setup_logging(verbosity)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    model, loader = parts()
    start_classifier(model, loader, {"type": "class_means", "args": {}}, max_batches=1)
    assert ("class means" in capsys.readouterr().err) is shown


def stand_in(width, projection=None, fails=None):
    """A module with what is used of open_clip: a text's features are drawn with the text as the seed."""
    class Network(torch.nn.Module):
        visual = types.SimpleNamespace(proj=projection)

        def encode_text(self, texts):
            return torch.stack([torch.randn(width, generator=torch.Generator().manual_seed(sum(map(ord, text))))
                                for text in texts])

    def create_model(name, pretrained):
        if fails:
            raise fails
        return Network()

    return types.SimpleNamespace(create_model=create_model, get_tokenizer=lambda name: lambda texts: texts)


@pytest.mark.parametrize("projected", [True, False])
def test_names(monkeypatch, tmp_path, projected):
    names = [f"digit_{label}" for label in range(10)]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    projection = torch.nn.Parameter(torch.randn(24, 7)) if projected else None
    package = stand_in(7 if projected else 24, projection)
    monkeypatch.setitem(sys.modules, "open_clip", package)
    model, loader = parts()
    start_classifier(model, loader, {"type": "text", "args": {"class_names": str(tmp_path / "names.txt"),
                                                              "template": "one {}!"}})
    for label, name in enumerate(names):
        wanted = package.create_model("", "").encode_text([f"one {name.replace('_', ' ')}!"])[0]
        wanted = projection @ wanted if projected else wanted
        torch.testing.assert_close(model.heads()[0].weight[:, label], (wanted / wanted.norm()).detach())
    if not projected:
        before = model.heads()[0].weight.clone()
        start_classifier(model, loader, {"type": "text", "args": {}})    # the data's own names
        assert not torch.equal(before, model.heads()[0].weight)


@pytest.mark.parametrize("args, package, said", [
    ({"template": "no place"}, stand_in(24), "init_classifier.args.template: must have {} where the name goes"),
    ({}, stand_in(512), "init_classifier.args.clip: ViT-B-16-quickgelu describes texts by 512 numbers"),
    ({"class_names": "NONE"}, stand_in(24), "init_classifier.args.class_names: NONE: can't be read"),
    ({"class_names": "TWO"}, stand_in(24), "2 names for 10 classes"),
    ({"class_names": "GAP"}, stand_in(24), "line 2: is empty"),
    ({}, stand_in(24, fails=OSError("offline\nall day")), "init_classifier.args.pretrained: 'openai' of"),
    ({}, stand_in(24, fails=OSError("word " * 99)), "(word word word word word word word word word word word word word "
     "word word word word word word word word word word word word word word word word word word ...)"),
    ({}, None, "init_classifier: text needs the package open_clip; pip install open_clip_torch"),
])
def test_refusals(monkeypatch, tmp_path, args, package, said):
    monkeypatch.setitem(sys.modules, "open_clip", package)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TWO").write_text("a\nb\n")
    (tmp_path / "GAP").write_text("a\n\nb\n")
    model, loader = parts()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        start_classifier(model, loader, {"type": "text", "args": args})
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("config, given, said", [
    ("ce", "class_mean", "init_classifier.type: unknown start 'class_mean'; did you mean 'class_means'?"),
    ("ce", {"type": "text", "args": {"cilp": 1}}, "init_classifier.args.cilp: unknown argument of text 'cilp'; did"),
    ("ride_ea", "class_means", "init_classifier: ResNet32EAModel has no classifier to start; leave it out"),
])
def test_the_config_is_checked(config, given, said):
    from utils.config.load import Override
    with pytest.raises(ConfigError) as caught:
        load_config(f"configs/digits_lt_{config}.json", [Override("init_classifier", given)])
    assert said in str(caught.value)


def test_a_run(tmp_path):
    flags = [*SMALL, "--save_dir", str(tmp_path), "--set", "init_classifier=class_means", "--set",
             "arch.args.use_norm=true", "--set", "optimizer.args.lr=1e-30", "--set", "optimizer.args.weight_decay=0",
             "--set", "trainer.freeze=backbone"]
    train.main(["-c", "configs/digits_lt_ce.json", "--run_id", "run", *flags])
    run = open_run(next(tmp_path.glob("models/*/run/checkpoint-epoch1.pth")))
    assert run.config["init_classifier"] == {"type": "class_means", "args": {}}
    weight = run.model.heads()[0].weight.clone()
    start_classifier(run.model, run.loader("train"), run.config["init_classifier"])
    torch.testing.assert_close(run.model.heads()[0].weight, weight)
    train.main(["-r", str(run.path), "-d", "cpu", "-q", "--epochs", "2"])      # goes on, not anew
    train.main(["-c", "configs/digits_lt_ce.json", "--dry_run", *flags])
