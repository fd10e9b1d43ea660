"""The code of the documentation runs, Python and shell.

The blocks of a page run one after the other in an empty folder. A block that begins with a comment
like `# name.py` is saved as that file instead. A block that cannot run begins with a comment that
says why. The quick tests run the Python of most pages with a small model, and have every command
read its flags. The slow tests run pages as they are.
"""

import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from unittest import mock

import pytest

from tests.docs.pages import DOCS, PAGES, ROOT, Shell, blocks
from tests.training.tiny_run import quick_config
from tim4rec_jax.models import MODELS

MODULES = r"(tim4rec_jax|data_prep|benchmarks|studies)(\.\w+)*"
OWN = re.compile(rf"(tim4rec|python (-m {MODULES}|\w+/?\w+\.py)) ")
CODE = {page: blocks(page) for page in PAGES}
# Pages whose Python trains or compiles as that of others does.
ONLY_SLOW = {"README", "every-day", "item-features", "models", "protocols", "serving", "tune"}
# What a page takes for granted.
BEFORE = {
    "README": """
import pandas as pd
import pathlib

events = pd.DataFrame(
    {
        "customer": [f"c{user}" for user in range(60) for _ in range(12)],
        "sku": [f"A{(user + step) % 20}" for user in range(60) for step in range(12)],
        "at": [pd.Timestamp("2024-01-01") + pd.Timedelta(hours=step) for step in range(12)] * 60,
    }
)
pathlib.Path("logs").mkdir()
log = events.rename(columns={"customer": "uid"})
log["at"] = (log["at"] - pd.Timestamp(0)) // pd.Timedelta("1ms")
log.to_parquet("logs/january.parquet")
""",
}


def pages_with(languages, *, without=(), also=()):
    """Pages with blocks of these languages that run, and others by their names."""
    return [
        pytest.param(page, id=page.stem)
        for page, code in CODE.items()
        if page.stem not in without
        and (page.stem in also or languages & {block.language for block in code if block.runs})
    ]


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """An empty folder. Modules and models that are made in the test are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    with mock.patch.dict(MODELS):
        yield tmp_path
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def quick(monkeypatch):
    """The configuration "causal" with a model that compiles in a second."""

    def load(named):
        assert named == "causal"
        config = quick_config("")
        config.train.update(objective="every_position", batch_size=16)
        return config

    monkeypatch.setattr("tim4rec_jax.api.load_config", load)


@pytest.mark.usefixtures("quick", "own_modules")
@pytest.mark.parametrize("page", pages_with({"python"}, without=ONLY_SLOW))
def test_the_python_of_a_page_runs(page):
    variables = {"__name__": "__main__"}
    exec(BEFORE.get(page.stem, ""), variables)
    for block in CODE[page]:
        if block.language == "python" and block.runs:
            block.run_python(variables)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with({"sh"}, also=ONLY_SLOW))
def test_a_page_runs_as_it_is(page, own_modules):
    variables = {"__name__": "__main__"}
    exec(BEFORE.get(page.stem, ""), variables)
    with Shell(own_modules) as shell:
        for block in CODE[page]:
            if block.language == "python" and block.runs:
                block.run_python(variables)
            if block.language == "sh" and block.runs:
                for command in block.commands():
                    shell.run(command)


class Understood(BaseException):
    """The command has read its flags."""


def commands():
    """Every command of the documentation that is a program of this package, once."""
    known = {}
    for page, code in CODE.items():
        for block in code:
            for command in block.commands() if block.language == "sh" else []:
                words = shlex.split(command, comments=True)
                if OWN.match(command):
                    known.setdefault(" ".join(words), (page, words))
    return [pytest.param(*value, id=name[:60]) for name, value in known.items()]


@pytest.mark.parametrize(("page", "words"), commands())
def test_a_command_has_the_flags_that_a_page_gives_it(page, words, own_modules, monkeypatch):
    """Those that take hours or a download as well. They stop when they have read their flags."""
    parse, inside = ArgumentParser.parse_known_args, []

    def understood(*arguments, **named):
        inside.append(arguments)
        flags, unknown = parse(*arguments, **named)
        inside.pop()
        if inside or unknown:  # the parser of a command of its own, or of the settings
            return flags, unknown
        raise Understood

    def train(config, *rest):
        raise Understood

    monkeypatch.setattr(ArgumentParser, "parse_known_args", understood)
    monkeypatch.setattr("tim4rec_jax.training.train.train_and_report", train)
    for block in CODE[page]:
        if block.module:
            block.run_python({})
    if words[1] in ("train", "train.py") and "--config" not in words:
        words = [*words, "--config", "causal"]  # it goes on with a run, which is not here
    if words[0] == "tim4rec":
        words = ["python", "-m", "tim4rec_jax", *words[1:]]
    for name in ("configs", "data_prep"):
        (own_modules / name).symlink_to(ROOT / name)
    start = words[2:] if words[1] == "-m" else words[1:]
    monkeypatch.setattr(sys, "argv", start)
    with pytest.raises(Understood):
        if words[1] == "-m":
            # What another test has imported is not what runs.
            monkeypatch.delitem(sys.modules, f"{start[0]}.__main__", raising=False)
            if not hasattr(sys.modules.get(start[0]), "__path__"):
                monkeypatch.delitem(sys.modules, start[0], raising=False)
            runpy.run_module(start[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / start[0]), run_name="__main__")


def test_no_code_hides_from_the_tests():
    """Few blocks do not run, and none of them is disguised as text."""
    assert {page.stem for page in PAGES} >= {"README", "add-a-model", "get-started", "layer"}
    for page, code in CODE.items():
        for block in code:
            where = f"{page.name}, line {block.line}"
            kind = block.language.split(" ")[0]  # an included file has its name behind it
            assert kind in ("python", "sh", "text", "{toctree}", "{include}"), where
            if block.language == "text":
                starts = ("import ", "from ", "python ", "tim4rec ", "pip ", "make ", "curl ")
                assert not any(line.startswith(starts) for line in block.code.splitlines()), where
    assert sum(not block.runs for code in CODE.values() for block in code) <= 18
    assert all(page.is_relative_to(DOCS) for page in PAGES[2:])
