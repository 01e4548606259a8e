"""Rows of a CSV file whose first line names the columns."""

import csv

from dpo_minimal import InputError
from dpo_minimal.extras.reading import reading

LONGEST = 2**30  # characters of a field; the module's own limit is 131,072


def read_csv(path):
    """Yield (place, row dict) of a CSV file in UTF-8; InputError for a line of another length."""
    csv.field_size_limit(LONGEST)
    with reading(path, "a CSV file in UTF-8"), open(path, encoding="utf-8-sig", newline="") as file:
        reader, first = csv.DictReader(file, strict=True), 2
        if not reader.fieldnames:
            raise InputError(f"{path} is empty: it should begin with the columns' names")
        for row in reader:
            place, first = f"{path}, line {first}", reader.line_num + 1
            if None in row or None in row.values():
                columns = len(reader.fieldnames)
                raise InputError(f"{place}: not the {columns} fields that the first line names")
            yield place, row
