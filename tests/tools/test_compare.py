"""The table of runs: what each row says, what is put together, and what broken folders do."""

import csv
import json
import os

import pytest

from tools.compare import arrange, compare, mean_row, published_rows
from tools.keep import check_figures
from tools.results import readme_table
from tools.run_table import COLUMNS, cell, csv_table, frame, html_table, markdown_table, text_table
from tools.runs import data_of, find_runs, method_of
from utils.config.read import read_json
from utils.errors import ConfigError

CONFIG = {"name": "ce", "seed": 0, "arch": {"type": "ResNet32Model", "args": {"num_classes": 10}},
          "data_loader": {"type": "DigitsLTDataLoader", "args": {"batch_size": 32}},
          "optimizer": {"type": "SGD", "args": {"lr": 0.1}}, "loss": {"type": "CrossEntropyLoss", "args": {}},
          "trainer": {"epochs": 3, "save_dir": "saved/"}}


def make_run(top, run_id, seed=0, accuracy=None, name="ce", val=None, epochs=3, **config):
    """A run's folders as training and test.py leave them, without weights."""
    models, log = (top / part / name / run_id for part in ("models", "log"))
    models.mkdir(parents=True)
    log.mkdir(parents=True)
    (models / "config.json").write_text(json.dumps({**CONFIG, "name": name, "seed": seed, **config}))
    (models / f"checkpoint-epoch{epochs}.pth").write_bytes(b"")
    rows = "".join(f"{e},0.1,1.0,1.0,0.5,{'' if val is None else val}\n" for e in range(1, epochs + 1))
    (log / "metrics.csv").write_text(f"epoch,lr,loss,val_loss,accuracy,val_accuracy\n{rows}")
    (log / "timing.csv").write_text("epoch,seconds,images_per_second\n1,60.0,100.0\n2,30.0,300.0\n3,30.0,200.0\n")
    if accuracy is not None:
        (models / "test_metrics.json").write_text(json.dumps({
            "accuracy": accuracy, "many_shot_acc": accuracy, "medium_shot_acc": None, "few_shot_acc": accuracy / 2,
            "ece": 0.1, "n_samples": 500}))
    return models


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three seeds of one method, a better one that is untested, and three broken folders."""
    top = tmp_path_factory.mktemp("compare")
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        make_run(top, f"seed{seed}", seed, accuracy)
    make_run(top, "fast", val=0.9, name="ride", epochs=2, loss={"type": "RIDELoss", "args": {}},
             arch={"type": "ResNet32Model", "args": {"num_experts": 3, "num_classes": 10, "add_bt": 1}})
    (make_run(top, "cut") / "config.json").write_text("{\"name\": ")
    (make_run(top, "odd", accuracy=0.1) / "test_metrics.json").write_text("[1]")
    (make_run(top, "bare") / "config.json").unlink()
    return top


@pytest.fixture(scope="module")
def compared(saved, call_cli):
    files = {kind: saved / f"table.{kind}" for kind in ("csv", "markdown", "html")}
    done = call_cli(["-m", "tools.compare", saved, *(x for kind, path in files.items() for x in (f"--{kind}", path))],
                    check=True)
    return done.stdout, files


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_each_run_has_a_row(compared):
    text, _ = compared
    assert text.index("ride/fast") < text.index("ce/seed0"), "the best comes first"
    (row,) = lines_of(text, "ride/fast")
    assert "RIDE, 3 experts + BatchFormer" in row and "90.0" in row
    assert "validation figures, 2 of 3 epochs" in row
    (row,) = lines_of(text, "ce/seed1")
    assert "60.0" in row and "2 min 00 s" in row and "200" in row and "0.46" in row


def test_seeds_are_put_together(compared):
    (row,) = lines_of(compared[0], "mean of 3 seeds")
    assert "60.0 ± 10.0" in row and "30.0 ± 5.0" in row and "0, 1, 2" in row


def test_a_detectors_average_precisions_have_columns(tmp_path):
    """In place of empty accuracies; tables without detectors have none of these."""
    detector = {"arch": {"type": "MaskRCNNR50FPNModel", "args": {}}, "data_loader": {"type": "CocoDataLoader",
                                                                                     "args": {"data_dir": "x"}}}
    for seed, ap in enumerate((0.25, 0.5)):
        models = make_run(tmp_path / "boxes", f"seed{seed}", seed, name="coco", **detector)
        (models / "test_metrics.json").write_text(json.dumps({
            "bbox_AP": ap, "bbox_AP50": 0.75, "bbox_AP75": 0.125, "segm_AP": 0.375, "bbox_AP_many": None,
            "bbox_AP_medium": None, "bbox_AP_few": 0.0625, "n_samples": 5}))
    table, _ = compare(tmp_path, costs=False, published="none")
    head, _, *lines = text_table(table).splitlines()
    assert [word for word in ("all %", "ECE %", "AP many") if word in head] == []
    assert all(word in head for word in ("box AP %", "AP50", "AP75", "AP few", "mask AP %"))
    assert "25.0" in lines[0] and "50.0" in lines[1] and "37.5 ± " in lines[2] and "Mask R-CNN" in lines[0]
    assert float(list(csv.DictReader(csv_table(table).splitlines()))[1]["ap"]) == 0.5
    with pytest.raises(ConfigError, match=r"config\.json: that run is a detector's, and README's table holds"):
        readme_table(table.to_dict("records"))
    make_run(tmp_path / "classes", "a", accuracy=0.5)
    plain = compare(tmp_path / "classes", costs=False, published="none")[0]
    assert "AP" not in text_table(plain) and "ap50" not in csv_table(plain)
    assert "all %" in text_table(compare(tmp_path, costs=False, published="none")[0])


def test_broken_runs_are_skipped_with_a_reason(compared):
    text, _ = compared
    skipped = lines_of(text, "skipped")
    assert len(skipped) == 3 and "Traceback" not in text
    assert any("ce/cut" in line and "JSON" in line for line in skipped)
    assert any("ce/odd" in line and "test_metrics.json" in line for line in skipped)
    assert any("ce/bare" in line and "no config.json" in line for line in skipped)


@pytest.mark.parametrize("change", [
    {"arch": {"type": 5}}, {"arch": {"type": "ResNet32Model", "args": [1]}}, {"loss": [1]}, {"seed": 1.5},
    {"arch": {"type": "ResNet32Model", "args": {"num_experts": "three"}}}, {"trainer": {"epochs": "many"}},
    {"groups": 5}, {"data_loader": {"type": "DigitsLTDataLoader", "args": "x"}}])
def test_a_config_with_anything_in_it_is_skipped(tmp_path, change):
    make_run(tmp_path, "odd", **change)
    make_run(tmp_path, "good", accuracy=0.5)
    runs, skipped = find_runs(tmp_path)
    assert [run.name for run in runs] == ["ce/good"]
    assert len(skipped) == 1 and "ce/odd/config.json: a value in it" in skipped[0]


def test_figures_with_anything_in_them_are_skipped(tmp_path):
    for number, figures in enumerate(({"classifier": "tau", "tau": "x"}, {"expert_share": [1]}, {"accuracy": {}})):
        (make_run(tmp_path, f"odd{number}") / "test_metrics.json").write_text(json.dumps(figures))
    table, skipped = compare(tmp_path, costs=False, published="none")
    assert len(skipped) == 2 and table["run"].tolist() == ["ce/odd2"] and table["all"].isna().all()


def test_files(compared):
    _, files = compared
    rows = list(csv.DictReader(files["csv"].open()))
    (mean,) = (row for row in rows if row["kind"] == "mean")
    assert float(mean["all"]) == pytest.approx(0.6) and float(mean["all_sd"]) == pytest.approx(0.1)
    assert mean["medium"] == ""
    assert "| **mean of 3 seeds** |" in files["markdown"].read_text()
    html = files["html"].read_text()
    assert "ride/fast" in html and '<td class="num best">90.0</td>' in html and "<script" not in html


def test_markdown_to_stdout_sorted(saved, call_cli):
    done = call_cli(["-m", "tools.compare", saved, "--markdown", "-", "--sort", "seconds", "--no_costs",
                     "--only_means"], check=True)
    assert "| ride/fast |" in done.stdout and "ce/seed0" not in done.stdout


def test_a_form_without_a_file_is_printed_alone(saved, call_cli, tmp_path):
    page = tmp_path / "runs.html"
    done = call_cli(["-m", "tools.compare", saved, "--no_costs", "--html", page, "--csv"], check=True)
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert {"ride/fast", "ce/seed0"} <= {row["run"] for row in rows} and len(rows) + 1 == done.stdout.count("\n")
    assert page.is_file() and f"written to {page}" in done.stderr


@pytest.mark.parametrize("args, said", [
    (["{saved}", "--csv", "--html"], "only one of them can be printed"),
    (["nowhere"], "nowhere: no such folder"), (["{empty}"], "holds no runs"),
    (["{saved}", "--sort", "fwe"], "did you mean 'few'?"), (["{saved}", "--cvs", "x"], "--cvs"),
    (["{saved}", "--csv", "x", "--markdown", "./x"], "--csv, --markdown, --html: need a file each"),
    (["{saved}", "--readme", "--csv", "x"], "--csv: is of the whole table, which --readme leaves out"),
    (["{saved}", "--curves", "x.png", "--markdown", "x"], "--markdown: is of the whole table, which --curves"),
])
def test_a_mistake_is_one_line(args, said, saved, call_cli, tmp_path):
    names = {"{saved}": str(saved), "{empty}": str(tmp_path)}
    done = call_cli(["-m", "tools.compare", *(names.get(arg, arg) for arg in args)])
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------- rows

TIMM = {"arch": {"type": "TimmModel", "args": {"model_name": "resnet18"}}}


@pytest.mark.parametrize("change, said", [
    ({}, "CE"),
    ({"loss": {"type": "LDAMLoss", "args": {"reweight_epoch": 160}}}, "LDAM-DRW"),
    ({"load_crt": "x.pth"}, "CE + cRT"),
    ({"load_crt": "x.pth", "arch": {"type": "ResNet32Model", "args": {"classifier": "lws"}}}, "CE + LWS"),
    ({"arch": {"type": "ResNet50Model", "args": {"norm": "NBN"}}}, "CE + NBN"),
    ({"arch": {"type": "ResNet50Model", "args": {"norm": {"type": "MABN", "args": {"normalization_batch_size": 2}}}}},
     "CE + MABN by 2"),
    ({"arch": {"type": "ResNet32EAModel", "args": {"num_experts": 3}},
      "data_loader": {"type": "DigitsLTDataLoader", "args": {"balanced": True}}}, "RIDE + EA, 3 experts"),
    ({"data_loader": {"type": "DigitsLTDataLoader", "args": {"sampler": {"type": "SquareRoot"}}}},
     "CE + square-root sampling"),
    ({"loss": {"type": "BalPoELoss"}, "arch": {"type": "ResNet32Model", "args": {"num_experts": 3}},
      "optimizer": {"type": "Muon"}, "data_loader": {"type": "DigitsLTDataLoader", "args": {
          "augment": "autoaugment", "mix": {"type": "mixup", "alpha": 0.4}}}},
     "BalPoE, 3 experts + mixup + AutoAugment + Muon"),
    ({**TIMM, "trainer": {"epochs": 30, "freeze": {"until": "epoch 30"}}}, "CE + frozen backbone"),
    ({**TIMM, "trainer": {"epochs": 40, "freeze": {"until": "epoch 30"}}}, "CE + fine-tuning"),
    ({"arch": {"type": "TimmModel", "args": {"model_name": "resnet18", "weights": False}}}, "CE"),
    ({"arch": {"type": "TimmModel", "args": {"model_name": "vit_small", "tuning": "LoRA"}}}, "CE + LoRA"),
])
def test_methods_have_their_usual_names(change, said):
    assert method_of({**CONFIG, **change}) == said


def test_data_sets_have_their_usual_names():
    def name(kind, **args):
        return data_of({"data_loader": {"type": kind, "args": args}})
    assert name("ImbalanceCIFAR100DataLoader", imb_factor=0.01) == "CIFAR-100-LT"
    assert name("ImbalanceCIFAR100DataLoader", imb_factor=0.1) == "CIFAR-100-LT 0.1"
    assert name("ImageFolderLTDataLoader", data_dir="photos/birds/") == "birds"


def test_only_the_seed_may_differ(tmp_path):
    make_run(tmp_path, "a", 0, 0.5)
    make_run(tmp_path, "b", 1, 0.5, optimizer={"type": "SGD", "args": {"lr": 0.2}})
    make_run(tmp_path, "c", 0, 0.7)
    from tools.compare import row_of
    runs, _ = find_runs(tmp_path)
    table = arrange([row_of(run, costs=False) for run in runs])
    assert len(table) == 3 and (table["kind"] == "run").all(), "another rate, and the same seed twice"


def test_how_fast_it_went_does_not_matter(tmp_path):
    make_run(tmp_path, "a", 0, 0.5, trainer={**CONFIG["trainer"], "amp": "bf16"})
    make_run(tmp_path, "b", 1, 0.7, trainer={**CONFIG["trainer"], "compile": "layers", "amp": "auto"},
             data_loader={"type": "DigitsLTDataLoader", "args": {"batch_size": 32, "num_workers": 4}})
    from tools.compare import row_of
    runs, _ = find_runs(tmp_path)
    table = arrange([row_of(run, costs=False) for run in runs])
    assert list(table["kind"]) == ["run", "run", "mean"] and table["all"].iloc[-1] == pytest.approx(0.6)


def test_a_mean_of_validation_figures_says_so(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, f"s{seed}", seed, val=0.5)
    table, _ = compare(tmp_path, published="none", only_means=True, costs=False)
    assert list(table["note"]) == ["validation figures, ± is the sample standard deviation"]
    with pytest.raises(ConfigError, match="has no test figures"):
        readme_table(table.to_dict("records"))


def test_a_mean_needs_every_run_to_have_the_figure():
    rows = [{"run": str(seed), "seed": str(seed), **{c.key: 0.5 for c in COLUMNS if c.spread}, "class_mean": None,
             "macro_f1": 0.1, "images_per_s": None, "seconds": 5.0} for seed in (0, 1)]
    rows[1]["few"] = None
    mean = frame([mean_row(frame(rows))]).iloc[0]
    assert mean["few"] is None and mean["all_sd"] == 0 and mean["seconds"] == 5.0


def test_published_rows_say_so():
    rows = published_rows({"CIFAR-100-LT"})
    assert rows and all(row["kind"] == "published" for row in rows)
    assert "published [RIDE]" in text_table(arrange(rows))
    assert "*48.6*" in markdown_table(arrange(rows)) and "Wang et al." in markdown_table(arrange(rows))
    for row in published_rows(None):
        assert row["source"] and 0 < row["all"] < 1
    assert published_rows({"Digits-LT"}) == []


def test_unknown_is_a_dash():
    assert {cell({}, column) for column in COLUMNS} == {"-"}


def test_a_figure_of_zero_is_a_figure(tmp_path):
    """0 % stands after what is better and before what isn't known, whatever column the table is sorted by."""
    for run_id, seed, accuracy in (("zero", 0, 0.0), ("good", 1, 0.4), ("untested", 2, None)):
        make_run(tmp_path, run_id, seed, accuracy, loss={"type": "FocalLoss", "args": {"gamma": seed}})
    from tools.compare import row_of
    rows = [row_of(run, costs=False) for run in find_runs(tmp_path)[0]]
    for column in COLUMNS:
        arranged = arrange(rows, column.key)["run"].tolist()
        assert len(arranged) == 3
        if column.key in ("all", "many", "few"):
            assert arranged == ["ce/good", "ce/zero", "ce/untested"]
    assert arrange(rows)["all"].tolist()[1] == 0.0


