"""Training on features that were computed once, and parts that are frozen until an epoch."""

import json
import re
import signal
import time

import numpy as np
import pytest
import torch

from base.freezing import freeze_plan
from logger.metrics_csv import read_table
from model.model import build_model
from tests.trainer.conftest import load
from tests.trainer.ranks import run_ranks, train_and_record, train_where_one_writes
from tools import opened
from tools import parts as tool_parts
from trainer import classifiers, feature_store
from trainer.cached import OnFeatures, store_of
from trainer.feature_store import FeatureLoader
from utils.errors import ConfigError, RunError

SMALL = {"layer2_output_dim": 16, "layer3_output_dim": 16}
CACHED = {"cache_features": True}
EA = {"arch": {"type": "ResNet32EAModel", "args": {"num_experts": 2, "use_norm": True}}, "resume_state_dict_only": True}


@pytest.fixture(scope="module")
def stage1(shared_runs):
    """Checkpoints of a first stage: one expert, and two."""
    return {1: shared_runs("cached_one", "--epochs", 1) / "checkpoint-epoch1.pth",
            2: shared_runs("cached_two", "--epochs", 1, arch={"args": {"num_experts": 2, "use_norm": True}})
            / "checkpoint-epoch1.pth"}


# ---------------------------------------------------------------------- freezing until an epoch

@pytest.mark.parametrize("value,plan", [
    (None, None), ("norms", ("norms", None, None)), (["a"], (["a"], None, None)), (0.5, (0.5, None, None)),
    ({"until": "epoch 3"}, ("backbone", 3, None)), ({"until": 3, "what": ["a", "b"]}, (["a", "b"], 3, None)),
    ({"until": 3, "then": 0.25}, ("backbone", 3, 0.25)), ({"until": 3, "then": "norms"}, ("backbone", 3, "norms"))])
def test_a_plan_is_read(value, plan):
    assert freeze_plan(value) == plan


@pytest.mark.parametrize("value,said", [
    ({"until": "3 epochs"}, "until: must be the last epoch"), ({"until": 0}, "until: must be"), ({}, "until: must be"),
    ({"until": True}, "until"), ({"untill": 3}, "did you mean 'until'"), ({"until": 3, "what": 5}, "what: must be"),
    ({"until": 3, "then": 1}, "then: must be"), ({"until": 3, "then": 1.5}, "share of the stages"), ([], "must be"),
    ({"until": 3, "then": []}, "then: must be")])
def test_a_wrong_plan_is_named(value, said):
    with pytest.raises(ConfigError, match=said):
        freeze_plan(value)


UNTIL = {"freeze": {"until": "epoch 2"}, "epochs": 4, "layer_decay": 0.8, "no_decay": "norm_bias",
         "ema": {"decay": 0.9}}


@pytest.fixture(scope="module", params=[{}, CACHED, {"cache_features": {"views": 2}}], ids=["images", "plain", "views"])
def thawed(request, shared_runs):
    """Four epochs, all but the classifier frozen in the first two."""
    name = f"until-{request.param_index}"
    sections = {"trainer": {**UNTIL, **request.param, "save_period": 1},
                "data_loader": {"args": {"sampler": {"type": "ClassBalanced", "args": {}}}}}
    return shared_runs(name, **sections), sections


def test_frozen_parts_stay_and_are_thawed(thawed):
    folder, _ = thawed
    first, second, third = (load(folder / f"checkpoint-epoch{epoch}.pth") for epoch in (1, 2, 3))
    head = {"backbone.linear.weight", "backbone.linear.bias"}
    for key in ("state_dict", "raw_state_dict"):
        assert {name for name, value in first[key].items() if not torch.equal(value, second[key][name])} == head
        moved = {name for name, value in second[key].items() if not torch.equal(value, third[key][name])}
        assert moved == set(first[key])     # norms' statistics and counters too
    assert len(first["optimizer"]["state"]) == 2 and len(third["optimizer"]["state"]) > 25


