"""Adds new items to a trained run, which recommends them at once, by their features alone.

    tim4rec add-items --workdir runs/shop --item-features new_items.csv --out runs/shop-today

Nothing is trained. The new run serves, exports and recommends like any other.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tim4rec_jax.data.features import Categorical, Dense, FeatureTable
from tim4rec_jax.errors import ArgumentParser, UserError, one_line
from tim4rec_jax.files import named_folder

# What a run needs to recommend, besides what is written anew.
_KEPT = ("config.json", "date_range.json")


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command line, or the given words."""
    parser = ArgumentParser(
        prog="tim4rec add-items",
        description="Adds items to a run that was trained with item features. Their features tell "
        "whom they are recommended to. Nothing is trained.",
    )
    add = parser.add_argument
    add("--workdir", type=named_folder, required=True, help="directory of the run")
    add(
        "--item-features",
        nargs="+",
        required=True,
        metavar="PATH",
        help="a table of items as the dataset was prepared with; known items in it are left out",
    )
    add("--out", type=named_folder, required=True, help="the new run; it must not exist")
    add("--item", metavar="COLUMN", help="the column with the id (default: as in preparation)")
    add("--on-bad-row", choices=["error", "skip"], default="error", help="default: error")
    flags = parser.parse_args(words)
    skip = flags.on_bad_row == "skip"
    found = read_table(flags.workdir, flags.item_features, item=flags.item, skip=skip)
    count = add_items(flags.workdir, *found, flags.out)
    print(f"{flags.out}: {count:,} items more than {flags.workdir}")


def read_table(
    workdir: Path,
    table: Sequence[str] | pa.Table,
    *,
    item: str | None = None,
    skip: bool = False,
) -> tuple[list[str], dict[str, Any], dict[str, str]]:
    """Reads a table of items as the dataset of a run was prepared with.

    Args:
      workdir: the run directory.
      table: paths, or the table.
      item: the column with the ids; None: that of the preparation.
      skip: whether bad rows are left out.

    Returns:
      The ids, the columns as `FeatureTable.encoded` takes them, and the title of each id that has
      one. Titles are in the column of the preparation, which may be missing.

    Raises:
      UserError: the run has no features, or the table cannot be used.
    """
    from tim4rec_jax.data_prep.features import Choices, read_items

    metadata, features = _features(workdir)
    told = metadata.get("item_features", {})
    choices = Choices(
        item=item or told.get("item", "item_id"),
        title=told.get("title"),
        title_needed=False,
        columns=tuple(feature.name for feature in features.features),
        dense=tuple(each.name for each in features.features if isinstance(each, Dense)),
        separator=told.get("separator"),
        skip=skip,
    )
    with tempfile.TemporaryDirectory() as work:
        found = read_items(table, choices, Path(work))
    return found.ids, found.columns, found.titles


def add_items(
    workdir: Path,
    ids: Sequence[str],
    columns: Mapping[str, Any],
    titles: Mapping[str, str],
    out: Path,
) -> int:
    """Writes a run that knows more items than another one.

    The vector of a new item is what the maps of the run make of its features. Values that the
    training did not know count as unknown. Known items keep everything.

    Args:
      workdir: the run directory.
      ids: of the items. Those that the run knows are left out.
      columns: their features, as `FeatureTable.encoded` takes them.
      titles: the titles by id, which are kept if the run has titles of its items.
      out: the new run directory. It must not exist, or be empty.

    Returns:
      The number of new items.

    Raises:
      UserError: the run is damaged or has no features, the columns are others than those that it
        was trained with, or `out` holds something.
    """
    import json

    import numpy as np
    import pyarrow.parquet as pq

    from tim4rec_jax.data import format as fmt
    from tim4rec_jax.data.features import FEATURES_FILE
    from tim4rec_jax.files import atomic_directory
    from tim4rec_jax.run import load_model
    from tim4rec_jax.training.checkpoints import Checkpoints

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another")
    metadata, features = _features(workdir)
    config, model = load_model(workdir, fold=False)
    if model.feature_maps is None:
        raise _untrained(workdir)
    items = fmt.read_items(workdir, metadata)
    known = set(items.column("item").to_pylist())
    rows = [row for row, item in enumerate(ids) if item not in known]
    if not rows:
        raise UserError(f"{workdir} knows all of these items already; there is nothing to add")
    new = FeatureTable.encoded(features.features, _checked(features, columns, rows))
    features = FeatureTable(pa.concat_tables([features.table, new.table]))
    count = len(items) + len(rows)
    table = {
        "index": np.arange(1, count + 1, dtype=np.int32),
        "item": [*items.column("item").to_pylist(), *(ids[row] for row in rows)],
        "count": np.append(items.column("count").to_numpy(), np.zeros(len(rows), np.int64)),
    }
    schema = items.schema
    if "title" in schema.names:
        added = (titles.get(ids[row]) for row in rows)
        table["title"] = [*items.column("title").to_pylist(), *added]
    items = pa.table(table, schema=schema)
    # The events of the dataset are not those of a dataset with these items.
    metadata |= {
        "items": count,
        "added_items": metadata.get("added_items", 0) + len(rows),
        "trained_content": metadata.get("trained_content", metadata.get("content")),
        "content": {**fmt.items_digests(items), "features": features.digest()},
    }
    params = _enlarged(config, model, features, len(rows))
    with atomic_directory(out) as folder:
        for name in _KEPT:
            if (workdir / name).exists():
                shutil.copyfile(workdir / name, folder / name)
        if (workdir / "data").is_dir():
            shutil.copytree(workdir / "data", folder / "data")
        pq.write_table(items, folder / fmt.ITEMS_FILE)
        features.write(folder / FEATURES_FILE)
        (folder / fmt.DATASET_FILE).write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
        checkpoints = Checkpoints(folder)
        checkpoints.save_best(1, params)
        checkpoints.close()
    return len(rows)