def test_what_people_name_things_runs_nowhere():
    """A run's name is text in the page, in the CSV and in the Markdown table."""
    name = "=1+1 <script>alert(1)</script> | x"
    table = frame([{"run": name, "kind": "run", "data": "a", "all": 0.5}])
    page = html_table(table, "<b>Runs</b>")
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>Runs" not in page
    assert next(csv.DictReader(csv_table(table).splitlines()))["run"] == f"'{name}"
    assert r"\| x" in markdown_table(table)


def test_help_comes_at_once(run_cli):
    """pandas is imported where a table is made, not where --help is asked for."""
    done = run_cli(["-X", "importtime", "-m", "tools.compare", "--help"], check=True)
    assert "pandas" not in done.stderr and "torch" not in done.stderr


@pytest.mark.parametrize("more, said", [
    ({"changed": ["use_experts=2"]}, "CE, use_experts=2"),
    ({"calibration": {"temperature": 2.0}, "chosen_on": "test"}, "CE, calibrated, chosen on the test images"),
    ({"calibration": {"temperature": 2.0}}, "CE, calibrated"),
    ({"prior": "estimate", "expert_weights": [0.2, 0.8]}, "CE, prior estimate, learned expert weights")])
def test_another_evaluation_is_no_seed_of_the_runs_own(tmp_path, more, said):
    plain, other = make_run(tmp_path, "plain", 0, 0.5), make_run(tmp_path, "other", 1, 0.6)
    file = other / "test_metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    table, _ = compare(tmp_path, costs=False, published="none")
    assert table["kind"].tolist() == ["run", "run"]
    assert dict(zip(table["run"], table["method"]))[f"ce/{other.name}"] == said
    with pytest.raises(ConfigError, match=f"are of another evaluation than the checkpoint's own .*{said[4:9]}"):
        check_figures(file, read_json(file, "figures"), other / "checkpoint-epoch3.pth")
    check_figures(plain / "test_metrics.json", {}, plain / "checkpoint-epoch3.pth")


