"""A training that begins with what another run has learnt: `train.py --init-from RUN`.

Parameters with a row for each item (the item table, BERT4Rec's output bias) are matched by the ids
of the items. An item of both runs keeps its row. A row of an item that is gone is dropped, and
`new_rows` says how the row of a new item begins. Users of models that have vectors of users are
matched likewise, and so are the values of item features by their names (`FeatureMatch`). The
vectors of a date bias are read off at the dates of the new knots. Everything else is taken as it
is.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.compute as pc
from flax import nnx
from jaxtyping import Float32, Float64, Int64

from tim4rec_jax import config as config_lib
from tim4rec_jax.config import Config
from tim4rec_jax.data import Dataset, open_dataset, train_item_counts
from tim4rec_jax.data.features import Categorical, FeatureTable
from tim4rec_jax.data.format import (
    DATASET_FILE,
    ITEMS_FILE,
    read_item_features,
    read_items,
    read_metadata,
)
from tim4rec_jax.errors import UserError
from tim4rec_jax.models import SequenceModel
from tim4rec_jax.run import check_model, check_same_dataset, load_model
from tim4rec_jax.training.checkpoints import read_state
from tim4rec_jax.training.step import TrainState, init_state, make_optimizer

# Dates of the training data, which may differ from day to day as long as there are some.
_DATES = "model.date_bias_knots"
# The spread of new rows, as a share of that of the rows they are drawn around.
_SPREAD = 0.01

_ITEMS, _DATE_VECTORS = "item_embedding/embedding", "drift/vectors"
_VALUES, _KERNEL, _BIAS = (f"item_embedding/maps/{name}" for name in ("values", "kernel", "bias"))

# A tree of arrays, as `nnx.to_pure_dict` returns it, by the place of each array in it.
Arrays = dict[str, np.ndarray]
MakeModel = Callable[..., SequenceModel]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Which rows of a table stand for the same things in two runs.

    Attributes:
      size: number of entries of the run that is begun with.
      origin: for each entry of the new run, its number among those entries, or -1 if it is new.
      first: number of the row of the first entry. Rows before it and behind the last one (padding,
        BERT4Rec's mask) stay as they are.
    """

    size: int
    origin: Int64[np.ndarray, " entries"]
    first: int = 1

    @classmethod
    def matched(
        cls, old: pa.ChunkedArray | pa.Array, new: pa.ChunkedArray | pa.Array, first: int = 1
    ) -> "Vocabulary":
        """Matches ids."""
        found = pc.call_function("index_in", [new], pc.SetLookupOptions(old))
        return cls(len(old), pc.fill_null(found, -1).to_numpy().astype(np.int64), first)

    @property
    def kept(self) -> int:
        """Number of entries of both."""
        return int((self.origin >= 0).sum())

    def move(self, table: np.ndarray, axis: int, fill: Callable[..., np.ndarray]) -> np.ndarray:
        """The table of the new run.

        Args:
          table: that of the run that is begun with.
          axis: the axis of the rows.
          fill: makes the rows of new entries from all rows of the run, and their number.
        """
        table, end = np.moveaxis(table, axis, 0), self.first + self.size
        rows, known = table[self.first : end], self.origin >= 0
        moved = np.empty((len(known), *table.shape[1:]), table.dtype)
        moved[known] = rows[self.origin[known]]
        if not known.all():
            moved[~known] = fill(rows, int((~known).sum()))
        parts = [table[: self.first], moved, table[end:]]
        return np.moveaxis(np.concatenate(parts), 0, axis)


