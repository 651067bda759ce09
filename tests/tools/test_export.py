"""python -m tools.export: one file that gives what the model gives, for any batch, and says how to feed it."""
import csv
import json
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tools import export, predict
from tools.classify import classify
from tools.exported import is_exported, open_exported
from utils.checkpoint.store import load_checkpoint
from utils.errors import ConfigError, RunError

ROOT = Path(__file__).resolve().parents[2]
PREPROCESS = {"image_size": 32, "resize": 32, "crop": False, "interpolation": "bilinear", "mean": [0.5] * 3,
              "std": [0.25] * 3}


def small_run(kind="ResNet10Model", **args):
    from model.model import build_model
    torch.manual_seed(0)
    arch = {"type": kind, "args": {"num_classes": 5, **args}}
    model = build_model(arch).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    config = {"arch": arch, "name": "small"}
    return SimpleNamespace(path=Path("model.pth"), config=config, model=model, temperature=1.0,
                           checkpoint={"data": {"preprocess": PREPROCESS, "class_names": list("abcde")}})


def test_onnx_of_a_run(digits_run, tmp_path, run_cli, call_cli):
    """The command, the file, and the program that the page on own data shows for it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shutil.copy(digits_run.checkpoint, tmp_path / "checkpoint.pth")
    done = run_cli(["-m", "tools.export", "-r", tmp_path / "checkpoint.pth", "--format", "onnx", "-d", "cpu"],
                   check=True)
    assert done.stderr == "" and float(re.search(r"difference from PyTorch: (\S+)", done.stdout)[1]) < 1e-4
    said = [line for line in done.stdout.splitlines() if not line.startswith("Applied")]   # onnxscript 0.6 says that
    assert said[0].startswith("largest difference")     # nothing of what the exporters log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "model.onnx"]

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for n in (1, 7):
        answer, = session.run(None, {"images": np.zeros((n, 3, 32, 32), np.float32)})
        assert answer.shape == (n, 10)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == [str(n) for n in range(10)]
    assert json.loads(about["preprocess"])["image_size"] == 32 and about["arch"] == "ResNet32Model"

    from tools.opened import open_run
    run = open_run(digits_run.checkpoint)
    Image.fromarray(run.loader("test").raw_image(3)).save(tmp_path / "photo.jpg")
    (tmp_path / "shown.py").write_text(shown_program())
    said = run_cli([tmp_path / "shown.py"], cwd=tmp_path, check=True).stdout.strip()
    found = classify(run.model, [str(tmp_path / "photo.jpg")], run.data["preprocess"]).found[0]
    assert said == str(found.classes[0])

    call_cli(["-m", "tools.predict", "-r", tmp_path / "model.onnx", tmp_path / "photo.jpg", "--csv",
              tmp_path / "x.csv"], check=True)
    (row,) = csv.DictReader((tmp_path / "x.csv").open())
    assert row["class"] == said and float(row["probability"]) == pytest.approx(found.probabilities[0], abs=1e-4)
    assert row["experts"] == "" == row["agreement"], "the file doesn't say how many there were"


def shown_program(kind="onnx"):
    """The program that the page on own data shows for an ONNX file, or for a `.pt2` with the lines that it gives."""
    program, lines = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-data.md").read_text(), re.DOTALL)
    if kind == "pt2":
        opening, answer = lines.rsplit("\n\n", 1)
        program = program.replace("import onnxruntime\n", "")
        program = re.sub(r"session = .*\nabout = .*\n", lambda _: f"{opening}\n", program)
        program = re.sub(r"logits = session.*\n", lambda _: answer, program)
        assert "session" not in program
    return program


def photo_file(path, kind):
    """A photo of 1283 x 961 pixels with fine detail, or another shape, as the file `path`, whatever its extension."""
    shape = {"panorama": (181, 1283), "small": (30, 41)}.get(kind, (961, 1283))
    grey = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    grey = np.maximum(grey // 2, np.linspace(0, 255, shape[1]).astype(np.uint8)[None, :, None])
    image, exif = Image.fromarray(grey), Image.Exif()
    exif[0x0112] = 6 if kind in ("turned", "tiff") else 1
    if kind == "wide grey":
        image = Image.fromarray(grey[..., 0].astype(np.uint16) * 257)
    elif kind in ("CMYK", "RGBA", "L", "LA"):
        image = image.convert(kind)
    form = {"wide grey": "PNG", "RGBA": "PNG", "LA": "PNG", "tiff": "TIFF", "MPO": "MPO"}.get(kind, "JPEG")
    image.save(path, form, exif=exif, **({"save_all": True, "append_images": [image]} if form == "MPO" else {}))


@pytest.mark.parametrize("more", [{}, {"squash": True}, {"crop": False, "resize": 48}, {"interpolation": "bicubic"}],
                         ids=str)
@pytest.mark.parametrize("kind", ["plain", "turned", "wide grey", "panorama", "small", "CMYK", "RGBA", "L", "LA",
                                  "tiff", "MPO"])
def test_the_program_shown_sees_what_predict_sees(kind, more, tmp_path, monkeypatch):
    """On photos as cameras write them: decoded smaller, on their side, of other modes and shapes."""
    onnxruntime = pytest.importorskip("onnxruntime")
    preprocess = {**PREPROCESS, "image_size": 48, "resize": 55, "crop": True, **more}
    tiny_onnx(tmp_path / "model.onnx", {**ABOUT, "preprocess": json.dumps(preprocess)}, size=48)
    photo_file(tmp_path / "photo.jpg", kind)
    monkeypatch.chdir(tmp_path)
    seen, session = [], onnxruntime.InferenceSession

    class Watched(session):
        def run(self, names, feed):
            seen.append(feed["images"])
            return super().run(names, feed)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Watched)
    exec(compile(shown_program(), "own-data.md", "exec"), {})
    predict.main(["-r", "model.onnx", "photo.jpg", "--csv", "found.csv"])
    level = 1 / 255 / 0.25
    assert seen[0].shape == seen[1].shape == (1, 3, 48, 48)
    assert np.abs(seen[0] - seen[1]).max() < 1.01 * level, np.abs(seen[0] - seen[1]).max() / level


def test_pt2_of_expert_assignment(tmp_path, monkeypatch, capsys):
    """All experts run, the gates choose: what the routed model answers, from a file with metadata."""
    run = small_run("ResNet10EAModel", num_experts=2, norm="NBN", use_norm=True)
    difference, written = export.export(run, "pt2", tmp_path / "m.pt2")
    assert difference < 1e-4 and written == [tmp_path / "m.pt2"] == list(tmp_path.iterdir())
    extra = {"metadata.json": ""}
    module = torch.export.load(str(written[0]), extra_files=extra).module()
    run.model.route = True
    images = torch.randn(3, 3, 32, 32)
    assert torch.allclose(module(images), run.model(images)["output"], atol=1e-4)
    assert json.loads(json.loads(extra["metadata.json"])["class_names"]) == list("abcde")
    photo_file(tmp_path / "photo.jpg", "turned")
    written[0].rename(tmp_path / "model.pt2")
    monkeypatch.chdir(tmp_path)
    exec(compile(shown_program("pt2"), "own-data.md", "exec"), {})
    (found,) = classify(run.model, ["photo.jpg"], PREPROCESS).found
    assert capsys.readouterr().out.split()[-1] == "abcde"[found.classes[0]]


def test_nothing_is_left_where_the_file_is_wrong(tmp_path, monkeypatch):
    def write(model, example, about, path):
        path.write_bytes(b"a model")
    wrong = {"pt2": (write, lambda path: lambda images: torch.full((len(images), 5), torch.nan), ())}
    monkeypatch.setattr(export, "FORMATS", wrong)
    with pytest.raises(RunError, match="differs"):
        export.export(small_run(), "pt2", tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_where_it_is_stopped(digits_run, number, tmp_path, monkeypatch, call_cli, request):
    """Neither by export nor, where it writes a table, by predict; what was there before stays."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("m.pt2", "found.csv"):
        (tmp_path / name).write_text("before")

    def stopped(model, example, about, path):
        path.write_bytes(b"half a model")
        signal.raise_signal(number)
    own = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored where a shell started the tests with &
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, own))
    monkeypatch.setitem(export.FORMATS, "pt2", (stopped, *export.FORMATS["pt2"][1:]))
    monkeypatch.setattr(predict, "rows", lambda found, names: signal.raise_signal(number))
    for words in (["export", "--format", "pt2", "--out", tmp_path / "m.pt2"],
                  ["predict", tmp_path / "a.png", "--csv", tmp_path / "found.csv"]):
        done = call_cli(["-m", f"tools.{words[0]}", "-r", digits_run.checkpoint, "-d", "cpu", *words[1:]])
        assert (done.returncode, done.stderr) == (1, "interrupted\n"), words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "found.csv", "m.pt2"]
    assert (tmp_path / "m.pt2").read_text() == (tmp_path / "found.csv").read_text() == "before"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ConfigError, match="pip install onnxscript"):
        export.check_packages("onnx")


