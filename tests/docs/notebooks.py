"""Executes the notebooks of the documentation.

python -m tests.docs.notebooks

executes them and stores what their cells show. What they print, such as the progress of a training,
is different each time and is not stored.
"""

import asyncio
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
KEPT = ("text/plain", "text/html", "image/png")


@contextmanager
def _kernel(folder: Path):
    """Has Jupyter find a kernel that runs this Python, in which the package can be imported."""
    kernel = folder / "kernels" / "here"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kind = {"argv": command, "display_name": "here", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(kind))
    variables = {"JAX_PLATFORMS": "cpu", "JUPYTER_PATH": str(folder), "PYTHONPATH": str(ROOT)}
    policy = asyncio.get_event_loop_policy()
    with mock.patch.dict(os.environ, variables):
        try:
            yield "here"
        finally:
            asyncio.set_event_loop_policy(policy)


def execute(path: Path, folder: Path) -> Any:
    """Executes a notebook in an empty folder.

    Returns:
      The notebook, with what its cells show and nothing else about this execution.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    with _kernel(folder) as kernel:
        NotebookClient(notebook, kernel_name=kernel, timeout=900).execute(cwd=str(folder))
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            shown = [output.data for output in cell.outputs if _is_shown(output)]
            data = [{kind: one[kind] for kind in one if kind in KEPT} for one in shown]
            cell.outputs = [nbformat.v4.new_output("display_data", one) for one in data]
    return notebook


def _is_shown(output: Any) -> bool:
    """Whether an output is the value of a cell or a picture, and not printed by the way."""
    return output.output_type == "execute_result" or "image/png" in output.get("data", {})


if __name__ == "__main__":
    import nbformat

    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(path, Path(folder)), path)
