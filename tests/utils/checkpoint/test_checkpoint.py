"""Checkpoints: written whole, read back as they were, and never run, whatever is in them."""
from __future__ import annotations

import collections
import logging
import os
import pickle
import resource
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from utils.checkpoint.plain_pickle import Inert
from utils.checkpoint.store import (
    load_checkpoint,
    newest_good_checkpoint,
    plain_data,
    recover_config,
    save_checkpoint,
)
from utils.checkpoint.torch_file import read_torch_file
from utils.errors import ConfigError

FORMATS = ("zip", "stacked", "pickle")


def write(value, path: Path, kind: str) -> Path:
    """As torch writes files now ("zip"), as it did before 1.6 ("stacked"), or as plain pickles."""
    if kind == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def same(a, b) -> bool:
    """Equal in value, type and layout of containers; tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(
            a.detach().contiguous().view(-1).view(torch.uint8) if a.numel() else a,
            b.contiguous().view(-1).view(torch.uint8) if b.numel() else b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(10)
    kinds = {str(dtype): torch.randn(2, 3).mul(50).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.complex64, torch.complex128)}
    return {**kinds, "uint8": torch.arange(5, dtype=torch.uint8), "bool": torch.tensor([True, False]),
            "0-d": torch.tensor(3), "empty": torch.zeros(0, 3), "transposed": torch.randn(4, 5).t(),
            "strided": torch.arange(12)[::3], "expanded": torch.ones(1).expand(4),
            "parameter": nn.Parameter(torch.ones(2)),
            "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
            "view": base[2:5], "overlap": base[3:]}


# ---- round trips ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", FORMATS)
def test_reads_what_torch_wrote(tmp_path, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = {"state": {0: {"momentum_buffer": torch.randn(3)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    value = {"state_dict": collections.OrderedDict(tensors()), "model": model.state_dict(), "epoch": 3,
             "optimizer": optimizer, "size": torch.Size([2, 3]), "dtype": torch.float16,
             "device": torch.device("cuda", 1), "best": np.float64(0.5), "counts": np.arange(3)}
    read = load_checkpoint(write(value, tmp_path / "a.pth", kind))
    for part in ("state_dict", "model", "optimizer", "epoch", "size", "dtype"):
        assert same(value[part], read[part]), part
    assert read["device"] == "cuda:1" and read["best"] == 0.5 and read["counts"].tolist() == [0, 1, 2]
    assert not read["state_dict"]["parameter"].requires_grad


@pytest.mark.parametrize("kind", ["zip", "stacked"])
def test_shared_storages_stay_shared(tmp_path, kind):
    read = load_checkpoint(write({"state_dict": tensors()}, tmp_path / "a.pth", kind))["state_dict"]
    read["view"][1] = 7
    assert read["overlap"][0] == 7


def test_newer_types(tmp_path):
    kinds = [getattr(torch, name) for name in ("uint16", "uint32", "uint64", "float8_e4m3fn") if hasattr(torch, name)]
    value = {"state_dict": {str(dtype): torch.tensor([1, 2, 3]).to(dtype) for dtype in kinds}}
    assert same(value, load_checkpoint(write(value, tmp_path / "a.pth", "zip")))


@pytest.mark.parametrize("kind", ["zip", "stacked"])
def test_parameter_with_attributes(tmp_path, kind):
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = "x"
    read = load_checkpoint(write({"state_dict": {"a": parameter}}, tmp_path / "a.pth", kind))
    assert same({"a": torch.ones(2)}, read["state_dict"])


names = st.text(st.characters(codec="ascii", categories=("L",)), min_size=1, max_size=4)
shapes = st.lists(st.integers(0, 3), max_size=3)
leaves = (st.none() | st.booleans() | st.integers(-2 ** 70, 2 ** 70) | st.floats(allow_nan=False) | st.text(max_size=5)
          | shapes.map(lambda shape: torch.arange(int(np.prod(shape))).reshape(shape).float())
          | st.sampled_from([torch.int8, torch.bool, torch.bfloat16]).map(lambda dtype: torch.ones(3).to(dtype)))
data = st.dictionaries(names, st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner)
                                           | st.dictionaries(names, inner, max_size=3), max_leaves=8), max_size=4)


@settings(max_examples=60)
@given(data, st.sampled_from(["zip", "stacked", "ours"]))
def test_random_nested_data(tmp_path_factory, value, kind):
    path = tmp_path_factory.mktemp("random") / "a.pth"
    if kind == "ours":
        save_checkpoint(path, value)
        assert same(value, torch.load(path, weights_only=True))
    else:
        write(value, path, kind)
    assert same(value, read_torch_file(path))


# ---- writing --------------------------------------------------------------------------------------------------------
def test_saved_is_plain(tmp_path):
    path = tmp_path / "new" / "checkpoint-epoch1.pth"
    weights = {"module.a.module.b": torch.ones(1), "module.module.c": nn.Parameter(torch.ones(1))}
    save_checkpoint(path, {"state_dict": weights, "best": np.float32(0.25), "n": np.int64(3),
                           "counts": np.arange(2), "path": Path("/a/b"), "nested": ({1: [torch.zeros(2)]}, None)})
    read = torch.load(path, weights_only=True)
    assert list(read["state_dict"]) == ["a.module.b", "c"] and not read["state_dict"]["c"].requires_grad
    assert (read["best"], read["n"], read["path"]) == (0.25, 3, "/a/b") and torch.equal(read["counts"], torch.arange(2))
    assert same(read, load_checkpoint(path))
    assert os.stat(path).st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"state_dict": {"a": torch.zeros(1_000_000)[:10]}})
    assert (tmp_path / "a.pth").stat().st_size < 10_000


def test_objects_are_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"checkpoint.config.parser: .*not a object"):
        save_checkpoint(tmp_path / "a.pth", {"config": {"parser": object()}})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"state_dict": {"a": torch.ones(2)}})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"a\.pth") as caught:
            save_checkpoint(path, {"state_dict": {"a": torch.ones(1_000_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(path) and caught.value.strerror
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    assert torch.equal(load_checkpoint(path)["state_dict"]["a"], torch.ones(2))


# ---- objects beside the weights -------------------------------------------------------------------------------------
def ride_like(monkeypatch) -> dict:
    """A checkpoint as RIDE's trainer writes it, its ConfigParser included; the class is gone afterwards."""
    module = types.ModuleType("parse_config")

    class ConfigParser:
        def __init__(self, config):
            self._config, self.resume, self._save_dir = config, None, Path("saved/models/x")
            self.log_levels = {0: logging.WARNING}

    ConfigParser.__module__, ConfigParser.__qualname__ = "parse_config", "ConfigParser"
    module.ConfigParser = ConfigParser
    monkeypatch.setitem(sys.modules, "parse_config", module)
    arch = {"type": "ResNet32Model", "args": {"num_classes": 10}}
    config = collections.OrderedDict(name="x", arch=arch, metrics=["a"])
    return {"arch": "ResNet32Model", "epoch": 7, "state_dict": nn.Linear(2, 3).state_dict(),
            "monitor_best": np.float64(0.4),
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.01, "initial_lr": 0.1, "params": [0]}]},
            "config": ConfigParser(config)}


