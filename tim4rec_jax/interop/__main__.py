"""`python -m tim4rec_jax.interop CHECKPOINT.pth --workdir DIR`: a run from a PyTorch checkpoint.

Reads a checkpoint of the published code without torch, and writes a run directory that `eval.py`
evaluates. The checkpoint is a file of RecBole's trainer, or a state dict alone with its YAML file
as `--config`.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import yaml
from flax import nnx

from tim4rec_jax import config as config_lib
from tim4rec_jax.data import Dataset, open_dataset
from tim4rec_jax.data.format import DATASET_FILE, ITEMS_FILE
from tim4rec_jax.errors import ArgumentParser, UserError, one_line, run_main
from tim4rec_jax.files import atomic_directory, named_folder, read_regular, write_json
from tim4rec_jax.interop.torch_file import read_checkpoint
from tim4rec_jax.interop.weights import from_torch, model_config, parameter_names, to_torch
from tim4rec_jax.models import SequenceModel
from tim4rec_jax.run import write_settings
from tim4rec_jax.training.checkpoints import Checkpoints
from tim4rec_jax.training.log import describe_model

_LARGEST_YAML = 1 << 20  # settings are much smaller


def _flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m tim4rec_jax.interop",
        description="Turns a checkpoint of the published PyTorch code into a run for eval.py.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="a .pth file RecBole's trainer saved, or a state dict")
    add("--workdir", type=named_folder, required=True, help="run directory to write")
    add("--dataset", type=Path, help="prepared dataset the run belongs to")
    add(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="the reference's settings, where the checkpoint holds none; its keys come first",
    )
    return parser.parse_args(arguments)


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(read_regular(path, _LARGEST_YAML).decode())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: --config takes the reference's YAML") from None
    # PyYAML raises ValueErrors of dates and of numbers too, and nests as deep as the file does.
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path} is no YAML file: {one_line(reason, 150)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings: expected lines like `hidden_size: 64`")
    return values


def _open(directory: Path, n_items: int, checkpoint: Path) -> Dataset:
    dataset = open_dataset(directory)
    if dataset.n_items != n_items:
        raise UserError(
            f"{checkpoint} knows {n_items:,} items and {directory} has {dataset.n_items:,}: "
            "prepare the log the model was trained on, with the same filters"
        )
    if dataset.order != "recbole":
        print(
            f"note: events of {directory} are in exact order; the reference's figures belong to "
            "data prepared with --order recbole"
        )
    return dataset


_NARROW = {np.dtype(np.float64): np.float32, np.dtype(np.complex128): np.complex64}


def _write_run(
    workdir: Path, settings: dict, max_length: int, dataset: Dataset | None, model: SequenceModel
) -> None:
    config = config_lib.default()
    config_lib.use_model(config, settings["name"])
    named = "" if dataset is None else str(dataset.directory)
    config.update({"dataset": named, "data": {"max_length": max_length}, "model": settings})
    config = config_lib.resolve(config)
    with atomic_directory(workdir) as folder:
        checkpoints = Checkpoints(folder)
        checkpoints.save_best(0, nnx.state(model, nnx.Param))
        checkpoints.close()
        if dataset is not None:
            write_json(folder / DATASET_FILE, dataset.metadata)
            shutil.copyfile(dataset.directory / ITEMS_FILE, folder / ITEMS_FILE)
        write_settings(config, folder / "config.json")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line, or the given arguments."""
    flags = _flags(arguments)
    if flags.workdir.exists() and (flags.workdir.is_file() or any(flags.workdir.iterdir())):
        raise UserError(f"{flags.workdir} exists and is not an empty directory: choose another")
    config, weights = read_checkpoint(flags.checkpoint)
    if flags.config:
        config |= _read_yaml(flags.config)
    with np.errstate(over="ignore"):  # what overflows is refused as not finite
        weights = {  # a run computes in float32
            name: value.astype(_NARROW.get(value.dtype, value.dtype), copy=False)
            for name, value in weights.items()
        }
    try:
        settings, max_length = model_config(config)
        model = from_torch(weights, config)
    except UserError as error:
        raise UserError(f"{flags.checkpoint}: {error}") from None
    dataset = _open(flags.dataset, model.n_items, flags.checkpoint) if flags.dataset else None
    _write_run(flags.workdir, settings, max_length, dataset, model)

    shapes = {name: value.shape for name, value in to_torch(model).items()}
    ours = parameter_names(model)
    for name in weights:
        print(f"{name} {shapes[name]} -> {ours[name]}")
    print(f"{len(shapes)} parameters, {model.n_items:,} items, histories of {max_length} events")
    print(describe_model(model))
    flag = "" if flags.dataset else " --dataset DIR"
    print(f"wrote {flags.workdir}; evaluate it: python eval.py --workdir {flags.workdir}{flag}")


if __name__ == "__main__":
    sys.exit(run_main(main))
