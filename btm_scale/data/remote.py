"""Text on s3://, gs://, https:// and other stores that fsspec reads, if it and the store's package are installed."""

from __future__ import annotations

import functools
import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from btm_scale.errors import DataError

_BLOCK = 1 << 22  # bytes of one request
# What changes with the content of a file, under the names that the stores use.
_VERSIONS = ("ETag", "etag", "LastModified", "mtime", "updated", "md5Hash", "content_md5", "last_modified", "created")


def remote_files(pattern: str) -> list[Path]:
    """Return the files that a URL or a glob of a store matches, as objects with those parts of Path that reading uses.

    Raises DataError without the package of the store, and if the store cannot be read.
    """
    system, path = _system_of(pattern)
    try:
        if any(character in path for character in "*[") or ("?" in path and not pattern.startswith("http")):
            names = [name for name, info in system.glob(path, detail=True).items() if info["type"] == "file"]
        else:
            names = [path]
        return [_described(system, name, pattern) for name in names]
    except FileNotFoundError:
        return []
    except DataError:
        raise
    except Exception as error:  # of the store's package
        raise _unreadable(pattern, error) from None


def _system_of(pattern: str) -> tuple[Any, str]:
    store = pattern.partition("://")[0]
    remedy = "Or copy the files here, or mount the store as a folder."
    try:
        import fsspec
    except ImportError:
        raise DataError(f"'{pattern}' needs fsspec, which is not installed: pip install fsspec. {remedy}") from None
    try:
        system, path = fsspec.core.url_to_fs(pattern)
    except ImportError as error:
        reason = str(error).strip().rstrip(".")
        raise DataError(f"'{pattern}' needs a package that is not installed: {reason}. {remedy}") from None
    except ValueError:
        raise DataError(
            f"'{pattern}' is not on this machine, and fsspec does not know the store '{store}'. Text is read from "
            f"files, s3://, gs:// and https://: copy it here first, or mount the store as a folder."
        ) from None
    except Exception as error:  # such as missing credentials
        raise _unreadable(pattern, error) from None
    return system, path


def _described(system: Any, name: str, pattern: str) -> Path:
    info = system.info(name)
    url = name if "://" in name else f"{pattern.partition('://')[0]}://{name.lstrip('/')}"
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    return cast(Path, RemoteFile(url, system, name, info.get("size"), version))


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store. Everything that reads text opens it through these methods, which are those of Path."""

    url: str
    system: Any = field(compare=False, repr=False)
    key: str = field(compare=False)
    size: int | None
    version: str

    def __str__(self) -> str:
        return self.url

    @functools.cached_property
    def _path(self) -> PurePosixPath:
        return PurePosixPath(unquote(urlsplit(self.url).path) or "/")

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self._path.name

    @property
    def suffix(self) -> str:
        """The last suffix of the name."""
        return self._path.suffix

    @property
    def suffixes(self) -> list[str]:
        """All suffixes of the name."""
        return self._path.suffixes

    def is_file(self) -> bool:
        """Return True: only files are listed."""
        return True

    def is_dir(self) -> bool:
        """Return False."""
        return False

    def is_relative_to(self, other: object) -> bool:
        """Return False: it is in no folder of this machine."""
        return False

    def stat(self) -> Any:
        """Return the size, and in place of a time a number that changes with the store's version of the file."""
        digest = hashlib.blake2b(self.version.encode(), digest_size=7).digest()
        return SimpleNamespace(st_size=self.size or 0, st_mtime_ns=int.from_bytes(digest, "big"))

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file for reading. Reading raises DataError if the store fails, so no text is lost silently."""
        return cast(BinaryIO, io.BufferedReader(_Stream(self), _BLOCK))


class _Stream(io.RawIOBase):
    """The bytes of a remote file; one whose server gives no parts of it is read from its beginning only."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._stream = self._opened()
        self._position = 0

    def _opened(self) -> Any:
        try:
            return self._file.system.open(self._file.key, "rb", block_size=_BLOCK)
        except Exception as error:
            raise _unreadable(self._file.url, error) from None

    def readable(self) -> bool:
        """Return True: the stream is for reading."""
        return True

    def seekable(self) -> bool:
        """Return whether any part can be read."""
        return bool(self._stream.seekable()) and self._file.size is not None

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer, or part of it. Returns 0 at the end."""
        try:
            content = self._stream.read(len(buffer))
        except Exception as error:
            raise _unreadable(self._file.url, error) from None
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position: to the beginning only, if the server gives no parts of the file."""
        if self.seekable():
            self._position = self._stream.seek(offset, whence)
        elif (offset, whence) == (0, io.SEEK_SET):
            self._stream.close()
            self._stream, self._position = self._opened(), 0
        else:
            raise io.UnsupportedOperation("seek")
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def close(self) -> None:
        """Close the connection."""
        if not self.closed:
            self._stream.close()
        super().close()


def _unreadable(url: str, error: Exception) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
    return DataError(
        f"{url} cannot be read ({type(error).__name__}: {reason}). Check the name, the network and the credentials of "
        "this host, and run the same command again."
    )
