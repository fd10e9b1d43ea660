"""Prepares a large log under a memory limit, and prints rows per second and peak memory.

    python -m benchmarks.data_prep --rows 50000000 --memory-limit 2GB

Makes a CSV log with 32 bytes a row, in which few users and items have most of the events. Prepares
it in another process. Needs about 200 bytes of disk for each row in --directory.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb
from rich.console import Console
from rich.table import Table

_LOG = """COPY (SELECT
    'user' || CAST(floor(pow(random(), 2) * {rows} / 25) AS BIGINT) AS user_id,
    'item' || CAST(floor(pow(random(), 3) * {rows} / 100) AS BIGINT) AS item_id,
    1500000000 + CAST(floor(random() * 100000000) AS BIGINT) AS timestamp
  FROM range({rows})) TO '{path}' (HEADER)"""


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--memory-limit", default="1GB")
    parser.add_argument("--directory", help="for temporary files (default: the system's)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.directory) as directory:
        path = Path(directory) / "log.csv"
        duckdb.sql("SET enable_progress_bar = false")
        duckdb.sql(_LOG.format(rows=flags.rows, path=path))
        size = path.stat().st_size
        command = [sys.executable, "-m", "data_prep", "table", str(path), "--out"]
        command += [f"{directory}/out", "--memory-limit", flags.memory_limit]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        sys.exit("the preparation failed")
    table = Table("rows", "log", "limit", "time", "CPU time", "rows/s", "peak memory")
    table.add_row(
        f"{flags.rows:,}",
        f"{size / 1e9:.2f} GB",
        flags.memory_limit,
        f"{seconds:.0f} s",
        f"{usage.ru_utime + usage.ru_stime:.0f} s",
        f"{flags.rows / seconds:,.0f}",
        f"{usage.ru_maxrss / 1e6:.2f} GB",  # Linux counts kilobytes
    )
    Console().print(table)


if __name__ == "__main__":
    main()
