"""The code in the documentation: which blocks there are, and how to run them."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted([*DOCS.glob("*.md"), *DOCS.glob("studies/*.md")]),
]
# A block whose first line is this comment cannot run in a test, and says to its readers why.
NOT_RUN = re.compile(r"# not run by the tests: \S+ \S+")
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>[^`\n]*)\n(?P<code>.*?)^ *```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A block of code on a page; `line` is the number of its first line there."""

    page: Path
    language: str
    code: str
    line: int

    @property
    def runs(self) -> bool:
        return not NOT_RUN.match(self.code)

    @property
    def module(self) -> str:
        """The name of the module that a block is to be saved as, if it begins with `# name.py`."""
        named = re.match(r"# (\w+)\.py\n", self.code)
        return named[1] if named else ""

    def commands(self) -> list[str]:
        """The commands of a shell block, of one or more lines each."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]

    def run_python(self, variables: dict) -> None:
        """Runs the block, or saves it as a module into the current folder."""
        if self.module:
            Path(f"{self.module}.py").write_text(self.code)
            return
        # With the lines of the page, for tracebacks.
        exec(compile("\n" * (self.line - 1) + self.code, str(self.page), "exec"), variables)


def blocks(page: Path) -> list[Block]:
    """All blocks of code of a page, in order."""
    text = page.read_text()
    return [
        Block(
            page,
            found["language"],
            textwrap.dedent(found["code"]),
            text.count("\n", 0, found.start("code")) + 1,
        )
        for found in _BLOCK.finditer(text)
    ]


class Shell:
    """Runs shell commands as a reader would: in a clone, where everything is installed.

    The current folder is empty but for links to what the clone has. A command that serves goes on
    in the background, and later commands find it at the port that they name.
    """

    def __init__(self, folder: Path):
        self.folder, self.servers = folder, []
        for name in (
            "train.py",
            "eval.py",
            "configs",
            "data_prep",
            "benchmarks",
            "studies",
            "examples",
        ):
            (folder / name).symlink_to(ROOT / name)
        programs = folder / ".bin"
        programs.mkdir()
        (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (programs / "tim4rec").write_text('#!/bin/sh\nexec python -m tim4rec_jax "$@"\n')
        for program in programs.iterdir():
            program.chmod(0o755)
        paths = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        flags = os.environ.get("XLA_FLAGS", "").split()
        one_device = " ".join(flag for flag in flags if "host_platform_device_count" not in flag)
        (folder / ".curlrc").write_text("fail\n")  # a refused request is a failure
        paths["CURL_HOME"] = str(folder)
        self.environment = os.environ | paths | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_device}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])

    def __enter__(self) -> "Shell":
        assert shutil.which("bash") and shutil.which("curl")
        return self

    def __exit__(self, *error) -> None:
        for server in self.servers:
            server.terminate()
        codes = {server.wait(30) for server in self.servers}
        assert error[0] or codes <= {0, -signal.SIGTERM}, codes

    def run(self, command: str) -> None:
        """Runs one command, and waits until it has ended or answers requests."""
        command = command.replace("8000", self.port)
        how = dict(cwd=self.folder, env=self.environment)
        if re.match(r"(tim4rec|python -m tim4rec_jax\.serving) serve\b", command):
            if "--port" not in command:
                command += f" --port {self.port}"
            self.servers.append(subprocess.Popen(["bash", "-c", f"exec {command}"], **how))
            self._wait()
            return
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", command], **how, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    def _wait(self) -> None:
        for _ in range(1200):
            assert self.servers[-1].poll() is None, "the service has ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise AssertionError("the service does not answer")
