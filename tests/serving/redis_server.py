"""A real Redis or Valkey server, if this machine has one."""

import shutil
import subprocess
import tempfile
import time

import pytest


class RedisServer:
    """Listens on a socket, and keeps its files in a folder, where it can be started again.

    It skips the test that asks for it where there is no server or no client.
    """

    def __init__(self, folder, *settings):
        pytest.importorskip("redis", reason="the client of the extra redis is not installed")
        self.program = shutil.which("redis-server") or shutil.which("valkey-server")
        if self.program is None:
            pytest.skip("needs redis-server or valkey-server: apt-get install redis-server")
        # The path of a socket has at most 107 bytes.
        self._short = tempfile.TemporaryDirectory(prefix="redis-")
        self.folder, self.settings = folder, settings or ("--appendonly", "yes")
        self.url = f"unix://{self._short.name}/s"

    def start(self):
        import redis

        flags = ["--port", "0", "--unixsocket", f"{self._short.name}/s", "--save", ""]
        flags += ["--appendfsync", "always", "--dir", str(self.folder), *self.settings]
        output = open(self.folder / "server.log", "ab")  # noqa: SIM115
        self.process = subprocess.Popen([self.program, *flags], stdout=output, stderr=output)
        output.close()
        client = redis.Redis.from_url(self.url)
        for _ in range(1000):
            try:
                client.ping()
                break
            except redis.RedisError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.01)
        client.close()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.kill()
        self._short.cleanup()
