"""A run's report: one page that needs nothing else, the numbers in it, and what draws its figures."""

import html
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_loader.data_loaders import DigitsLTDataLoader
from logger.figures.classes import group_bars
from logger.figures.drawings import _experts_text, drawings, figures_to_tensorboard
from logger.figures.facts import RunFacts
from logger.figures.style import LIGHT, to_array, to_svg
from model.model import build_model
from tools.flags import parse_test
from tools.report import gather
from tools.report_page import _tiles
from tools.runs import evaluation_flags
from trainer.evaluate import evaluate


@pytest.fixture(scope="module")
def run_copy(digits_run, tmp_path_factory):
    """The shared run's two folders, copied: reports are written into them."""
    top = tmp_path_factory.mktemp("report") / "saved"
    for folder in (digits_run.models, digits_run.log):
        shutil.copytree(folder, top / folder.parent.parent.name / folder.parent.name / folder.name)
    return top / "models" / digits_run.models.parent.name / digits_run.models.name


@pytest.fixture(scope="module")
def page(run_copy, call_cli):
    done = call_cli(["-m", "tools.report", run_copy, "-d", "cpu"], check=True)
    assert str(run_copy / "report.html") in done.stdout
    return (run_copy / "report.html").read_text(encoding="utf-8")


def test_one_page_that_needs_no_network(page, run_copy):
    assert [path.name for path in run_copy.glob("*.html")] == ["report.html"]
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))
    assert not re.search(r"<(script|link|iframe)\b|url\(\s*['\"]?http", page)
    assert "prefers-color-scheme:dark" in page and "<meta name=\"viewport\"" in page
    pictures = {path.stem for path in (run_copy / "report").glob("*.png")}
    assert {"groups", "classes", "training", "confusion", "reliability", "experts", "group_confusion"} <= pictures


def test_all_experts_together_are_those_of_every_image():
    """Not the few that routing asks."""
    own = {"all": [0.5, 0.4]}
    result = {"accuracy": 0.49, "few_shot_acc": 0.3, "all_experts_acc": 0.52,
              "all_experts_shot_acc": {"many": 0.7, "medium": 0.5, "few": 0.35}}
    facts = RunFacts({}, result, [3, 2], None)
    assert facts.together() == {"all": 0.52, "many": 0.7, "medium": 0.5, "few": 0.35}
    assert "get 52.0 % right, 2.0 points more" in _experts_text(facts, own)


def test_a_detectors_figures_arent_made_twice(monkeypatch, tmp_path):
    """Of several processes one writes the report, and would wait for the others."""
    monkeypatch.setattr("trainer.tasks.task_of", lambda loader: SimpleNamespace(classifies=False))
    run = SimpleNamespace(config={}, data={}, model=torch.nn.Linear(1, 1))
    facts = gather(run, {"bbox_AP": 0.5}, SimpleNamespace(n_samples=3), SimpleNamespace(log=tmp_path), "test")
    assert facts.result == {"bbox_AP": 0.5}


def test_a_detectors_headline_has_its_groups():
    result = {"bbox_AP": 0.5, "bbox_AP75": 0.25, "segm_AP": 0.125, "bbox_AP_few": 0.0625, "bbox_AP_many": None,
              "few_class_num": 2}
    tiles = {name: (value, unit, note) for name, value, unit, note, _ in _tiles(
        SimpleNamespace(classifies=False, result=result))}
    assert tiles["bbox AP75"] == ("25.0", "%", "") and tiles["bbox AP few-shot"] == ("6.2", "%", "2 classes")
    assert "bbox AP many-shot" not in tiles


def test_its_numbers_are_test_pys(page, run_copy, call_cli):
    """test.py --report writes the same page, from the evaluation that test.py made anyway."""
    checkpoint = sorted(run_copy.glob("checkpoint-*.pth"))[-1]
    done = call_cli(["test.py", "-r", checkpoint, "-d", "cpu", "--report"], check=True)
    assert str(run_copy / "report.html") in done.stdout
    figures = json.loads((run_copy / "test_metrics.json").read_text())
    assert "predictions" not in figures
    again = (run_copy / "report.html").read_text(encoding="utf-8")
    for text in (page, again):
        for key in ("accuracy", "few_shot_acc", "macro_f1", "ece"):
            assert f"<b>{100 * figures[key]:.1f}<small>%" in text, key
    assert re.findall(r"<h2>.*?</h2>", page) == re.findall(r"<h2>.*?</h2>", again)
    assert 0 < page.count("<img class=small") <= 24


