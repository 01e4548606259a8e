"""Rows of a parquet file: the hub serves stack-exchange-paired in this form."""

from dpo_minimal import InputError
from dpo_minimal.extras.reading import reading


def read_parquet(path):
    """Yield (place, row dict) of a parquet file, with one batch of rows in memory at a time."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path} is parquet: pip install pyarrow to read it") from None
    with reading(path, "a parquet file"):
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
