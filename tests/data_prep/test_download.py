"""Downloads against a local server that cuts connections, changes files and refuses."""

import dataclasses
import hashlib
import http.server
import io
import os
import socket
import threading
import zipfile

import numpy as np
import pytest
from rich.console import Console

from tim4rec_jax.data_prep import sources
from tim4rec_jax.data_prep.download import fetch
from tim4rec_jax.errors import UserError

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`, at most `server.cut` bytes of it at a time."""

    def do_GET(self):
        server = self.server
        server.requests.append(self.headers.get("Range"))
        if server.status != 200:
            self.send_error(server.status)
            return
        start = 0
        if "Range" in self.headers and self.headers.get("If-Range") == server.tag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        if server.tag:
            self.send_header("ETag", server.tag)
        self.end_headers()
        self.wfile.write(server.content[start : start + server.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.tag, server.status = CONTENT, '"v1"', 200
        server.cut, server.requests = len(CONTENT), []
        server.url = f"http://127.0.0.1:{server.server_port}/files/a.bin"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def get(server, directory, md5=MD5):
    return fetch(
        server.url, directory, md5=md5, command="prepare", console=Console(quiet=True), pause=0.001
    )


def test_whole_file_once(server, tmp_path):
    path = get(server, tmp_path / "cache")
    assert path.name == "a.bin" and path.read_bytes() == CONTENT
    assert get(server, tmp_path / "cache") == path
    assert server.requests == [None]
    assert [file.name for file in path.parent.iterdir()] == ["a.bin"]


def test_a_cut_connection_is_continued(server, tmp_path):
    server.cut = 120_000
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=120000-", "bytes=240000-"]


def test_a_later_run_continues(server, tmp_path):
    server.cut = 50_000
    with pytest.raises(UserError, match=r"cannot download a.bin \(the connection was cut\)"):
        get(server, tmp_path)
    server.cut, server.requests = len(CONTENT), []
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=250000-"]


def test_a_file_that_changed_starts_anew(server, tmp_path):
    server.cut = 50_000
    with pytest.raises(UserError):
        get(server, tmp_path)
    server.cut, server.tag, server.content = len(CONTENT), '"v2"', CONTENT[::-1]
    assert get(server, tmp_path, md5=None).read_bytes() == CONTENT[::-1]


def test_killed_between_the_last_byte_and_the_rename(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    (tmp_path / "a.bin.part.version").write_text(server.tag)
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(CONTENT)}-", None]


def test_wrong_checksum(server, tmp_path):
    server.content = CONTENT[:-1] + b"?"
    with pytest.raises(UserError) as error:
        get(server, tmp_path)
    found = hashlib.md5(server.content).hexdigest()
    assert str(error.value) == (
        f"a.bin from {server.url} has the checksum {found}, its owner says {MD5}: deleted; run "
        f"again, or fetch {server.url} by other means and run `prepare --source a.bin`"
    )
    assert not any(path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".version")


def test_missing_file_is_not_asked_for_twice(server, tmp_path):
    server.status = 404
    with pytest.raises(UserError, match="the server answers 404; fetch http"):
        get(server, tmp_path)
    assert len(server.requests) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_a_full_disk_is_no_broken_connection(server, tmp_path):
    (tmp_path / "a.bin.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"a.bin.part cannot be written: No space left .* --cache"):
        get(server, tmp_path)
    assert len(server.requests) == 1


def test_busy_server_is_asked_again(server, tmp_path):
    server.status = 503
    with pytest.raises(UserError, match=r"cannot download a.bin \(the server answers 503\)"):
        get(server, tmp_path)
    assert len(server.requests) == 5


@pytest.mark.parametrize("begun", [False, True])
def test_a_server_that_does_not_answer_is_not_asked_again(tmp_path, begun):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.bin"
    if begun:
        (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    console = Console(file=io.StringIO())
    with pytest.raises(UserError) as error:
        fetch(url, tmp_path, md5=None, command="prepare", console=console, pause=0.001)
    assert str(error.value) == (
        f"cannot download a.bin (Connection refused): fetch {url} by other means and run "
        "`prepare --source a.bin`"
    )
    assert "trying again" not in console.file.getvalue()


def serve_movielens_from(url, monkeypatch):
    source = dataclasses.replace(sources.SOURCES["movielens"], url=lambda flags: url)
    monkeypatch.setitem(sources.SOURCES, "movielens", source)


def test_offline(run, tmp_path, monkeypatch):
    url = "http://no-such-host.invalid/ml-1m.zip"
    serve_movielens_from(url, monkeypatch)
    sentence = run("movielens", "ml-1m", "--cache", tmp_path / "cache", fails=True)
    assert sentence.startswith("cannot download ml-1m.zip (")
    command = "python -m data_prep movielens ... --source ml-1m.zip"
    assert sentence.endswith(f"): fetch {url} by other means and run `{command}`")


def test_from_server_to_dataset(run, server, tmp_path, monkeypatch, histories):
    with zipfile.ZipFile(tmp_path / "ml-100k.zip", "w") as archive:
        archive.writestr("ml-100k/u.data", "1\t2\t5\t100\n1\t3\t5\t99\n")
    server.content = (tmp_path / "ml-100k.zip").read_bytes()
    server.cut = 100
    url = server.url.replace("a.bin", "ml-100k.zip")
    serve_movielens_from(url, monkeypatch)
    monkeypatch.setitem(sources.MD5, "ml-100k.zip", hashlib.md5(server.content).hexdigest())
    ds = run("movielens", "ml-100k", "--cache", tmp_path / "cache", "--k-core", "1")
    assert histories(ds) == {"1": [("3", 99), ("2", 100)]}


def test_addresses(run, monkeypatch, tmp_path):
    asked = []

    def fetch(url, directory, *, md5, command, console):
        asked.append((url, md5 is not None))
        raise UserError("no network here")

    monkeypatch.setattr("tim4rec_jax.data_prep.__main__.fetch", fetch)
    for arguments in (
        ("movielens", "ml-32m"),
        ("amazon", "Beauty"),
        ("amazon", "All_Beauty", "--edition", "2018"),
        ("amazon", "All_Beauty", "--edition", "2023"),
        ("kuairand", "27K"),
        ("steam",),
    ):
        assert run(*arguments, fails=True) == "no network here"
    assert [known for _, known in asked] == [True, False, False, False, True, False]
    assert [url.rsplit("/", 1)[1] for url, _ in asked] == [
        "ml-32m.zip",
        "ratings_Beauty.csv",
        "All_Beauty.csv",
        "All_Beauty.csv.gz",
        "KuaiRand-27K.tar.gz",
        "steam_reviews.json.gz",
    ]


@pytest.mark.parametrize("name, what", [("movielens", "edition"), ("amazon", "category")])
def test_nothing_to_read(run, name, what):
    assert run(name, fails=True) == (
        f"{name}: nothing to read; pass --source PATH or name the {what} to download "
        f"(`python -m data_prep {name} --help`)"
    )
    assert "nothing to read; pass --source PATH (" in run("table", fails=True)
