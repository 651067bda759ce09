"""What test.py does to a trained model's logits, on the weights of a short run, against the formulas."""
import json
import shutil
import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import test as test_script
from model import split_metrics
from model.metric import EvalState
from tools import export as export_script
from tools import predict as predict_script
from tools import report as report_script
from tools.calibration import keep_temperature
from tools.flags import parse_test
from tools.opened import Run, open_run
from tools.report_page import report_name
from trainer import classifiers
from utils.checkpoint.store import load_checkpoint, save_checkpoint
from utils.errors import ConfigError

pytestmark = pytest.mark.usefixtures("shallow_resnet32")
COUNTS = torch.tensor([120, 77, 50, 32, 21, 13, 8, 5, 3, 2], dtype=torch.float64)
PI = COUNTS / COUNTS.sum()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_trainer):
    """One epoch of three balanced experts, and their logits on test and validation images."""
    folder = tmp_path_factory.mktemp("after")
    run = digits_trainer(folder, "run", "--set", "loss.type=BalPoELoss", "--set", "loss.args={}", "--set",
                         "data_loader.args.image_size=8", "--set", "data_loader.args.sampler=null",
                         "--set", "trainer.amp=false", epochs=1)
    opened = open_run(run.checkpoint)
    found = {}
    with torch.no_grad():
        for split in ("test", "val"):
            parts = [(opened.model(images)["logits"].double(), labels) for images, labels in opened.loader(split)]
            found[split] = [torch.cat(column) for column in zip(*parts)]
    return run.checkpoint, found


def figures(checkpoint, *flags):
    test_script.main(["-r", str(checkpoint), "-d", "cpu", "-q", *map(str, flags)])
    return json.loads((checkpoint.parent / "test_metrics.json").read_text())


def ece(logits, labels):
    state = EvalState(10)
    state.update(logits, labels)
    return state.compute()["ece"]


def right(logits, labels):
    return pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=0.0041)


def test_logits_that_are_adjusted_already_are_warned_of(trained, capsys):
    test_script.main(["-r", str(trained[0]), "-d", "cpu", "--classifier", "la", "--tau", "1"])
    assert "was trained by BalPoELoss that reckons with how rare a class is" in capsys.readouterr().out


def test_groups_are_those_of_the_config(trained):
    found = figures(trained[0], "--set", "groups.many=40", "--set", "groups.few=3")
    assert [found[f"{name}_class_num"] for name in ("many", "medium", "few")] == [3, 6, 1]


def test_adjusted_logits_and_class_distributions(trained, tmp_path):
    checkpoint, found = trained
    logits, labels = found["test"]
    z = logits.mean(1)
    assert figures(checkpoint, "--classifier", "la", "--tau", 0.5)["accuracy"] == right(z - 0.5 * PI.log(), labels)
    swept = figures(checkpoint, "--classifier", "la", "--tau", "0:2:0.5", "--tau_metric", "accuracy")
    val, val_labels = found["val"]
    best = max(swept["tau_sweep"]["tau"],
               key=lambda tau: ((val.mean(1) - tau * PI.log()).argmax(1) == val_labels).double().mean())
    assert swept["tau"] == best
    # The loss says that the mean logits are for equal classes: `uniform` changes nothing, `train` adds log pi.
    assert figures(checkpoint, "--prior", "uniform")["accuracy"] == right(z, labels)
    assert figures(checkpoint, "--prior", "train")["accuracy"] == right(z + PI.log(), labels)
    # An adjustment by half is taken back, whatever tau is.
    assert figures(checkpoint, "--classifier", "la", "--tau", 0.5, "--prior", "uniform")["accuracy"] == right(z, labels)
    (tmp_path / "prior.txt").write_text(" ".join(map(str, range(1, 11))))
    assert figures(checkpoint, "--prior", tmp_path / "prior.txt")["accuracy"] \
        == right(z + torch.arange(1, 11).log(), labels)
    estimated = figures(checkpoint, "--prior", "estimate")
    assert estimated["prior"] == "estimate" and sum(estimated["class_distribution"]) == pytest.approx(1)
    assert estimated["accuracy"] == right(z + torch.tensor(estimated["class_distribution"]).log(), labels)
    (tmp_path / "prior.txt").write_text("1 2 3")
    args = parse_test(["-r", str(checkpoint), "--prior", str(tmp_path / "prior.txt"), "-q"])
    for text in ("1 2 3", " ".join(["1e308"] * 10)):    # of the latter the sum is infinite
        (tmp_path / "prior.txt").write_text(text)
        with pytest.raises(ConfigError, match="10 numbers, one a class"):
            test_script.test(args)


