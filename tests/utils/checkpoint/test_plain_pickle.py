"""The restricted unpickler: plain data comes back, nothing runs, whatever way a file asks for it."""
from __future__ import annotations

import argparse
import collections
import copyreg
import datetime
import functools
import os
import pickle
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.checkpoint.plain_pickle import Inert, Refused, loads, read_arrays
from utils.errors import ConfigError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() \
    | st.complex_numbers(allow_nan=False)
keys = st.text(max_size=5) | st.integers() | st.binary(max_size=3) | st.tuples(st.integers(), st.text(max_size=2))
plain = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4)
    | st.tuples(inner, inner) | st.sets(keys, max_size=3) | st.frozensets(keys, max_size=3), max_leaves=12)


@settings(max_examples=150, deadline=None)
@given(plain, st.sampled_from(PROTOCOLS))
def test_plain_data_is_what_pickle_reads(value, protocol):
    assert loads(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", [
    np.arange(6, dtype=np.uint8).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((0, 4)),
    np.array(3.5), np.arange(3, dtype=">i4"), np.array(["ab", "c"]), np.array([True, False]), np.arange(3) * 1j,
    np.arange(12)[::2], np.array([b"x", b"yz"])], ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays(array, protocol):
    read = loads(pickle.dumps(array, protocol))
    np.testing.assert_array_equal(read, array)
    assert read.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    read[...] = read.copy()  # writable


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_numbers_and_paths(protocol):
    value = {"o": collections.OrderedDict(a=1, b=[2]), "d": collections.defaultdict(list, {"a": [1]}),
             "c": collections.Counter("aab"), "q": collections.deque([1, 2], 5), "f": np.float32(1.5),
             "i": np.int64(7), "p": Path("/a/b/c.pth"), "r": Path("x/y"), "b": bytearray(b"xy\xff")}
    read = loads(pickle.dumps(value, protocol))
    assert read == {**value, "q": [1, 2], "f": 1.5, "i": 7, "p": "/a/b/c.pth", "r": "x/y"}
    assert type(read["f"]) is float and type(read["o"]) is collections.OrderedDict


def test_shared_and_circular_parts_stay_so():
    part = [1]
    circle: list = [part, part]
    circle.append(circle)
    read = loads(pickle.dumps(circle))
    assert read[0] is read[1] and read[2] is read


def test_python2_text_is_latin1():
    # {'caf\xe9': array([1, 2], dtype=uint8)} as Python 2 wrote it, the array's bytes as text
    program = (b"\x80\x02}U\x04caf\xe9cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
               b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
               b"K\x00tb\x89U\x02\x01\x02tbs.")
    read = loads(program)
    assert list(read) == ["caf\xe9"] and read["caf\xe9"].tolist() == [1, 2]


# ---- objects --------------------------------------------------------------------------------------------------------
def make_classes(monkeypatch):
    """Classes of a module that is gone when the pickle is read."""
    module = types.ModuleType("parse_config")
    ran = []

    class ConfigParser:
        def __init__(self):
            self._config = {"arch": {"type": "X", "args": {}}, "n_gpu": 1}
            self.resume = Path("saved/model_best.pth")

        def __setstate__(self, state):
            ran.append("setstate")

    class EasyDict(dict):
        pass

    for cls in (ConfigParser, EasyDict):
        cls.__module__, cls.__qualname__ = "parse_config", cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "parse_config", module)
    return ConfigParser, EasyDict, ran


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("module_left", [False, True])
def test_objects_are_inert(monkeypatch, protocol, module_left):
    parser, easy, ran = make_classes(monkeypatch)
    data = pickle.dumps([parser(), easy(a=1)], protocol)
    if not module_left:
        monkeypatch.delitem(sys.modules, "parse_config")
    config, mapping = loads(data)
    assert type(config) is Inert and config.name == "parse_config.ConfigParser"
    assert config.attribute("_config") == {"arch": {"type": "X", "args": {}}, "n_gpu": 1}
    assert config.attribute("resume") == "saved/model_best.pth" and config.attribute("nothing") is None
    assert type(mapping) is Inert and (mapping.pairs or mapping.args[0]) == {"a": 1}
    assert ran == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", [datetime.datetime(2020, 1, 2), datetime.timedelta(3), argparse.Namespace(a=1),
                                   functools.partial(print, 1), slice(1, 2), types.SimpleNamespace(b=2), object()])
