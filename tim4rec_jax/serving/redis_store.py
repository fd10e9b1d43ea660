"""A store of users in Redis or Valkey, which the services of many machines share."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.stores import Change, Snapshot, StoreError

SCHEMES = ("redis://", "rediss://", "unix://", "valkey://", "valkeys://")
# Decimal digits of a time and of an event's number, so that texts are in the order of the numbers.
_DIGITS = 20
_TOKEN = 8  # bytes that tell a change from all others of its user
_EVERY = 0.02  # seconds between two looks at what the server does in the background
# A script is one step for the server: no other caller sees or does anything in between. A change
# that is sent twice is made once: the tokens of a user's last 16 changes are kept.
_APPLY = """
local found = redis.call('HMGET', KEYS[1], 'events', 'last', 'changes')
local expected, model, keeps, state, last, token = unpack(ARGV, 1, 6)
local changes = found[3] or ''
if string.find(changes, token, 1, true) then return 1 end
if (found[1] or '0') ~= expected then return 0 end
for number = 7, #ARGV do redis.call('ZADD', KEYS[2], 0, ARGV[number]) end
if found[2] and found[2] > last then last = found[2] end
local events = string.format('%.0f', expected + #ARGV - 6)
changes = string.sub(token .. changes, 1, 16 * #token)
redis.call('HSET', KEYS[1], 'events', events, 'last', last, 'model', model, 'changes', changes)
if keeps == '1' then
  redis.call('HSET', KEYS[1], 'state', state)
else
  redis.call('HDEL', KEYS[1], 'state')
end
return 1
"""


class RedisStore:
    """Keeps users in a server of Redis 6 or later, or of Valkey; for the extra `redis`.

    An update of a user is one step of the server: it is made completely or not at all. The server
    must write a log of what it does (`appendonly yes`) and must not evict keys. With `appendfsync
    always`, what it has acknowledged survives a power cut, too, and with `everysec` a kill of the
    server, but a power cut may lose the last second.

    The server may make a change whose answer does not come, because the connection breaks or the
    time is up. So the change is sent once more, and the server makes it once. If that answer does
    not come either, nobody knows whether the change is made: events that are then sent again may
    stand twice in the log, where two equal events cannot be told from one that came twice.

    Each user has two keys, `PREFIX{USER}:user` and `PREFIX{USER}:events`, which a cluster keeps on
    one node.
    """

    def __init__(self, url: str, *, prefix: str = "tim4rec:", timeout: int | float = 60.0):
        """Connects to the server.

        Args:
            url: `redis://[[USER]:PASSWORD@]HOST[:PORT][/NUMBER]`, `rediss://` for TLS, or
                `unix:///PATH`. `valkey://` is the same as `redis://`.
            prefix: the beginning of all keys. Stores with different prefixes share a server.
            timeout: how many seconds to wait for the server.

        Raises:
            StoreError: the server cannot be reached.
            UserError: the client is not installed, the address is none, or the server would lose
                users by its settings.
        """
        try:
            import redis
        except ModuleNotFoundError as error:
            raise UserError("redis is not installed; pip install 'tim4rec-jax[redis]'") from error
        self._error, self._prefix, self._timeout = redis.RedisError, prefix, timeout
        self._unheard = redis.ConnectionError, redis.TimeoutError
        self.name = url.rpartition("@")[2]  # without the password
        url = url.replace("valkey", "redis", 1) if url.startswith("valkey") else url
        try:
            self._client: Any = redis.Redis.from_url(
                url, socket_timeout=timeout, socket_connect_timeout=timeout
            )
        except ValueError as error:
            raise UserError(f"{self.name} is no address of a Redis server ({error})") from error
        self._script = self._client.register_script(_APPLY)
        with self._naming_what_fails():
            info = self._client.info()
        if not info.get("aof_enabled"):
            raise UserError(
                f"the server {self.name} keeps users in memory only; start it with "
                "`--appendonly yes`"
            )
        if info.get("maxmemory") and info.get("maxmemory_policy") != "noeviction":
            raise UserError(
                f"the server {self.name} throws users away when its memory is full; set "
                "`maxmemory-policy noeviction`"
            )

    def snapshots(self, users: Sequence[str], model: str) -> list[Snapshot]:
        """See `Store`."""
        with self._naming_what_fails(), self._client.pipeline(transaction=False) as pipe:
            for user in users:
                pipe.hmget(self._keys(user)[0], "events", "last", "model")
            rows = pipe.execute()
            known = [number for number, row in enumerate(rows) if row[2] == model.encode()]
            # The state is read together with what it belongs to.
            for number in known:
                pipe.hmget(self._keys(users[number])[0], "events", "last", "model", "state")
            for number, row in zip(known, pipe.execute(), strict=True):
                rows[number] = row
        return [_snapshot(row, model) for row in rows]

    def history(self, user: str) -> tuple[list[str], list[int]]:
        """See `Store`."""
        with self._naming_what_fails():
            events = self._client.zrange(self._keys(user)[1], 0, -1)
        items = [event[2 * _DIGITS :].decode("utf-8", "surrogatepass") for event in events]
        return items, [int(event[:_DIGITS]) for event in events]

    def apply(self, changes: Sequence[Change], model: str) -> list[bool]:
        """See `Store`; each change is a step of its own.

        Raises:
            StoreError: the server cannot be used. Some changes may be made, or all.
        """
        calls = []
        for change in changes:
            members = [
                f"{timestamp:0{_DIGITS}d}{change.expected + number:0{_DIGITS}d}".encode()
                + item.encode("utf-8", "surrogatepass")
                for number, (item, timestamp) in enumerate(
                    zip(change.items, change.timestamps, strict=True)
                )
            ]
            last = f"{max(change.timestamps):0{_DIGITS}d}" if change.timestamps else ""
            state, token = change.state or b"", secrets.token_bytes(_TOKEN)
            keeps = int(change.state is not None)
            arguments = [change.expected, model, keeps, state, last, token, *members]
            calls.append((self._keys(change.user), arguments))
        with self._naming_what_fails():
            try:
                return self._call(calls)
            except self._unheard:  # the tokens keep the server from doing anything twice
                return self._call(calls)

    def _call(self, calls: Sequence[tuple[list[bytes], list[Any]]]) -> list[bool]:
        with self._client.pipeline(transaction=False) as pipe:
            for keys, arguments in calls:
                self._script(keys=keys, args=arguments, client=pipe)
            return [bool(done) for done in pipe.execute()]

    def delete(self, user: str) -> bool:
        """See `Store`.

        The server writes its log and its snapshot anew, without the user, before this returns.
        Copies that others have made of these files are not known to it.

        Raises:
            StoreError: besides what makes every call fail, the server has not finished in time.
                The user is deleted all the same; a second call writes the files anew again.
        """
        with self._naming_what_fails():
            gone = self._client.delete(*self._keys(user))
            self._rewrite("aof_rewrite_in_progress", self._client.bgrewriteaof)
            # The AOF is the truth; a snapshot is there if the server was told to make some.
            if self._client.info("persistence").get("rdb_saves", 0) or self._has_snapshots():
                self._rewrite("rdb_bgsave_in_progress", self._client.bgsave)
        return gone > 0

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _has_snapshots(self) -> bool:
        try:
            return bool(self._client.config_get("save").get("save"))
        except self._error:  # a server that others run need not tell its settings
            return True

    def _rewrite(self, running: str, begin: Any) -> None:
        """Has the server write a file anew, from now on, and waits until it is written."""
        until, begun = time.monotonic() + self._timeout, False
        while time.monotonic() < until:
            info = self._client.info("persistence")
            if not info["aof_rewrite_in_progress"] and not info["rdb_bgsave_in_progress"]:
                if begun and not info.get("aof_rewrite_scheduled"):
                    return
                try:
                    begun = bool(begin())
                except self._error as error:
                    if "in progress" not in str(error):
                        raise
            time.sleep(_EVERY)
        raise StoreError(
            f"the user is deleted, but the server {self.name} is still busy ({running}), so that "
            "traces are left in its files; delete the user once more"
        )

    def _keys(self, user: str) -> list[bytes]:
        key = f"{self._prefix}{{{user}}}".encode("utf-8", "surrogatepass")
        return [key + b":user", key + b":events"]

    @contextmanager
    def _naming_what_fails(self) -> Iterator[None]:
        try:
            yield
        except (self._error, OSError) as error:
            raise StoreError(f"the store {self.name} cannot be used: {error}") from error


def _snapshot(row: list[bytes | None], model: str) -> Snapshot:
    events, last, made_by, *state = row
    if events is None:
        return Snapshot(0, None, None)
    own = state[0] if state and made_by == model.encode() else None
    return Snapshot(int(events), int(last) if last else None, own)