def prior_figures(found, weights, taus=(0, 1, 2)):
    """(logits made right for even classes, labels) of weighed experts with the offsets tau_e · log pi."""
    logits, labels = found["test"]
    weights = torch.tensor(weights, dtype=torch.float64)
    offset = sum(w * tau for w, tau in zip(weights.tolist(), taus)) - 1
    return torch.einsum("nec,e->nc", logits, weights) + offset * PI.log(), labels


def test_a_prior_is_for_the_experts_that_are_asked(trained):
    """Experts have offsets of their own: the distribution that one's logits are right for isn't that of all three."""
    checkpoint, found = trained
    for used, weights in (("2", [0, 0, 1]), ("2,0", [0.5, 0, 0.5]), ("0,1", [0.5, 0.5, 0])):
        got = figures(checkpoint, "--prior", "uniform", "--set", f"arch.args.use_experts={used}")
        assert got["accuracy"] == right(*prior_figures(found, weights))
    learned = figures(checkpoint, "--prior", "uniform", "--expert_weights", "learn")
    assert learned["accuracy"] == right(*prior_figures(found, learned["expert_weights"]))


def test_a_prior_knows_the_loss_that_trained_them(trained):
    """Not the one that the command line names."""
    checkpoint, found = trained
    got = figures(checkpoint, "--prior", "uniform", "--set", "loss.type=CrossEntropyLoss", "--set", "loss.args={}")
    assert got["accuracy"] == right(*prior_figures(found, [1 / 3] * 3))


OWN = """
from criteria.experts import BalPoELoss
from data_loader.samplers import InstanceBalancedSampler

print("own code runs")

class Loss(BalPoELoss):
    pass

class Shuffled(InstanceBalancedSampler):
    power = None
"""


