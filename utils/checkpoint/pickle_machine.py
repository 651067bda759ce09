"""The stack machine that pickles are programs for, over plain data only: nothing is imported, nothing is called.

Python's own reader imports whatever names a pickle gives and calls them. This one lets `pickletools` split the program
into operations and carries them out on lists, dicts and numbers. A name stays text (an `Inert`), and a "call" is looked
up by that text in a table of constructors that the caller gives. What isn't in the table is never run: an instance of
some class becomes an `Inert` that holds its arguments and state, and a call that looks like running code (a function of
the standard library, a public function of any other module) refuses the whole file.
"""
from __future__ import annotations

import pickletools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np


class Refused(Exception):
    """The pickle is damaged, isn't plain data, or tries to run code. The message says which."""


class Inert:
    """A name from a pickle, or an object of a class that isn't read: what was written about it, and nothing alive.

    `name` is "module.Class"; `called` is False for the bare name. `args` and `state` are what the pickle gave the
    object, `items` what was appended to it and `pairs` what was set in it, where it is a kind of list or dict.
    """

    __slots__ = ("args", "called", "items", "name", "pairs", "state")

    def __init__(self, name: str, args: tuple | None = None):
        self.name, self.args, self.called = name, args, args is not None
        self.state: Any = None
        self.items: list = []
        self.pairs: dict = {}

    def __repr__(self) -> str:
        return f"<inert {self.name}>"

    def attribute(self, name: str) -> Any:
        """The attribute that the object was pickled with, or None: `config.attribute("_config")`."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return state.get(name) if isinstance(state, dict) else None


_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg", "exceptions": "builtins"}
_PYTHON2_ONLY = {"commands", "popen2", "cPickle", "cStringIO", "StringIO", "UserDict", "UserList", "urllib2"}
# Standard-library classes whose instances are worth keeping as inert data; any other call into it is refused.
_INERT_STDLIB = {
    "argparse.Namespace", "builtins.object", "builtins.range", "builtins.slice", "datetime.date", "datetime.datetime",
    "datetime.time", "datetime.timedelta", "datetime.timezone", "decimal.Decimal", "fractions.Fraction",
    "functools.partial", "itertools.count", "itertools.cycle", "logging.Logger", "logging.RootLogger",
    "logging.getLogger", "random.Random", "re._compile", "types.SimpleNamespace", "uuid.UUID"}
# Modules of the standard library whose instances are refused even where they are made without a call.
_RUNNERS = {"builtins", "code", "codeop", "commands", "ctypes", "importlib", "io", "marshal", "multiprocessing", "nt",
            "os", "pickle", "posix", "pty", "runpy", "shutil", "socket", "subprocess", "sys", "threading", "types",
            "webbrowser"}


class Reader:
    """One pickle being read from `handle`, a file of `size` bytes.

    `constructors` maps "module.name" to a function that gets the reader, then the pickle's arguments. `resolve` turns
    a name into a value (say, a dtype) or None, `persistent_load` a reference to data outside of the pickle.
    """

    def __init__(self, handle: Any, size: int, constructors: Mapping[str, Callable], *,
                 persistent_load: Callable[[Any], Any] | None = None, resolve: Callable[[str], Any] | None = None,
                 keep_inert: bool = True):
        self.handle, self.constructors, self.persistent_load = handle, constructors, persistent_load
        self.resolve = resolve or (lambda name: None)
        self.keep_inert = keep_inert
        # What constructors may copy, in bytes or elements: a small file can't be made to fill the memory.
        self.budget = 16 * size + (1 << 20)
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, Any] = {}

    def spend(self, amount: int) -> None:
        """Count `amount` bytes or elements that a constructor copies; refuses a file that multiplies itself."""
        self.budget -= amount
        if self.budget < 0:
            raise Refused("it unpacks to far more data than it holds")

    def read(self) -> Any:
        """The object pickled at the handle's position, which is left just after it. Raises Refused."""
        try:
            for operation, argument, _ in pickletools.genops(self.handle):
                if operation.name == "STOP":
                    return self.stack.pop()
                if operation.name not in _OPERATIONS:
                    raise Refused(f"it uses the pickle operation {operation.name}, which plain data never needs")
                _OPERATIONS[operation.name](self, argument)
        except Refused:
            raise
        except (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError,
                ValueError) as error:
            raise Refused("it is damaged, or isn't a file of this kind") from error
        raise Refused("it ends before its data does")

    def pop_to_mark(self) -> list:
        """What was pushed since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def name(self, module: Any, name: Any) -> Any:
        """The value for a name in the pickle: an `Inert`, or what `resolve` knows it to be."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Refused("it is damaged: a name that isn't text")
        full = f"{_PYTHON2.get(module, module)}.{name}"
        known = self.resolve(full)
        return Inert(full) if known is None else known

    def inert(self, name: str, args: tuple) -> Inert:
        """An object of a class that isn't read, where those are allowed at all."""
        if not self.keep_inert:
            raise Refused(f"it holds a {name[:100]}")
        return Inert(name, args)

    def call(self, function: Any, args: Any) -> Any:
        """What REDUCE, INST and OBJ stand for: a constructor from the table, an `Inert`, or a refusal."""
        if not isinstance(function, Inert) or function.called or not isinstance(args, tuple):
            raise Refused("it calls something that isn't a name")
        if function.name in self.constructors:
            return self.constructors[function.name](self, *args)
        looks_like_function = function.name.rpartition(".")[2][:1].islower()
        if function.name not in _INERT_STDLIB and (_is_stdlib(function.name) or looks_like_function):
            raise Refused(f"it would run code: {function.name[:100]}")
        return self.inert(function.name, args)

    def instance(self, cls: Any, args: Any) -> Any:
        """What NEWOBJ stands for: an instance made without calling its class."""
        if not isinstance(cls, Inert) or cls.called or not isinstance(args, tuple):
            raise Refused("it makes an instance of something that isn't a class")
        if cls.name in self.constructors:
            return self.constructors[cls.name](self, *args)
        top, last = cls.name.partition(".")[0], cls.name.rpartition(".")[2].lstrip("_")
        if cls.name not in _INERT_STDLIB and _is_stdlib(cls.name) and (top in _RUNNERS or not last[:1].isupper()):
            raise Refused(f"it would run code: {cls.name[:100]}")
        return self.inert(cls.name, args)

    def build(self, target: Any, state: Any) -> None:
        """What BUILD stands for: the state of an object, kept as data."""
        if isinstance(target, Inert) and target.called:
            target.state = state
        elif isinstance(target, np.ndarray):
            self.constructors["numpy.ndarray.__setstate__"](self, target, state)
        elif not (isinstance(target, (dict, list, set)) or type(target).__module__.partition(".")[0] == "torch"):
            # Of a container or a tensor it would only set attributes, which are dropped.
            raise Refused("it sets the state of something that has none")

    def append(self, target: Any, values: Iterable) -> None:
        """What APPEND and APPENDS stand for."""
        if isinstance(target, Inert) and target.called:
            target = target.items
        if type(target) is not list:
            raise Refused("it appends to something that isn't a list")
        target.extend(values)

    def add(self, target: Any, values: Iterable) -> None:
        """What ADDITEMS stands for."""
        if isinstance(target, Inert) and target.called:
            target.items.extend(values)
        elif isinstance(target, set):
            target.update(map(plain_key, values))
        else:
            raise Refused("it adds to something that isn't a set")

    def set_items(self, target: Any, flat: list) -> Any:
        """What SETITEM and SETITEMS stand for; `flat` is key, value, key, value, ... Returns `target`."""
        pairs = target.pairs if isinstance(target, Inert) and target.called else target
        if not isinstance(pairs, dict) or len(flat) % 2:
            raise Refused("it sets items in something that isn't a dict")
        pairs.update((plain_key(key), value) for key, value in zip(flat[::2], flat[1::2]))
        return target

    def outside(self, identifier: Any) -> Any:
        """What PERSID and BINPERSID stand for: data that lies outside of the pickle."""
        if self.persistent_load is None:
            raise Refused("it refers to data outside of itself")
        return self.persistent_load(identifier)


