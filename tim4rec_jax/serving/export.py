"""A run as a folder that recommends without this package: StableHLO, weights, vocabulary.

`python -m tim4rec_jax.serving export --workdir RUN --out DIR` writes

- `recommend.stablehlo`: what `jax.export.deserialize` reads; for CPU, CUDA and TPU, any number
  of rows;
- `weights.npz`: its first argument, an array for each parameter;
- `items.parquet`: `index` (from 1) and `item`, the original id, `count`, and `title` where known;
- `metadata.json`: the other arguments in words, and what the model was trained with.

Weights are an argument and no constants: the program stays small, compiles fast and has no
limit on the catalogue. `examples/run_export.py` shows how it is called.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export

import tim4rec_jax
from tim4rec_jax.data import format as fmt
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation.ranking import top_k
from tim4rec_jax.files import atomic_directory, write_json
from tim4rec_jax.models import condition_on_time, inputs
from tim4rec_jax.scoring import HistoryItems
from tim4rec_jax.serving.catalogue import Catalogue, load_run

FORMAT_VERSION = 1
PLATFORMS = ("cpu", "cuda", "tpu")
# The names in the program of arrays of a batch, and what they are.
_MOMENTS = {
    "time_to_next": (
        "wait",
        "float32 [rows]: seconds from the last event to the moment of prediction",
    ),
    "dates": ("date", "float32 [rows]: of the last event, days since 1970"),
}
PROGRAM, WEIGHTS, METADATA = "recommend.stablehlo", "weights.npz", "metadata.json"


def export(workdir: Path, out: Path, *, top: int = 100, dataset: Path | None = None) -> dict:
    """Writes the best model of a run as a folder of its own, complete or not there at all.

    Args:
      workdir: of the run.
      out: the folder to write; must not exist, or be empty.
      top: items that a call returns (fewer where the catalogue has fewer).
      dataset: the prepared dataset with the vocabulary; None takes the one of the training.

    Returns:
      What `metadata.json` holds.

    Raises:
      UserError: the run or the dataset is missing or damaged, they do not belong together, or
        `out` holds something.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: choose another --out")
    config, model, catalogue = load_run(workdir, dataset)
    top = min(top, len(catalogue))
    recommend, weights = program(model, top)
    metadata = _metadata(config, model, catalogue, top)
    with atomic_directory(out) as folder:
        exported = lower(recommend, weights, model)
        (folder / PROGRAM).write_bytes(exported.serialize())
        np.savez(folder / WEIGHTS, allow_pickle=False, **weights)
        shutil.copyfile(catalogue.directory / fmt.ITEMS_FILE, folder / fmt.ITEMS_FILE)
        write_json(folder / METADATA, metadata)
    return metadata


def program(model: Any, top: int) -> tuple[Callable[..., Any], dict[str, np.ndarray]]:
    """The function to export and its weights.

    Args:
      model: see `tim4rec_jax.models`.
      top: items that it returns.

    Returns:
      `recommend(weights, items [B,L], lengths [B], gaps [B,L], exclude [B,S]) -> (scores [B,K],
      items [B,K])`, and the weights by the path of the parameter (`"blocks.0.ssd.A_log"`). A
      model that knows when the next event happens takes `wait [B]` too, seconds until then;
      then one that drifts with the date `date [B]`, of the last event, days since 1970.
    """
    graphdef, params = nnx.split(model)
    paths = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(params)}
    weights = {
        ".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params)
    }

    def recommend(weights, items, lengths, gaps, exclude, *moments):
        values = {paths[name]: value for name, value in weights.items()}
        state = jax.tree.map(lambda leaf: leaf, params)
        nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(values))
        model = nnx.merge(graphdef, state)

        # Row by row under vmap: the layers choose block sizes by the number of rows, which
        # is unknown here.
        def encode(*row):
            return model.encode(*(value[None] for value in row))[0]

        hidden = jax.vmap(encode)(items, lengths, gaps)
        hidden = condition_on_time(model, hidden, dict(zip(_moments(model), moments, strict=True)))
        repeat_bias = model.repeat_bias()
        history = None if repeat_bias is None else HistoryItems(items, repeat_bias)
        return top_k(hidden, model.item_table(), top, exclude=exclude, history=history)

    return recommend, weights


def _moments(model: Any) -> list[str]:
    """The arrays of a batch, one value a row, that the program of this model takes last."""
    return [name for name in inputs(model) if name in _MOMENTS]


def lower(recommend: Callable[..., Any], weights: dict, model: Any) -> jax_export.Exported:
    """Lowers the function of `program` for all `PLATFORMS`, rows and exclusions left open."""
    rows, excluded = jax_export.symbolic_shape("rows, excluded")
    kinds = [
        ((rows, model.max_length), jnp.int32),
        ((rows,), jnp.int32),
        ((rows, model.max_length), jnp.float32),
        ((rows, excluded), jnp.int32),
    ]
    kinds += [((rows,), jnp.float32) for _ in _moments(model)]
    arguments = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    return jax_export.export(jax.jit(recommend), platforms=PLATFORMS)(weights, *arguments)


def _metadata(config: Any, model: Any, catalogue: Catalogue, top: int) -> dict:
    return {
        "format_version": FORMAT_VERSION,
        "made_by": f"tim4rec-jax {tim4rec_jax.__version__}, jax {jax.__version__}",
        "dataset": catalogue.metadata["name"],
        "items": len(catalogue),
        "max_length": model.max_length,
        "top_k": top,
        "gaps": config.data.convention,
        "platforms": PLATFORMS,
        "arguments": {
            "weights": f"the arrays of {WEIGHTS} by name",
            "items": "int32 [rows, max_length]: item indices of the last events, oldest first, "
            "right padded with 0",
            "lengths": "int32 [rows]: how many events, 1 or more",
            "gaps": "float32 [rows, max_length]: seconds since the event before, 0 for the first; "
            "exact: 0 at padding; recbole: differences of the times as float32, padded with 0 "
            "first, so the first padding position holds minus the last time",
            "exclude": "int32 [rows, any]: item indices not to recommend, 0 for none",
        }
        | dict(_MOMENTS[name] for name in _moments(model)),
        "returns": "scores float32 [rows, top_k] and item indices int32 [rows, top_k], best "
        "first; index 0 where no item was left",
    }


def add_command(subparsers: Any) -> None:
    """Adds `export` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "export",
        help="write a run as StableHLO, weights and vocabulary that need only jax",
        description="Writes a folder that recommends without this package (CPU, CUDA, TPU).",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--top-k", type=int, default=100, metavar="K", help="items a call returns (default: 100)"
    )
    parser.add_argument("--dataset", type=Path, help="the prepared dataset, if it has moved")
    parser.set_defaults(run=_run)


def _run(flags: argparse.Namespace) -> int:
    if flags.top_k < 1:
        raise UserError(f"--top-k is {flags.top_k}; it must be 1 or more")
    metadata = export(flags.workdir, flags.out, top=flags.top_k, dataset=flags.dataset)
    size = sum(file.stat().st_size for file in flags.out.iterdir())
    print(
        f"wrote {flags.out}: {metadata['items']:,} items, {size / 1e6:.1f} MB, for "
        f"{', '.join(PLATFORMS)}"
    )
    return 0