def test_a_prior_needs_to_know_own_losses_and_samplers(trained, tmp_path, monkeypatch, capsys):
    """A checkpoint's config alone neither runs code from outside nor is another's taken for it."""
    checkpoint, found = trained
    (tmp_path / "my_parts.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    plain = load_checkpoint(checkpoint)["config"]
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    for name in ("Loss", "Shuffled"):
        contents = load_checkpoint(checkpoint)
        named = f"my_parts:{name}"
        if name == "Loss":
            contents["config"]["loss"]["type"] = named
        else:
            contents["config"]["data_loader"]["args"]["sampler"] = {"type": named, "args": {}}
        other = tmp_path / name / checkpoint.name
        other.parent.mkdir()
        save_checkpoint(other, contents)
        with pytest.raises(ConfigError, match=r"^--prior: \S+ was trained with a (loss|sampler) from outside"):
            figures(other, "--prior", "uniform", "-c", "plain.json")
        test_script.main(["-r", str(other), "-d", "cpu", "-q", "--classifier", "la", "--tau", "1", "-c", "plain.json"])
        assert "own code runs" not in capsys.readouterr().out
    got = figures(tmp_path / "Loss" / checkpoint.name, "--prior", "uniform", "--set", "loss.type=my_parts:Loss")
    assert got["accuracy"] == right(*prior_figures(found, [1 / 3] * 3))
    with pytest.raises(ConfigError, match="or that doesn't say what it favours"):
        figures(tmp_path / "Shuffled" / checkpoint.name, "--prior", "uniform", "--set",
                'data_loader.args.sampler={"type": "my_parts:Shuffled"}')


def other_logits(model, images):
    """Name of the flags -> the logits that they ask for, float64 [N, C], of three balanced linear or cosine heads."""
    outputs = model(images)
    z = outputs["output"].double()
    tau = []
    for head, feats in zip(model.heads(), outputs["feat"].double().unbind(1)):
        weight = head.weight.detach().double().t()                  # cosine heads': [D, C] -> [C, D]
        unit = torch.nn.functional.normalize(feats, dim=1)
        tau.append(head.s * unit @ (weight / weight.norm(dim=1, keepdim=True) ** 0.7).t())
    return {("--classifier", "la", "--tau", "0.5"): z - 0.5 * PI.log(),
            ("--prior", "train"): z + PI.log(),
            ("--classifier", "tau", "--tau", "0.7"): torch.stack(tau).mean(0)}


def test_exports_and_predictions_with_another_classifier(trained, tmp_path):
    checkpoint, _ = trained
    opened = open_run(checkpoint)
    images = next(iter(opened.loader("test")))[0][:6]
    with torch.no_grad():
        wanted = other_logits(opened.model, images)
    for number, (flags, logits) in enumerate(wanted.items()):
        out = tmp_path / f"{number}.pt2"
        export_script.main(["-r", str(checkpoint), "--format", "pt2", "--out", str(out), *flags])
        extra = {"metadata.json": ""}
        got = torch.export.load(str(out), extra_files=extra).module()(images)
        assert torch.allclose(got.double().log_softmax(1), logits.log_softmax(1), atol=1e-4)
        assert json.loads(extra["metadata.json"])[flags[0][2:]] == " ".join(flags[1::2])
    for number in range(3):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(
            tmp_path / f"{number}.png")
    found = []
    for flags in ((), ("--prior", "train")):
        predict_script.main(["-r", str(checkpoint), "-d", "cpu", str(tmp_path), "--topk", "10", "--json",
                             str(tmp_path / "found.json"), *flags])
        rows = json.loads((tmp_path / "found.json").read_text())["predictions"]
        found.append([{row["class"]: row["probability"]} | {row[f"class_{k}"]: row[f"probability_{k}"]
                                                            for k in range(2, 11)} for row in rows])
    for plain, shifted in zip(*found, strict=True):
        shares = torch.tensor([plain[str(n)] for n in range(10)], dtype=torch.float64) * PI
        assert [shifted[str(n)] for n in range(10)] == pytest.approx((shares / shares.sum()).tolist(), abs=1e-5)


@pytest.mark.parametrize("flags, said", [
    (["--tau", "1"], "--tau: goes with --classifier tau or la"), (["--classifier", "tau"], "--tau: missing"),
    (["--classifier", "la", "--tau", "0:1:0.5"], "--tau: must be one number here"),
    (["--prior", "estimate"], "--prior: estimate needs a test split"), (["--prior", "nowhere"], "--prior")])
@pytest.mark.parametrize("command", [predict_script, export_script])
def test_wrong_flags_for_another_classifier(trained, command, flags, said):
    with pytest.raises(ConfigError, match=said):
        command.parse(["-r", str(trained[0]), *flags, *([] if command is export_script else ["x.png"])])


def test_the_configs_metrics_are_in_the_test_figures(trained, capsys):
    """Those that are averaged over batches as well as those of the whole split."""
    checkpoint, found = trained
    test_script.main(["-r", str(checkpoint), "-d", "cpu", "--set", 'metrics=["accuracy", "auc", "top_k_acc"]'])
    written = json.loads((checkpoint.parent / "test_metrics.json").read_text())
    logits, labels = found["test"]
    probs = logits.mean(1).softmax(1)
    assert written["auc"] == pytest.approx(float(split_metrics.auc(probs, labels)), abs=1e-4)
    assert written["top_k_acc"] == pytest.approx(
        (probs.topk(5, 1).indices == labels[:, None]).any(1).double().mean().item(), abs=0.0041)
    assert written["accuracy"] == right(logits.mean(1), labels)
    assert f"auc             {written['auc']:>9.4f}" in capsys.readouterr().out


def test_a_prior_knows_which_experts_were_trained(trained):
    """Two of three, with a strength each; the third's logits are right for nothing that is known."""
    checkpoint, found = trained
    contents = load_checkpoint(checkpoint)
    contents["config"]["arch"]["args"]["use_experts"] = "2,0"
    contents["config"]["loss"]["args"] = {"taus": [1.5, 0]}
    other = checkpoint.parent / "two" / checkpoint.name
    other.parent.mkdir()
    save_checkpoint(other, contents)
    assert figures(other, "--prior", "uniform")["accuracy"] == right(*prior_figures(found, [0.5, 0, 0.5], (0, 0, 1.5)))
    assert figures(other, "--prior", "uniform", "--set", "arch.args.use_experts=2")["accuracy"] \
        == right(*prior_figures(found, [0, 0, 1], (0, 0, 1.5)))
    with pytest.raises(ConfigError, match=r"--prior: expert 1 took no part in the training of .*use_experts=2,0"):
        figures(other, "--prior", "uniform", "--set", "arch.args.use_experts=0,1")


def test_outputs_that_arent_numbers_are_no_accuracy(trained, tmp_path):
    """The first class would seem to be predicted."""
    contents = load_checkpoint(trained[0])
    contents["state_dict"]["backbone.conv1.weight"].fill_(float("nan"))
    broken = tmp_path / trained[0].name
    save_checkpoint(broken, contents)
    with pytest.raises(ConfigError, match="its outputs aren't finite numbers"):
        figures(broken)
    with pytest.raises(ConfigError, match="its outputs aren't finite numbers"):
        report_script.main([str(tmp_path), "-d", "cpu"])
    assert [path.name for path in tmp_path.iterdir()] == [broken.name]


def test_learned_weights_of_experts(trained):
    checkpoint, found = trained
    logits, labels = found["test"]
    first = figures(checkpoint, "--expert_weights", "learn")
    weights = torch.tensor(first["expert_weights"], dtype=torch.float64)
    assert len(weights) == 3 and float(weights.sum()) == pytest.approx(1) and weights.min() > 0.01
    assert first["accuracy"] == right(torch.einsum("nec,e->nc", logits, weights), labels)
    assert figures(checkpoint, "--expert_weights", "learn")["expert_weights"] == first["expert_weights"]


@pytest.mark.parametrize("flip", [True, False, "alternate"])
def test_images_that_mustnt_be_mirrored_arent(monkeypatch, flip):
    """Ramps that rise to the right fall where they are flipped; the zeros that a move lets in are left out."""
    images, views = torch.arange(1.0, 17).repeat(32, 3, 16, 1), []

    def outputs_of(model, loader, head, view):
        views.append(view(images))
        return torch.randn(32, 2, 3), None
    monkeypatch.setattr(classifiers, "outputs_of", outputs_of)
    classifiers.learned_expert_weights(None, SimpleNamespace(flip=flip))
    rise = (views[1][:, 0, 8, 4:12].diff() > 0).all(1)
    assert rise.all() if flip is False else 0 < rise.sum() < 32


def test_a_temperature_is_fitted_on_validation_images_and_kept(trained, capsys):
    checkpoint, found = trained
    val, val_labels = found["val"]
    got = figures(checkpoint, "--calibrate")
    kept = got["calibration"]
    assert kept["before"] == pytest.approx(ece(val.mean(1), val_labels), abs=1e-4)
    cooled = val.mean(1) / kept["temperature"]
    assert kept["after"] == pytest.approx(ece(cooled, val_labels), abs=1e-4)
    z, labels = found["test"][0].mean(1), found["test"][1]
    assert got["accuracy"] == right(z, labels) and got["ece"] == pytest.approx(
        ece(z / kept["temperature"], labels), abs=1e-3)
    assert open_run(checkpoint).temperature == kept["temperature"] != 1
    capsys.readouterr()
    test_script.main(["-r", str(checkpoint), "-d", "cpu"])
    assert f"divide its logits by {kept['temperature']:.3f}" in capsys.readouterr().out
    changed = figures(checkpoint, "--calibrate", "--set", "arch.args.use_experts=2")
    assert changed["changed"] == ["use_experts=2"] and changed["calibration"]["temperature"] != kept["temperature"]
    assert open_run(checkpoint).temperature == kept["temperature"]      # that of another evaluation isn't kept
    assert "changed" not in figures(checkpoint, "--set", "arch.args.use_experts=null")
    other = checkpoint.parent / "other.pth"
    other.write_bytes(checkpoint.read_bytes())
    assert open_run(other).temperature == kept["temperature"]       # the same weights by another name
    kept = (checkpoint.parent / "calibration.json").read_text()
    trained_again = load_checkpoint(checkpoint)
    trained_again["state_dict"]["backbone.conv1.weight"] += 0.01
    again = checkpoint.parent / "again" / checkpoint.name
    again.parent.mkdir()
    save_checkpoint(again, trained_again)
    (again.parent / "calibration.json").write_text(kept)
    assert open_run(again).temperature == 1      # nor that of other weights of the same epoch


def test_each_classifier_has_its_own_temperature(trained, tmp_path, capsys):
    """Also in a file of another name, with which calibration.json was copied; a trained one's is never another's."""
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
    checkpoint = shutil.copy(trained[0], tmp_path / "run" / trained[0].name)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    said = {}
    for flags in ((), ("--classifier", "la", "--tau", "0.5"), ("--classifier", "tau", "--tau", "0.7")):
        said[flags] = figures(checkpoint, "--calibrate", *flags)["calibration"]["temperature"]
    assert len(set(said.values())) == 3
    assert figures(checkpoint, "--calibrate", "--classifier", "ncm")["calibration"]["temperature"] not in said.values()
    renamed = shutil.copy(checkpoint, tmp_path / "other" / "renamed.pth")
    file = shutil.copy(checkpoint.parent / "calibration.json", tmp_path / "other")
    opened = open_run(renamed)
    image = classify_pixels(opened, tmp_path / "a.png")
    with torch.no_grad():
        logits = {(): opened.model(image)["output"].double()} | other_logits(opened.model, image)
    capsys.readouterr()
    for flags, temperature in said.items():
        csv = tmp_path / "found.csv"
        predict_script.main(["-r", str(renamed), "-d", "cpu", str(tmp_path / "a.png"), "--csv", str(csv), *flags])
        wanted = (logits[flags] / temperature).softmax(1).max().item()
        assert float(csv.read_text().splitlines()[1].split(",")[2]) == pytest.approx(wanted, abs=1e-4)
        name = " ".join(flags[1::2]) or "joint"
        assert f"temperature {temperature:.3f} of classifier {name}, from {file}" in capsys.readouterr().out
        out = tmp_path / "m.pt2"
        export_script.main(["-r", str(renamed), "--format", "pt2", "--out", str(out), *flags])
        assert f"temperature {temperature:.3f} of classifier {name}, from {file}" in capsys.readouterr().out
        extra = {"metadata.json": ""}
        got = torch.export.load(str(out), extra_files=extra).module()(image).double()
        assert torch.allclose(got.log_softmax(1), (logits[flags] / temperature).log_softmax(1), atol=1e-4)
        assert json.loads(extra["metadata.json"])["temperature"] == f"{temperature:g}"
    predict_script.main(["-r", str(renamed), "-d", "cpu", str(tmp_path / "a.png"), "--classifier", "la", "--prior",
                         "uniform"])
    assert f"no temperature: {file} has none for classifier la 1, only for joint, la 0.5, tau 0.7" \
        in capsys.readouterr().out
    other = load_checkpoint(renamed)
    other["state_dict"]["backbone.conv1.weight"] += 0.01
    save_checkpoint(renamed, other)
    predict_script.main(["-r", str(renamed), "-d", "cpu", str(tmp_path / "a.png")])
    assert "has none for these weights" in capsys.readouterr().out


def classify_pixels(run, path):
    """A file as the model's input, float [1, 3, S, S]."""
    from data_loader.transforms import test_transform
    return test_transform(run.data["preprocess"])(Image.open(path))[None]


def test_another_config_is_another_evaluation(trained, tmp_path):
    """By -c as by --set; the checkpoint's own config is none, whatever it leaves to the data."""
    checkpoint = shutil.copytree(trained[0].parent, tmp_path / "run") / trained[0].name
    (checkpoint.parent / "calibration.json").unlink(missing_ok=True)
    config = json.loads((checkpoint.parent / "config.json").read_text())
    del config["arch"]["args"]["num_classes"]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert "changed" not in figures(checkpoint, "-c", file)
    config["arch"]["args"]["use_experts"] = "0"
    file.write_text(json.dumps({**config, "groups": {"many": 3, "few": 2}}))
    got = figures(checkpoint, "-c", file, "--calibrate")
    assert got["changed"] == ["use_experts=0", "many=3", "few=2"]
    assert not (checkpoint.parent / "calibration.json").exists()


def test_a_temperature_isnt_that_of_an_altered_model(trained, tmp_path, capsys):
    checkpoint = shutil.copytree(trained[0].parent, tmp_path / "run") / trained[0].name
    run = open_run(checkpoint)
    keep_temperature(checkpoint, 1, run.model, {"temperature": 20.0})
    for key, value, found in (("arch.args.use_experts", "0", 1), ("data_loader.args.image_size", 16, 1),
                              ("data_loader.args.crops", 5, 1), ("groups.many", 50, 20),
                              ("data_loader.args.image_size", "auto", 20), ("data_loader.args.num_workers", 2, 20)):
        other = open_run(checkpoint, overrides=[(key, value, "--set")])
        capsys.readouterr()
        assert other.temperature == other.temperature == found, key
        said = capsys.readouterr().out
        assert said.count(f"isn't applied, as it was found without {key.rpartition('.')[2]}={value}") == (found == 1)
    for flags, found in (((), 20), (("--crops", "1"), 20), (("--crops", "5"), 1)):
        args = predict_script.parse(["-r", str(checkpoint), "x.png", "-d", "cpu", *flags])
        assert predict_script.open_model(args)[1]["temperature"] == found


@pytest.mark.parametrize("flags", [("--calibrate",), ("--classifier", "la", "--tau", "0:1:0.5"),
                                   ("--classifier", "tau", "--tau", "0:1:0.5")])
def test_what_is_chosen_on_the_test_images_is_marked(trained, flags, capsys):
    """As under `"validation": "test"`, which old configs have without a word; with images of its own it isn't."""
    argv = ["-r", str(trained[0]), "-d", "cpu", *flags]
    for validation, marked in (("test", True), ("holdout", False)):
        test_script.main([*argv, "--set", f"data_loader.args.validation={validation}"])
        got = json.loads((trained[0].parent / "test_metrics.json").read_text())
        said = "is chosen on the test images" in capsys.readouterr().out
        assert said == marked == (got.get("chosen_on") == "test")
    test_script.main([*argv[:4], "--set", "data_loader.args.validation=test"])      # nothing is chosen
    assert "chosen on" not in capsys.readouterr().out


@pytest.mark.parametrize(("changed", "says"), [
    ("split_seed=5", "split_seed: 5, but the checkpoint's split was made with 0"),
    ("imb_factor=0.5", "imb_factor: 0.5, but the model was trained with 0.02; validation images drawn with another")])
def test_validation_images_of_another_subset_are_refused(trained, changed, says):
    with pytest.raises(ConfigError, match=says):
        figures(trained[0], "--split", "val", "--set", "data_loader.args.validation=holdout", "--set",
                f"data_loader.args.{changed}")
    assert not (trained[0].parent / "val_metrics.json").exists()


def test_open_set_on_several_processes_is_refused_before_anything_is_read(trained, monkeypatch, tmp_path):
    """Without joining them either: nobody else is there in this test."""
    (tmp_path / "unknown.txt").write_text("a.png\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("tools.opened.load_checkpoint", lambda *args: pytest.fail("read a checkpoint"))
    with pytest.raises(ConfigError, match="--open_set: needs all test images in one process"):
        figures(trained[0], "--open_set", tmp_path / "unknown.txt")


def test_other_data_and_older_weights_have_files_of_their_own(runs_of_photos, capsys):
    """test_metrics.json stays the run's own; the others name data and checkpoint."""
    models, other = runs_of_photos
    own = (models / "test_metrics.json").read_text()
    (models / "checkpoint-epoch2 (1).pth").touch()  # a copy that somebody left there
    test_script.main(["-r", str(models / "checkpoint-epoch2.pth"), "-d", "cpu", "-q", "--data_dir", str(other)])
    test_script.main(["-r", str(models / "checkpoint-epoch1.pth"), "-d", "cpu", "-q"])
    assert (models / "test_metrics.json").read_text() == own
    elsewhere = json.loads((models / "test_metrics.other.checkpoint-epoch2.json").read_text())
    assert elsewhere["n_samples"] == 6 and elsewhere["data_dir"] == str(other)
    earlier = json.loads((models / "test_metrics.checkpoint-epoch1.json").read_text())
    assert earlier["checkpoint"] == "checkpoint-epoch1.pth"
    capsys.readouterr()
    test_script.main(["-r", str(models / "checkpoint-epoch2.pth"), "-d", "cpu"])
    assert "of 100 photos like the 8 it was tested on" in capsys.readouterr().out
    again = json.loads((models / "test_metrics.json").read_text())
    assert again["checkpoint"] == "checkpoint-epoch2.pth" and again["loss"] == pytest.approx(json.loads(own)["loss"])


def test_data_without_a_folder_are_called_by_their_loader(tmp_path):
    run = SimpleNamespace(path=tmp_path / "model_best.pth", is_own_data=False, checkpoint={"epoch": 1},
                          config={"data_loader": {"type": "mine.data:Digits", "args": {}}})
    run.about = lambda: Run.about(run)
    assert test_script.figures_file(Namespace(split="test"), run).name == "test_metrics.Digits.model_best.json"
    assert report_name("val", run) == "val_report.Digits.model_best"


def test_the_distribution_that_was_trained_on_isnt_the_other_datas(runs_of_photos):
    """There are no training images in `other`, and none are needed."""
    models, other = runs_of_photos
    found = []
    for flags in ((), ("--prior", "train")):
        test_script.main(["-r", str(models / "checkpoint-epoch2.pth"), "-d", "cpu", "-q", "--data_dir", str(other),
                          *flags])
        found.append(json.loads((models / "test_metrics.other.checkpoint-epoch2.json").read_text()))
    assert found[1]["prior"] == "train" and found[1]["loss"] == pytest.approx(found[0]["loss"])
    assert found[1]["class_distribution"] == [0.5, 0.5]


@pytest.fixture
def runs_of_photos(tmp_path):
    """(the models folder of two epochs on photos in folders, a folder `other` with test photos of the same classes)."""
    import numpy as np
    from PIL import Image

    import train as train_script

    def photos(folder, count, shade):
        folder.mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(i).integers(0, 60, (12, 12, 3)) + shade
            Image.fromarray(noise.astype(np.uint8)).save(folder / f"{shade}_{i}.png")
    for shade, name in ((20, "ant"), (150, "bee")):
        for part, count in (("train", 8), ("test", 4)):
            photos(tmp_path / "own" / part / name, count, shade)
        photos(tmp_path / "other" / "test" / name, 3, shade)
    train_script.main([
        "-c", "configs/image_folder_ride.json", "--data_dir", str(tmp_path / "own"), "--save_dir",
        str(tmp_path / "saved"), "--run_id", "a", "-d", "cpu", "--epochs", "2", "--save_period", "1",
        "--num_experts", "1", "--bs", "4", "--set", "arch.type=ResNet32Model", "--set", "trainer.amp=off",
        "--set", "data_loader.args.image_size=12", "--set", "trainer.tensorboard=false",
        "--set", "data_loader.args.num_workers=0"])
    return tmp_path / "saved" / "models" / "image_folder_ride" / "a", tmp_path / "other"


def test_class_means_of_other_images_are_marked(trained):
    other = figures(trained[0], "--classifier", "ncm", "--set", "data_loader.args.imb_factor=0.05")
    assert other["changed"] == ["imb_factor=0.05"] and "changed" not in figures(trained[0], "--classifier", "ncm")