def test_standard_objects_are_inert(value, protocol):
    assert type(loads(pickle.dumps(value, protocol))) is Inert


def test_names_are_never_imported():
    assert loads(b"cthis\ns\n.").name == "this.s"
    assert "this" not in sys.modules


# ---- attacks --------------------------------------------------------------------------------------------------------
def attacks(command: str) -> dict[str, bytes]:
    """Programs that would run `command` in a shell if Python's own reader read them."""
    text = command.encode()
    arg = b"X" + len(text).to_bytes(4, "little") + text
    call = b"import os; os.system(" + repr(command).encode() + b")"
    code = b"X" + len(call).to_bytes(4, "little") + call

    def unicode(word: str) -> bytes:
        return b"\x8c" + bytes([len(word)]) + word.encode()

    class ByReduce:
        def __reduce__(self):
            return os.system, (command,)

    class ByPopen:
        def __reduce__(self):
            return subprocess.Popen, (command,), None, None, None

    found = {f"reduce, protocol {p}": pickle.dumps({"a": [ByReduce()]}, p) for p in PROTOCOLS}
    found.update({f"Popen, protocol {p}": pickle.dumps((ByPopen(),), p) for p in PROTOCOLS})
    for name in ("os system", "posix system", "nt system", "commands getoutput", "subprocess call"):
        module, function = name.split()
        found[f"GLOBAL {name}"] = b"c" + module.encode() + b"\n" + function.encode() + b"\n" + arg + b"\x85R."
        found[f"STACK_GLOBAL {name}"] = b"\x80\x04" + unicode(module) + unicode(function) + b"\x93" + arg + b"\x85R."
    for name in ("eval", "exec", "compile", "__import__"):
        for module in (b"builtins", b"__builtin__"):
            found[f"{module.decode()}.{name}"] = b"c" + module + b"\n" + name.encode() + b"\n" + code + b"\x85R."
    found |= {
        "INST": b"(" + arg + b"ios\nsystem\n.",
        "INST Popen": b"(" + arg + b"isubprocess\nPopen\n.",
        "OBJ": b"(cos\nsystem\n" + arg + b"o.",
        "EXT1": b"\x80\x02\x82\xf0" + arg + b"\x85R.",
        "EXT2": b"\x80\x02\x83\xf0\x00" + arg + b"\x85R.",
        "EXT4": b"\x80\x02\x84\xf0\x00\x00\x00" + arg + b"\x85R.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + arg + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n" + arg + b"\x85}\x92.",
        "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nX\x08\0\0\0__call__tR" + arg + b"\x85R.",
        "operator": b"coperator\nattrgetter\nX\x06\0\0\0system\x85R(cbuiltins\n__import__\nX\x02\0\0\0os\x85RtR.",
        "dotted name": b"\x80\x04" + unicode("torch") + unicode("os.system") + b"\x93" + arg + b"\x85R.",
        "dotted class": b"\x80\x04" + unicode("pathlib") + unicode("Path.touch") + b"\x93" + arg + b"\x85R.",
        "partial called": b"cfunctools\npartial\n(cos\nsystem\n" + arg + b"tR)R.",
        "map": b"cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n(" + arg + b"ttRtR.",
        "reconstructor": b"ccopyreg\n_reconstructor\n(csubprocess\nPopen\ncbuiltins\nobject\n" + arg + b"tR.",
        "newobj function": b"ccopyreg\n__newobj__\n(csubprocess\nPopen\n" + arg + b"tR.",
        "torch hub": b"ctorch.hub\nload\n(" + arg + arg + b"tR.",
        "torch load": b"ctorch.serialization\nload\n" + arg + b"\x85R.",
        "numpy gadget": b"cnumpy.testing._private.utils\nrunstring\n(" + code + b"}tR.",
        "setstate on a name": b"cevil\nThing\n}X\x0c\0\0\0__setstate__cos\nsystem\nsb.",
        "setstate called": b"\x80\x02cos\n_wrap_close\n)\x81" + arg + b"b.",
        "array's own setter": b"cnumpy\nndarray.__setstate__\n(cos\nsystem\n(" + arg + b"ttR.",
        "persistent id": b"P" + text.replace(b"\n", b" ") + b"\n.",
        "binary persistent id": arg + b"Q.",
        "dict key": b"}cos\nsystem\n" + arg + b"\x85RNs.",
        "state": b"\x80\x02cmy\nThing\n)\x81}X\x01\0\0\0acos\nsystem\n" + arg + b"\x85Rsb.",
    }
    return found


