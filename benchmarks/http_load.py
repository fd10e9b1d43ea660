"""Measures latency and requests per second of the HTTP service by number of clients.

python -m tim4rec_jax.serving serve --workdir RUN --port 8000 &
python -m benchmarks.http_load [--url http://127.0.0.1:8000] [--seconds 5] [--events 20]

Each client waits for an answer before it sends its next request. The clients are coroutines of
this process and share the cores of the machine with the service. The figures are therefore a
lower bound of what the service can do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
import urllib.request
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.table import Table

CLIENTS = (1, 4, 16, 64, 256)


def requests(url: str, events: int, count: int = 500) -> list[bytes]:
    """Returns requests for random histories, as bytes to send."""
    with urllib.request.urlopen(f"{url}/items?limit=100") as answer:
        items = [item["item"] for item in json.load(answer)]
    address, drawn = urlsplit(url).netloc, random.Random(0)
    made = []
    for _ in range(count):
        times = sorted(drawn.sample(range(1_600_000_000, 1_700_000_000), events))
        body = json.dumps({"items": drawn.choices(items, k=events), "timestamps": times}).encode()
        head = (
            f"POST /recommend HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        made.append(head.encode() + body)
    return made


async def client(url: str, made: list[bytes], until: float, seconds: list[float | None]) -> None:
    """Sends one request after the other on one connection; notes `None` where one is refused.

    It writes the bytes itself, because a client library would use more of the cores than the
    service.
    """
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    number = random.randrange(len(made))
    while time.perf_counter() < until:
        start = time.perf_counter()
        writer.write(made[number % len(made)])
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith((b"http/1.1 200", b"http/1.1 503")):
            raise SystemExit(f"error: {url} answered {head.splitlines()[0].decode()}")
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        seconds.append(time.perf_counter() - start if head[9:12] == b"200" else None)
        number += 1
    writer.close()
    await writer.wait_closed()


async def measure(url: str, made: list[bytes], clients: int, length: float) -> list[float | None]:
    """Returns the seconds of each request, from `clients` at once for `length` seconds."""
    seconds: list[float | None] = []
    until = time.perf_counter() + length
    await asyncio.gather(*(client(url, made, until, seconds) for _ in range(clients)))
    return seconds


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=5.0, help="per row of the table")
    parser.add_argument("--events", type=int, default=20, help="events of a history")
    flags = parser.parse_args()
    made = requests(flags.url, flags.events)
    table = Table(title=f"POST /recommend, {flags.events} events, {flags.seconds:g} s a row")
    for column in ("clients", "requests/s", "p50, ms", "p99, ms", "requests", "refused"):
        table.add_column(column, justify="right")
    for clients in CLIENTS:
        everything = asyncio.run(measure(flags.url, made, clients, flags.seconds))
        seconds = [taken for taken in everything if taken is not None]
        refused = len(everything) - len(seconds)
        low, high = np.quantile(seconds, (0.5, 0.99)) * 1e3
        rate = len(seconds) / flags.seconds
        table.add_row(
            str(clients),
            f"{rate:,.0f}",
            f"{low:.1f}",
            f"{high:.1f}",
            f"{len(seconds):,}",
            f"{refused:,}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