def test_figures_of_an_epoch_that_the_run_has_left_are_not_its_own(tmp_path):
    models = make_run(tmp_path, "on", accuracy=0.1, val=0.9)
    file = models / "test_metrics.json"
    for name, accuracy, note in (("checkpoint-epoch1.pth", 0.9, "validation figures"),
                                 ("checkpoint-epoch3.pth", 0.1, ""),
                                 ("model_best.pth", 0.1, "best epoch, picked on the test images"),
                                 ("checkpoint-epoch9.pth", 0.9, "validation figures")):
        file.write_text(json.dumps({**json.loads(file.read_text()), "checkpoint": name}))
        row, = compare(tmp_path, costs=False, published="none")[0].to_dict("records")
        assert (row["all"], row["note"]) == (accuracy, note)


def test_figures_older_than_the_best_epoch_are_not_its_own(tmp_path):
    models = make_run(tmp_path, "on", accuracy=0.1, val=0.9)
    file, best = models / "test_metrics.json", models / "model_best.pth"
    file.write_text(json.dumps({**json.loads(file.read_text()), "checkpoint": best.name}))
    best.touch()
    for age, accuracy in ((1, 0.9), (-1, 0.1)):
        os.utime(file, (best.stat().st_mtime - age,) * 2)
        row, = compare(tmp_path, costs=False, published="none")[0].to_dict("records")
        assert row["all"] == accuracy and ("validation figures" in row["note"]) is (age > 0)