def _is_stdlib(name: str) -> bool:
    top = name.partition(".")[0]
    return top in sys.stdlib_module_names or top in _PYTHON2_ONLY


def plain_key(key: Any) -> Any:
    """`key` if it may be a dict key or a set's element: a scalar, a name, or a flat tuple of these.

    Nested tuples are refused: hashing one that shares its parts takes time exponential in its depth.
    """
    simple = (str, bytes, int, float, complex, type(None), Inert)
    if isinstance(key, simple) or (type(key) is tuple and all(isinstance(part, simple) for part in key)):
        return key
    if type(key).__module__ == "torch" and type(key).__name__ == "dtype":
        return key
    raise Refused("it has a key that isn't text or a number")


# --- operations: each gets the reader and the argument that stands in the program ------------------------------------
def _push(reader: Reader, value: Any) -> None:
    reader.stack.append(value)


def _make(make: Callable[[], Any]) -> Callable:
    return lambda reader, _: reader.stack.append(make())


def _from_mark(make: Callable[[Reader, list], Any]) -> Callable:
    """An operation that takes everything since the mark and leaves one value."""
    def operation(reader: Reader, _: Any) -> None:
        items = reader.pop_to_mark()
        reader.stack.append(make(reader, items))
    return operation


def _onto(change: Callable[[Reader, Any, list], Any], count: int | None = None) -> Callable:
    """An operation that takes `count` values, or all since the mark, and changes what lies below them."""
    def operation(reader: Reader, _: Any) -> None:
        if count is None:
            values = reader.pop_to_mark()
        else:
            values = [reader.stack.pop() for _ in range(count)][::-1]
        change(reader, reader.stack[-1], values)
    return operation


