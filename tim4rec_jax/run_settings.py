"""The settings and the dataset that a run directory keeps, and whether they are still the same."""

import json
from pathlib import Path

from tim4rec_jax import config as config_lib
from tim4rec_jax.errors import UserError


def write(config: config_lib.Config, path: Path) -> None:
    """Writes the settings as JSON, whole or not at all."""
    _write_json(config.to_dict(), path)


def _write_json(values: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)


def read(path: Path) -> config_lib.Config:
    """Reads settings that `write` wrote.

    Raises:
      UserError: the file is missing or no JSON.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} is no run directory: it has no {path.name}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it or train anew") from error
    config = config_lib.default()
    if "model" in values:
        config_lib.use_model(config, values["model"].get("name", "tim4rec"))
    with config.unlocked(), config.ignore_type():
        config.update(values)
        if config.data.buckets is not None:
            config.data.buckets = tuple(config.data.buckets)
    return config


def check_unchanged(config: config_lib.Config, path: Path) -> None:
    """Makes sure that a run goes on with the settings it began with.

    Raises:
      UserError: they differ, with the names of those that do.
    """
    # Through JSON, which makes lists of tuples.
    ours = config_lib.flatten(json.loads(json.dumps(config.to_dict())))
    theirs = json.loads(json.dumps(config_lib.flatten(read(path).to_dict())))
    changed = [name for name in ours if ours[name] != theirs.get(name) and name != "prepare"]
    if changed:
        listed = ", ".join(f"{name} ({theirs.get(name)} -> {ours[name]})" for name in changed)
        raise UserError(
            f"{path.parent} holds a run with other settings: {listed}; "
            "choose another --workdir, or delete that one to start anew"
        )


def check_same_dataset(directory: Path, ours: dict, path: Path) -> None:
    """Makes sure that a run goes on with the dataset it began with, described in `path`.

    Args:
      directory: of the dataset.
      ours: its metadata.
      path: the metadata of the one the run began with; written if missing.

    Raises:
      UserError: another dataset is in its place, with what tells them apart.
    """
    if not path.exists():
        _write_json(ours, path)
    theirs = json.loads(path.read_text())
    changed = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
    if changed:
        raise UserError(
            f"{directory} is not the dataset that the run in {path.parent} began with "
            f"(other {', '.join(changed)}); restore it, or choose another --workdir"
        )
