"""The Python code of the documentation runs.

Blocks of a page run one after the other in an empty folder. A block that begins with a comment like
`# name.py` is saved as that file instead.
"""

import re
import sys
from pathlib import Path

import pytest

from tests.training.tiny_run import quick_config

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted(DOCS.glob("*.md")) if BLOCK.search(page.read_text())]


@pytest.fixture
def quick(monkeypatch):
    """The configuration "causal" with a model that compiles in a second."""

    def load(named):
        assert named == "causal"
        config = quick_config("")
        config.train.update(objective="every_position", batch_size=16)
        return config

    monkeypatch.setattr("tim4rec_jax.api.load_config", load)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text, variables, modules = page.read_text(), {"__name__": "__main__"}, []
    for block in BLOCK.finditer(text):
        code = block[1]
        if named := re.match(r"# (\w+)\.py\n", code):
            (tmp_path / f"{named[1]}.py").write_text(code)
            modules.append(named[1])
            continue
        # With the lines of the page, for tracebacks.
        lines_before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + code, str(page), "exec"), variables)
    for module in modules:
        sys.modules.pop(module, None)


def test_there_are_pages_with_code():
    assert {"add-a-model", "get-started", "layer"} <= {page.stem for page in PAGES}
