"""`python -m tim4rec_jax.interop CHECKPOINT.pth --workdir DIR`: a run from a PyTorch checkpoint.

Reads a checkpoint of the published code without torch, and writes a run directory that `eval.py`
evaluates. The checkpoint is a file of RecBole's trainer, or a state dict alone with its YAML file
as `--config`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import yaml
from flax import nnx

from tim4rec_jax import config as config_lib
from tim4rec_jax.data import open_dataset
from tim4rec_jax.errors import UserError, run_main
from tim4rec_jax.interop.torch_file import read_checkpoint
from tim4rec_jax.interop.weights import from_torch, model_config, parameter_names, to_torch
from tim4rec_jax.models import SequenceModel
from tim4rec_jax.run import write_settings
from tim4rec_jax.training.checkpoints import Checkpoints
from tim4rec_jax.training.log import describe_model


def _flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tim4rec_jax.interop",
        description="Turns a checkpoint of the published PyTorch code into a run for eval.py.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="a .pth file RecBole's trainer saved, or a state dict")
    add("--workdir", type=Path, required=True, help="run directory to write")
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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: --config takes the reference's YAML") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings: expected lines like `hidden_size: 64`")
    return values


def _check_dataset(directory: Path, n_items: int, checkpoint: Path) -> None:
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


def _write_run(workdir: Path, settings: dict, max_length: int, dataset: str, model: SequenceModel):
    config = config_lib.default()
    config_lib.use_model(config, settings["name"])
    config.update({"dataset": dataset, "data": {"max_length": max_length}, "model": settings})
    config = config_lib.resolve(config)
    checkpoints = Checkpoints(workdir)
    checkpoints.save_best(0, nnx.state(model, nnx.Param))
    checkpoints.close()
    # The settings come last, because a directory without them does not count as a run.
    write_settings(config, workdir / "config.json")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line, or the given arguments."""
    flags = _flags(arguments)
    if flags.workdir.exists() and (flags.workdir.is_file() or any(flags.workdir.iterdir())):
        raise UserError(f"{flags.workdir} exists and is not an empty directory: choose another")
    config, weights = read_checkpoint(flags.checkpoint)
    if flags.config:
        config |= _read_yaml(flags.config)
    weights = {  # a run computes in float32
        name: value.astype(np.float32) if value.dtype == np.float64 else value
        for name, value in weights.items()
    }
    try:
        settings, max_length = model_config(config)
        model = from_torch(weights, config)
    except UserError as error:
        raise UserError(f"{flags.checkpoint}: {error}") from None
    if flags.dataset:
        _check_dataset(flags.dataset, model.n_items, flags.checkpoint)
    _write_run(flags.workdir, settings, max_length, str(flags.dataset or ""), model)

    shapes = {name: value.shape for name, value in to_torch(model).items()}
    ours = parameter_names(model)
    for name in weights:
        print(f"{name} {shapes[name]} -> {ours[name]}")
    print(f"{len(shapes)} parameters, {model.n_items:,} items, histories of {max_length} events")
    print(describe_model(*nnx.split(model), max_length))
    dataset = "" if flags.dataset else " --dataset DIR"
    print(f"wrote {flags.workdir}; evaluate it: python eval.py --workdir {flags.workdir}{dataset}")


if __name__ == "__main__":
    sys.exit(run_main(main))