def _features(workdir: Path) -> tuple[dict, FeatureTable]:
    """What a run keeps of its dataset, and the features of its items."""
    from tim4rec_jax.data import format as fmt

    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} is no run directory: it has no config.json")
    if not (workdir / fmt.DATASET_FILE).exists():
        raise _untrained(workdir)
    metadata = fmt.read_metadata(workdir)
    features = fmt.read_item_features(workdir, metadata)
    if features is None:
        raise _untrained(workdir)
    return metadata, features


def _untrained(workdir: Path) -> UserError:
    return UserError(
        f"{workdir} was trained without item features, so that it can know only items with events; "
        "prepare the log with --item-features, and train again"
    )


def _checked(
    features: FeatureTable, columns: Mapping[str, Any], rows: Sequence[int]
) -> dict[str, Any]:
    """Some rows of the columns, if these are what the run was trained with."""
    import numpy as np

    chosen = {}
    for feature in features.features:
        shown, column = repr(one_line(feature.name, 40)), columns.get(feature.name)
        if column is None:
            raise UserError(f"the new items have no column {shown}, which the run was trained with")
        words = isinstance(column, pa.Array)
        if words != isinstance(feature, Categorical):
            kinds = ("numbers", "names") if words else ("names", "numbers")
            raise UserError(
                f"the column {shown} of the new items holds {kinds[1]}, and the run was trained "
                f"with {kinds[0]}; make it as it was"
            )
        if isinstance(feature, Dense) and column.shape[1] != len(feature.mean):
            raise UserError(
                f"the vectors {shown} of the new items have {column.shape[1]:,} numbers, and the "
                f"run was trained with {len(feature.mean):,}"
            )
        chosen[feature.name] = column.take(pa.array(rows)) if words else column[np.array(rows)]
    return chosen


def _enlarged(config: Any, model: Any, features: FeatureTable, added: int) -> Any:
    """The parameters of a model, for more items: what it learns of each item is 0 for the new."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from tim4rec_jax.layers.items import EXCLUDED
    from tim4rec_jax.models import FeatureArrays, build

    known = model.n_items + 1
    codes, weights, dense, values = features.arrays()
    counts = np.zeros(known + added, np.int64)
    users = getattr(model, "user_embedding", None)
    larger = nnx.eval_shape(
        lambda: build(
            config.model,
            n_items=model.n_items + added,
            max_length=config.data.max_length,
            n_users=0 if users is None else users.num_embeddings - 1,
            item_features=FeatureArrays(codes, weights, dense, counts, values),
        )
    )
    wanted = nnx.to_pure_dict(nnx.state(larger))
    params = nnx.state(model)
    held = nnx.to_pure_dict(params)

    def enlarge(value, shape):
        value = np.asarray(value)
        if len(shape.shape) and shape.shape[0] == value.shape[0] + added:
            zeros = np.zeros((added, *value.shape[1:]), value.dtype)
            return jnp.asarray(np.concatenate([value[:known], zeros, value[known:]]))
        return jnp.asarray(value)

    maps = held["item_embedding"].pop("maps")
    like = wanted["item_embedding"].pop("maps")
    enlarged = jax.tree.map(enlarge, held, wanted)
    for name, array in (("codes", codes), ("weights", weights), ("dense", dense)):
        if name in maps:
            maps[name] = jnp.asarray(array)
    excluded = np.append(np.asarray(maps["excluded"]), np.full(added, EXCLUDED, np.float32))
    maps["excluded"] = jnp.asarray(excluded)
    assert jax.tree.map(jnp.shape, maps) == jax.tree.map(lambda leaf: leaf.shape, like)
    enlarged["item_embedding"]["maps"] = maps
    nnx.replace_by_pure_dict(params, enlarged)
    return params
