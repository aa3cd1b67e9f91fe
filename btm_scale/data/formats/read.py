"""The reader of each format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from btm_scale.config.data import DomainConfig, Format
from btm_scale.data.files import SourceFile
from btm_scale.data.formats.arrow import read_arrow, read_parquet
from btm_scale.data.formats.json_lines import read_json_lines
from btm_scale.data.formats.json_values import read_json_values
from btm_scale.data.formats.plain_text import read_plain_text
from btm_scale.data.formats.rows import Report, Row
from btm_scale.data.formats.tables import read_csv, read_tsv
from btm_scale.data.formats.webdataset import read_webdataset

Reader = Callable[[SourceFile, DomainConfig, Report], Iterator[Row]]

READERS: dict[Format, Reader] = {
    "jsonl": read_json_lines,
    "json": read_json_values,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "webdataset": read_webdataset,
    "text": read_plain_text,
}

# What the numbers of a format count.
UNITS: dict[Format, str] = {"json": "value", "parquet": "row", "arrow": "row", "webdataset": "sample"}
