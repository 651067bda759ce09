"""python -m tools.predict: the same answers as the test loader's, from the checkpoint alone; open-set lists."""
import csv
import gc
import io
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tools.classify import (
    Prediction,
    classify,
    classify_list,
    detect,
    facts_of,
    find_images,
    read_open_set,
)
from tools.predict import main, parse, write_gallery
from tools.prediction_files import CsvWriter, as_line, rows
from utils.errors import ConfigError


@pytest.fixture(scope="module")
def photos(digits_run, tmp_path_factory):
    """Ten test digits as files, an unreadable one and one that is no image; (folder, test loader, the ten indices)."""
    from tools.opened import open_run
    loader = open_run(digits_run.checkpoint).loader("test")
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    chosen = list(range(0, loader.n_samples, loader.n_samples // 10))[:10]
    for n, index in enumerate(chosen):
        Image.fromarray(loader.raw_image(index)).save(folder / ("more" if n > 7 else ".") / f"{n}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff not much of a photo")
    (folder / "notes.txt").write_text("no image")
    return folder, loader, chosen


def test_nothing_that_is_read_is_written_over(tmp_path):
    for name in ("a.png", "model.pth"):
        (tmp_path / name).write_bytes(b"as it was")
    for flags, said in ((("--csv", "model.pth"), "--csv: .*model.pth is the checkpoint itself"),
                        (("--gallery", "a.png"), "--gallery: .*a.png is one of the images"),
                        (("--csv", "x", "--json", "x"), "--json: .*x is asked for twice")):
        flags = [str(tmp_path / flag) if not flag.startswith("--") else flag for flag in flags]
        with pytest.raises(ConfigError, match=said):
            main(["-r", str(tmp_path / "model.pth"), str(tmp_path), *flags])
    assert {file.read_bytes() for file in tmp_path.iterdir()} == {b"as it was"}


def test_another_size_is_taken_everywhere(digits_run, photos, tmp_path):
    """By predictions and open-set lists as by the test loader, and with it its crops."""
    from tools.cli import tool_parser
    from tools.opened import open_run
    folder, _, _ = photos
    overrides = tool_parser("x", "").parse_args(["--set", "data_loader.args.image_size=16", "--set",
                                                 "data_loader.args.crops=5"]).overrides
    run = open_run(digits_run.checkpoint, overrides=overrides)
    loader = run.loader("test")
    assert facts_of(run)["preprocess"] == loader.preprocess and loader.preprocess["image_size"] == 16
    (tmp_path / "list.txt").write_text(f"{folder}/0.png\n")
    run.config["data_loader"]["args"]["allow_outside"] = True
    seen = []
    run.model.register_forward_hook(lambda module, inputs, outputs: seen.append(tuple(inputs[0].shape)))
    classify_list(run, tmp_path / "list.txt", loader.views)
    assert seen == [(1, 3, 16, 16)] * 5


def test_folder_to_csv_json_and_gallery(digits_run, photos, tmp_path, run_cli):
    folder, loader, chosen = photos
    alone = tmp_path / "elsewhere.pth"  # no config.json beside it
    shutil.copy(digits_run.checkpoint, alone)
    out = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "png")}
    done = run_cli(["-m", "tools.predict", "-r", alone, folder, "-d", "cpu", "--csv", out["csv"], "--json", out["json"],
                    "--gallery", out["png"], "--topk", 3, "--batch_size", 4])
    assert "1 of 11 files couldn't be read" in done.stdout and "broken.jpg" in done.stdout
    assert done.returncode == 1 and done.stderr.startswith("1 of 11 files couldn't be read, such as ")
    assert done.stderr.count("\n") == 1 and "10 images, written to" in done.stdout

    table = list(csv.DictReader(out["csv"].open()))
    assert list(table[0])[:3] == ["path", "class", "probability"]
    assert [row["path"] for row in table] == [str(folder / f"{n}.png") for n in range(8)] + \
        [str(folder / "more" / f"{n}.png") for n in (8, 9)]

    from tools.opened import open_run
    run = open_run(digits_run.checkpoint)
    images = torch.cat([images for images, _ in loader])[chosen]
    with torch.no_grad():
        wanted = run.model(images)
    probabilities, classes = wanted["output"].softmax(1).max(1)
    names = run.data["class_names"]
    assert [row["class"] for row in table] == [names[c] for c in classes]
    assert np.allclose([float(row["probability"]) for row in table], probabilities, atol=1e-3)
    agreement = (wanted["logits"].argmax(2) == classes[:, None]).float().mean(1)
    assert np.allclose([float(row["agreement"]) for row in table], agreement, atol=1e-3)
    assert {row["experts"] for row in table} == {"3"}

    written = json.loads(out["json"].read_text())
    assert out["json"].read_text() == json.dumps(written, indent=2) + "\n"
    assert len(written["predictions"]) == 10 and written["predictions"][0]["class"] == table[0]["class"]
    assert [item["path"] for item in written["unreadable"]] == [str(folder / "broken.jpg")]
    with Image.open(out["png"]) as sheet:
        assert sheet.format == "PNG" and sheet.width > 500


