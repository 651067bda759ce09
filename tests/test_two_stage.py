"""Two-stage methods on digits-LT, from stage 1 to the last table, through the command lines of train.py and test.py."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import test as test_script
import train
from model.loss import RIDELossWithDistill
from tools import session
from tools.opened import open_run
from trainer.distill_trainer import DistillTrainer, Renormalised
from utils.checkpoint.store import load_checkpoint
from utils.errors import ConfigError

pytestmark = pytest.mark.usefixtures("shallow_resnet32")

# Digits as they are (8x8) and narrow stages: what is tested is who learns what, not how well.
SMALL = ["-d", "cpu", "--seed", "0", "--set", "data_loader.args.image_size=8", "--set", "trainer.tensorboard=false",
         "--set", "trainer.amp=off"]
NARROW = ["--layer2_dimension", "16", "--layer3_dimension", "16"]
TEACHER = ["--set", "distill_arch.args.layer2_output_dim=16", "--set", "distill_arch.args.layer3_output_dim=16"]
KEYS = {"accuracy", "class_mean_acc", "many_shot_acc", "medium_shot_acc", "few_shot_acc", "many_class_num",
        "medium_class_num", "few_class_num", "macro_f1", "ece", "loss", "n_samples", "per_class_acc", "classifier"}
GATES = "backbone.expert_help_pred"


class Bench:
    """Trains one epoch a call in a folder of its own, and tests there."""

    def __init__(self, folder):
        self.folder = folder

    def flags(self, *more):
        return [*SMALL, *NARROW, "--epochs", "1", "--bs", "64", "--save_dir", str(self.folder), "-q",
                *map(str, more)]

    def train(self, config, *more):
        """The checkpoint of one epoch of configs/digits_lt_`config`.json."""
        train.main(["-c", f"configs/digits_lt_{config}.json", "--run_id", "run", "--name", f"{config}{len(more)}",
                    *self.flags(*more)])
        return self.folder / "models" / f"{config}{len(more)}" / "run" / "checkpoint-epoch1.pth"

    def test(self, checkpoint, *more, split="test"):
        test_script.main(["-r", str(checkpoint), "-d", "cpu", "-q", "--split", split, *map(str, more)])
        figures = json.loads((checkpoint.parent / f"{split}_metrics.json").read_text())
        assert set(figures) >= KEYS, KEYS - set(figures)
        assert figures["n_samples"] == (500 if split == "test" else 278)
        assert 0 <= figures["accuracy"] <= 1 and figures["few_class_num"] == 5
        return figures


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def weights(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def changed(before, after):
    """Keys of `after` that `before` lacks or holds in other bits."""
    return {key for key, value in after.items() if key not in before or not torch.equal(before[key], value)}


@torch.no_grad()
def features(checkpoint, split):
    """(feats [N, E, D], labels [N]) of a split, in float64."""
    run = open_run(checkpoint)
    parts = [(run.model(images)["feat"].double(), labels) for images, labels in run.loader(split)]
    return tuple(torch.cat(column) for column in zip(*parts))


def right(logits, labels):
    return (logits.argmax(1) == labels).double().mean().item()


def score(metric, logits, labels):
    """scikit-learn's word for `metric`."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
    if metric == "macro_f1":
        return f1_score(labels, logits.argmax(1), average="macro")
    return (accuracy_score if metric == "accuracy" else balanced_accuracy_score)(labels, logits.argmax(1))