def new_rows(
    rows: Float32[np.ndarray, "V *shape"], count: int, rng: np.random.Generator
) -> Float32[np.ndarray, "{count} *shape"]:
    """The first rows of things that nothing has been learnt about.

    They are the mean of all rows: scores are dot products with these rows, so a new item begins
    with the mean of all scores, whatever the history. The same row is the item's input vector,
    where the mean says nothing but "some item". Around the mean, they are spread by a hundredth of
    the spread of all rows. With the very mean, all new items had the same score, and those that are
    not trained kept it: a target among them would take the best place of all. A spread as wide as
    that of an untrained model would order new items by chance, against trained ones too. The
    repeat bias is one number for all items, and is no part of any row.

    Args:
      rows: those that are known.
      count: number of rows to make.
      rng: draws the spread.
    """
    mean, spread = rows.mean(axis=0), rows.std(axis=0)
    noise = rng.standard_normal((count, *rows.shape[1:]), np.float32)
    return (mean + _SPREAD * spread * noise).astype(rows.dtype)


def _zeros(name: str, rows: np.ndarray, count: int) -> np.ndarray:
    return np.zeros((count, *rows.shape[1:]), rows.dtype)


def _means(name: str, rows: np.ndarray, count: int) -> np.ndarray:
    return np.broadcast_to(rows.mean(axis=0), (count, *rows.shape[1:])) if len(rows) else 0


@dataclasses.dataclass(frozen=True)
class FeatureMatch:
    """How the item features of two runs match.

    Attributes:
      vocabularies: of the values of categorical features, and of the numbers of dense ones.
      old: mean and standard deviation with which each number of today was standardised in the run
        that is begun with; those of today if it is new.
      new: those of today.
    """

    vocabularies: dict[str, Vocabulary]
    old: Float64[np.ndarray, "2 F"]
    new: Float64[np.ndarray, "2 F"]

    @classmethod
    def matched(cls, old: FeatureTable, new: FeatureTable) -> "FeatureMatch":
        """Matches values and numbers by their names."""
        (values, numbers, statistics), (values_now, numbers_now, now) = map(
            _named_features, (old, new)
        )
        known = Vocabulary.matched(numbers, numbers_now, first=0)
        then = np.where(known.origin >= 0, statistics[:, known.origin] if known.size else now, now)
        return cls({"values": Vocabulary.matched(values, values_now), "numbers": known}, then, now)

    def keep_sums(self, params: Arrays) -> None:
        """Has the linear map give the same sums, although numbers are standardised in another way.

        A number x was (x - m) / s, and is now (x - n) / t. So its weight w becomes w t / s, and
        w (n - m) / s is added to the bias.

        Args:
          params: the parameters of the new run, changed in place.
        """
        (m, s), (n, t), kernel = self.old, self.new, params[_KERNEL]
        params[_BIAS] = (params[_BIAS] + ((n - m) / s) @ kernel).astype(kernel.dtype)
        params[_KERNEL] = (kernel * (t / s)[:, None]).astype(kernel.dtype)


def _named_features(table: FeatureTable) -> tuple[pa.Array, pa.Array, np.ndarray]:
    """Names of all values and of all numbers, in the order of `FeatureMaps`; mean and deviation."""
    values, numbers, mean, std = [], [], [], []
    for feature in table.features:
        if isinstance(feature, Categorical):
            values += [json.dumps([feature.name, value]) for value in (None, *feature.vocabulary)]
        else:
            numbers += [json.dumps([feature.name, i]) for i in range(len(feature.mean))]
            mean, std = [*mean, *feature.mean], [*std, *feature.std]
    return (
        pa.array(values, pa.string()),
        pa.array(numbers, pa.string()),
        np.array([mean, std], np.float64).reshape(2, -1),
    )