ATTACKS = list(attacks("true"))


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_and_nothing_runs(name, tmp_path):
    marker = tmp_path / "ran"
    copyreg.add_extension("os", "system", 240)
    try:
        with pytest.raises(Refused):
            loads(attacks(f"touch {marker}")[name])
    finally:
        copyreg.remove_extension("os", "system", 240)
    assert not marker.exists()


def test_the_attacks_are_real(tmp_path):
    """Python's own reader does run a number of them: the marker tells."""
    ran = []
    for name in ("reduce, protocol 2", "STACK_GLOBAL posix system", "builtins.eval", "INST", "OBJ", "partial called"):
        marker = tmp_path / "ran"
        code = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
        subprocess.run([sys.executable, "-c", code], input=attacks(f"touch {marker}")[name], capture_output=True)
        ran.append(marker.exists())
        marker.unlink(missing_ok=True)
    assert sum(ran) >= 4


@pytest.mark.parametrize("program", [
    b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    b"cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R.",
    b"cbuiltins\nlist\ncbuiltins\nrange\nK\x00J\xff\xff\xff\x7f\x86R\x85R.",
    b"(" + b"K\x01" * 50_000 + b"lq\x00" + b"(" + b"cbuiltins\nlist\nh\x00\x85R" * 5_000 + b"t.",
    b"\x8e" + (2 ** 62).to_bytes(8, "little") + b"abc", b"\x8b" + (2 ** 31 - 1).to_bytes(4, "little") + b"abc",
    b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01J\xff\xff\xff\x7f\x85cnumpy\ndtype\nX\x02\0\0\0f8\x85RI00\nC\x00tb.",
    b"I" + b"9" * 100_000 + b"\n.",
], ids=["bytearray", "bytes", "range", "copies", "size", "long", "array", "digits"])
def test_small_files_cannot_take_time_or_memory(program):
    start = time.perf_counter()
    with pytest.raises(Refused):
        loads(program)
    assert time.perf_counter() - start < 5


def test_deep_nesting_is_refused():
    with pytest.raises(Refused):
        loads(b"]" * 100_000 + b"a" * 99_999 + b".")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_programs_never_fail_otherwise(data):
    program = bytearray(pickle.dumps({"a": [1, 2.5, "x", b"y"], "b": np.arange(4), "c": (None, {3})},
                                     data.draw(st.sampled_from(PROTOCOLS))))
    for _ in range(data.draw(st.integers(1, 4))):
        program[data.draw(st.integers(0, len(program) - 1))] = data.draw(st.integers(0, 255))
    try:
        loads(bytes(program[:data.draw(st.integers(0, len(program)))]))
    except Refused:
        pass


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_never_fail_otherwise(program):
    try:
        loads(program)
    except Refused:
        pass


# ---- files ----------------------------------------------------------------------------------------------------------
def test_read_arrays(tmp_path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": np.ones((2, 3), np.uint8), "labels": [0, 1]}, 2))
    assert read_arrays(path)["labels"] == [0, 1]
    path.write_bytes(pickle.dumps({"data": np.ones((20, 30), np.uint8)}, 2)[:-100])
    with pytest.raises(ConfigError, match=r"data_batch_1.*fetch it again"):
        read_arrays(path)
    path.write_bytes(pickle.dumps({"data": argparse.Namespace()}, 2))
    with pytest.raises(ConfigError, match=r"data_batch_1.*argparse.Namespace"):
        read_arrays(path)
    with pytest.raises(ConfigError, match=r"gone.*no such file"):
        read_arrays(tmp_path / "gone")
