"""Where text is: paths, globs, folders of `datasets.save_to_disk`, the Hugging Face cache, and remote stores."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path

from btm_scale.data.remote import remote_files
from btm_scale.errors import DataError, first_few
from btm_scale.util.bounded_json import parse_json, read_bounded

_HUGGING_FACE = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<path>.+)")
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def matches_of(pattern: str, text_root: Path) -> list[Path]:
    """Return what a path, glob, URL or `hf://` name of the YAML matches: files, and folders that are not a data set.

    A folder of `datasets.save_to_disk` is its files. Raises DataError for a name that cannot be resolved here.
    """
    if pattern.startswith("hf://"):
        matches = _cached(pattern)
    elif _REMOTE.match(pattern):
        return remote_files(pattern)
    else:
        matches = _local(text_root / pattern)
    return [path for match in matches for path in (_files_of_dataset(match) if match.is_dir() else [match])]


def _local(pattern: Path) -> list[Path]:
    # A name with a bracket or a star is literal if such a file exists.
    if pattern.exists() or not glob.has_magic(str(pattern)):
        return [pattern] if pattern.exists() or pattern.is_symlink() else []
    # Unlike Path.glob, glob accepts absolute patterns.
    return [Path(path) for path in glob.iglob(str(pattern), recursive=True)]  # noqa: PTH207


def _files_of_dataset(folder: Path) -> list[Path]:
    """Return the Arrow files of a data set that `save_to_disk` wrote; of another folder, the folder."""
    if (folder / "dataset_dict.json").is_file():
        names = _read(folder / "dataset_dict.json", lambda value: value["splits"])
        splits = first_few([f"'{folder.name}/{name}'" for name in names], "splits")
        raise DataError(f"{folder} is a DatasetDict. A domain's text is one data set: name a split, {splits}.")
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return [folder]
    names = _read(folder / "state.json", lambda value: [entry["filename"] for entry in value["_data_files"]])
    if escaping := [name for name in names if Path(name).name != name]:
        raise DataError(f"{folder / 'state.json'} names the file {escaping[0]!r}, which is not in its folder.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(f"{folder} is a data set whose file {missing[0]} is missing. Save or copy it again.")
    return [folder / name for name in names]


def _read(path: Path, part: Callable[..., list[str]]) -> list[str]:
    try:
        names = part(parse_json(read_bounded(path)))
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise DataError(f"{path} is not as `datasets` writes it. Save the data set again, or name its files.")


def _cached(pattern: str) -> list[Path]:
    """Return the files that a name such as `hf://datasets/allenai/c4/en/*.json.gz` matches in the local cache."""
    match = _HUGGING_FACE.fullmatch(pattern)
    if match is None or ".." in Path(match["path"]).parts:
        raise DataError(
            f"'{pattern}' is not a name of files. Write hf://datasets/OWNER/NAME/PATH or "
            "hf://datasets/OWNER/NAME@REVISION/PATH; PATH may be a glob."
        )
    repository = _cache() / f"datasets--{match['name'].replace('/', '--')}"
    revision = match["revision"] or "main"
    reference = repository / "refs" / revision
    if not _COMMIT.fullmatch(revision) and reference.is_file():
        revision = reference.read_text(encoding="utf-8").strip()
    snapshot = repository / "snapshots" / revision
    # A revision that is a path would lead out of the snapshots.
    if Path(revision).name != revision or not snapshot.is_dir():
        raise DataError(
            f"'{pattern}' is not in the Hugging Face cache {_cache()}. Nothing is downloaded: run "
            f"`hf download --repo-type dataset {match['name']}` first, or set HF_HUB_CACHE to the folder of the cache."
        )
    return _local(snapshot / match["path"])


def _cache() -> Path:
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"
