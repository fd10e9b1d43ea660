"""A notebook in which nobody has installed ipywidgets, as a new user has it."""

import asyncio
import json
import sys
from pathlib import Path

import duckdb
import pytest

from tim4rec_jax.data_prep.database import connect
from tim4rec_jax.prepared import quiet_in_notebooks

CELLS = [
    """
import sys
sys.modules["ipywidgets"] = None  # as if it were not installed
sys.path.insert(0, {root!r})
import pandas as pd
import tim4rec_jax as t4r

events = pd.DataFrame(
    {{
        "customer": [f"c{{user}}" for user in range(24) for _ in range(8)],
        "sku": [(user + step) % 12 for user in range(24) for step in range(8)],
        "at": [pd.Timestamp("2024-01-01") + pd.Timedelta(hours=step) for step in range(8)] * 24,
    }}
)
""",
    """
data = t4r.prepare(events, user="customer", item="sku", time="at")
data
""",
    """
small = {{"model.name": "tests.training.tiny_run:LastItem", "train.batch_size": 16}}
model = t4r.fit(data, "causal", epochs=2, max_length=8, **small)
""",
    """
import threading
found = []
thread = threading.Thread(
    target=lambda: found.append(t4r.fit(data, "causal", epochs=1, max_length=8, **small))
)
thread.start()
thread.join()
assert set(found[0].metrics["test"]) == set(model.metrics["test"])
""",
    """
model.recommend(users=["c3"], k=3)
""",
]


def test_nothing_moves_in_a_notebook(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a kernel does
    assert quiet_in_notebooks().is_terminal
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    console = quiet_in_notebooks()
    assert not console.is_terminal and not console.is_jupyter


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the notebook's own libraries
def test_a_notebook(tmp_path, monkeypatch):
    """What nobody asked for, such as the warning that ipywidgets is missing, does not appear."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    kernel = tmp_path / "kernels" / "here"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kind = {"argv": command, "display_name": "here", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(kind))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    root = str(Path(__file__).parents[1])
    cells = [nbformat.v4.new_code_cell(cell.format(root=root)) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    policy = asyncio.get_event_loop_policy()
    try:
        NotebookClient(notebook, kernel_name="here", timeout=300).execute(cwd=str(tmp_path))
    finally:
        asyncio.set_event_loop_policy(policy)
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    texts = [out["text"] for out in outputs if out["output_type"] == "stream"]
    errors = [out["text"] for out in outputs if out.get("name") == "stderr"]
    shown = [out["data"]["text/plain"] for out in outputs if out["output_type"] == "execute_result"]
    assert not errors
    assert "epoch 2: loss" in "".join(texts)
    assert "\x1b[2K" not in "".join(texts)  # no frame of a spinner
    assert shown[0] == "<24 users, 12 items, 192 events>"
    assert "customer" in shown[1]


def test_where_there_is_no_progress_bar_nobody_switches_it_off(tmp_path, monkeypatch):
    """In a notebook without ipywidgets, DuckDB takes that for a mistake."""
    connect_to = duckdb.connect

    class Notebook:
        __class__ = duckdb.DuckDBPyConnection  # for the checks of types

        def __init__(self, *args, **kwargs):
            self.con = connect_to(*args, **kwargs)
            # A worker of xdist looks interactive to DuckDB, and then the bar is on.
            self.con.execute("SET enable_progress_bar = false")

        def execute(self, query, *args):
            assert "SET enable_progress_bar" not in query
            return self.con.execute(query, *args)

    monkeypatch.setattr(duckdb, "connect", Notebook)
    connect(tmp_path, "1GB").con.close()
