"""Parquet and Arrow tables: a few rows in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from btm_scale.config.data import DomainConfig
from btm_scale.data.files import SourceFile
from btm_scale.data.formats.rows import Fields, NoFieldError, Report, Row
from btm_scale.errors import DataError

_ROWS = 16  # few, because a page of a few bytes can repeat a text of megabytes in every row

Batches = Iterable[Any]


def read_parquet(file: SourceFile, settings: DomainConfig, bad: Report) -> Iterator[Row]:
    """Yield the rows of a Parquet file. Raises DataError for a missing column."""
    yield from _rows(file, settings, bad, _parquet_batches)


def read_arrow(file: SourceFile, settings: DomainConfig, bad: Report) -> Iterator[Row]:
    """Yield the rows of an Arrow file or stream, as `datasets` saves them. Raises DataError for a missing column."""
    yield from _rows(file, settings, bad, _arrow_batches)


def _rows(
    file: SourceFile,
    settings: DomainConfig,
    bad: Report,
    open_batches: Callable[[SourceFile, Fields], contextlib.AbstractContextManager[Batches]],
) -> Iterator[Row]:
    # Imported here: other formats are read on machines without pyarrow.
    import pyarrow as pa

    fields = Fields(settings)
    number = 0
    try:
        with open_batches(file, fields) as batches:
            for batch in batches:
                for row in range(batch.num_rows):
                    number += 1
                    try:
                        values = {name: batch.column(name)[row].as_py() for name in batch.schema.names}
                        if (found := fields(values)) is not None:
                            yield (number, *found)
                    except UnicodeDecodeError as error:
                        bad(number, f"not UTF-8 at byte {error.start} of the text")
                    except NoFieldError as error:
                        bad(number, str(error), error.remedy)
                    except ValueError as error:
                        bad(number, str(error))
    except (pa.ArrowException, MemoryError, UnicodeDecodeError) as error:  # a damaged size, or name of a column
        raise OSError(f"{type(error).__name__}: {error}") from None


def _columns(file: SourceFile, fields: Fields, available: list[str]) -> list[str]:
    """Return the columns that hold the fields. Raises DataError if one is missing."""
    columns = {}
    for name, key in fields.names.items():
        column = name if name in available else name.partition(".")[0]
        if column not in available:
            raise DataError(
                f"{file.path} has no column '{name}', only {', '.join(available)}. Set the domain's "
                f"{'field or split_by' if key != 'filter.field' else 'filter'}."
            )
        columns[column] = True
    columns |= {name: True for name in fields.optional if name in available}
    return list(columns)


@contextlib.contextmanager
def _parquet_batches(file: SourceFile, fields: Fields) -> Iterator[Batches]:
    import pyarrow.parquet as pq

    with file.open_seekable() as stream, pq.ParquetFile(stream) as table:
        columns = _columns(file, fields, table.schema_arrow.names)
        yield table.iter_batches(batch_size=_ROWS, columns=columns)


@contextlib.contextmanager
def _arrow_batches(file: SourceFile, fields: Fields) -> Iterator[Batches]:
    import pyarrow as pa

    with file.open_seekable() as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            with pa.ipc.open_file(stream) as table:
                columns = _columns(file, fields, table.schema.names)
                yield _valid(columns, (table.get_batch(i) for i in range(table.num_record_batches)))
        else:
            with pa.ipc.open_stream(stream) as table:
                yield _valid(_columns(file, fields, table.schema.names), table)


def _valid(columns: list[str], batches: Batches) -> Iterator[Any]:
    """Yield parts of batches; offsets that lead out of the file would crash the process."""
    for batch in batches:
        chosen = batch.select(columns)
        chosen.validate(full=True)
        for start in range(0, chosen.num_rows, _ROWS):
            yield chosen.slice(start, _ROWS)