def test_a_share_of_the_stages_stays_frozen(runs):
    sections = {"trainer": {**UNTIL, **CACHED, "freeze": {"until": "epoch 1", "then": 0.5}, "epochs": 2,
                            "save_period": 1}}
    folder = runs("half", **sections)
    first, second = (load(folder / f"checkpoint-epoch{epoch}.pth")["raw_state_dict"] for epoch in (1, 2))
    kept = ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.")
    moved = {name for name, value in first.items() if not torch.equal(value, second[name])}
    assert moved == {name for name in first if not name.startswith(kept)} and len(moved) > 30
    with pytest.raises(ConfigError, match=r"trainer\.freeze"):
        runs(None, "-r", folder / "checkpoint-epoch2.pth", "--epochs", 3, "--set", "trainer.freeze.then=null")


def test_a_share_less_than_a_stage_is_refused():
    model = build_model({"type": "ResNet32Model", "args": SMALL}, 5)
    with pytest.raises(ConfigError, match=r"less than one; give at least 0\.25"):
        model.freeze(0.2)
    model.freeze(0.25)
    assert set(model.frozen) == {"backbone.conv1.weight", "backbone.bn1.weight", "backbone.bn1.bias"}


def test_a_stop_before_and_after_the_thaw_loses_nothing(thawed, runs, same_state, signal_at):
    folder, sections = thawed
    path = runs.models("stopped")
    steps = len(range(0, 23, 6))
    signal_at(steps + 2)                    # inside epoch 2, the last on frozen features
    runs("stopped", **sections)
    assert same_state(folder / "checkpoint-epoch1.pth", path / "checkpoint-epoch1.pth") == []
    signal_at(2 * steps - (steps + 2) + 3)  # inside epoch 3, the first that is thawed
    runs(None, "-r", path / "checkpoint-epoch2.pth")
    runs(None, "-r", path / "checkpoint-epoch3.pth")
    for epoch in (2, 3, 4):
        assert same_state(folder / f"checkpoint-epoch{epoch}.pth", path / f"checkpoint-epoch{epoch}.pth") == []


def test_an_epoch_between_is_gone_on_from(thawed, runs, same_state, capfd):
    folder, sections = thawed
    halves = {**sections, "trainer": {**sections["trainer"], "epochs": 2}}
    half = runs("half", **halves) / "checkpoint-epoch2.pth"
    accuracy = load(half)["extra"]["accuracy_so_far"]
    runs(None, "-r", half, "--epochs", 4)
    assert same_state(folder / "checkpoint-epoch4.pth", half.with_name("checkpoint-epoch4.pth")) == []
    said = next(line for line in capfd.readouterr().out.splitlines() if "thawed" in line)
    assert said.startswith("epoch 3: ") and said.endswith(f"validation accuracy so far: {100 * accuracy:.1f} %")


# ---------------------------------------------------------------------- features in place of images

@pytest.mark.parametrize("arch,more", [
    ("ResNet32Model", {}), ("ResNet32Model", {"num_experts": 3, "use_norm": True}),
    ("ResNet32Model", {"classifier": "lws"}), ("ResNet32Model", {"num_experts": 3, "use_experts": "0,2"}),
    ("ResNet32Model", {"num_experts": 2, "classifier": "linear_fcbn"}),
    ("ResNet32EAModel", {"num_experts": 3, "use_norm": True}),
    ("TimmModel", {"model_name": "test_efficientnet"}), ("TimmModel", {"model_name": "test_vit", "num_experts": 2})])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_on_its_features_is_the_model(arch, more, training):
    torch.manual_seed(0)
    size = 16
    if arch == "TimmModel":
        pytest.importorskip("timm")
        size = 160
    model = build_model({"type": arch, "args": {"weights": False, **more} if size == 160 else {**SMALL, **more}}, 5)
    if not model.routed:
        model.freeze("backbone")
    images, labels = torch.randn(7, 3, size, size), torch.arange(7) % 5
    model.eval()
    if routes := model.route:
        model.route = False
    feats = model(images)["feat"].detach()
    if routes:
        model.route = True
    model.train(training)
    extra = {"target": labels} if model.routed else {}
    expected, found = model(images, **extra), OnFeatures(model)(feats, **extra)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_dropout_and_random_experts_are_drawn_on_features_too():
    model = build_model({"type": "ResNet32Model", "args": {**SMALL, "num_experts": 3, "use_experts": "rand",
                                                           "dropout": 0.5}}, 5)
    model.freeze("backbone")
    feats = torch.ones(4, 3, 16)
    outputs = model.train().from_features(feats)
    assert outputs["logits"].shape == (4, 2, 5) and (outputs["feat"] == 0).any()
    assert model.eval().from_features(feats)["logits"].shape == (4, 3, 5)