def check_tau_and_ncm(bench, checkpoint, heads):
    """What test.py says of tau and NCM against the formulas on the model's features; heads: [C, D] an expert."""
    feats, labels = features(checkpoint, "test")

    def tau_logits(tau, feats):
        logits = [feats[:, i] @ (w / w.norm(dim=1, keepdim=True) ** tau).t() for i, w in enumerate(heads)]
        return torch.stack(logits).mean(0)

    def tau_accuracy(tau):
        return right(tau_logits(tau, feats), labels)

    close = {"abs": 0.0041}  # float32 ties: two images of 500
    for tau in (0.0, 0.7):
        figures = bench.test(checkpoint, "--classifier", "tau", "--tau", tau)
        assert figures["tau"] == tau and figures["accuracy"] == pytest.approx(tau_accuracy(tau), **close)
    on_val = features(checkpoint, "val")
    for metric, flags in (("class_mean_acc", []), ("accuracy", ["--tau_metric", "accuracy"]),
                          ("macro_f1", ["--tau_metric", "macro_f1"])):
        swept = bench.test(checkpoint, "--tau", "0:2:0.1", *flags)
        found = swept["tau_sweep"]
        values = found[f"val_{metric}"]
        assert found["metric"] == metric and len(found["tau"]) == len(values) == 21
        assert swept["tau"] == found["tau"][int(np.argmax(values))]  # the smaller of equals
        expected = [score(metric, tau_logits(tau, on_val[0]), on_val[1]) for tau in found["tau"]]
        assert values == pytest.approx(expected, abs=0.0075)
        assert swept["accuracy"] == pytest.approx(tau_accuracy(swept["tau"]), **close)

    train_feats, train_labels = features(checkpoint, "train_eval")
    assert len(train_labels) == 331
    centre = train_feats.mean(0)
    for kind, prepare in (("un", lambda x: x), ("l2n", lambda x: F.normalize(x, dim=2)),
                          ("cl2n", lambda x: F.normalize(x - centre, dim=2))):
        have, ask = prepare(train_feats), prepare(feats)
        means = torch.stack([have[train_labels == c].mean(0) for c in range(10)])
        expected = right(-(ask[:, None] - means[None]).square().sum(3).mean(2), labels)
        figures = bench.test(checkpoint, "--classifier", "ncm", "--feat_type", kind)
        assert figures["feat_type"] == kind and figures["accuracy"] == pytest.approx(expected, **close)