def _taking(count: int, make: Callable) -> Callable:
    """An operation that takes `count` values and leaves one."""
    def operation(reader: Reader, _: Any) -> None:
        values = [reader.stack.pop() for _ in range(count)][::-1]
        reader.stack.append(make(reader, *values))
    return operation


def _mark(reader: Reader, _: Any) -> None:
    reader.marks.append(reader.stack)
    reader.stack = []


def _pop(reader: Reader, _: Any) -> None:
    if reader.stack:
        reader.stack.pop()
    else:
        reader.pop_to_mark()


def _put(reader: Reader, index: int | None) -> None:
    reader.memo[len(reader.memo) if index is None else index] = reader.stack[-1]


def _global(reader: Reader, text: str) -> None:
    module, _, name = text.partition(" ")
    reader.stack.append(reader.name(module, name))


def _inst(reader: Reader, text: str) -> None:
    module, _, name = text.partition(" ")
    args = tuple(reader.pop_to_mark())
    reader.stack.append(reader.call(reader.name(module, name), args))


_LITERALS = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
    "BINBYTES8", "BYTEARRAY8")
# EXT1, EXT2, EXT4, NEXT_BUFFER and READONLY_BUFFER are left out on purpose: plain data never needs them.
_OPERATIONS: dict[str, Callable[[Reader, Any], None]] = {
    **dict.fromkeys(_LITERALS, _push),
    **dict.fromkeys(("PROTO", "FRAME"), lambda reader, _: None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda reader, index: reader.stack.append(reader.memo[index])),
    "NONE": _make(lambda: None), "NEWTRUE": _make(lambda: True), "NEWFALSE": _make(lambda: False),
    "EMPTY_LIST": _make(list), "EMPTY_DICT": _make(dict), "EMPTY_SET": _make(set), "EMPTY_TUPLE": _make(tuple),
    "MARK": _mark, "POP": _pop, "POP_MARK": lambda reader, _: reader.pop_to_mark() and None,
    "DUP": lambda reader, _: reader.stack.append(reader.stack[-1]),
    "LIST": _from_mark(lambda reader, items: items), "TUPLE": _from_mark(lambda reader, items: tuple(items)),
    "FROZENSET": _from_mark(lambda reader, items: frozenset(map(plain_key, items))),
    "DICT": _from_mark(lambda reader, flat: reader.set_items({}, flat)),
    "OBJ": _from_mark(lambda reader, items: reader.call(items[0], tuple(items[1:]))), "INST": _inst,
    "TUPLE1": _taking(1, lambda reader, *items: items), "TUPLE2": _taking(2, lambda reader, *items: items),
    "TUPLE3": _taking(3, lambda reader, *items: items),
    "APPEND": _onto(Reader.append, 1), "APPENDS": _onto(Reader.append), "ADDITEMS": _onto(Reader.add),
    "SETITEM": _onto(Reader.set_items, 2), "SETITEMS": _onto(Reader.set_items),
    "BUILD": _onto(lambda reader, target, values: reader.build(target, values[0]), 1),
    "GLOBAL": _global, "STACK_GLOBAL": _taking(2, Reader.name), "REDUCE": _taking(2, Reader.call),
    "NEWOBJ": _taking(2, Reader.instance),
    "NEWOBJ_EX": _taking(3, lambda reader, cls, args, keywords: reader.instance(cls, args)),
    "PERSID": lambda reader, identifier: reader.stack.append(reader.outside(identifier)),
    "BINPERSID": _taking(1, Reader.outside),
}
