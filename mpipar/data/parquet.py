"""Texts out of the column of a Parquet file, a row group at a time.

pyarrow, an extra, is imported where the first such file is met.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mpipar.data.skipped import PieceError
from mpipar.errors import ConfigError

_ROWS = 256  # at a time


def row_group_bytes(path: str, column: str) -> list[int]:
    """The size of the texts in each row group.

    Raises:
        PieceError: The file is no Parquet file, or has no such column of texts.
        ConfigError: pyarrow is not installed.
    """
    with _opened(path) as file:
        index = _index_of(file, path, column)
        metadata = file.metadata
        return [
            metadata.row_group(group).column(index).total_uncompressed_size for group in range(metadata.num_row_groups)
        ]


def read_texts(path: str, group: int, column: str) -> Iterator[bytes | None]:
    """The texts of a row group, as they are stored: nobody has looked whether they are UTF-8. None is a null.

    Raises:
        PieceError: The row group cannot be read.
    """
    import pyarrow as pa

    with _opened(path) as file:
        _index_of(file, path, column)
        # The threads are the ranks'.
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False):
            yield from batch.column(0).cast(pa.large_binary()).to_pylist()


def _index_of(file: Any, path: str, column: str) -> int:
    """Which of the columns has this name."""
    import pyarrow as pa

    schema = file.schema_arrow
    if column not in schema.names:
        raise PieceError(path, "no text", f"no column {column!r}; it has {', '.join(schema.names)}"[:200])
    kind = schema.field(column).type
    stored = kind.value_type if pa.types.is_dictionary(kind) else kind
    if stored not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        raise PieceError(path, "no text", f"column {column!r} holds {kind}, and no texts")
    return [file.metadata.schema.column(i).path for i in range(len(file.metadata.schema))].index(column)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The ParquetFile; what pyarrow finds wrong with it while it is open is an error of the piece."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet files need pyarrow: pip install 'mpipar[parquet]'") from error
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PieceError(path, "unreadable", said.partition("\n")[0]) from error
