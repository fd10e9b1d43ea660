"""A run directory: its settings, its dataset, its best model.

    config.json       settings
    dataset.json      metadata of the dataset that the model was trained on
    items.parquet     the items of that dataset: ids, numbers of events, titles
    date_range.json   times of the training events, for models with a date bias
    best/             parameters with the best validation figures

Training adds `checkpoints/`, `log.jsonl`, `tensorboard/` and `metrics.json`.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx

from tim4rec_jax import config as config_lib
from tim4rec_jax.errors import UserError, first_line
from tim4rec_jax.files import write_json
from tim4rec_jax.models import SequenceModel, build, model_class

# Orbax warns of optional files that are missing. What fails raises an error as well.
logging.set_verbosity(logging.FATAL)


def write_settings(config: config_lib.Config, path: Path) -> None:
    """Writes the settings as JSON, complete or not at all."""
    write_json(path, config.to_dict())


def read_settings(path: Path) -> config_lib.Config:
    """Reads settings that `write_settings` wrote, of this version or an older one.

    Raises:
      UserError: the file is missing, is no JSON, or names a model that cannot be found.
    """
    values: config_lib.Config = config_lib.ConfigDict(_read_json(path))
    config_lib.rename_settings(values)
    config = config_lib.default()
    try:
        config_lib.use_model(config, values.model.get("name", config.model.name))
    except ValueError as error:
        raise UserError(f"{path}: model.{error}") from error
    with config.unlocked(), config.ignore_type():
        config.update(values)
        if config.data.buckets is not None:
            config.data.buckets = tuple(config.data.buckets)
    return config


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} is no run directory: it has no {path.name}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it or train anew") from error


def check_unchanged(config: config_lib.Config, path: Path) -> None:
    """Makes sure that a run goes on with the settings that it began with.

    Args:
      config: the settings of now, resolved.
      path: the file with the settings that the run began with.

    Raises:
      UserError: they differ; the message names the settings that do.
    """
    # Through JSON, which makes lists of tuples.
    ours, theirs = (
        json.loads(json.dumps(config_lib.flatten(each))) for each in (config, read_settings(path))
    )
    changed = [name for name in ours if ours[name] != theirs.get(name) and name != "prepare"]
    if changed:
        listed = ", ".join(f"{name} ({theirs.get(name)} -> {ours[name]})" for name in changed)
        raise UserError(
            f"{path.parent} holds a run with other settings: {listed}; "
            "choose another --workdir, or delete that one to start anew"
        )


def check_same_dataset(directory: Path, ours: dict, path: Path) -> None:
    """Makes sure that a run goes on with the dataset that it began with.

    Args:
      directory: the folder of the dataset.
      ours: the metadata of that dataset.
      path: the file with the metadata of the dataset that the run began with.

    Raises:
      UserError: it is another dataset; the message says what tells them apart.
    """
    theirs = json.loads(path.read_text())
    changed = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
    if changed:
        raise UserError(
            f"{directory} is not the dataset that the run in {path.parent} began with "
            f"(other {', '.join(changed)}); restore it, or choose another --workdir"
        )


def write_date_range(workdir: Path, date_range: tuple[int, int]) -> None:
    """Writes what `read_date_range` reads; the arguments are described there."""
    write_json(workdir / "date_range.json", date_range)


def read_date_range(workdir: Path) -> tuple[int, int] | None:
    """The times that a model with a date bias was trained on.

    Args:
      workdir: the run directory.

    Returns:
      The times of the first and the last training event, in seconds since 1970. None: the model
      has no date bias.
    """
    path = workdir / "date_range.json"
    if path.exists():
        first, last = json.loads(path.read_text())
        return first, last
    return config_lib.old_date_range(_read_json(workdir / "config.json"))


def load_model(workdir: str | Path) -> tuple[config_lib.Config, SequenceModel]:
    """The settings of a run, and its model with the parameters that were best on validation.

    Raises:
      UserError: the run directory or its best checkpoint is missing or damaged.
    """
    workdir = Path(workdir)
    config = read_settings(workdir / "config.json")
    best = workdir / "best"
    steps = ocp.utils.checkpoint_steps(best.absolute()) if best.is_dir() else []
    if not steps:
        raise UserError(f"{workdir} has no best checkpoint yet: let train.py finish an epoch there")
    path = best.absolute() / str(max(steps)) / "default"
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            sizes: Any = _sizes(config, checkpointer.metadata(path).item_metadata)
            # Shapes alone: nothing is drawn only to be replaced.
            model = nnx.eval_shape(
                lambda: build(
                    config.model,
                    max_length=config.data.max_length,
                    date_range=read_date_range(workdir),
                    **sizes,
                )
            )
            graphdef, params = nnx.split(model)
            wanted = jax.tree.map(_on_first_device, nnx.to_pure_dict(params))
            stored = checkpointer.restore(path, wanted)
    except Exception as error:
        raise UserError(
            f"the best checkpoint {path} cannot be read ({first_line(error)}); "
            "run train.py again in this --workdir to make it anew"
        ) from error
    nnx.replace_by_pure_dict(params, stored)
    best_model: Any = nnx.merge(graphdef, params)
    return config, best_model


def _on_first_device(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return shape.update(sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def _sizes(config: config_lib.Config, stored: Any) -> dict[str, int]:
    """Numbers of items and users that the stored tables are for."""
    rows = stored["item_embedding"]["embedding"].shape[0]
    sizes = {"n_items": rows - model_class(config.model).special_rows}
    if "user_embedding" in stored:
        sizes["n_users"] = stored["user_embedding"]["embedding"].shape[0] - 1
    return sizes


def check_model(model: Any, n_items: int, dataset: Path, workdir: Path) -> None:
    """Makes sure that a run's model can score the items of a dataset.

    Raises:
        UserError: the weights are not finite, or belong to another number of items.
    """
    # By numpy: JAX would compile a program for every shape.
    params = jax.device_get(nnx.state(model, nnx.Param))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise UserError(f"{workdir}: the weights are not finite, the training has diverged")
    if model.n_items != n_items:
        raise UserError(
            f"{workdir} was trained on {model.n_items} items and {dataset} has {n_items}; name "
            "the dataset of the training with --dataset, or train anew"
        )