def test_of_validation_images_it_is_another_page(page, run_copy, call_cli):
    checkpoint = sorted(run_copy.glob("checkpoint-*.pth"))[-1]
    done = call_cli(["test.py", "-r", checkpoint, "-d", "cpu", "--report", "--split", "val"], check=True)
    assert str(run_copy / "val_report.html") in done.stdout
    validation = (run_copy / "val_report.html").read_text(encoding="utf-8")
    assert "Of 100 validation images" in validation and "Accuracy on the validation images" in validation
    assert "test images" not in validation and f"{checkpoint} --split val --report" in validation
    assert (run_copy / "val_report" / "groups.png").is_file() and "in <code>val_report/</code>" in validation
    tested = (run_copy / "report.html").read_text(encoding="utf-8")
    assert "Of 100 test images" in tested and "validation images" not in tested
    for path in run_copy.glob("val_report*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_kept_run_has_the_same_page(page, run_copy, tmp_path, call_cli):
    """Its curve, time and speed too; and what is kept isn't kept again."""
    from tools.keep import keep
    folder = keep(sorted(run_copy.glob("checkpoint-*.pth"))[-1], tmp_path / "results", "kept")
    done = call_cli(["-m", "tools.report", folder, "-d", "cpu"], check=True)
    assert str(folder / "report.html") in done.stdout
    kept = (folder / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>.*?</h2>", kept) == re.findall(r"<h2>.*?</h2>", page)
    for fact in ("training time", "speed"):
        shown = re.search(f"<dt>{fact}</dt><dd>.*?</dd>", page)[0]
        assert shown in kept
    assert (folder / "report" / "training.png").is_file()
    done = call_cli(["-m", "tools.report", folder, "--checkpoint", "best"])
    assert done.returncode == 2 and "has no model_best.pth; there is weights.pth" in done.stderr
    done = call_cli(["-m", "tools.keep", folder, tmp_path / "again"])
    assert done.returncode == 2 and "holds no checkpoint" in done.stderr and not (tmp_path / "again").exists()


def test_its_figures_are_in_float32(run_copy, tmp_path, call_cli):
    """As test.py's, whatever the training's precision was."""
    models = shutil.copytree(run_copy, tmp_path / "models" / "digits" / "half")
    checkpoint = sorted(models.glob("checkpoint-*.pth"))[-1]
    file = torch.load(checkpoint, weights_only=True)
    file["config"]["trainer"]["amp"] = "bf16"
    torch.save(file, checkpoint)
    call_cli(["test.py", "-r", checkpoint, "-d", "cpu"], check=True)
    figures = json.loads((models / "test_metrics.json").read_text())
    call_cli(["-m", "tools.report", models, "-d", "cpu"], check=True)
    page = html.unescape((models / "report.html").read_text(encoding="utf-8"))
    for key in ("ece", "loss"):
        assert float(re.search(rf'"{key}": ([-\d.e]+)', page)[1]) == pytest.approx(figures[key], rel=1e-6), key


def test_how_to_do_it_again(page, run_copy):
    assert f"python train.py -c {run_copy / 'config.json'}" in page
    assert "python test.py -r" in page and "tensorboard --logdir" in page
    assert "additional_diversity_factor" in page
    assert f"python -m tools.report {run_copy / 'checkpoint-epoch2.pth'}" in page


@pytest.mark.parametrize("result, how", [
    ({"classifier": "tau", "tau": 0.7}, " --tau 0.7"), ({"classifier": "ncm", "feat_type": "un"},
                                                        " --classifier ncm --feat_type un"),
    ({"classifier": "la", "tau": 1, "expert_weights": [0.5, 0.5]}, " --classifier la --tau 1 --expert_weights learn"),
    ({"prior": "my prior.txt", "calibration": {"temperature": 2.0}}, " --calibrate --prior 'my prior.txt'"), ({}, "")])
def test_flags_of_an_evaluation(result, how):
    assert evaluation_flags(result) == how
    if "prior.txt" not in how:
        assert parse_test(["-r", __file__, *how.split()]).classifier == result.get("classifier", "joint")


@pytest.mark.parametrize("args, said", [
    (["nowhere"], "nowhere: no such folder"),
    (["."], "holds no checkpoint"),
    ([], "the following arguments are required: RUN"),
    (["{run}", "--checkpoint", "checkpoint-epoch99.pth"], "checkpoint-epoch2.pth"),
    (["{run}/checkpoint-epoch2.pth", "--checkpoint", "best"], "--checkpoint: chooses in a run's folder"),
    (["{run}", "--checkpoint", "{other}"], "--checkpoint: {run} has no {other}"),
])
def test_a_mistake_is_one_line(args, said, run_copy, call_cli, tmp_path):
    (tmp_path / "checkpoint-epoch2.pth").touch()     # another run's
    names = {"run": str(run_copy), "other": str(tmp_path / "checkpoint-epoch2.pth")}
    done = call_cli(["-m", "tools.report", *(arg.format(**names) for arg in args)])
    assert done.returncode == 2
    assert said.format(**names) in done.stderr and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------- facts and figures, from numbers made here

def made_up(classes=10, each=8, experts=3, **more):
    """Facts of a run that never was: the common classes mostly right, the rare ones not."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    guess = rng.integers(0, classes, (experts, len(labels)))
    predictions = np.where(rng.random((experts, len(labels))) < 0.9 - 0.7 * labels / classes, labels, guess).T
    counts = [max(2, int(500 * 0.004 ** (i / (classes - 1)))) for i in range(classes)]
    right = predictions[:, 0] == labels
    result = {"accuracy": float(right.mean()), "many_shot_acc": 0.8, "medium_shot_acc": 0.5, "few_shot_acc": None,
              "many_class_num": 4, "medium_class_num": 3, "few_class_num": 0, "n_samples": len(labels),
              "per_class_acc": [float(right[labels == c].mean()) for c in range(classes)],
              "predictions": predictions[:, 0], "labels": labels, "confidences": rng.random(len(labels)),
              "expert_predictions": predictions, "expert_disagreement": 0.3,
              "expert_share": {"all": [0.6, 0.3, 0.1], "many": [0.9, 0.1, 0.0], "medium": None, "few": [0.2, 0.3, 0.5]}}
    history = [{"epoch": float(e), "loss": 3 / e, "val_loss": None, "accuracy": 1 - 1 / e, "val_accuracy": 0.5,
                "val_many_shot_acc": 0.9, "val_few_shot_acc": 0.1} for e in range(1, 6)]
    norms = {"nbn": {"scales": [1.2, 0.8], "expert": [0, 1], "weight": [3.0, 4.0], "bias": [0.0, 1e5]},
             "mabn": {"second": [[0.5, 1.0, 2.0]] * 3, "gradient": [[0.0, 0.0, 0.0]] * 3}}
    return RunFacts(more.pop("config", {}), result, counts, more.pop("class_names", None), history, norms)


def test_every_figure_is_drawn_with_a_sentence():
    shown = list(drawings(made_up()))
    assert [drawing.key for drawing in shown] == ["groups", "group_confusion", "classes", "training", "confusion",
                                                 "reliability", "experts", "expert_share", "nbn", "mabn"]
    for drawing in shown:
        assert drawing.text.endswith(".") and "nan" not in drawing.text
        svg = to_svg(drawing.draw(), drawing.heading)
        assert svg.startswith("<svg") and "var(--soft)" in svg
        assert not any(colour in svg for colour in LIGHT.values()), "a colour that can't follow the theme"


def test_any_name_can_be_drawn(recwarn, tmp_path):
    """Dollar signs are no formulas, scripts without a font no warnings, and long names leave the figure its room."""
    names = ["$1 $2", "$\\frac{$", "猫", "a_b", "x" * 200, *"fghij"]
    for drawing in drawings(made_up(class_names=names)):
        if drawing.key in ("classes", "confusion"):
            svg = to_svg(drawing.draw(), drawing.heading)
            assert "猫" in svg and "$1 $2" in svg and "x" * 21 + "…" in svg and "x" * 22 not in svg
            assert to_array(drawing.draw()).std() > 0
    assert not recwarn.list


def test_many_classes_take_no_square_of_memory():
    keys = [drawing.key for drawing in drawings(made_up(classes=400))]
    assert "confusion" not in keys and "group_confusion" in keys


def test_a_run_without_predictions_still_has_a_report():
    facts = made_up()
    facts.result = {"accuracy": 0.5, "many_shot_acc": 0.5, "many_class_num": 1}
    facts.history, facts.norms = [], {}
    assert [drawing.key for drawing in drawings(facts)] == ["groups"]


def test_where_images_end_up():
    facts = RunFacts({}, {"labels": np.array([0, 0, 1, 2, 2, 2, 2]), "predictions": np.array([0, 1, 1, 0, 0, 1, 2]),
                          "confidences": np.array([.9, .8, .9, .6, .7, .95, .5])}, [200, 50, 3])
    assert facts.flow()["few"] == {"right": 0.25, "many": 0.5, "medium": 0.25, "few": 0.0}
    assert facts.flow()["many"] == {"right": 0.5, "many": 0.0, "medium": 0.5, "few": 0.0}
    assert facts.confused_pairs(2) == [(2, 0, 2, 4), (0, 1, 1, 2)]
    assert facts.confusion().tolist() == [[1, 1, 0], [0, 1, 0], [2, 1, 1]]
    assert facts.hardest() == [5, 1, 4, 3]
    assert facts.hardest(of_a_kind=1) == [5, 1, 4]


def test_each_experts_accuracy_is_the_metrics():
    from model.metric import shot_accuracy
    facts = made_up(classes=30)
    for expert, column in enumerate(facts.image("expert_predictions").T):
        expected = shot_accuracy(column, facts.image("labels"), facts.counts)
        for key, values in facts.expert_accuracy().items():
            assert values[expert] == pytest.approx(expected[key])
    differ = facts.disagreement()
    assert (differ == differ.T).all() and (np.diag(differ) == 0).all()


def test_a_group_without_test_images_is_not_without_classes():
    bars = group_bars({"accuracy": 0.5, "many_shot_acc": 0.5, "many_class_num": 2, "medium_class_num": 3})
    assert [text.get_text() for text in bars.axes[0].texts] == ["50.0 %", "50.0 %", "untested", "no classes"]


def test_one_network_is_not_compared_with_itself():
    """A model of one expert may return that expert's logits too: they are the model's."""
    loader = DigitsLTDataLoader(batch_size=50, training=False, image_size=16)
    model = build_model({"type": "ResNet32Model", "args": {"num_classes": 10, "num_experts": 1}})
    assert "logits" in model(next(iter(loader))[0])
    result = evaluate(model, loader, keep=True, max_batches=1)
    assert "experts" not in [drawing.key for drawing in drawings(RunFacts({}, result, list(loader.cls_num_list)))]


def test_tensorboard_gets_the_same_figures():
    got = {}
    writer = SimpleNamespace(add_image=lambda tag, picture, step, dataformats: got.update({tag: (picture, step)}))
    facts = made_up()
    facts.norms = {}
    figures_to_tensorboard(writer, facts, 7)
    assert set(got) == {f"report/{drawing.key}" for drawing in drawings(facts)}
    picture, step = got["report/classes"]
    assert step == 7 and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert (picture[0, 0] == 255).all()


def test_norm_facts_are_the_layers():
    from logger.figures.norms import norm_facts
    from model.norm import convert_norm
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    assert norm_facts(plain) == {}
    mabn = norm_facts(convert_norm(plain, "MABN", B=2, real_B=4))["mabn"]
    assert mabn["second"] == [[1.0, 1.0, 1.0]] and len(mabn["gradient"]) == 1


def test_names_are_text_and_not_html(tmp_path):
    svg = to_svg(list(drawings(made_up(class_names=["<script>"] * 10)))[2].draw(), '"><script>')
    assert "<script>" not in svg
    from base.run_paths import RunPaths
    from tools.report_page import report_page
    name = "<script>alert('x')</script>"
    config = {"arch": {"type": "ResNet32Model"}, "loss": {"type": name}, "trainer": {"epochs": 1},
              "data_loader": {"type": "ImageFolderLTDataLoader", "args": {"data_dir": f"photos {name}"}}}
    run = SimpleNamespace(path=tmp_path / "checkpoint-epoch1.pth", config=config, checkpoint={"epoch": 0}, device="cpu",
                          model=None, about=list)
    loader = SimpleNamespace(raw_image=lambda index: np.zeros((4, 4, 3), np.uint8))
    facts = made_up(class_names=[name] * 10, config=config)
    page = report_page(facts, run, RunPaths(tmp_path, tmp_path), [], loader)
    assert "<script" not in page and page.count("&lt;script&gt;") > 10
    assert "<dd>0 of 1</dd>" in page, "epoch 0 is an epoch"


def test_users_matplotlib_settings_dont_leak_in():
    import matplotlib
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 30}):
        ours = to_array(next(iter(drawings(made_up()))).draw())
    assert np.array_equal(ours, to_array(next(iter(drawings(made_up()))).draw()))