def test_wrong_flags_are_named(digits_run, tmp_path):
    for flags, said in ((["--format", "onxx"], "'onnx'"), (["--out", str(tmp_path)], "folder"),
                        (["--out", str(tmp_path / "m.dat")], r"must end in \.onnx"),
                        (["--out", str(tmp_path / "no" / "m.onnx")], "folder"), (["--fromat", "pt2"], "--format"),
                        (["--format", "pt2", "--out", str(digits_run.checkpoint)], "checkpoint itself")):
        with pytest.raises(ConfigError, match=said):
            export.parse(["-r", str(digits_run.checkpoint), *flags])


# ---------------------------------------------------------------------- exported files given to predict

ABOUT = {"preprocess": json.dumps(PREPROCESS), "class_names": json.dumps(list("abcde"))}


def tiny_onnx(path, about, size=32, classes=5):
    """An ONNX file whose class k has the logit k times the images' mean."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper
    nodes = [helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=0),
             helper.make_node("Unsqueeze", ["mean", "one"], ["column"]),
             helper.make_node("Mul", ["column", "factors"], ["output"])]
    constants = [helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
                 helper.make_tensor("one", TensorProto.INT64, [1], [1]),
                 helper.make_tensor("factors", TensorProto.FLOAT, [1, classes], range(classes))]
    graph = helper.make_graph(nodes, "tiny", [helper.make_tensor_value_info("images", 1, ["N", 3, size, size])],
                              [helper.make_tensor_value_info("output", 1, ["N", classes])], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, about)
    onnx.save(model, str(path))
    return path


def test_an_onnx_file_predicts_with_its_own_preprocessing(tmp_path):
    pytest.importorskip("onnxruntime")
    model = open_exported(str(tiny_onnx(tmp_path / "m.onnx", ABOUT)), "onnx")
    Image.new("RGB", (64, 48), (255, 255, 255)).save(tmp_path / "white.png")
    (found,) = classify(model, [str(tmp_path / "white.png")], model.preprocess).found
    logits = np.arange(5) * (1 - 0.5) / 0.25
    assert found.classes == [4, 3, 2, 1, 0] and found.experts is None
    assert np.allclose(found.probabilities, (np.exp(logits) / np.exp(logits).sum())[::-1], atol=1e-5)


@pytest.mark.parametrize("about", [
    {}, {"preprocess": ABOUT["preprocess"]}, {**ABOUT, "class_names": json.dumps(list("abc"))},
    {**ABOUT, "preprocess": "{"}, {**ABOUT, "preprocess": "[1]"},
    {**ABOUT, "preprocess": json.dumps({**PREPROCESS, "image_size": 64})},
    {**ABOUT, "preprocess": json.dumps({**PREPROCESS, "resize": 10**9})},
    {**ABOUT, "preprocess": json.dumps({**PREPROCESS, "std": [0.0, 1.0, 1.0]})},
    {**ABOUT, "preprocess": json.dumps({**PREPROCESS, "mean": [float("nan")] * 3})}])
def test_an_onnx_file_of_others_is_named(about, tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ConfigError, match=r"m\.onnx: an ONNX file without the `preprocess`"):
        open_exported(str(tiny_onnx(tmp_path / "m.onnx", about)), "onnx")


def test_what_is_no_model_is_named(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"m\.onnx: onnxruntime can't read it"):
        open_exported(str(tmp_path / "m.onnx"), "onnx")


@pytest.mark.parametrize("name", ["m.pt2", "renamed.pth"])
def test_an_exported_program_is_named_and_not_opened(name, tmp_path, monkeypatch):
    """Loading one can run code in it."""
    monkeypatch.setattr(torch.export, "load", lambda *more, **args: pytest.fail("it was loaded"))
    torch.export.save(torch.export.export(torch.nn.Linear(2, 1), (torch.zeros(1, 2),)), tmp_path / "m.pt2")
    path = (tmp_path / "m.pt2").rename(tmp_path / name)
    assert is_exported(str(path)) == "pt2"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for more, said in (([], "an exported program"), (["--set", "seed=1"], "--set"), (["-d", "0"], "-d")):
        with pytest.raises(ConfigError, match=said):
            predict.main(["-r", str(path), str(tmp_path / "a.png"), *more])
    with pytest.raises(ConfigError, match="an export isn't one"):
        load_checkpoint(path)


def test_a_checkpoint_is_no_export(digits_run):
    assert is_exported(str(digits_run.checkpoint)) is None


def test_detectors_are_refused(tmp_path):
    run = small_run()
    run.checkpoint["data"]["preprocess"] = {"task": "detection"}
    with pytest.raises(ConfigError, match="detector"):
        export.export(run, "pt2", tmp_path / "m.pt2")
