"""Read PyTorch files without executing their pickles: tensors become file locations, the rest plain data."""

from __future__ import annotations

import collections
import io
import pickle
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # torch.save writes the names of Python 2
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from btm_scale.checkpoint.formats.stored import Segment, StoredTensor
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.errors import CheckpointError


class Inert:
    """Placeholder for an object of a class that is not loaded; it records its arguments and state."""

    kind = ""
    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any, **_: Any) -> Inert:
        """Record the arguments."""
        inert = super().__new__(cls)
        inert.__dict__["arguments"] = arguments
        return inert

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__.setdefault("items", {})[key] = value

    def append(self, value: Any) -> None:
        """Record an item; a pickle calls this on subclasses of list."""
        self.__dict__.setdefault("values", []).append(value)

    def extend(self, values: Any) -> None:
        """Record several items."""
        self.__dict__.setdefault("values", []).extend(values)

    def add(self, value: Any) -> None:
        """Record an item; a pickle calls this on subclasses of set."""
        self.append(value)

    def __call__(self, *_: Any, **__: Any) -> Inert:
        """Return self; a pickle calls this if the object is a function."""
        return self

    def __repr__(self) -> str:
        return f"<{self.kind}, not loaded>"


_PLAIN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "slice"): slice,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): bytearray,
    ("_codecs", "encode"): lambda text, _encoding="latin1": str(text).encode("latin1"),
    ("torch", "Size"): torch.Size,
    ("torch", "device"): lambda *_: "device",
}
# Standard library modules whose objects occur in benign checkpoints; no others do.
_HARMLESS_MODULES = {
    "argparse",
    "collections",
    "copyreg",
    "dataclasses",
    "datetime",
    "enum",
    "pathlib",
    "types",
}


class _Unpickler(pickle.Unpickler):
    """Builds plain containers and `StoredTensor`s, and `Inert` for everything else; it imports nothing."""

    def __init__(self, file: Any, archive: _Archive) -> None:
        super().__init__(file, encoding="utf-8")
        self.archive = archive

    def find_class(self, module: str, name: str) -> Any:
        """Return the substitute for a class or function. Raises `CheckpointError` for one that could run code."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild_tensor
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return lambda rebuild, _type, arguments, _state: rebuild(*arguments)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _storage_dtype(name)
        root = module.partition(".")[0]
        if root in sys.stdlib_module_names and root not in _HARMLESS_MODULES:
            raise CheckpointError(
                f"{self.archive.path} contains a pickle that calls {module}.{name}; no checkpoint needs that, and "
                "nothing was executed. Do not trust this file: get the model as safetensors."
            )
        return type("Inert", (Inert,), {"kind": f"{module}.{name}"})

    def persistent_load(self, reference: Any) -> _Storage:
        """Return where a storage's bytes are."""
        _, dtype, key, _, elements = reference
        return _Storage(self.archive.path, self.archive.offset(f"data/{key}"), dtype, int(elements))


@dataclass(frozen=True)
class _Storage:
    file: Path
    offset: int
    dtype: torch.dtype
    elements: int


def _storage_dtype(name: str) -> torch.dtype:
    names = {
        "Half": "float16",
        "Float": "float32",
        "Double": "float64",
        "BFloat16": "bfloat16",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Bool": "bool",
        "ComplexFloat": "complex64",
        "ComplexDouble": "complex128",
    }
    dtype = getattr(torch, names.get(name.removesuffix("Storage"), ""), torch.uint8)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _rebuild_tensor(storage: _Storage, start: int, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    spec = TensorSpec(storage.dtype, tuple(shape))
    contiguous = torch.empty(0, dtype=storage.dtype, device="meta").new_empty(spec.shape).stride() == tuple(stride)
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if spec.elements else 0
    if start + extent > storage.elements:
        raise CheckpointError(f"{storage.file} has a tensor that extends past its storage. Save it again.")
    stored = spec.elements if contiguous else extent
    segment = Segment(storage.file, storage.offset + start * storage.dtype.itemsize, stored)
    return StoredTensor(spec, (segment,), None if contiguous else tuple(stride))


class _Archive:
    """The zip archive that `torch.save` writes, starting at byte `start` of an open file."""

    def __init__(self, path: Path, file: Any, start: int = 0) -> None:
        self.path, self.file, self.start = path, file, start
        self.zip = zipfile.ZipFile(file)
        self.entries = {info.filename.partition("/")[2]: info for info in self.zip.infolist()}

    def offset(self, name: str) -> int:
        """Return the byte offset of an entry in the file. Raises `CheckpointError` if it is compressed or missing."""
        info = self.entries.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{self.path} has no uncompressed entry '{name}'. It was not written by torch.save: save it again."
            )
        self.file.seek(info.header_offset)
        local = self.file.read(30)
        lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        return self.start + info.header_offset + 30 + lengths

    def load(self) -> Any:
        """Return the pickled object, with tensors as `StoredTensor`."""
        with self.zip.open(self.entries["data.pkl"]) as data:
            return _Unpickler(data, self).load()


def load_pickle(path: Path) -> Any:
    """Return what `torch.save` wrote to `path`, with tensors as `StoredTensor` and other classes as `Inert`.

    Raises `CheckpointError` for files that are truncated, older than PyTorch 1.6, or would run code.
    """
    try:
        with path.open("rb") as file:
            return _Archive(path, file).load()
    except CheckpointError:
        raise
    except Exception as error:  # a truncated or hostile pickle can fail in any way
        raise CheckpointError(
            f"{path} cannot be read as a torch.save file ({error}). Copy it again, or save it again."
        ) from error


def load_embedded(path: Path, start: int, length: int) -> Any:
    """Like `load_pickle`, from the `length` bytes at `start`."""
    try:
        with path.open("rb") as file:
            return _Archive(path, _Window(file, start, length), start).load()
    except CheckpointError:
        raise
    except Exception as error:  # as above
        raise CheckpointError(f"{path} cannot be read at byte {start} ({error}). Copy it again.") from error


class _Window(io.RawIOBase):
    """A byte range of an open file, presented as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self.file, self.start, self.length, self.position = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self.position = offset + (0, self.position, self.length)[whence]
        return self.position

    def read(self, size: int = -1, /) -> bytes:
        remaining = max(0, self.length - self.position)
        self.file.seek(self.start + self.position)
        content = self.file.read(remaining if size < 0 else min(size, remaining))
        self.position += len(content)
        return content


def load_plain_pickle(path: Path) -> Any:
    """Load a pickle without tensors, such as the `.metadata` of a distributed checkpoint.

    Raises `CheckpointError` like `load_pickle`.
    """

    class NoTensors(_Archive):
        def __init__(self) -> None:
            self.path = path

    try:
        with path.open("rb") as file:
            return _Unpickler(file, NoTensors()).load()
    except CheckpointError:
        raise
    except Exception as error:  # as above
        raise CheckpointError(f"{path} cannot be read as a pickle ({error}). Copy it again.") from error