@pytest.mark.parametrize("name, status, said", [("broken.jpg", 2, "broken.jpg"), ("gone.png", 2, "no such file"),
                                                ("empty", 2, "no image")])
def test_exit_status(digits_run, photos, call_cli, name, status, said):
    folder = photos[0]
    (folder / "empty").mkdir(exist_ok=True)
    done = call_cli(["-m", "tools.predict", "-r", digits_run.checkpoint, folder / name, "-d", "cpu"])
    assert done.returncode == status
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_files_of_another_time_arent_left_where_nothing_can_be_read(digits_run, tmp_path, call_cli):
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    (tmp_path / "none.png").write_bytes(b"none")
    (tmp_path / "photo.HEIC").touch()
    for name in ("out.json", "out.csv"):
        (tmp_path / name).write_text("before")
    done = call_cli(["-m", "tools.predict", "-r", digits_run.checkpoint, tmp_path, "-d", "cpu", "--json",
                     tmp_path / "out.json", "--csv", tmp_path / "out.csv"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "none of the 2 files could be read" in done.stderr
    assert "left out: 3 files not named as images are" in done.stdout and ".heic 1" in done.stdout
    text = (tmp_path / "out.json").read_text()
    written = json.loads(text)
    assert text == json.dumps(written, indent=2) + "\n"
    assert written["predictions"] == [] and "EPS, which isn't pixels" in str(written["unreadable"][0]["reason"])
    assert (tmp_path / "out.csv").read_text() == "path,class,probability\n"


@pytest.mark.parametrize("flag", ["--csv", "--json"])
def test_a_table_is_alone_on_stdout(digits_run, photos, tmp_path, run_cli, call_cli, flag):
    """Even where some files can't be read, another isn't an image, and the command writes other files besides."""
    other = {"--csv": "--json", "--json": "--csv"}[flag]
    done = run_cli(["-m", "tools.predict", "-r", digits_run.checkpoint, photos[0], "-d", "cpu", flag, "-", other,
                    tmp_path / "other"])
    call_cli(["-m", "tools.predict", "-r", digits_run.checkpoint, photos[0], "-d", "cpu", flag, tmp_path / "table"])
    assert done.stdout == (tmp_path / "table").read_text() and done.returncode == 1
    for said in ("broken.jpg", "left out: 1 file", f"10 images, written to {tmp_path / 'other'}"):
        assert said in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "table"]
    done = call_cli(["-m", "tools.predict", "-r", digits_run.checkpoint, photos[0] / "broken.jpg", "-d", "cpu", flag,
                     "-"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.fixture
def usual_collections():
    """Garbage is collected as often as outside these tests."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_memory_is_that_of_a_batch(tmp_path, usual_collections):
    """Not of all images: what is kept of each is its path."""
    pytest.importorskip("onnxruntime")
    from tests.tools.test_export import ABOUT, tiny_onnx
    tiny_onnx(tmp_path / "m.onnx", ABOUT)
    peaks, folder = [], tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    for count in (64, 128, 1128):       # the first of these warms up
        for n in range(1, count):
            if not (folder / f"{n}.png").exists():
                os.link(folder / "0.png", folder / f"{n}.png")
        tracemalloc.start()
        main(["-r", str(tmp_path / "m.onnx"), str(folder), "--csv", str(tmp_path / "x.csv"), "--json",
              str(tmp_path / "x.json"), "--batch_size", "16", "--num_workers", "1"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len((tmp_path / "x.csv").read_text().splitlines()) == count + 1
    assert (peaks[2] - peaks[1]) / 1000 < 500, peaks


def test_a_threshold_is_for_detectors(digits_run, photos, call_cli):
    done = call_cli(["-m", "tools.predict", "-r", digits_run.checkpoint, photos[0] / "0.png", "--threshold", "0.9"])
    assert done.returncode == 2 and "--threshold: is for detectors" in done.stderr


@pytest.mark.parametrize("flags", [[], ["--json", "found.json"]])
def test_outputs_that_arent_numbers_are_said(digits_run, photos, tmp_path, call_cli, flags):
    loaded = torch.load(digits_run.checkpoint, weights_only=True)
    loaded["state_dict"]["backbone.conv1.weight"].fill_(float("nan"))
    torch.save(loaded, tmp_path / "nan.pth")
    done = call_cli(["-m", "tools.predict", "-r", tmp_path / "nan.pth", photos[0] / "0.png", "-d", "cpu", *flags],
                    cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nan%" not in done.stdout
    assert "nan.pth: its outputs aren't finite numbers" in done.stderr and not (tmp_path / "found.json").exists()


@pytest.mark.parametrize("flags", [["--topk", "0"], ["--batch_size", "x"], ["--csv", "no/such/folder/x.csv"],
                                   ["--thresold", "0.5"], ["--threshold", "2"], ["--csv", ""]])
def test_wrong_flags_are_named(digits_run, flags):
    with pytest.raises(ConfigError, match="--thres" if "thres" in flags[0] else flags[0]):
        parse(["-r", str(digits_run.checkpoint), "a.png", *flags])


def test_paths_may_stand_on_both_sides_of_flags(digits_run):
    assert parse(["a.png", "-r", str(digits_run.checkpoint), "b.png", "--topk", "2", "c.png"]).paths == \
        ["a.png", "b.png", "c.png"]


def test_find_images(tmp_path):
    left = ["sub/@eaDir/c.webp", "__MACOSX/._a.png", "lost+found/e.png", "$RECYCLE.BIN/e.png",
            ".ipynb_checkpoints/e.png", "sub/System Volume Information/e.png", "sub/._c.webp"]
    for name in ("b.JPG", "a.png", ".hidden.png", "x.txt", "sub/c.webp", ".git/d.png", *left):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    found = find_images([str(tmp_path / "x.txt"), str(tmp_path), str(tmp_path / "a.png")])
    assert [path[len(str(tmp_path)) + 1:] for path in found] == ["x.txt", "a.png", "b.JPG", "sub/c.webp"]
    (tmp_path / "sub" / "back").symlink_to(tmp_path)
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "linked").symlink_to(tmp_path / "sub")
    other = []
    assert find_images([str(tmp_path / "album")], other) == [
        str(tmp_path / "album/linked" / name) for name in ("c.webp", "back/a.png", "back/b.JPG")]
    assert other == ["x.txt"]


def test_expert_assignment_tells_experts_used(photos):
    from data_loader.transforms import test_preprocess as preprocess
    from model.model import build_model
    torch.manual_seed(0)
    model = build_model({"type": "ResNet10EAModel", "args": {"num_classes": 4, "num_experts": 2}}).eval()
    paths = [str(photos[0] / f"{n}.png") for n in range(3)]
    steps = preprocess(32, (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        model.backbone.expert_help_pred_fc.bias.fill_(-100)
        lazy = classify(model, paths, steps, topk=9, batch_size=2)
        model.backbone.expert_help_pred_fc.bias.fill_(100)
        eager = classify(model, paths, steps, batch_size=2, threads=0)
    assert [one.experts for one in lazy.found + eager.found] == [1, 1, 1, 2, 2, 2]
    assert all(one.agreement is None and len(one.classes) == 4 for one in lazy.found)
    assert "1 of 2 experts used" in as_line(rows(lazy.found, None)[0], 5, 2)


class Finder(torch.nn.Module):
    """Finds one thing of class 2 in the left half of every picture, and one that it isn't sure of."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        _, height, width = images[0].shape
        boxes = torch.tensor([[0.0, 0, width / 2, height], [0, 0, 4, 4]])
        return {"detections": [{"boxes": boxes, "labels": torch.tensor([2, 1]), "scores": torch.tensor([0.9, 0.1]),
                                "masks": torch.ones(2, 1, height, width)}]}


def test_detections_become_rows_and_pictures(photos, tmp_path):
    from tools.gallery import gallery
    done = detect(Finder(), find_images([str(photos[0])]), threshold=0.5, threads=0, masks=4)
    assert ["masks" in found for _, found in done.found] == [True] * 4 + [False] * 6
    table = rows(done.found, ["cat", "dog"])
    assert len(table) == 10 and len(done.unreadable) == 1
    assert {key: table[0][key] for key in ("class", "left", "right")} == {"class": "dog", "left": 0.0, "right": 16.0}
    assert gallery(done.found, ["cat", "dog"], str(tmp_path / "sheet.png")) == 10
    nothing = detect(Finder(), [str(photos[0] / "0.png")], threshold=0.95)
    assert rows(nothing.found, None) == [{"path": str(photos[0] / "0.png"), "class": None, "probability": None}]


def test_a_full_gallery_says_how_many_are_on_it(digits_run, tmp_path, call_cli):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    for n in range(1, 125):
        os.link(tmp_path / "0.png", tmp_path / f"{n}.png")
    done = call_cli(["-m", "tools.predict", "-r", digits_run.checkpoint, tmp_path, "-d", "cpu", "--gallery",
                     tmp_path / "sheet.png"], check=True)
    assert done.stdout == f"the first 120 of 125 images, written to {tmp_path / 'sheet.png'}\n"


def test_half_a_gallery_is_never_left(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    sheet = tmp_path / "sheet.png"
    sheet.write_bytes(b"before")

    def full(self, file, **more):
        file.write(b"half") if hasattr(file, "write") else Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ConfigError, match=r"sheet\.png: can't be written: No space"):
        write_gallery(sheet, [Prediction(str(tmp_path / "a.png"), [0], [1.0])], ["ant"])
    assert sheet.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 2


def test_csv_of_different_rows():
    found = [Prediction("a,b.png", [1, 0], [0.75, 0.25]), Prediction("c.png", [0], [1.0], 3, 1 / 3)]
    written = CsvWriter(io.StringIO())
    for one in found:
        written.add(rows([one], ["x", "y"]))
    written.end([])
    lines = written.handle.getvalue().splitlines()
    assert lines[0] == "path,class,probability,experts,agreement,class_2,probability_2"
    assert lines[1] == '"a,b.png",y,0.750000,1,,x,0.250000' and lines[2] == "c.png,x,1.000000,3,0.333333,,"


# ---------------------------------------------------------------------- open-set lists

def test_open_set_list(photos, tmp_path):
    folder = photos[0]
    file = folder / "list.txt"
    file.write_bytes(b"\xef\xbb\xbf0.png\r\n1.png -1\r\n\r\nmore/8.png\t-1\r\n0.png\r\n")
    assert read_open_set(file) == [str(folder / name) for name in ("0.png", "1.png", "more/8.png")]
    elsewhere = tmp_path / "list.txt"
    elsewhere.write_text("more/8.png\n")
    assert read_open_set(elsewhere, str(folder)) == [str(folder / "more" / "8.png")]
    for text, said in (("0.png 3\n", "line 1: the label is 3"), ("", "lists no image"), ("0.png\ngone.png", "line 2"),
                       ("../x.png", "outside")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_open_set(file)


def test_open_set_through_test_py(digits_run, photos, tmp_path, call_cli):
    shutil.copy(digits_run.checkpoint, tmp_path / "model.pth")
    file = photos[0] / "others.txt"
    file.write_text("".join(f"{n}.png -1\n" for n in range(5)))
    call_cli(["test.py", "-r", tmp_path / "model.pth", "-d", "cpu", "--open_set", file, "--open_threshold", "0.3"],
             check=True)
    found = json.loads((tmp_path / "test_metrics.json").read_text())["open_set"]
    assert found["unknown_images"] == 5 and found["threshold"] == 0.3 and 0 <= found["f_measure"] <= 1
