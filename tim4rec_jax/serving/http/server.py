"""Runs the service: `python -m tim4rec_jax.serving serve --workdir RUN`."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Literal

import uvicorn
from fastapi import FastAPI

from tim4rec_jax.errors import UserError
from tim4rec_jax.files import read_regular
from tim4rec_jax.runtime import enable_compilation_cache
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.http.app import create_app
from tim4rec_jax.serving.http.connection import IDLE_SECONDS, MAX_CONNECTIONS, Connection
from tim4rec_jax.serving.http.service import Service
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.serving.redis_store import SCHEMES, RedisStore
from tim4rec_jax.serving.stores import SQLiteStore, Store

# How long answers that are being computed may take after SIGTERM, and when the process ends at the
# latest.
_DRAIN_SECONDS, _END_SECONDS = 6, 9
_STORE_SECONDS = 3  # how long to wait for another process that writes to the store
_LARGEST_TOKEN = 1 << 20  # bytes
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def serve(
    workdir: Path,
    *,
    dataset: Path | None = None,
    store: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    approximate: bool = False,
    state_dtype: Literal["float32", "bfloat16"] = "float32",
    token_file: Path | None = None,
    allowed_hosts: Collection[str] = (),
) -> None:
    """Serves the best model of a run until the process is told to end.

    It prints the address once everything is compiled. SIGTERM lets it finish what it has begun.
    SIGHUP and `POST /reload` make it load the run again, in the background.

    Args:
        workdir: the run directory.
        dataset: the prepared dataset, if it has moved since the training.
        store: an SQLite file that keeps the users, or the address of a Redis or Valkey server
            (`redis://HOST:PORT`); `None` keeps them in memory.
        host: the address to listen on.
        port: the port to listen on; 0 takes any that is free.
        approximate: whether to search an index; see `Recommender.load`.
        state_dtype: see `Recommender.load`.
        token_file: a file whose first line callers must send as bearer token; `None`: anybody may
            call.
        allowed_hosts: the names under which callers reach the service. Without any, a service on a
            loopback address answers only to names of this machine, and others to all names.

    Raises:
        UserError: the port cannot be used, or the run, the dataset, the token or the store cannot
            be read.
    """
    token = None if token_file is None else _read_token(token_file)
    listener = listen(host, port)
    enable_compilation_cache()
    users = _open_store(store) if store else None

    def load() -> Recommender:
        recommender = Recommender.load(
            workdir, users, dataset, approximate=approximate, state_dtype=state_dtype
        )
        recommender.model.compile_ahead()
        print(recommender.open_training(), file=sys.stderr, flush=True)
        return recommender

    recommender = load()
    users = recommender.store
    host, port = listener.getsockname()[:2]
    hosts = [*allowed_hosts] or ([*_LOOPBACK, host] if host.startswith("127.") else None)
    app = create_app(recommender, token=token, hosts=hosts)
    # A thread that computes in Python gives way to the event loop after this many seconds.
    sys.setswitchinterval(0.0005)
    _allow_open_files(2 * MAX_CONNECTIONS)
    # What is there now stays, and need not be searched for garbage again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # of what is there only for a moment, there may be much under load
    print(f"{len(recommender.catalogue):,} items at http://{host}:{port}", flush=True)
    server = Server(app, load)
    if token or host.startswith("127."):
        app.state.service.reload = server.load_again
    del recommender, app  # the service has them, and lets go of what it has loaded again
    server.run(sockets=[listener])


def _open_store(name: str | Path) -> Store:
    if str(name).startswith(SCHEMES):
        return RedisStore(str(name), timeout=_STORE_SECONDS)
    users = SQLiteStore(name, timeout=_STORE_SECONDS)
    users.check()
    return users


def listen(host: str, port: int) -> socket.socket:
    """Opens a port (0: any that is free), whose connections send without delay.

    Raises:
        UserError: the port cannot be used.
    """
    try:
        listener = socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from error
    except OverflowError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}") from None
    # Connections inherit it. asyncio sets it only where a socket names its protocol, and without
    # it the body of an answer waits 40 ms for the receipt of its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _read_token(path: Path) -> str:
    try:
        lines = read_regular(path, _LARGEST_TOKEN).decode("ascii").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name another file") from error
    except UnicodeDecodeError:
        lines = []
    token = lines[0].strip() if lines else ""
    if len(token) < 16 or " " in token:
        raise UserError(
            f"{path}: the first line must be a token of 16 or more ASCII characters without spaces"
        )
    return token


def _allow_open_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Server(uvicorn.Server):
    """Looks after its connections, loads the run again on SIGHUP, and always ends in time."""

    def __init__(self, app: FastAPI, load: Callable[[], Recommender]):
        """Prepares a server.

        Args:
            app: from `create_app`.
            load: makes the recommender to go on with after SIGHUP.
        """
        service: Service = app.state.service
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(  # type: ignore[arg-type]
                    Connection, service.admission, service.metrics
                ),
                ws="none",
                # uvloop accepts one connection in each round, so that new ones wait under load.
                loop="asyncio",
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=_DRAIN_SECONDS,
            )
        )
        self._service = service
        self._load, self._loading = load, threading.Lock()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to answer."""
        await super().startup(sockets)
        if threading.current_thread() is threading.main_thread():  # no other gets signals
            thread = functools.partial(threading.Thread, target=self.reload, daemon=True)
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: thread().start())

    def reload(self) -> None:
        """Does `load_again` and prints what has become of it."""
        try:
            print(f"{self.load_again():,} items, loaded again", flush=True)
        except UserError as error:
            print(f"error: {error}; the earlier run goes on", file=sys.stderr, flush=True)

    def load_again(self) -> int:
        """Goes on with the recommender that is loaded now; requests are answered meanwhile.

        Returns:
            The number of its items.

        Raises:
            UserError: it cannot be loaded, or is of another log; the earlier one still answers.
        """
        with self._loading:
            new = self._load()
            _check_same_log(self._service.recommender.catalogue, new.catalogue)
            self._service.recommender = new
            return len(new.catalogue)

    async def on_tick(self, counter: int) -> bool:
        """Is called ten times a second."""
        if counter % 10 == 0:
            now = asyncio.get_running_loop().time()
            for connection in [*self.server_state.connections]:
                connection.check_time(now)  # type: ignore[union-attr]
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to end the process."""
        super().handle_exit(sig, frame)
        timer = threading.Timer(_END_SECONDS, os._exit, (1,))
        timer.daemon = True
        timer.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finishes what has been begun."""
        await super().shutdown(sockets)
        self._service.recommender.store.close()


def _check_same_log(old: Catalogue, new: Catalogue) -> None:
    """Makes sure that the users of one run are those of the other.

    Raises:
        UserError: most of the items that are served now are unknown to the new run, so that what
            users have done would count for nothing.
    """
    known = int((new.indices(old.ids) > 0).sum())
    if known < len(old) / 2:
        raise UserError(
            f"{new.directory} knows {known:,} of the {len(old):,} items that are served now, so it "
            "seems to be of other data; start the service anew if that is what you want"
        )
