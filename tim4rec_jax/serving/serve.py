"""`python -m tim4rec_jax.serving serve`: the HTTP service on a port."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tim4rec_jax import compilation_cache
from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.command import add_approximate_flag
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.serving.sqlite_store import SQLiteStore

_LEAST_EXCLUDED = 16  # of the powers of two that `Engine.best` pads to


def add_command(subparsers: Any) -> None:
    """Adds `serve` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve",
        help="recommend over HTTP (pip install 'tim4rec-jax[serve]')",
        description="Serves recommendations over HTTP, with a page to try them at /.",
    )
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="directory of a run, as train.py wrote it")
    add("--dataset", type=Path, help="the prepared dataset, if it has moved since the training")
    add("--store", type=Path, metavar="FILE", help="keep users in this SQLite file, not in memory")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    add_approximate_flag(parser)
    parser.set_defaults(run=_run)


def _run(flags: argparse.Namespace) -> None:
    try:
        import uvicorn

        from tim4rec_jax.serving.http_service import BATCHES, create_app
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise UserError(
            f"{error.name} is not installed; pip install 'tim4rec-jax[serve]'"
        ) from error
    if not 0 <= flags.port < 1 << 16:
        raise UserError(f"--port is {flags.port}; ports go from 0 to 65535")
    try:
        listener = socket.create_server((flags.host, flags.port), backlog=2048)
    except OSError as error:
        raise UserError(
            f"cannot listen on {flags.host}:{flags.port}: {error.strerror}; choose another "
            "--host or --port"
        ) from error
    compilation_cache.enable()
    store = SQLiteStore(flags.store) if flags.store else None
    recommender = Recommender.load(
        flags.workdir, store, flags.dataset, approximate=flags.approximate
    )
    warm_up(recommender, BATCHES)
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(create_app(recommender), log_level="warning", access_log=False)
    print(f"{len(recommender.catalogue):,} items at http://{host}:{port}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def warm_up(recommender: Recommender, batches: Sequence[int]) -> None:
    """Compiles what histories of up to a full window will need, in batches of these sizes."""
    engine = recommender.engine
    engine.one_width = True
    at = engine.max_length if engine.knows_next_time else None
    item, lengths = recommender.catalogue.ids[:1], [engine.max_length]
    while lengths[-1] > _LEAST_EXCLUDED:  # the items left out have a width of their own
        lengths.append(lengths[-1] // 2)
    for rows in batches:
        for length in lengths:
            recommender.recommend_batch([(item * length, list(range(length)))] * rows, at=at)