def test_the_whole_chain(bench, call_cli, monkeypatch):
    # ---- stage 1: one expert with cross-entropy, RIDE with three, a teacher with six
    ce, ride = bench.train("ce"), bench.train("ride")
    teacher = bench.train("ride_teacher")
    assert sum(key.startswith("backbone.linears.") for key in weights(teacher)) == 6
    stage1, content = weights(ride), teacher.read_bytes()

    # ---- distillation: the teacher's own logits, on the student's images, move the loss
    seen = []

    def forward(self, images, labels, original=DistillTrainer.forward):
        outputs = original(self, images, labels)
        seen.append((images.clone(), outputs["teacher"], self.teacher.training))
        return outputs

    def loss(self, outputs, target, original=RIDELossWithDistill.forward):
        value = original(self, outputs, target)
        if "teacher" in outputs:
            other = original(self, {**outputs, "teacher": outputs["teacher"].flip(1)}, target)
            assert value.isfinite() and not torch.isclose(value, other)
            assert not outputs["teacher"].requires_grad
        return value

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "forward", forward)
        patch.setattr(RIDELossWithDistill, "forward", loss)
        student = bench.train("ride_distill", "--distill_checkpoint", teacher, *TEACHER)
    assert len(seen) == 6 and not any(training for *_, training in seen)  # 331 images in batches of 64
    expected = open_run(teacher).model
    with torch.no_grad():
        for images, logits, _ in seen:
            torch.testing.assert_close(logits, expected(images)["output"], rtol=1e-4, atol=1e-4)
    assert teacher.read_bytes() == content
    assert weights(student).keys() == stage1.keys() and changed(stage1, weights(student))

    # ---- expert assignment, on RIDE: the gates learn, and nothing else moves by a bit
    ea = bench.train("ride_ea", "-r", ride)
    assert json.loads((ea.parent / "origin.json").read_text()) == {"checkpoint": str(ride)}
    assert not (ride.parent / "origin.json").exists()
    gated = weights(ea)
    assert stage1.keys() == {key for key in gated if not key.startswith(GATES)}
    assert changed(stage1, gated) == {key for key in gated if key.startswith(GATES)}
    assert any("running_mean" in key for key in stage1)
    ended = json.loads((ea.parent / "test_metrics.json").read_text())
    done = call_cli(["test.py", "-r", ea, "-d", "cpu"], check=True)
    figures = json.loads((ea.parent / "test_metrics.json").read_text())
    assert set(figures["expert_share"]) == {"all", "many", "medium", "few"}
    for shares in figures["expert_share"].values():
        assert len(shares) == 3 and sum(shares) == pytest.approx(1)
    everyone = bench.test(ride)
    assert figures["expert_acc"] == everyone["expert_acc"]
    assert figures["all_experts_acc"] == ended["all_experts_acc"] == everyone["accuracy"]
    assert figures["all_experts_shot_acc"] == {g: everyone[f"{g}_shot_acc"] for g in ("many", "medium", "few")}
    for word in ("used 1 %", "used 3 %", "each expert %"):
        assert word in done.stdout
    # The threshold is a choice of use: at 1 nobody asks further, at 0 everybody does.
    first = bench.test(ea, "--set", "arch.args.route_threshold=1", split="val")
    assert first["expert_share"]["all"] == [1, 0, 0] and first["accuracy"] == first["expert_acc"][0]
    last = bench.test(ea, "--set", "arch.args.route_threshold=0", split="val")
    assert last["expert_share"]["all"] == [0, 0, 1] and last["accuracy"] == last["all_experts_acc"]
    assert json.loads((ea.parent / "test_metrics.json").read_text()) == figures  # validation's are kept apart

    # ---- decoupling, on cross-entropy: new classifier, scales, and two that need no training
    tried = call_cli(["train.py", "-c", "configs/digits_lt_crt.json", "--dry_run", "-d", "cpu"], check=True)
    assert "warning: load_crt: missing" in tried.stdout  # what trains is refused: tests/test_bad_input.py
    plain = weights(ce)
    learned = call_cli(["train.py", "-c", "configs/digits_lt_crt.json", "--load_crt", ce, "--run_id", "crt",
                        *[flag for flag in bench.flags() if flag != "-q"]], check=True)
    assert "170 of them trained" in learned.stdout  # 16 x 10 and a bias
    crt = bench.folder / "models" / "digits_lt_crt" / "crt" / "checkpoint-epoch1.pth"
    assert changed(plain, weights(crt)) == {"backbone.linear.weight", "backbone.linear.bias"}
    lws = bench.train("lws", "--load_crt", ce)
    assert changed(plain, weights(lws)) == {"backbone.linear.scales"}
    assert not torch.equal(weights(lws)["backbone.linear.scales"], torch.ones(10))
    for checkpoint in (student, crt, lws):
        assert bench.test(checkpoint)["classifier"] == "joint"
    check_tau_and_ncm(bench, ce, [plain["backbone.linear.weight"].double()])


def test_decoupling_with_several_experts(bench):
    """Each expert has a classifier of its own; test.py takes the mean of their logits."""
    experts = ["--num_experts", 3]
    stage1 = bench.train("ce", *experts)
    before = weights(stage1)
    heads = {f"backbone.linears.{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    crt = bench.train("crt", *experts, "--load_crt", stage1)
    assert changed(before, weights(crt)) == heads
    lws = bench.train("lws", *experts, "--load_crt", stage1)
    assert changed(before, weights(lws)) == {f"backbone.linears.{i}.scales" for i in range(3)}
    assert len({tuple(weights(lws)[f"backbone.linears.{i}.scales"].tolist()) for i in range(3)}) == 3
    for checkpoint in (crt, lws):
        assert len(bench.test(checkpoint)["expert_acc"]) == 3
    check_tau_and_ncm(bench, stage1, [before[f"backbone.linears.{i}.weight"].double() for i in range(3)])


def test_new_classifiers_for_ride_and_for_gated_models(bench):
    """cRT replaces RIDE's cosine classifier by a linear one; tau and NCM take a gated model's experts, all of them."""
    ride = bench.train("ride")
    crt = bench.train("crt", "--num_experts", 3, "--load_crt", ride)
    before, after = weights(ride), weights(crt)
    assert changed(before, after) == {key for key in after if key.startswith("backbone.linears.")}
    ea = bench.train("ride_ea", "-r", ride)
    for flags in (("--tau", "1"), ("--classifier", "ncm")):
        ours, theirs = bench.test(ea, *flags), bench.test(ride, *flags)
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.0021) and "expert_share" not in ours
    assert bench.test(ride, "--tau", "1")["accuracy"] == pytest.approx(bench.test(ride)["accuracy"], abs=0.0021)


