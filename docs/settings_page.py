"""Writes the page *Settings* of the site from the settings themselves."""

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tim4rec_jax import config as config_lib
from tim4rec_jax.models import DEFAULT_MODEL, MODELS

INTRODUCTION = """\
# Settings

A config file sets them, `--config.NAME=VALUE` changes one on the command line, and `fit` takes
them as keywords. `train.py --config FILE --print` shows the value of each and where it comes from.
The defaults here are those without a config file; *none* means that the program chooses.
"""


def text() -> str:
    """The page in Markdown."""
    parts = [INTRODUCTION]
    config = config_lib.default()
    lines = config_lib.setting_help(config)
    for group, title in (
        ("", "The run"),
        ("data", "Data: `data.`"),
        ("train", "Training: `train.`"),
        ("mesh", "Devices: `mesh.`"),
        ("eval", "Evaluation: `eval.`"),
    ):
        rows = [
            (name, "none" if setting.optional else f"`{setting.default!r}`", setting.help)
            for name, setting in config_lib.SETTINGS.items()
            if name.rpartition(".")[0] == group
        ]
        parts.append(f"## {title}\n\n{_list(rows)}")
    common = set(config.model)
    for name in MODELS:
        config = config_lib.default()
        config_lib.use_model(config, name)
        common &= set(config.model)
    for name in ("", *MODELS):
        config = config_lib.default()
        config_lib.use_model(config, name or DEFAULT_MODEL)
        lines = config_lib.setting_help(config)
        rows = [
            (f"model.{key}", f"`{value!r}`", lines[f"model.{key}"])
            for key, value in config.model.items()
            if (key in common) == (not name)
        ]
        title = f"Model `{name}`: `model.`" if name else "Every model: `model.`"
        if rows:
            parts.append(f"## {title}\n\n{_list(rows)}")
    return "\n".join(parts)


def _list(rows: Iterable[tuple[str, str, str]]) -> str:
    """A line for each setting, which is easier to read on a telephone than a table."""
    return "".join(
        f"- `{name}`, {default}: {line}\n".replace("*", "\\*") for name, default, line in rows
    )