@pytest.mark.parametrize("loader, said", [
    ({"type": "DigitsLTDataLoader", "args": {"validation": "test"}}, "best epoch, picked on the test images"),
    ({"type": "DigitsLTDataLoader", "args": {"validation": "holdout"}}, "best epoch"),
    ({"type": "ImageNetLTDataLoader", "args": {}}, "best epoch"),
    ({"type": "ImageFolderLTDataLoader", "args": {"data_dir": "x"}},
     "best epoch, picked on the test images unless there are validation images")])
def test_the_best_epoch_is_no_seed_of_the_last(tmp_path, loader, said):
    for seed, name in enumerate(("checkpoint-epoch3.pth", "model_best.pth")):
        file = make_run(tmp_path, name, seed, 0.5, data_loader=loader) / "test_metrics.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "checkpoint": name}))
    table, _ = compare(tmp_path, costs=False, published="none")
    assert dict(zip(table["run"], table["note"])) == {"ce/checkpoint-epoch3.pth": "", "ce/model_best.pth": said}


@pytest.mark.parametrize("key", ["load_crt", "distill_checkpoint", "origin"])
def test_second_stages_of_several_methods_are_not_one(tmp_path, key):
    """What began from a run that isn't there any more counts as before: as any other, if only one method is known."""
    first = {name: make_run(tmp_path / "first", name, loss={"type": kind, "args": {}}) / "checkpoint-epoch3.pth"
             for name, kind in (("ce", "CrossEntropyLoss"), ("bs", "BalancedSoftmaxLoss"))}
    gone = tmp_path / "gone/checkpoint-epoch3.pth"
    for seed, source in enumerate((first["ce"], first["ce"], gone)):
        named = {} if key == "origin" else {key: str(source)}
        models = make_run(tmp_path / "second", f"s{seed}", seed, 0.5, name="crt", **named)
        if key == "origin":
            (models / "origin.json").write_text(json.dumps({"checkpoint": str(source)}))
    table, _ = compare(tmp_path / "second", costs=False, published="none", only_means=True)
    assert table["run"].tolist() == ["mean of 3 seeds"] and "began" not in table["note"][0]
    if key == "origin":
        (models / "origin.json").write_text(json.dumps({"checkpoint": str(first["bs"])}))
    else:
        (models / "config.json").write_text(json.dumps({**CONFIG, "name": "crt", "seed": 2, key: str(first["bs"])}))
    table, _ = compare(tmp_path / "second", costs=False, published="none", only_means=True)
    assert {row["run"]: row["note"] for row in table.to_dict("records")} == {
        "mean of 2 seeds": "began from CE, ± is the sample standard deviation", "crt/s2": "began from balanced softmax"}


