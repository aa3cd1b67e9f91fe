"""What an interrupted process left of a mixture of experts: the same mixture resumes from it, any other removes it."""

from __future__ import annotations

import json
from pathlib import Path

from btm_scale.forest.expert import Expert
from btm_scale.util.files import make_directory, partial_path, remove_partial, write_file


def unrouted_path(final: Path) -> Path:
    """Return the temporary path of a mixture whose router is not fitted yet."""
    return final.with_name(f".{final.name}.unrouted")


def new_path(final: Path) -> Path:
    """Return the temporary path of a complete mixture that has not replaced the former one yet."""
    return final.with_name(f".{final.name}.new")


def begin(final: Path, card: Expert) -> None:
    """Remove what was left of other mixtures than that of the card. The caller holds the lock of `making_mixture`."""
    content = json.dumps(card.document())
    if not _note(final).is_file() or _note(final).read_text(encoding="utf-8", errors="replace") != content:
        remove(final)
        make_directory(final.parent)
        write_file(_note(final), content)


def remove(final: Path) -> None:
    """Remove all that was left. The caller holds the lock of `making_mixture`."""
    for path in (unrouted_path(final), new_path(final)):
        partial = partial_path(path)
        for left in (path, partial, partial.with_name(f"{partial.name}.lock")):
            remove_partial(left)
    for former in final.parent.glob(f".{final.name}.*.replaced") if final.is_dir() else ():
        remove_partial(former)
    _note(final).unlink(missing_ok=True)


def _note(final: Path) -> Path:
    """Return the path of the card of the mixture that is being made."""
    return final.with_name(f".{final.name}.begun")