@pytest.mark.parametrize("kind", FORMATS)
def test_rides_config_is_inert(tmp_path, monkeypatch, kind):
    checkpoint = ride_like(monkeypatch)
    path = write(checkpoint, tmp_path / "a.pth", kind)
    monkeypatch.delitem(sys.modules, "parse_config")
    read = load_checkpoint(path)
    assert type(read["config"]) is Inert and read["config"].name == "parse_config.ConfigParser"
    assert same(dict(checkpoint["state_dict"]), dict(read["state_dict"])) and read["monitor_best"] == 0.4
    assert recover_config(read)["arch"] == {"type": "ResNet32Model", "args": {"num_classes": 10}}
    assert same(checkpoint["optimizer"], read["optimizer"])


class Options(dict):
    pass


class Names(list):
    pass


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_kinds_of_dict_and_list_and_other_protocols(tmp_path, protocol):
    """torch's reader has no place for these beside the weights, and knows protocol 2 alone; the weights are read."""
    options, names = Options(lr=0.1), Names(["ant", "bee"])
    options.note = "x"
    base = torch.arange(6.0)
    torch.save({"state_dict": {"a": base[1:], "b": base, "empty": torch.zeros(0)}, "config": options, "names": names,
                "counts": np.arange(3)}, tmp_path / "a.pth", pickle_protocol=protocol)
    read = load_checkpoint(tmp_path / "a.pth")
    assert same(read["state_dict"], {"a": base[1:], "b": base, "empty": torch.zeros(0)})
    read["state_dict"]["b"][1] = 7
    assert read["state_dict"]["a"][0] == 7 and read["counts"].tolist() == [0, 1, 2]
    assert read["config"].pairs == {"lr": 0.1} and read["config"].attribute("note") == "x"
    assert plain_data(read["names"]) == ["ant", "bee"]