def test_second_stages_of_shorter_first_ones_are_not_one(tmp_path):
    """One method, but trained otherwise; another seed of it makes no difference."""
    for seed, (epochs, rate) in enumerate(((200, 0.1), (200, 0.1), (3, 0.001))):
        first = make_run(tmp_path / "first", f"s{seed}", seed, trainer={"epochs": epochs},
                         optimizer={"type": "SGD", "args": {"lr": rate}})
        make_run(tmp_path / "second", f"s{seed}", seed, 0.5, name="crt", load_crt=str(first / "checkpoint-epoch3.pth"))
    table, _ = compare(tmp_path / "second", costs=False, published="none", only_means=True)
    assert {row["run"]: row["note"] for row in table.to_dict("records")} == {
        "mean of 2 seeds": "began from CE with other settings, ± is the sample standard deviation",
        "crt/s2": "began from CE with other settings"}


def test_a_first_stage_whose_config_is_broken_is_unknown(tmp_path):
    first = make_run(tmp_path / "first", "s0", trainer=[1]) / "checkpoint-epoch3.pth"
    make_run(tmp_path / "second", "s0", 0, 0.5, name="crt", load_crt=str(first))
    (run,) = find_runs(tmp_path / "second")[0]
    assert (run.origin, run.trained_first) == (None, None)
    assert compare(tmp_path / "second", costs=False, published="none")[0]["run"].tolist() == ["crt/s0"]