@pytest.fixture
def plainly(monkeypatch):
    """Training images as they are: what one pass sees."""
    make = tool_parts.make_loader

    def plain(*args, **more):
        loader = make(*args, **more)
        loader.augment = False
        return loader
    monkeypatch.setattr(tool_parts, "make_loader", plain)


@pytest.mark.parametrize("kind", ["crt", "lws", "ea", "rest"])
def test_cached_training_is_ordinary_training_of_plain_images(kind, runs, stage1, plainly):
    balanced = {"data_loader": {"args": {"sampler": {"type": "ClassBalanced", "args": {}}}}}
    sections, flags = {
        "crt": (balanced, ["--load_crt", stage1[1]]),
        "lws": ({**balanced, "arch": {"args": {"classifier": "lws"}}}, ["--load_crt", stage1[1]]),
        "ea": (EA, ["-r", stage1[2]]),
        "rest": ({"arch": {"args": {"num_experts": 2, "use_norm": True}}, "loss": {"type": "RIDELoss"},
                  "trainer": {"freeze": "backbone", "accumulate": 2, "ema": {"decay": 0.9}}},
                 ["--pretrained", stage1[2]]),
    }[kind]
    trainer = sections.pop("trainer", {})
    flags += ["--lr", 0.002]
    one = runs("images", *flags, **sections, trainer={**trainer})
    two = runs("features", *flags, **sections, trainer={**trainer, **CACHED})
    before, after = (load(folder / "checkpoint-epoch2.pth")["state_dict"] for folder in (one, two))
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=5e-3, atol=2e-3)
    rows = [(runs.log(name) / "metrics.csv").read_text().splitlines()[-1].split(",") for name in ("images", "features")]
    assert [float(v or 0) for v in rows[0]] == pytest.approx([float(v or 0) for v in rows[1]], rel=2e-2, abs=2e-2)
    assert sorted(path.name for path in (two / "features").iterdir()) == [
        "train.f16", "train.json", "valid.f16", "valid.json"] and not (one / "features").exists()


REFUSED = [
    ({}, "backbone.conv1.weight is trained"),
    ({"trainer": {"freeze": ["backbone.layer1."]}}, "backbone.conv1.weight is trained"),
    ({"trainer": {"freeze": "backbone"}, "data_loader": {"args": {"mix": {"type": "mixup"}}}}, "can't be mixed"),
    ({"trainer": {"cache_features": {"views": 0}}}, "views: must be 1 or more"),
    ({"trainer": {"cache_features": {"view": 2}}}, "did you mean 'views'"),
    ({"distill": True, "distill_checkpoint": "TWO", "distill_arch": {"type": "ResNet32Model", "args": {
        **SMALL, "num_experts": 2, "use_norm": True}}, "trainer": {"freeze": "backbone"}}, "the teacher needs"),
]


@pytest.mark.parametrize("sections,said", REFUSED)
def test_what_would_change_features_is_refused(sections, said, runs, stage1):
    sections = json.loads(json.dumps(sections).replace("TWO", str(stage1[2])))
    with pytest.raises(ConfigError, match=f"^trainer.cache_features.*{said}"):
        runs("refused", **{**sections, "trainer": {**CACHED, **sections.get("trainer", {})}})
    assert not runs.models("refused").exists()


@pytest.mark.parametrize(("trainer", "args", "says"), [
    ({"freeze": "backbone"}, {"augment": "autoaugment", "cutout": 4}, "args.augment, cutout have no effect"),
    ({"freeze": UNTIL["freeze"]}, {"rotation": 5}, "rotation have an effect from epoch 3 on"),
    ({"freeze": "backbone", "cache_features": {"views": 2}}, {"cutout": 4}, None), ({"freeze": "backbone"}, {}, None)])
