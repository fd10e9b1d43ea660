"""Settings of the documentation site, which `make docs` builds with Sphinx."""

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import settings_page  # noqa: E402

import tim4rec_jax  # noqa: E402

project = "tim4rec-jax"
author = "The tim4rec-jax authors"
project_copyright = author
version = release = tim4rec_jax.__version__

extensions = [
    "myst_nb",  # pages in Markdown, and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # docstrings in Google's form
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

# Nothing is downloaded, neither here nor by who reads the site: furo has its own styles and uses
# the fonts of the reader's system.
html_theme = "furo"
html_title = "tim4rec-jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

exclude_patterns = ["_build", "**.ipynb_checkpoints"]
suppress_warnings = ["config.cache"]  # of functions in settings

# Headings of the first three levels can be linked to, as on GitHub.
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]

# The tests execute the notebooks; the site shows the outputs that are stored in them.
nb_execution_mode = "off"

# `name` in a docstring is a link where there is something of this name, and code elsewhere.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
# A class of Flax has a metaclass that hides its arguments: they stand at `__init__`.
autodoc_class_signature = "separated"
autodoc_default_options = {
    "members": True,
    "special-members": "__init__, __call__",
    "show-inheritance": True,
}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_use_rtype = False
napoleon_attr_annotations = False
copybutton_exclude = ".linenos, .gp, .go"

# Pages that stand outside this folder, where people look for them in a repository.
OUTSIDE = {
    ROOT / "CONTRIBUTING.md": "contributing",
    ROOT / "CHANGELOG.md": "changelog",
    ROOT / "benchmarks/RESULTS.md": "measurements",
}
# How Sphinx names the class of arrays, and arrays of either JAX or NumPy.
ARRAY = re.compile(r"~?\bjax(lib\._jax)?\.Array\b")
EITHER = re.compile(r"(([~\w.]+)\[Array, ('[^']*')\]) \| \2\[[~\w.]*ndarray, \3\]")
LINK = re.compile(r"(?<!!)\[([^][]+)\]\(([^():#\s]+)(#[^()\s]*)?\)")


def read_page(app: Any, page: str, source: list[str]) -> None:
    """Takes pages from outside this folder, and makes links to them links to the site's pages."""
    docs, folder = ROOT / "docs", (ROOT / "docs" / page).parent
    for path, name in OUTSIDE.items():
        if name == page:
            source[0], folder = path.read_text(), path.parent
    if page == "api/settings":
        source[0] = settings_page.text()

    def in_site(link: re.Match[str]) -> str:
        text, target, place = link[1], (folder / link[2]).resolve(), link[3] or ""
        if target in OUTSIDE:
            return f"[{text}](/{OUTSIDE[target]}.md{place})"
        if target.is_relative_to(docs):
            return f"[{text}](/{target.relative_to(docs)}{place})"
        return text if target.exists() else link[0]  # the site has no page for it

    source[0] = LINK.sub(in_site, source[0])


def shorten_types(
    app: Any, what: str, name: str, item: Any, options: Any, signature: str, returns: str
) -> tuple[str | None, ...]:
    """Writes annotations of arrays as the source does."""
    return tuple(
        text and EITHER.sub(r"\1", ARRAY.sub("Array", text)) for text in (signature, returns)
    )


def skip_member(app: Any, what: str, name: str, item: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of named tuples, which their docstrings describe, and their maker."""
    return True if type(item).__name__ == "_tuplegetter" or name == "__new__" else None


def setup(app: Any) -> None:
    """Connects the functions of this file with Sphinx."""
    app.connect("source-read", read_page)
    app.connect("autodoc-process-signature", shorten_types)
    app.connect("autodoc-skip-member", skip_member)
