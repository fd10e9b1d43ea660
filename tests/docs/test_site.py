"""The documentation site: no warning, no network, no public name is missing."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tim4rec_jax import config as config_lib
from tim4rec_jax.models import MODELS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MODULES = ("ssd", "layers", "models", "data", "serving", "interop", "evaluation")
# The addresses of what a browser loads by itself, in pages and in style sheets.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*?\bsrc=["']?([^"'\s>]+)
    |<link(?=[^>]*\brel=["']?(?:stylesheet|icon|preload|preconnect))[^>]*?\bhref=["']?([^"'\s>]+)
    |@import\s+(?:url\()?["']?([^"');]+)
    |\burl\(["']?([^"')]+)""",
    re.VERBOSE,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. Whoever asks another machine gets no answer."""
    out = tmp_path_factory.mktemp("site")
    nowhere = "http://127.0.0.1:9"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "http_proxy": nowhere}
    environment |= {"https_proxy": nowhere, "HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere}
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    command += ["--builder", "html", "--doctree-dir", str(out / "trees"), "docs", str(out / "html")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.mark.slow
def test_every_public_name_is_in_the_api_reference(site):
    from sphinx.util.inventory import InventoryFile

    with open(site / "objects.inv", "rb") as file:
        found = InventoryFile.loads(file.read(), uri="").data
    documented = {name for kind in found if kind.startswith("py:") for name in found[kind]}
    public = {f"tim4rec_jax.{name}" for name in importlib.import_module("tim4rec_jax")._CALLS}
    for module in MODULES:
        names = importlib.import_module(f"tim4rec_jax.{module}").__all__
        public |= {f"tim4rec_jax.{module}.{name}" for name in names}
    assert sorted(public - documented) == []


@pytest.mark.slow
def test_the_pages_load_nothing_from_elsewhere(site):
    loaded = 0
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        for match in LOADED.finditer(file.read_text()):
            [address] = filter(None, match.groups())
            loaded += 1
            assert not address.startswith(("http:", "https:", "//")), (file, address)
    assert loaded > 100


def test_every_page_is_in_the_navigation():
    listed = set()
    for page in (DOCS / f"{folder}index.md" for folder in ("", "api/", "studies/")):
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.M | re.S):
            names = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / name).relative_to(DOCS).as_posix() for name in names}
    pages = [*DOCS.glob("*.md"), *DOCS.glob("api/*.md"), *DOCS.glob("studies/*.md")]
    pages += DOCS.glob("notebooks/*.ipynb")
    there = {page.relative_to(DOCS).with_suffix("").as_posix() for page in pages}
    assert there - {"index"} == listed


def test_every_module_with_public_names_has_a_page_of_the_api_reference():
    with_names = {
        path.parent.name
        for path in (ROOT / "tim4rec_jax").glob("*/__init__.py")
        if "__all__" in path.read_text()
    }
    assert with_names == set(MODULES)
    for module in MODULES:
        page = (DOCS / "api" / f"{module}.md").read_text()
        assert f".. automodule:: tim4rec_jax.{module}\n" in page


def test_the_drawings_are_those_of_their_program():
    pictures = runpy.run_path(str(DOCS / "pictures" / "draw.py"))["PICTURES"]
    drawn = {f"kernels-{name}.svg": draw().svg() for name, draw in pictures.items()}
    assert drawn == {path.name: path.read_text() for path in DOCS.glob("pictures/kernels-*.svg")}


def test_the_page_of_settings_has_all_of_them(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    text = importlib.import_module("settings_page").text()
    names = set(config_lib.SETTINGS)
    for model in MODELS:
        config = config_lib.default()
        config_lib.use_model(config, model)
        names |= set(config_lib.flatten(config))
    assert {name for name in names if f"- `{name}`, " not in text} == set()