def test_recover_config_of_others():
    assert recover_config({"config": {"arch": {}}}) == {"arch": {}}
    assert recover_config({}) is None and recover_config({"config": "x"}) is None
    circle: list = []
    circle.append(circle)
    with pytest.raises(ConfigError, match="nested too deeply"):
        plain_data(circle)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("where", ["whole model", "state_dict", "a weight"])
def test_weights_that_are_objects_are_refused(tmp_path, kind, where):
    model = nn.Linear(2, 2)
    value = {"whole model": model, "state_dict": {"state_dict": model, "epoch": 1},
             "a weight": {"state_dict": {"a": torch.ones(1), "b": model}}}[where]
    with pytest.raises(ConfigError, match=r"a\.pth: refused, .*plain tensors"):
        load_checkpoint(write(value, tmp_path / "a.pth", kind))


# ---- attacks --------------------------------------------------------------------------------------------------------
class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Evaluate(Attack):
    def __reduce__(self):
        return eval, (f"__import__('os').system({self.command!r})",)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("attack", [Attack, Evaluate])
@pytest.mark.parametrize("where", ["alone", "beside", "state_dict", "weight", "optimizer", "list", "config"])
def test_attacks_are_refused(tmp_path, kind, attack, where):
    marker = tmp_path / "ran"
    bad = attack(f"touch {marker}")
    good = {"state_dict": {"a": torch.ones(2)}, "optimizer": {"state": {0: {"m": torch.ones(1)}}}, "epoch": 1}
    value = {"alone": bad, "beside": {**good, "extra": bad}, "state_dict": {**good, "state_dict": bad},
             "weight": {**good, "state_dict": {"a": torch.ones(2), "b": bad}},
             "optimizer": {**good, "optimizer": {"state": {0: {"m": bad}}}}, "list": {**good, "x": [[bad]]},
             "config": {**good, "config": {"arch": {"type": bad}}}}[where]
    path = write(value, tmp_path / "evil.pth", kind)
    with pytest.raises(ConfigError, match=r"evil\.pth: refused, it would run code: \w+\.(system|eval)"):
        load_checkpoint(path)
    assert not marker.exists()


