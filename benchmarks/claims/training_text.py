"""The documents of a run's train splits as files: they may be divided anew, and dev and test stay what they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from btm_scale.config.run import RunConfig
from btm_scale.data.documents import BadLines, read_documents
from btm_scale.data.sources import resolve_sources
from btm_scale.data.splits import identify
from btm_scale.util.files import new_directory


def write_training_text(config: RunConfig, folder: Path) -> dict[str, Path]:
    """Write `<domain>.jsonl.gz` for each training domain, unless the folder exists. Returns the files by domain."""
    files = {name: folder / f"{name}.jsonl.gz" for name in config.domains}
    if folder.is_dir():
        return files
    with new_directory(folder) as unfinished:
        for source in resolve_sources(config.domains, config.text_root):
            # No time in the header, so that the same text gives the same bytes.
            with (
                (unfinished / files[source.name].name).open("wb") as raw,
                gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
            ):
                for document in read_documents(source, BadLines("error")):
                    if identify(document, dev=config.data.dev, test=config.data.test).split == "train":
                        packed.write((json.dumps({"text": document.text}) + "\n").encode())
    return files
