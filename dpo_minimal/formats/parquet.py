"""Rows of a parquet file: the hub serves stack-exchange-paired in this form."""

from dpo_minimal import InputError


def read_parquet(path):
    """Yield (place, row dict) of a parquet file, with one batch of rows in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path} is parquet: pip install pyarrow to read it") from None
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a parquet file that can be read ({error})") from None