def forged(path: Path, program: bytes, storages: dict[str, bytes] | None = None, **entries: bytes) -> Path:
    """A torch archive with this pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        for name, content in {**{f"data/{key}": raw for key, raw in (storages or {}).items()}, **entries}.items():
            archive.writestr(f"archive/{name}", content)
    return path


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0%sX\x03\0\0\0cpuK%ctQ"


def tensor_program(key: bytes = b"0", numel: int = 2, size: bytes = b"K\x02\x85", stride: bytes = b"K\x01\x85",
                   offset: bytes = b"K\x00") -> bytes:
    storage = STORAGE % (key, numel)
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89NtR"
    return b"\x80\x02}X\x0a\0\0\0state_dict}X\x01\0\0\0a" + rebuilt + b"ss."


def test_forged_archive_is_read(tmp_path):
    path = forged(tmp_path / "a.pth", tensor_program(), {"0": np.float32([1, 2]).tobytes()})
    assert torch.equal(load_checkpoint(path)["state_dict"]["a"], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("change", [
    dict(numel=3), dict(numel=200, size=b"K\xc8\x85"), dict(size=b"K\x03\x85"),
    dict(offset=b"K\x01"), dict(stride=b"K\x02\x85"), dict(key=b"1"),
    dict(size=b"J\xff\xff\xff\xff\x85"), dict(offset=b"J\xff\xff\xff\xff"), dict(stride=b"K\x01K\x01\x86"),
    dict(size=b"\x8a\x08\0\0\0\0\0\0\0\x40\x85", stride=b"K\x00\x85"), dict(size=b"X\x01\0\0\0a\x85"),
    dict(offset=b"N"),
], ids=str)
def test_forged_tensors_are_refused(tmp_path, change):
    path = forged(tmp_path / "a.pth", tensor_program(**change), {"0": np.float32([1, 2]).tobytes()})
    with pytest.raises(ConfigError, match=r"a\.pth: refused"):
        load_checkpoint(path)


def test_other_archives_are_refused(tmp_path):
    raw = {"0": np.float32([1, 2]).tobytes()}
    with pytest.raises(ConfigError, match="TorchScript"):
        load_checkpoint(forged(tmp_path / "a.pth", tensor_program(), raw, **{"constants.pkl": b"N."}))
    with pytest.raises(ConfigError, match="big-endian"):
        load_checkpoint(forged(tmp_path / "a.pth", tensor_program(), raw, byteorder=b"big"))
    with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_program())
    with pytest.raises(ConfigError, match="compressed"):
        load_checkpoint(tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(ConfigError, match="not one of torch's"):
        load_checkpoint(tmp_path / "c.zip")


def test_files_inside_files_end(tmp_path):
    """A plain pickle may hold one torch file per tensor, but not files in files in files."""
    inner = pickle.dumps(torch.ones(2))
    program = b"ctorch.storage\n_load_from_bytes\nB" + len(inner).to_bytes(4, "little") + inner + b"\x85R."
    (tmp_path / "a.pth").write_bytes(program)
    with pytest.raises(ConfigError, match=r"a\.pth: refused"):
        load_checkpoint(tmp_path / "a.pth")


# ---- damage ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["zip", "stacked"])
def test_truncated_at_any_length(tmp_path, kind):
    path = write({"state_dict": {"a": torch.randn(50)}}, tmp_path / "a.pth", kind)
    whole = path.read_bytes()
    for length in sorted({*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1, 1, 2, 3, 4, 5}):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"a\.pth"):
            load_checkpoint(path)


def test_a_changed_byte_in_the_weights_is_noticed(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"state_dict": {"a": torch.full((1000,), 3.0)}})
    content = bytearray(path.read_bytes())
    at = content.find(torch.full((10,), 3.0).numpy().tobytes()) + 400
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.pth: refused, it is truncated or damaged"):
        load_checkpoint(path)


@settings(max_examples=80)
@given(st.data())
@pytest.mark.parametrize("kind", FORMATS)
def test_changed_bytes_never_fail_otherwise(tmp_path_factory, kind, data):
    path = tmp_path_factory.mktemp("damaged") / "a.pth"
    write({"state_dict": {"a": torch.ones(4), "b": torch.tensor([True])}, "n": [1, "x"]}, path, kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        load_checkpoint(path)
    except ConfigError as error:
        assert "a.pth" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("content, why", [
    (b"", "it is empty"), (b"hello, world\n" * 50, "damaged, or isn't"), (b"\x89PNG\r\n\x1a\n" + bytes(200), "refused"),
    (b'{"name": 1}', "damaged, or isn't"), (pickle.dumps([1, 2]), "holds no weights"),
    (pickle.dumps({"a": 1}), "holds no weights"), (b"PK\x03\x04" + bytes(100), "truncated or damaged")])
def test_other_files(tmp_path, content, why):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"a\.pth: .*{why}"):
        load_checkpoint(path)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.pth: no such checkpoint"):
        load_checkpoint(tmp_path / "gone.pth")
    with pytest.raises(ConfigError, match="is a folder"):
        load_checkpoint(tmp_path)


# ---- the newest good one --------------------------------------------------------------------------------------------
def test_newest_good_checkpoint(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ltr"), "propagate", True)
    assert newest_good_checkpoint(tmp_path) is None and newest_good_checkpoint(tmp_path / "gone") is None
    for n in (2, 9, 10):
        save_checkpoint(tmp_path / f"checkpoint-epoch{n}.pth", {"epoch": n, "state_dict": {"a": torch.ones(100)}})
    save_checkpoint(tmp_path / "checkpoint-epoch10-batch3.pth", {"epoch": 9, "state_dict": {"a": torch.ones(1)}})
    save_checkpoint(tmp_path / "model_best.pth", {"epoch": 99, "state_dict": {"a": torch.ones(1)}})
    save_checkpoint(tmp_path / "checkpoint-epochx.pth", {"epoch": 99, "state_dict": {"a": torch.ones(1)}})
    path, checkpoint = newest_good_checkpoint(tmp_path)
    assert path.name == "checkpoint-epoch10.pth" and checkpoint["epoch"] == 10
    for epoch, newest in ((10, path.name), (11, "model_best.pth")):
        save_checkpoint(tmp_path / "model_best.pth", {"epoch": epoch, "state_dict": {}, "optimizer": {}})
        assert newest_good_checkpoint(tmp_path)[0].name == newest
    (tmp_path / "model_best.pth").write_bytes(b"x")
    path.write_bytes(path.read_bytes()[:300])
    with caplog.at_level(logging.WARNING):
        assert newest_good_checkpoint(tmp_path)[0].name == "checkpoint-epoch10-batch3.pth"
    assert "checkpoint-epoch10.pth" in caplog.text and "model_best.pth" in caplog.text
    (tmp_path / "checkpoint-epoch10-batch3.pth").write_bytes(b"")
    assert newest_good_checkpoint(tmp_path)[0].name == "checkpoint-epoch9.pth"
    for name in ("checkpoint-epoch9.pth", "checkpoint-epoch2.pth"):
        (tmp_path / name).write_bytes(b"x")
    assert newest_good_checkpoint(tmp_path) is None