def test_augmentation_that_features_do_not_have_is_told(trainer, args, says, runs, stage1, capsys):
    runs("plain", "--pretrained", stage1[1], "--dry_run", trainer={**CACHED, **trainer}, data_loader={"args": args})
    said = capsys.readouterr().out
    assert says in said if says else "effect" not in said


def test_nothing_to_thaw_is_refused(runs, stage1):
    with pytest.raises(ConfigError, match=r"freeze\.until: leaves nothing to thaw"):
        runs("refused", "--load_crt", stage1[1], trainer={"freeze": {"until": 1}})


# ---------------------------------------------------------------------- the file

@pytest.fixture
def parts(runs, monkeypatch):
    """(model, its loader, the images in order); chunks of two batches."""
    torch.manual_seed(0)
    config = json.loads(runs.config().read_text())
    loader = tool_parts.make_loader({**config, "seed": 0})
    model = build_model({"type": "ResNet32Model", "args": {**SMALL, "num_experts": 2}}, 3).eval()
    monkeypatch.setattr(feature_store, "CHUNK", 2 * 6 * 2 * 16 * 2)
    monkeypatch.setattr(feature_store, "STOP_EVERY", 1)
    return model, loader, loader.feature_loader()


def test_a_pass_is_gone_on_with_and_another_key_starts_anew(parts, tmp_path, monkeypatch):
    model, _, images = parts
    seen, folded = [], []
    own = feature_store.FeatureStore._features

    def watched(self, network, x, amp):
        seen.append(len(x))
        folded.append(network)
        return own(self, network, x, amp)
    monkeypatch.setattr(feature_store.FeatureStore, "_features", watched)
    store = store_of(model, images, tmp_path / "train.f16", 1, "off")
    answers = iter([False, False, True])
    assert not store.fill(model, images, stop=lambda: next(answers)) and seen == [6, 6, 6]
    assert store.rows_done() == 18 and not store.complete
    assert store.fill(model, images) and seen == [6, 6, 6, 5]
    images.set_epoch(1)
    with torch.no_grad():
        expected = torch.cat([model(x)["feat"] for x, _ in images])
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in folded[-1].modules())
    assert any(isinstance(part, torch.nn.BatchNorm2d) for part in model.modules())      # the model itself stays
    assert torch.allclose(store.rows(0, np.arange(23)), expected, rtol=2**-10, atol=1e-5)

    again = store_of(model, images, tmp_path / "train.f16", 1, "off")
    assert again.complete and again.fill(model, images) and len(seen) == 4
    with torch.no_grad():
        model.backbone.linears[0].weight.add_(1)    # a classifier's weights aren't features'
        assert store_of(model, images, tmp_path / "train.f16", 1, "off").complete
        model.backbone.conv1.weight.mul_(1.01)
    other = store_of(model, images, tmp_path / "train.f16", 1, "off")
    assert not other.complete and other.fill(model, images) and len(seen) == 8
    assert not torch.equal(other.rows(0, np.arange(23)), expected.half().float())
    assert not store_of(model, images, tmp_path / "train.f16", 1, "bf16").complete


def test_views_are_augmented_and_large_files_are_read_by_row(parts, tmp_path, monkeypatch):
    model, loader, _ = parts
    images = loader.feature_loader(augment=True)
    store = store_of(model, images, tmp_path / "train.f16", 3, "off")
    assert store.fill(model, images)
    held = [store.rows(view, np.arange(23)) for view in range(3)]
    assert not torch.equal(held[0], held[1]) and not torch.equal(held[1], held[2])
    monkeypatch.setattr(feature_store, "IN_MEMORY", 0)
    mapped = FeatureLoader(loader, store_of(model, images, tmp_path / "train.f16", 3, "off"))
    for epoch in (1, 2, 4):
        mapped.set_epoch(epoch)
        order = loader.epoch_order(epoch)
        feats, labels = (torch.cat(part) for part in zip(*mapped))
        assert torch.equal(feats, held[(epoch - 1) % 3][order])
        assert torch.equal(labels, torch.from_numpy(loader.targets[order]))
    with torch.no_grad():
        model.backbone.conv1.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="isn't finite in half precision"):
        store_of(model, images, tmp_path / "train.f16", 1, "off").fill(model, images)