@dataclasses.dataclass(frozen=True)
class Moments:
    """Adam's state.

    Attributes:
      count: number of updates that it has seen.
      mu: the running mean of the gradient of each parameter.
      nu: the running mean of its square.
    """

    count: int
    mu: Arrays
    nu: Arrays


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """What a training begins with.

    Attributes:
      words: says where it comes from, for people.
      params: the parameters.
      moments: Adam's state, or None if it begins anew.
    """

    words: str
    params: Arrays
    moments: Moments | None

    def state(self, fresh: TrainState) -> TrainState:
        """The first state of the training.

        Args:
          fresh: that of a training from random weights. Its step, its random key and the schedule
            of its learning rate stay.
        """

        def filled(tree: nnx.State, arrays: Arrays) -> nnx.State:
            def one(path, leaf):
                # What is known of the items' features is no parameter, and that of today.
                return jnp.asarray(arrays.get(_name(path), leaf), leaf.dtype)

            pure = jax.tree_util.tree_map_with_path(one, nnx.to_pure_dict(tree))
            copy = jax.tree.map(lambda x: x, tree)
            nnx.replace_by_pure_dict(copy, pure)
            return copy

        opt_state, moments = fresh.opt_state, self.moments
        if moments is not None:
            opt_state = _replace_adam(
                opt_state,
                lambda adam: adam._replace(
                    count=jnp.asarray(moments.count, adam.count.dtype),
                    mu=filled(adam.mu, moments.mu),
                    nu=filled(adam.nu, moments.nu),
                ),
            )
        return dataclasses.replace(
            fresh, params=filled(fresh.params, self.params), opt_state=opt_state
        )


def read_warm_start(
    config: Config, workdir: Path, dataset: Dataset, make_model: MakeModel, structure: Any
) -> WarmStart:
    """Reads a run for a training to begin with, and moves it to the dataset of that training.

    Nothing of the run is changed.

    Args:
      config: the settings of the training, resolved; `train.init_from` names the run.
      workdir: the run directory of the training.
      dataset: what it trains on.
      make_model: makes its model; `n_items` and `n_users` are keywords of it.
      structure: that model with shapes for weights.

    Raises:
      UserError: the run is missing or damaged, its model is another one, or it has nothing in
        common with the dataset.
    """
    run = Path(config.train.init_from)
    if run.resolve() == workdir.resolve():
        raise UserError(
            f"--init-from and --workdir are both {run}; name a new folder for the new run, or "
            "leave --init-from out to go on with the old one"
        )
    if structure.needs_item_counts:
        raise UserError(
            f"a {config.model.name} model counts the events of its dataset and learns nothing; "
            "train it anew, without --init-from"
        )
    theirs, model = load_model(run, fold=False)
    _check_same_model(config, theirs, run)
    vocabularies = _vocabularies(theirs, run, dataset, structure)
    check_model(model, vocabularies["n_items"].size, run, run)
    items = vocabularies["n_items"]
    if not items.kept:
        raise UserError(
            f"{dataset.directory} has no item of {run}; were both prepared with the same column of "
            "item ids? Train anew, without --init-from"
        )

    axes, dates = _entity_axes(make_model, structure), None
    if structure.drift is not None and model.drift is not None:
        dates = model.drift.knots(), structure.drift.knots()
    moments = None
    if config.train.init_optimizer == "carry":
        adam: Any = _read_adam(theirs, model, run)
        moments = Moments(int(adam.count), dict(_named(adam.mu)), dict(_named(adam.nu)))
    features = _match_features(run, model, dataset, structure)
    if features is not None:
        vocabularies |= features.vocabularies
        axes |= {_VALUES: ("values", 0), _KERNEL: ("numbers", 0)}
    wanted = {name: leaf.shape for name, leaf in _named(nnx.state(structure, nnx.Param))}

    def moved(arrays: dict[str, Any], fill: Callable[..., np.ndarray]) -> Arrays:
        result = {}
        for name in sorted(arrays.keys() & wanted):
            array = np.asarray(arrays[name])
            if name in axes:
                kind, axis = axes[name]
                array = vocabularies[kind].move(array, axis, functools.partial(fill, name))
            elif name == _DATE_VECTORS and dates is not None:
                array = _at_other_dates(array, *dates)
            result[name] = array
        _check_shapes(result, wanted, config, theirs, run)
        return result

    rng = np.random.default_rng((config.seed, 1))

    def first_rows(name: str, rows: np.ndarray, count: int) -> np.ndarray:
        # Where an item has features, they stand alone until its own row is trained, and a value
        # adds nothing before it is.
        if features is not None and name in (_ITEMS, _VALUES, _KERNEL):
            return _zeros(name, rows, count)
        return new_rows(rows, count, rng)

    params = moved(dict(_named(nnx.state(model, nnx.Param))), first_rows)
    if features is not None:
        features.keep_sums(params)
        # As `ItemEmbedding` has them.
        params[_ITEMS][1:][: dataset.n_items][train_item_counts(dataset) == 0] = 0
    if moments is not None:
        # The gradients of a new row have no mean yet. Their size is guessed, because Adam takes the
        # count of updates of the whole table for that of each row: from a second moment of 0, the
        # first updates of a new row would be several times the learning rate.
        moments = Moments(moments.count, moved(moments.mu, _zeros), moved(moments.nu, _means))
    new, gone = len(items.origin) - items.kept, items.size - items.kept
    optimizer = "Adam goes on" if moments else "Adam begins anew"
    words = f"{items.kept:,} items as there, {new:,} new, {gone:,} dropped; {optimizer}"
    return WarmStart(f"begins with the best weights of {run}: {words}", params, moments)


