"""`trainer.compile: "layers"`: a run with its norms and convolutions in C++ beside one without."""
import csv

import pytest
import torch

from model.native import winograd
from model.native.build import compiler
from model.native.winograd import Winograd
from trainer.trainer import Trainer

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
HINT = "faster: --set trainer.compile=layers has 28 of the convolutions"


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    """The hint and "auto" are for what was measured: AVX2 here, with no instructions for bfloat16."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for unit in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, unit, lambda: False, raising=False)


@pytest.fixture(scope="module", autouse=True)
def networks():
    """Not here: a ResNet-32's convolutions are counted."""


def figures(runs, run_id):
    with open(runs.log(run_id) / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if name in ("loss", "val_loss")}
                for row in csv.DictReader(file)]


def test_a_run_goes_as_without(runs, capsys, monkeypatch):
    calls = []
    inner = Winograd.forward
    monkeypatch.setattr(Winograd, "forward", lambda self, x, weight: calls.append(winograd._validating)
                        or inner(self, x, weight))
    test = Trainer.test
    monkeypatch.setattr(Trainer, "test", lambda self, *args, **more: calls.append("test") or test(self, *args, **more))
    flags = ["--epochs", 1, "--lr", 1e-4, "--set", "trainer.amp=off"]       # slow, so that rounding stays small
    runs("plain", *flags)
    assert HINT in capsys.readouterr().out and calls == ["test"]
    runs("compiled", *flags, "--set", "trainer.compile=layers")
    said = capsys.readouterr().out
    assert "3x3 convolutions compiled: 28" in said and HINT not in said
    assert {False, True} == set(calls[1:-1]) and calls[-1] == "test"          # steps, validation; the test is torch's
    plain, compiled = figures(runs, "plain"), figures(runs, "compiled")
    assert len(plain) == len(compiled) == 1
    for name, value in plain[0].items():
        assert compiled[0][name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("flags", [["--set", "trainer.amp=bf16"], ["--set", "trainer.channels_last=false"],
                                   ["--set", "trainer.freeze=backbone"]])
def test_no_hint_where_it_would_not_help(runs, capsys, flags):
    runs("none", "--epochs", 1, "--dry_run", *flags)
    said = capsys.readouterr().out
    assert "faster:" not in said and "dry run: everything builds" in said


@pytest.mark.parametrize(("vectors", "hint"), [("AVX512", True), ("DEFAULT", False)])
def test_the_hint_is_for_measured_processors(runs, capsys, monkeypatch, vectors, hint):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    runs("none", "--epochs", 1, "--dry_run", "--set", "trainer.amp=off")
    assert (HINT in capsys.readouterr().out) is hint


AUTO = ["--dry_run", "--set", "trainer.compile=auto"]


@pytest.mark.parametrize(("epochs", "flags", "said"), [
    (300, ["--set", "trainer.amp=off"], "3x3 convolutions compiled: 28"),
    (200, ["--set", "trainer.amp=off"], "(trainer.compile auto): training on so few images takes less time than"),
    (300, ["--set", "trainer.amp=bf16"], "(trainer.compile auto): nothing is known to be faster with this processor"),
    (300, ["--set", "trainer.freeze=0.5"], "(trainer.compile auto): nothing is known to be faster")])
def test_auto_is_what_was_measured_to_be_faster(runs, capsys, epochs, flags, said):
    """23 images an epoch; bfloat16 without instructions for it has never been timed."""
    runs("auto", "--epochs", epochs, *AUTO, *flags)
    text = capsys.readouterr().out
    assert said in text and "faster: --set" not in text and "dry run: everything builds" in text
    assert ("nothing is compiled" in text) is ("28" not in said)


@pytest.mark.parametrize("amx", [False, True])
def test_auto_in_bfloat16_compiles_the_norms(runs, capsys, monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    flags = ["--epochs", 300, "--dry_run", "--set", "trainer.amp=bf16"]
    runs("auto", *flags, "--set", "trainer.compile=auto")
    text = capsys.readouterr().out
    assert "norms compiled:" in text and "3x3 convolutions compiled" not in text
    runs("none", *flags)
    assert "faster: --set trainer.compile=norms has the norms in C++" in capsys.readouterr().out


def test_auto_without_a_compiler_says_what_would_be_faster(runs, capsys, monkeypatch):
    monkeypatch.setattr("trainer.compiling.compiler", lambda: None)
    runs("auto", "--epochs", 300, *AUTO, "--set", "trainer.amp=off")
    text = capsys.readouterr().out
    assert "(trainer.compile auto): it would be faster with g++ or clang++" in text
