"""Reads titles of items, which recommendations show beside the ids."""

import csv
from pathlib import Path

from data_prep.text import open_text


def titles(files: list[Path]) -> dict[str, str]:
    """Reads the lists of movies of MovieLens.

    Args:
      files: `u.item`, `movies.dat` or `movies.csv`; plain or gzip.

    Returns:
      The title of each original item id.
    """
    found: dict[str, str] = {}
    for path in files:
        if "movies.csv" in path.name:
            with open_text(path) as file:
                rows = csv.reader(file)
                next(rows, None)
                found |= {row[0]: row[1] for row in rows if len(row) > 1}
        else:
            delimiter = "::" if "movies.dat" in path.name else "|"
            with open_text(path, encoding="latin-1") as file:
                rows = (line.split(delimiter) for line in file)
                found |= {row[0]: row[1] for row in rows if len(row) > 1}
    return found