def test_a_classifier_that_is_kept_needs_its_classes(bench, photos_of):
    """LWS learns scales of stage 1's classifier; cRT learns a new one."""
    stage1 = bench.train("ce")
    flags = ["-c", "configs/digits_lt_lws.json", "--load_crt", str(stage1), "--dry_run", *bench.flags(), "--set",
             "data_loader={\"type\": \"ImageFolderLTDataLoader\", \"args\": {\"image_size\": 8}}", "--data_dir",
             str(photos_of("abcdefghij"))]
    with pytest.raises(ConfigError, match=r"load_crt: .*knows other classes \(0, 1, 2 \.\.\.\).*\(a, b, c"):
        train.main(flags)
    train.main([*flags, "--set", "arch.args.classifier=linear"])


def test_gates_are_no_classifier_to_retrain(bench):
    stage1 = bench.train("ride", "--num_experts", 2)
    with pytest.raises(ConfigError, match=r"^load_crt: retrains a classifier, and an EAModel trains gates"):
        train.main(["-c", "configs/digits_lt_ride_ea.json", "--load_crt", str(stage1), "--num_experts", "2",
                    *bench.flags()])


def test_a_run_begins_from_one_file(bench):
    stage1 = bench.train("ce")
    for more in (["-r", str(stage1)], ["-c", "configs/digits_lt_ce.json", "-r", str(stage1)]):
        with pytest.raises(ConfigError, match="--pretrained: a run begins from one file"):
            train.main([*more, "--pretrained", str(stage1), "--dry_run", "-d", "cpu"])
    with pytest.raises(ConfigError, match="--load_crt: a run begins from one file"):
        train.main(["-c", "configs/digits_lt_crt.json", "-r", str(stage1), "--load_crt", str(stage1), "--dry_run",
                    "--set", "resume_state_dict_only=true", "-d", "cpu"])
    stage2 = bench.train("crt", "--load_crt", stage1)      # its own file may be named again
    train.main(["-r", str(stage2), "--load_crt", str(stage1), "--dry_run", "-d", "cpu"])


def test_a_teacher_that_nothing_looks_at_is_warned_of(bench, capsys):
    teacher = bench.train("ce")
    flags = ["-c", "configs/digits_lt_ride_distill.json", "--distill_checkpoint", str(teacher), "--dry_run", *TEACHER,
             "--set", "distill_arch.args={\"num_classes\": 10, \"layer2_output_dim\": 16, \"layer3_output_dim\": 16}",
             *[flag for flag in bench.flags() if flag != "-q"]]
    for loss, warned in (("RIDELossWithDistill", 0), ("LDAMLoss", 1)):
        capsys.readouterr()
        train.main([*flags, "--set", f"loss={{\"type\": \"{loss}\"}}"])
        assert capsys.readouterr().out.count("warning: distill: the teacher changes nothing") == warned


@pytest.fixture
def photos_of(tmp_path):
    """A folder with two photos of each class."""
    def make(classes):
        for name in classes:
            (tmp_path / "photos" / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (i, 9, 9)).save(tmp_path / "photos" / name / f"{i}.png")
        return tmp_path / "photos"
    return make


def test_what_starts_anew_is_said(bench, capsys):
    """Ten digits' weights as a start for a cosine classifier of the same ten: the log names what isn't taken over."""
    plain = bench.train("ce", "--num_experts", 3)
    capsys.readouterr()
    train.main(["-c", "configs/digits_lt_ride.json", "--pretrained", str(plain), "--dry_run",
                *[flag for flag in bench.flags() if flag != "-q"]])
    said = capsys.readouterr().out
    assert f"{plain}: these start anew: backbone.linears.0.weight" in said


