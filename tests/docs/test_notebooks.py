"""The notebooks of the documentation: they run, and what is stored in them is small."""

import ast
import json
import re

import pytest

from tests.docs.notebooks import KEPT, NOTEBOOKS

LARGEST = 100_000  # bytes of a notebook with its outputs
MACHINE = re.compile(r"/(tmp|home|root|usr)/|site-packages")


def cells(path):
    return json.loads(path.read_text())["cells"]


def kinds(found):
    """Which cells show something, and what."""
    return [
        [sorted(output["data"]) for output in cell["outputs"]]
        for cell in found
        if cell["cell_type"] == "code"
    ]


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["layer", "own-log"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored(path):
    """Code that Python can read, and little of the last execution: nothing of its machine."""
    assert path.stat().st_size < LARGEST
    for cell in cells(path):
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))
            assert cell["execution_count"] is None
            for output in cell["outputs"]:
                assert set(output["data"]) <= set(KEPT)
                texts = {kind: text for kind, text in output["data"].items() if "png" not in kind}
                assert not MACHINE.search(json.dumps(texts))
    assert any(kinds(cells(path)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the notebook's own libraries
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_stored(path, tmp_path):
    from tests.docs.notebooks import execute

    executed = execute(path, tmp_path)
    assert kinds(executed.cells) == kinds(cells(path))
    for cell, stored in zip(executed.cells, cells(path), strict=True):
        assert cell.source == "".join(stored["source"])
        # Texts are the same on every machine: the notebooks show nothing to more digits than that.
        for new, old in zip(cell.get("outputs", []), stored.get("outputs", []), strict=True):
            assert new.data.get("text/plain", "") == "".join(old["data"].get("text/plain", ""))