def _check_same_model(config: Config, theirs: Config, run: Path) -> None:
    """Makes sure that weights of a run mean the same to another training.

    Raises:
      UserError: a setting of the model differs, or that of the gaps that it is given.
    """
    ours_flat, theirs_flat = config_lib.flatten(config), config_lib.flatten(theirs)
    names = [name for name in ours_flat | theirs_flat if name.startswith("model.")]
    different = [
        name
        for name in [*names, "data.convention"]
        if ours_flat.get(name) != theirs_flat.get(name)
        and not (name == _DATES and ours_flat.get(name) and theirs_flat.get(name))
    ]
    if different:
        listed = ", ".join(
            f"{name} ({theirs_flat.get(name)} -> {ours_flat.get(name)})" for name in different
        )
        raise UserError(
            f"--init-from {run} is a run of a model with other settings: {listed}; take the "
            "settings of that run, or train anew without --init-from"
        )


def _check_shapes(
    arrays: Arrays, wanted: dict[str, tuple], config: Config, theirs: Config, run: Path
) -> None:
    """Makes sure that all parameters fit, once the rows of items and users do.

    Raises:
      UserError: one does not. Settings of the model are the same, so it is the length of histories
        in the weights, or a model that is written in another way than it was.
    """
    found = {name: array.shape for name, array in arrays.items()}
    if found == wanted:
        return
    ours, old = config.data.max_length, theirs.data.max_length
    if ours != old:
        raise UserError(
            f"--init-from {run} has weights for histories of another length: data.max_length "
            f"({old} -> {ours}); take {old}, or train anew without --init-from"
        )
    name = min(name for name in found | wanted if found.get(name) != wanted.get(name))
    raise UserError(
        f"--init-from {run} holds {found.get(name)} values for {name}, and the model has "
        f"{wanted.get(name)}; train anew without --init-from"
    )


def _vocabularies(
    theirs: Config, run: Path, dataset: Dataset, structure: Any
) -> dict[str, Vocabulary]:
    """How items match, and users if the model has vectors for them; by the keyword of `build`."""
    keeps_items = (run / ITEMS_FILE).exists() and (run / DATASET_FILE).exists()
    if keeps_items:
        old_items = read_items(run, read_metadata(run)).column("item")
    else:  # a run of an earlier version
        old_items = _dataset_of(theirs, run, "items").item_ids
    found = {"n_items": Vocabulary.matched(old_items, dataset.item_ids)}
    if structure.needs_users:
        old_users = _dataset_of(theirs, run, "users").user_ids
        found["n_users"] = Vocabulary.matched(old_users, dataset.user_ids)
    return found


def _dataset_of(theirs: Config, run: Path, what: str) -> Dataset:
    """The dataset of a run that does not keep all that is needed."""
    try:
        opened = open_dataset(theirs.dataset)
        if (run / DATASET_FILE).exists():
            check_same_dataset(opened.directory, opened.metadata, run / DATASET_FILE)
    except UserError as error:
        raise UserError(
            f"--init-from {run} keeps no ids of its {what}, so the dataset of its training is "
            f"needed: {error}"
        ) from error
    return opened


