"""What a store says to a Redis server, answered without one: for machines that have none.

That a store works with Redis is what `redis_server.py` and its tests are for.
"""

import contextlib
import hashlib
import itertools
import socketserver
import tempfile
import threading

import pytest


class StandIn:
    """Listens on a socket and answers the few commands of `RedisStore`, in the protocol of Redis.

    It cannot run the store's script, and does the same by other means: what is wrong in the script
    itself, only a real server finds.

    Attributes:
      url: the address.
      info: what it says of itself.
      values: the hashes and sorted sets by their keys.
      rewriting: which files it is writing anew.
      rewritten: which files it has written anew.
      looks: how often a client finds each file unfinished; None: always.
      version: of the protocol; a client may ask for another one.
    """

    def __init__(self, looks: int | None = 0, **info):
        pytest.importorskip("redis", reason="the client of the extra redis is not installed")
        self.info = {"aof_enabled": 1, "maxmemory": 0, "rdb_saves": 0} | info
        self.values, self.scripts, self.version = {}, set(), 2
        self.rewriting, self.rewritten, self.looks, self._left = "", [], looks, 0
        self._lock, self._folder = threading.Lock(), tempfile.TemporaryDirectory(prefix="redis-")
        self.url = f"unix://{self._folder.name}/s"

    def __enter__(self):
        class Handler(socketserver.StreamRequestHandler):
            def handle(handler):
                with contextlib.suppress(EOFError, ConnectionError):
                    while True:
                        command = _read(handler.rfile)
                        with self._lock:
                            answer = self._answer(*command)
                        handler.wfile.write(_written(answer, self.version))

        self._server = socketserver.ThreadingUnixStreamServer(self.url[len("unix://") :], Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()

    def _answer(self, name, *arguments):
        command = getattr(self, f"_{name.decode().lower()}", None)
        return command(*arguments) if command else Exception(f"ERR unknown command {name}")

    def _hello(self, version):
        self.version = int(version)
        return {b"proto": self.version}

    def _info(self, *section):
        if self.rewriting and self.looks is not None:
            self._left -= 1
            if self._left < 0:
                self.rewritten.append(self.rewriting)
                self.rewriting = ""
        now = {
            "aof_rewrite_in_progress": int(self.rewriting == "log"),
            "rdb_bgsave_in_progress": int(self.rewriting == "snapshot"),
        }
        return "".join(f"{name}:{value}\r\n" for name, value in (self.info | now).items()).encode()

    def _bgrewriteaof(self):
        self.rewriting, self._left = "log", self.looks
        return "Background append only file rewriting started"

    def _bgsave(self, *schedule):
        self.rewriting, self._left = "snapshot", self.looks
        return "Background saving started"

    def _config(self, get, name):
        return {name: b""}

    def _script(self, what, *given):
        if what == b"LOAD":
            self.scripts.add(sha := hashlib.sha1(given[0]).hexdigest().encode())
            return sha
        return [int(sha in self.scripts) for sha in given]

    def _evalsha(
        self, sha, keys, user, events, expected, model, keeps, state, last, token, *members
    ):
        assert sha in self.scripts and keys == b"2" and len(token) == 8
        fields = self.values.get(user, {})
        changes = fields.get(b"changes", b"")
        if token in changes:
            return 1
        if fields.get(b"events", b"0") != expected:
            return 0
        if members:
            self.values.setdefault(events, set()).update(members)
        count, last = int(expected) + len(members), max(last, fields.get(b"last", b""))
        self.values[user] = {b"events": b"%d" % count, b"last": last, b"model": model}
        self.values[user][b"changes"] = (token + changes)[: 16 * 8]
        if keeps == b"1":
            self.values[user][b"state"] = state
        return 1

    def _hmget(self, key, *names):
        return [self.values.get(key, {}).get(name) for name in names]

    def _zrange(self, key, first, last):
        assert (first, last) == (b"0", b"-1")
        return sorted(self.values.get(key, ()))

    def _del(self, *keys):
        return sum(self.values.pop(key, None) is not None for key in keys)


def _read(stream):
    """The next word or list of words that a client sends."""
    if not (line := stream.readline()):
        raise EOFError
    count = int(line[1:])
    if line[:1] == b"*":
        return [_read(stream) for _ in range(count)]
    return stream.read(count + 2)[:count]


def _written(answer, version):
    match answer:
        case None:
            return b"$-1\r\n" if version == 2 else b"_\r\n"
        case int():
            return b":%d\r\n" % answer
        case bytes():
            return b"$%d\r\n%s\r\n" % (len(answer), answer)
        case str():
            return b"+%s\r\n" % answer.encode()
        case Exception():
            return b"-%s\r\n" % str(answer).encode()
        case dict() if version == 3:
            begin, parts = b"%%%d\r\n" % len(answer), itertools.chain(*answer.items())
        case dict():
            begin, parts = b"*%d\r\n" % (2 * len(answer)), itertools.chain(*answer.items())
        case list():
            begin, parts = b"*%d\r\n" % len(answer), answer
    return begin + b"".join(_written(part, version) for part in parts)