def test_a_mean_has_the_mean_cost():
    rows = [{"run": f"s{seed}", "kind": "run", "same": "a", "seed": str(seed), "gflops": gflops, "data": "d",
             "all": 0.5} for seed, gflops in enumerate((0.1, 0.2))]
    assert arrange(rows).iloc[-1]["gflops"] == pytest.approx(0.15)


def test_runs_on_cached_features_have_no_speed(tmp_path):
    """Epochs on features would be counted beside those on images."""
    for name, cached in (("plain", False), ("cached", True)):
        make_run(tmp_path, name, accuracy=0.5, trainer={"epochs": 3, "cache_features": cached})
    speeds = {run.name: run.images_per_second for run in find_runs(tmp_path)[0]}
    assert speeds == {"ce/plain": 200.0, "ce/cached": None}


def test_other_groups_are_named(tmp_path):
    """Accuracies of groups with other limits aren't those of the published rows: the note says which they are."""
    from tools.compare import row_of
    make_run(tmp_path, "own", accuracy=0.5, groups={"many": 50, "few": 10})
    make_run(tmp_path, "usual", accuracy=0.5, groups={"many": 100, "few": 20})
    notes = {run.name: row_of(run, costs=False)["note"] for run in find_runs(tmp_path)[0]}
    assert notes == {"ce/own": "many over 50, few under 10", "ce/usual": ""}


def test_zero_epochs_are_a_number(tmp_path):
    from tools.compare import row_of
    models = make_run(tmp_path, "new", epochs=0)
    (models / "checkpoint-epoch0.pth").unlink()
    (models / "model_best.pth").touch()
    assert row_of(find_runs(tmp_path)[0][0], costs=False)["epochs"] == 0