def test_a_stop_inside_the_pass_is_one_of_the_run(runs, stage1, same_state, monkeypatch):
    sections = {"trainer": {**CACHED, "epochs": 2}}
    whole = runs("whole", "--load_crt", stage1[1], **sections)
    monkeypatch.setattr(feature_store, "STOP_EVERY", 1)
    features = feature_store.FeatureStore._features

    def stopping(self, *args):
        signal.raise_signal(signal.SIGTERM)
        return features(self, *args)
    with monkeypatch.context() as patch:
        patch.setattr(feature_store.FeatureStore, "_features", stopping)
        stopped = runs("stopped", "--load_crt", stage1[1], **sections) / "checkpoint-epoch1.pth"
    assert json.loads((stopped.parent / "features" / "train.json").read_text())["done"] == 6
    runs(None, "-r", stopped)
    assert same_state(whole / "checkpoint-epoch2.pth", stopped.with_name("checkpoint-epoch2.pth")) == []


def test_two_ranks_share_the_work_and_take_one_process_s_steps(shared_runs, stage1):
    """23 images in batches of 10: 10, 10 and 3. On features, which one writes, thawed after an epoch, and expert
    assignment."""
    uneven = {"data_loader": {"args": {"batch_size": 10}}}
    group = {"arch": {"args": {"norm": "GroupNorm"}}}
    kinds = [({**uneven, "trainer": CACHED}, ["--load_crt", stage1[1]]),
             ({**uneven, **group, "trainer": {**CACHED, "freeze": {"until": 1}}}, []),
             ({**uneven, **EA, "trainer": CACHED}, ["-r", stage1[2]])]

    def commands(who):
        return [[str(part) for part in ("-c", shared_runs.config(**sections), "-d", "cpu", "--epochs", 2, "--lr", 1e-9,
                                        "--run_id", f"{who}-{i}", *flags)]
                for i, (sections, flags) in enumerate(kinds)]
    alone, ranks = train_and_record(commands("alone")), run_ranks(train_where_one_writes, commands("ranks"))
    for i in range(len(kinds)):
        one, two = (np.fromfile(shared_runs.models(f"{who}-{i}") / "features" / "train.f16", np.float16)
                    for who in ("alone", "ranks"))
        np.testing.assert_allclose(two, one, rtol=2e-3, atol=1e-3)
        for rank in ranks:
            for mine, theirs in zip(alone["steps"][i], rank["steps"][i], strict=True):
                assert mine.shape == theirs.shape and (mine - theirs).norm() <= 1e-4 * mine.norm()
    assert len({len(step) for step in alone["steps"][1]}) == 2     # the classifier's gradients, then all


# ---------------------------------------------------------------------- classifiers without training

def test_class_means_take_one_pass_and_none_where_features_are_kept(runs, stage1, monkeypatch):
    """cl2n means look at the features twice."""
    folder = runs("kept", "--load_crt", stage1[1], "--epochs", 1, trainer=CACHED)
    run = opened.open_run(folder / "checkpoint-epoch1.pth")
    images, seen = torch.randn(4, 3, 16, 16), []
    run.model.register_forward_hook(lambda module, inputs, outputs: seen.append(len(inputs[0])))
    loader = run.loader("train_eval")
    new = classifiers.ncm_head(run.model, loader, 3, "cl2n")
    assert seen == [6, 6, 6, 5]
    kept = classifiers.ncm_head(run.model, loader, 3, "cl2n", (folder / "features" / "train.f16", "off"))
    assert seen == [6, 6, 6, 5]
    with torch.no_grad():
        feats = run.model(images)
    torch.testing.assert_close(kept(feats), new(feats), rtol=1e-3, atol=1e-3)
    heads = [classifiers.sweep_tau(run.model, run.loader("val"), [0.0, 1.0], kept=kept)[1]
             for kept in (None, (folder / "features" / "valid.f16", "off"))]
    assert heads[0] == pytest.approx(heads[1]) and len(seen) == 7
    with torch.no_grad():
        run.model.backbone.conv1.weight.mul_(2)     # not the network whose features they are
    classifiers.ncm_head(run.model, loader, 3, "l2n", (folder / "features" / "train.f16", "off"))
    assert len(seen) == 11