def _entity_axes(make_model: MakeModel, structure: Any) -> dict[str, tuple[str, int]]:
    """The parameters with a row for each item or user: for each, which of the two, and the axis.

    They are those whose shape grows with the number of items or users, so a model does not have to
    list them.

    Raises:
      UserError: a parameter grows in another way.
    """
    sizes = {"n_items": structure.n_items}
    if structure.needs_users:
        sizes["n_users"] = structure.user_embedding.num_embeddings - 1
    before = {name: leaf.shape for name, leaf in _named(nnx.state(structure, nnx.Param))}
    axes = {}
    for kind, size in sizes.items():
        grown: Any = nnx.eval_shape(lambda kind=kind, size=size: make_model(**{kind: size + 1}))
        for name, leaf in _named(nnx.state(grown, nnx.Param)):
            changes = [b - a for a, b in zip(before[name], leaf.shape, strict=True)]
            if any(changes):
                if sorted(changes)[-1] != 1 or sum(map(abs, changes)) != 1 or name in axes:
                    raise UserError(
                        f"--init-from cannot be used with this model: {name} has not one row for "
                        "each item; train anew without it"
                    )
                axes[name] = kind, changes.index(1)
    return axes


def _match_features(run: Path, model: Any, dataset: Dataset, structure: Any) -> FeatureMatch | None:
    """How the item features match; None if today's model has none.

    What features of the run have added is then written into its item table, and nothing is lost.

    Raises:
      UserError: today's model has features and the run has not.
    """
    if structure.feature_maps is None:
        if model.feature_maps is not None:
            model.item_embedding.fold()
        return None
    old = read_item_features(run, read_metadata(run)) if model.feature_maps is not None else None
    if old is None or dataset.features is None:
        raise UserError(
            f"--init-from {run} was trained without item features, and {dataset.directory} has "
            "some; train anew once, or take config.model.item_features=False in both"
        )
    return FeatureMatch.matched(old, dataset.features)


def _at_other_dates(vectors: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """What a piecewise linear function with values at the dates `old` has at the dates `new`.

    It is constant before the first and after the last date, as the date bias is.
    """
    columns = [np.interp(new, old, column) for column in vectors.T]
    return np.stack(columns, axis=1).astype(vectors.dtype)


def _read_adam(theirs: Config, model: SequenceModel, run: Path) -> optax.ScaleByAdamState:
    """Adam's state in a checkpoint of a run, with the best weights if it is still there.

    Raises:
      UserError: the run has no checkpoint.
    """
    train = theirs.train
    tx = make_optimizer(
        train.learning_rate,
        train.weight_decay,
        # Their values do not matter, only what is kept in the optimizer's state because of them.
        cosine_steps=1 if train.schedule == "cosine" else None,
        warmup_steps=1 if train.init_from and train.init_optimizer == "rewarm" else 0,
    )
    shapes = jax.eval_shape(lambda params: init_state(params, tx, 0), nnx.state(model))
    state = read_state(run, shapes)
    if state is None:
        raise UserError(
            f"--init-from {run} has no checkpoint that can be read, and with it Adam's state is "
            "gone; take config.train.init_optimizer=rewarm"
        )
    found: list[Any] = []
    _replace_adam(state.opt_state, lambda adam: found.append(adam) or adam)
    return found[0]


def _replace_adam(opt_state: Any, new: Callable[[Any], Any]) -> Any:
    """The state of an optimizer of `make_optimizer` with another part of Adam."""
    kind = optax.ScaleByAdamState
    return jax.tree.map(
        lambda part: new(part) if isinstance(part, kind) else part,
        opt_state,
        is_leaf=lambda part: isinstance(part, kind),
    )


def _named(state: Any) -> list[tuple[str, Any]]:
    """The arrays of an `nnx.State` with their places in it."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    return [(_name(path), leaf) for path, leaf in leaves]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
