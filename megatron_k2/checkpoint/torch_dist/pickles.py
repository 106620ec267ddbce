"""Pickles that name classes of torch and Megatron, read and written without importing either.

torch takes two seconds to import, Megatron three: more than moving a gigabyte takes. And a pickle
is a program: reading it here runs none of what it names. Every class or function that is not one
of a few harmless ones becomes a ``StandIn``: a class that remembers its name, whose instances
remember what they were made of. Writing a stand-in writes the name again.
"""

import argparse
import codecs
import collections
import functools
import io
import pathlib
import pickle
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, override

Resolve = Callable[[str, str], Any]
"""(module, name) -> what to take for it, None for a stand-in."""

_HARMLESS: Mapping[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("_io", "BytesIO"): io.BytesIO,
    ("_codecs", "encode"): codecs.encode,  # how protocol 2 spells bytes
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib", "PurePosixPath"): pathlib.PurePosixPath,
    ("torch", "Size"): tuple,
    **{("builtins", kind.__name__): kind for kind in (set, frozenset, bytearray, complex, slice)},
}


class StandIn(type):
    """The class of stand-ins: one for each name a pickle mentions."""

    module: str
    name: str


class Instance(metaclass=StandIn):
    """What a pickle makes of such a class: its arguments, and the state it was given."""

    module: ClassVar[str]
    name: ClassVar[str]
    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> "Instance":
        """Accept the arguments of any class, and keep them."""
        self = super().__new__(cls)
        self.args = args
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @override
    def __repr__(self) -> str:
        return f"{self.module}.{self.name}{self.args}"


@functools.cache
def stand_in(module: str, name: str) -> StandIn:
    """The one stand-in of a name."""
    return StandIn(name, (Instance,), {"module": module, "name": name})


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, resolve: Resolve, persistent: Callable[[Any], Any]) -> None:
        super().__init__(io.BytesIO(content))
        self._resolve = resolve
        self._persistent = persistent

    @override
    def find_class(self, module: str, name: str) -> Any:
        found = self._resolve(module, name) or _HARMLESS.get((module, name))
        return stand_in(module, name) if found is None else found

    @override
    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)


def read_pickle(
    content: bytes,
    resolve: Resolve = lambda module, name: None,
    persistent: Callable[[Any], Any] = lambda pid: pid,
) -> Any:
    """What a pickle describes, with stand-ins for the classes it names.

    Args:
        content: the pickle.
        resolve: classes to take instead of stand-ins.
        persistent: what a persistent id (a storage, in torch's) stands for.

    Raises:
        pickle.UnpicklingError: for a damaged pickle; whatever else a damaged one may cause.
    """
    return _Unpickler(content, resolve, persistent).load()


class Persistent(tuple[Any, ...]):
    """Written as a persistent id."""

    __slots__ = ()


class _Pickler(pickle._Pickler):
    """The one in Python: the other insists on importing what it names."""

    write: Callable[[bytes], Any]
    memoize: Callable[[Any], None]

    dispatch: ClassVar[dict[type, Callable[..., None]]] = dict(pickle._Pickler.dispatch)

    def _save_name(self, named: StandIn) -> None:
        self.write(pickle.GLOBAL + f"{named.module}\n{named.name}\n".encode())
        self.memoize(named)

    dispatch[StandIn] = _save_name

    @override
    def reducer_override(self, obj: Any) -> Any:
        return (type(obj), obj.args) if isinstance(obj, Instance) else NotImplemented

    @override
    def persistent_id(self, obj: Any) -> Any:
        return tuple(obj) if isinstance(obj, Persistent) else None


def write_pickle(value: Any) -> bytes:
    """A pickle of plain values and stand-ins; in protocol 2, which ``torch.load`` reads."""
    content = io.BytesIO()
    _Pickler(content, protocol=2).dump(value)
    return content.getvalue()
