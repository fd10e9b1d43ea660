"""Imports go one way, without circles, and what prepares data works without JAX."""

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

# Each part of `tim4rec_jax` with the parts that it may import.
MAY_IMPORT = {
    "errors": (),
    "checks": (),
    "files": ("errors",),
    "runtime": ("errors",),
    "item_rows": ("digests", "runtime", "errors"),
    "digests": ("files", "errors"),
    "ssd": ("runtime", "errors"),
    "layers": ("ssd", "runtime", "errors"),
    "models": ("layers", "ssd", "runtime", "checks", "errors"),
    "data": ("files", "errors"),
    "data_prep": ("data", "files", "errors"),
    "config": ("models", "data", "checks", "errors"),
    "scoring": ("models", "layers", "data", "runtime", "errors"),
    "run": ("config", "models", "data", "digests", "files", "runtime", "errors"),
    "verify": ("run", "data", "digests", "files", "errors"),
}
LIBRARY = tuple(part for part in MAY_IMPORT if part != "data_prep")
MAY_IMPORT |= {
    "evaluation": LIBRARY,
    "training": (*LIBRARY, "evaluation"),
    "serving": (*LIBRARY, "evaluation", "data_prep"),
    "interop": LIBRARY,
    "plan": (*LIBRARY, "training"),
    "presets": ("config", "models", "errors"),
    "configs": ("presets", "config"),
    "frames": ("data_prep", "errors"),
}
# Commands put the parts together, and nothing but another command imports them.
COMMANDS = {
    "tim4rec_jax.__main__",
    *(
        f"tim4rec_jax.commands{name}"
        for name in ("", ".add_items", ".train", ".eval", ".results", ".verify", ".trainings")
    ),
    *(f"tim4rec_jax.commands.{name}" for name in ("tune", "search", "search_space")),
    "tim4rec_jax.commands.search_report",
    *(f"tim4rec_jax.commands.compare{name}" for name in ("", "_report")),
    "tim4rec_jax.api",
    "tim4rec_jax.cli",
    "tim4rec_jax.prepared",
    "tim4rec_jax.data_prep.__main__",
    "tim4rec_jax.interop.__main__",
    "tim4rec_jax.plan.__main__",
    "tim4rec_jax.serving.__main__",
}


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("tim4rec_jax", include_external_packages=True, cache_dir=None)


def part(module: str) -> str:
    """Returns "data" for "tim4rec_jax.data.splits", and "" for the package itself."""
    return (*module.split("."), "")[1]


def test_imports_go_one_way(graph):
    wrong = []
    for module in sorted(graph.modules - COMMANDS):
        if not module.startswith("tim4rec_jax."):
            continue
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            if imported in COMMANDS or (
                imported.startswith("tim4rec_jax.")
                and part(imported) not in (part(module), *MAY_IMPORT[part(module)])
            ):
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_no_circles(graph):
    """Takes away what imports none of the rest, or what none of the rest imports, until it ends."""
    left = {m for m in graph.modules if m.startswith("tim4rec_jax")}
    size = 0
    while size != len(left):
        size = len(left)
        left = {m for m in left if graph.find_modules_directly_imported_by(m) & left}
        left = {m for m in left if graph.find_modules_that_directly_import(m) & left}
    assert not left, f"circles run through {sorted(left)}"


def test_the_op_knows_no_flax(graph):
    assert not graph.find_modules_that_directly_import("flax") & {
        module for module in graph.modules if part(module) == "ssd"
    }


@pytest.mark.parametrize(
    "package", ["tim4rec_jax", "tim4rec_jax.data", "tim4rec_jax.data_prep.__main__"]
)
def test_importing_it_loads_no_jax(package):
    program = f"import sys, {package}; sys.exit(', '.join(sys.modules.keys() & {{'jax', 'flax'}}))"
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
    )
    assert not result.stderr.strip(), result.stderr
