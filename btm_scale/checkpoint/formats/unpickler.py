"""The unpickler of foreign files: plain containers and tensors' locations only, in bounded time and memory.

A pickle is a program. Besides calling functions, it can hash nested tuples forever, recurse past the C stack, allocate
gigabytes in one instruction, or change functions of this process. The instructions that could do so are replaced here.
The base class is the unpickler written in Python, 20 times slower than the one in C: a pickle holds no weights, so its
speed does not matter.
"""

from __future__ import annotations

import collections
import io
import pickle
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # torch.save writes the names of Python 2
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from btm_scale.checkpoint.formats.inert import Inert, InertClass
from btm_scale.errors import CheckpointError

_MAX_INSTRUCTIONS = 8_000_000
_MAX_OBJECTS = 3_000_000  # containers and placeholders, of at most some 200 bytes each
_MAX_KEY_PARTS = 32
# The standard library modules whose objects occur in benign checkpoints.
_HARMLESS_MODULES = {"argparse", "collections", "copyreg", "dataclasses", "datetime", "enum", "pathlib", "types"}
_STORAGES = {
    "Byte": torch.uint8,
    "Untyped": torch.uint8,
    "Half": torch.float16,
    "Float": torch.float32,
    "Double": torch.float64,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
# Opcodes that create an object.
_CREATING = b"])}(tl\x85\x86\x87\x8f\x81\x92Rd\x91io"
# Opcodes that no checkpoint needs: registered extensions, buffers outside of the pickle, and arrays that are allocated
# before their bytes are read.
_REFUSED = b"\x82\x83\x84\x96\x97\x98"


def _encoded(text: Any, _encoding: Any = "latin1") -> bytes:
    return str(text).encode("latin1")


def _bytearray(content: Any = b"", *_: Any) -> bytes:
    if not isinstance(content, bytes):  # a number would be allocated
        raise ValueError("a bytearray that is not made of bytes")
    return content


def _ordered(pairs: Sequence[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    return collections.OrderedDict((_key(name), value) for name, value in pairs)


_Machine: Any = pickle._Unpickler


class Unpickler(_Machine):
    """Builds plain containers, what `tensors` returns for tensors, and `Inert` for everything else.

    `functions` are those that may be called, by module and name; `storage` returns what a persistent reference to a
    storage of a dtype means. Raises `CheckpointError` for a pickle that calls any other function, and any exception
    for one that is damaged.
    """

    dispatch: dict[int, Callable[[Any], None]] = dict(_Machine.dispatch)

    def __init__(
        self,
        content: bytes,
        path: Path,
        functions: dict[tuple[str, str], Callable[..., Any]],
        storage: Callable[[Any], Any],
    ) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._path, self._size = path, len(content)
        self._functions = _PLAIN | functions
        self.persistent_load = storage
        self._objects = 0

    def load(self) -> Any:
        """Return the object."""
        self._unframer = pickle._Unframer(self._file_read, self._file_readline)  # type: ignore[attr-defined]
        self.read, self.readline = self._unframer.read, self._unframer.readline
        self.readinto = self._unframer.readinto
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        read, dispatch = self.read, self.dispatch
        try:
            for _ in range(_MAX_INSTRUCTIONS):
                opcode = read(1)
                if not opcode:
                    raise EOFError("it ends early")
                dispatch[opcode[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value
        raise ValueError(f"more than {_MAX_INSTRUCTIONS:,} instructions")

    def find_class(self, module: str, name: str) -> Any:
        """Return the substitute for a class or function. Raises `CheckpointError` for one that could run code."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if (module, name) in self._functions:
            return self._functions[module, name]
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            if name.removesuffix("Storage") not in _STORAGES:
                raise CheckpointError(
                    f"{self._path} has a storage of the unknown type {module}.{name:.80}. Save it as safetensors."
                )
            return _STORAGES[name.removesuffix("Storage")]
        root = module.partition(".")[0]
        if root in sys.stdlib_module_names and root not in _HARMLESS_MODULES:
            raise CheckpointError(
                f"{self._path} contains a pickle that calls {module:.80}.{name:.80}; no checkpoint needs that, and "
                "nothing was executed. Do not trust this file: get the model as safetensors."
            )
        return InertClass(f"{module}.{name}")

    def counted(self) -> None:
        """Count a new object. Raises `ValueError` above the limit."""
        self._objects += 1
        if self._objects > _MAX_OBJECTS:
            raise ValueError(f"more than {_MAX_OBJECTS:,} objects")

    def load_refused(self) -> None:
        """An opcode that no checkpoint needs."""
        raise ValueError("an instruction that no checkpoint needs")

    def load_frame(self) -> None:
        """Read a frame. Raises `ValueError` if bytes of it are missing, which shifts what follows."""
        size = int.from_bytes(self.read(8), "little")
        if size > self._size:
            raise ValueError("a frame beyond the end of the pickle")
        self._unframer.load_frame(size)
        if self._unframer.current_frame.getbuffer().nbytes != size:
            raise ValueError("a frame that is cut off")

    def load_setitems(self) -> None:
        """Set several items of a mapping."""
        self._set_items(self.pop_mark())

    def load_setitem(self) -> None:
        """Set one item of a mapping."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = list(zip(map(_key, items[::2]), items[1::2], strict=True))
        if isinstance(target, Inert):
            target.items += pairs
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            raise TypeError(f"items of a {type(target).__name__}")

    def load_dict(self) -> None:
        """Build a dict from the items above the mark."""
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_append(self) -> None:
        """Append one value."""
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        """Append several values."""
        self._extend(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.items += values
        elif isinstance(target, list):
            target += values
        else:
            raise TypeError(f"values of a {type(target).__name__}")

    def load_additems(self) -> None:
        """Add several members to a set."""
        members = self.pop_mark()
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.items += members
        elif isinstance(target, set):
            target.update(map(_key, members))
        else:
            raise TypeError(f"members of a {type(target).__name__}")

    def load_frozenset(self) -> None:
        """Build a frozenset from the members above the mark."""
        members = self.pop_mark()
        self.append(frozenset(map(_key, members)))

    def load_build(self) -> None:
        """Set the state of an object; a state dict's `_metadata` is not needed."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, collections.OrderedDict):
            raise TypeError(f"a state of a {type(target).__name__}")

    def load_newobj(self) -> None:
        """Call a class with arguments."""
        arguments, kind = self.stack.pop(), self.stack.pop()
        self.append(kind(*arguments))

    def load_newobj_ex(self) -> None:
        """Call a class with arguments and keywords, which are dropped."""
        self.stack.pop()
        self.load_newobj()

    def _instantiate(self, kind: Any, arguments: Any) -> None:
        self.append(kind(*arguments))


def _key(key: Any) -> Any:
    """Return a key or member that is hashed in bounded time. Raises `TypeError` for any other."""
    parts = key if isinstance(key, tuple) else (key,)
    if len(parts) > _MAX_KEY_PARTS or any(isinstance(part, (tuple, frozenset)) for part in parts):
        raise TypeError("a nested key")
    return key


_PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "set"): lambda members=(): set(map(_key, members)),
    ("builtins", "frozenset"): lambda members=(): frozenset(map(_key, members)),
    ("builtins", "slice"): lambda *_: None,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): _bytearray,
    ("_codecs", "encode"): _encoded,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch", "device"): lambda *_: "device",
}


def _counting(handler: Callable[[Any], None]) -> Callable[[Any], None]:
    def load(unpickler: Unpickler) -> None:
        unpickler.counted()
        handler(unpickler)

    return load


for _opcode, _handler in {
    pickle.FRAME: Unpickler.load_frame,
    pickle.SETITEM: Unpickler.load_setitem,
    pickle.SETITEMS: Unpickler.load_setitems,
    pickle.DICT: Unpickler.load_dict,
    pickle.APPEND: Unpickler.load_append,
    pickle.APPENDS: Unpickler.load_appends,
    pickle.ADDITEMS: Unpickler.load_additems,
    pickle.FROZENSET: Unpickler.load_frozenset,
    pickle.BUILD: Unpickler.load_build,
    pickle.NEWOBJ: Unpickler.load_newobj,
    pickle.NEWOBJ_EX: Unpickler.load_newobj_ex,
}.items():
    Unpickler.dispatch[_opcode[0]] = _handler
for _number in _REFUSED:
    Unpickler.dispatch[_number] = Unpickler.load_refused
for _number in _CREATING:
    Unpickler.dispatch[_number] = _counting(Unpickler.dispatch[_number])