def test_several_crops_of_validation_images_leave_training_on_features(runs, stage1, capsys):
    """Their logits are averaged, so these aren't cached; a training image has one crop."""
    runs("crops", "--load_crt", stage1[1], "--epochs", 1, data_loader={"args": {"crops": 5}}, trainer=CACHED)
    said = capsys.readouterr().out
    assert "features of 23 train images" in said and "valid images" not in said


def test_kept_features_are_of_one_crop(tmp_path):
    (tmp_path / "train.json").write_text("{}")
    model = build_model({"type": "ResNet32Model", "args": SMALL}, num_classes=3).eval()
    images = torch.randn(2, 5, 3, 16, 16)

    class Loader(list):
        views = {"crops": 5}

        def share(self, batch):
            return 2, 2

        def feature_loader(self):
            raise AssertionError("takes what was kept")
    labels = torch.tensor([0, 1])
    [(feats, _)] = classifiers.features_once(model, Loader([(images, labels)]), (tmp_path / "train.f16", "off"))()
    with torch.no_grad():
        means = torch.stack([model(part)["feat"].mean(0) for part in images])
    torch.testing.assert_close(feats, means, rtol=1e-3, atol=1e-4)


def test_features_of_one_expert_arent_taken_for_anothers(stage1):
    """They have the same shape and come from the same weights."""
    run = opened.open_run(stage1[2])
    loader, keys = run.loader("train_eval"), {}
    for chosen in ([0, 1], [0], [1], [1, 0]):
        run.model.backbone.use_experts = chosen
        keys[str(chosen)] = feature_store.feature_key(run.model, loader, 1, "off")
    assert len(set(keys.values())) == 4


def test_features_of_other_layers_arent_taken(stage1):
    """What no weight tells, such as a norm's eps."""
    run = opened.open_run(stage1[2])
    loader = run.loader("train_eval")
    before = feature_store.feature_key(run.model, loader, 1, "off")
    run.model.backbone.linears[0].s = 7.0                        # the classifier's own
    assert feature_store.feature_key(run.model, loader, 1, "off") == before
    run.model.backbone.bn1.eps = 1e-3
    assert feature_store.feature_key(run.model, loader, 1, "off") != before


def test_a_start_from_class_means_is_of_the_features_that_are_kept(runs, stage1, monkeypatch, same_state, capsys):
    """One pass over the training images, one over the validation images; averages begin there too."""
    passes = []
    features = feature_store.FeatureStore._features
    monkeypatch.setattr(feature_store.FeatureStore, "_features", lambda self, *args: (
        passes.append(self.file.stem) or time.sleep(0.25) or features(self, *args)))
    sections = {"arch": {"args": {"use_norm": True}}, "init_classifier": "class_means",
                "trainer": {"freeze": {"until": 1}, "ema": {"decay": 0.9}}}
    flags = ("--lr", 1e-9, "--epochs", 1)
    plain = runs("plain", *flags, **sections)
    assert not passes
    sections["trainer"] |= CACHED
    kept = runs("kept", *flags, **sections)
    assert passes == ["train"] * 4 + ["valid"] * 2
    assert read_table(runs.log("kept") / "timing.csv")[0]["seconds"] >= 1.5     # the passes are a part of the epoch
    for key in ("state_dict", "raw_state_dict"):
        one, two = (load(folder / "checkpoint-epoch1.pth")[key]["backbone.linear.weight"] for folder in (plain, kept))
        torch.testing.assert_close(one, two, rtol=2e-3, atol=1e-4)

    with monkeypatch.context() as patch:
        patch.setattr(feature_store, "STOP_EVERY", 1)
        patch.setattr(feature_store.FeatureStore, "_features",
                      lambda self, *args: signal.raise_signal(signal.SIGTERM) or features(self, *args))
        stopped = runs("stopped", *flags, **sections)
    assert not list(stopped.glob("*.pth"))
    assert re.search(r"go on with: python train\.py -c \S+ --run_id stopped .* -r auto\n", capsys.readouterr().out)
    runs("stopped", "-r", "auto", *flags, **sections)
    assert same_state(kept / "checkpoint-epoch1.pth", stopped / "checkpoint-epoch1.pth") == []