def test_gates_on_untrained_experts_are_warned_of(call_cli, tmp_path):
    done = call_cli(["train.py", "-c", "configs/digits_lt_ride_ea.json", "--dry_run", *SMALL, *NARROW], check=True)
    assert done.stdout.count("give the trained model with -r STAGE1") == 1


@pytest.mark.parametrize(("first", "config", "flag", "more"), [
    (["ce"], "ce", "--pretrained", []), (["ce"], "crt", "--load_crt", []),
    (["ride_teacher"], "ride_distill", "--distill_checkpoint", TEACHER)], ids=["pretrained", "stage 1", "teacher"])
def test_a_file_to_start_from_is_read_once(bench, monkeypatch, first, config, flag, more):
    """Its facts are wanted before the data are read and its weights after: one file, opened once."""
    from model.weights import files, remap
    from tools import session
    source = bench.train(*first)
    read, reader = [], session.load_checkpoint

    def counting(path, *rest):
        read.append(str(path))
        return reader(path, *rest)
    for module in (session, remap, files):
        monkeypatch.setattr(module, "load_checkpoint", counting)
    bench.train(config, flag, source, *more)
    assert read == [str(source)]


def test_validation_images_that_stage_1_learned_from_are_said(bench, tmp_path, capsys):
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8), (i, 9, 9)).save(tmp_path / "photos" / name / f"{i}.png")
    data = ["--set", "data_loader={\"type\": \"ImageFolderLTDataLoader\", \"args\": {\"image_size\": 8}}",
            "--data_dir", str(tmp_path / "photos"), "--set", "arch.args.num_classes=2"]
    stage1 = bench.train("ce", *data, "--set", "data_loader.args.validation=none", "--set", "trainer.monitor=off")
    again = ["-c", "configs/digits_lt_crt.json", "--load_crt", str(stage1), *bench.flags(), "--dry_run", *data, "-q"]
    for validation, said in (("holdout", True), ("none", False)):
        capsys.readouterr()
        train.main([*again, "--set", f"data_loader.args.validation={validation}", "--set", "trainer.monitor=off"])
        assert ("validation figures will be too good" in capsys.readouterr().out) == said


def test_a_teacher_sees_images_normalised_as_in_its_training():
    def normalised(facts):
        return (pixels - torch.tensor(facts["mean"]).view(3, 1, 1)) / torch.tensor(facts["std"]).view(3, 1, 1)
    pixels, network = torch.rand(2, 3, 8, 8), torch.nn.Conv2d(3, 4, 3)
    network.num_classes = 4
    ours = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    theirs = {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}
    teacher = Renormalised(network, ours, theirs)
    torch.testing.assert_close(teacher(normalised(ours)), network(normalised(theirs)), rtol=1e-4, atol=1e-5)
    assert teacher.num_classes == 4


def test_a_teacher_of_timms_without_facts_sees_what_its_package_says(tmp_path):
    timm = pytest.importorskip("timm")
    name, arch = "test_vit", {"model_name": "test_vit", "num_classes": 10}
    torch.save(timm.create_model(name, num_classes=10).state_dict(), tmp_path / "t.pth")
    start = SimpleNamespace(take=load_checkpoint, config={"distill": True, "distill_checkpoint": str(
        tmp_path / "t.pth"), "distill_arch": {"type": "TimmModel", "args": arch}})
    theirs = session.input_of({"arch": start.config["distill_arch"]})
    other = {**theirs, "mean": [0.1, 0.2, 0.3]}
    assert isinstance(session.make_teacher(start, 10, "cpu", other), Renormalised)
    assert not isinstance(session.make_teacher(start, 10, "cpu", theirs), Renormalised)


def test_ride_learns_what_few_images_show(bench):
    """A floor (chance is a tenth): half of 24 epochs, digits of 8 x 8 pixels, a network of four blocks."""
    found = bench.test(bench.train("ride", "--epochs", 12).with_name("checkpoint-epoch12.pth"))
    assert found["accuracy"] > 0.5 and found["medium_shot_acc"] > 0.8, found
