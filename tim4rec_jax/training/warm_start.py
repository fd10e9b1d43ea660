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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tim4rec_jax import config as config_lib
from tim4rec_jax.config import Config
from tim4rec_jax.data import Dataset, open_dataset, train_item_counts
from tim4rec_jax.data.format import (
    DATASET_FILE,
    ITEMS_FILE,
    read_item_features,
    read_items,
    read_metadata,
)
from tim4rec_jax.digests import by_place, place
from tim4rec_jax.errors import UserError
from tim4rec_jax.models import SequenceModel
from tim4rec_jax.run import check_model, check_same_dataset, idle_settings, load_model
from tim4rec_jax.training.checkpoints import read_state
from tim4rec_jax.training.row_matching import (
    KERNEL,
    VALUES,
    Arrays,
    FeatureMatch,
    Vocabulary,
    at_other_dates,
    means,
    new_rows,
    zeros,
)
from tim4rec_jax.training.state import TrainState, init_state, make_optimizer

# Dates of the training data, which may differ from day to day as long as there are some.
_DATES = "model.date_bias_knots"
# What only a ranking adds, and is counted anew for each dataset.
_OF_RANKING = ("model.neighbours", "model.neighbours_follow", "model.neighbour_weight")
# Whether item features count, which `_match_features` compares with what the datasets have.
_FEATURES = "model.item_features"
_ITEMS, _DATE_VECTORS = "item_embedding/embedding", "drift/vectors"

MakeModel = Callable[..., SequenceModel]
Fill = Callable[[np.ndarray, int], np.ndarray]


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
                return jnp.asarray(arrays.get(place(path), leaf), leaf.dtype)

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
        moments = Moments(int(adam.count), _arrays(adam.mu), _arrays(adam.nu))
    features = _match_features(run, model, dataset, structure)
    if features is not None:
        vocabularies |= features.vocabularies
        axes |= {VALUES: ("values", 0), KERNEL: ("numbers", 0)}
    wanted = {name: leaf.shape for name, leaf in _named(nnx.state(structure, nnx.Param)).items()}

    def moved(arrays: Arrays, filled_by: Callable[[str], Fill]) -> Arrays:
        result = {}
        for name in sorted(arrays.keys() & wanted):
            array = arrays[name]
            if name in axes:
                kind, axis = axes[name]
                array = vocabularies[kind].move(array, axis, filled_by(name))
            elif name == _DATE_VECTORS and dates is not None:
                array = at_other_dates(array, *dates)
            result[name] = array
        if features is not None:  # the first features of their kind
            first = {VALUES, KERNEL} & (wanted.keys() - result.keys())
            result |= {name: np.zeros(wanted[name], np.float32) for name in first}
        _check_shapes(result, wanted, config, theirs, run)
        return result

    rng = np.random.default_rng((config.seed, 1))

    def first_rows(name: str) -> Fill:
        # Where an item has features, they stand alone until its own row is trained, and a value
        # adds nothing before it is. Neither does a new item's number for where it comes last.
        by_features = features is not None and name in (_ITEMS, VALUES, KERNEL)
        nothing = by_features or name == "last_offset"
        return zeros if nothing else functools.partial(new_rows, rng=rng)

    params = moved(_arrays(nnx.state(model, nnx.Param)), first_rows)
    if moments is not None:
        # The gradients of a new row have no mean yet. Their size is guessed, because Adam takes the
        # count of updates of the whole table for that of each row: from a second moment of 0, the
        # first updates of a new row would be several times the learning rate.
        moments = Moments(
            moments.count, moved(moments.mu, lambda _: zeros), moved(moments.nu, lambda _: means)
        )
    if features is not None:
        features.keep_sums(params)
        # Rows of items without events are zero, as `ItemEmbedding` has them, and stay there.
        cold = 1 + np.flatnonzero(train_item_counts(dataset) == 0)
        params[_ITEMS][cold] = 0
        if moments is not None:
            moments.mu[_ITEMS][cold] = 0
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
        and name not in (*_OF_RANKING, _FEATURES, *idle_settings(config))
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
        check_same_dataset(opened.directory, opened.metadata, run)
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
    before = {name: leaf.shape for name, leaf in _named(nnx.state(structure, nnx.Param)).items()}
    axes = {}
    for kind, size in sizes.items():
        grown: Any = nnx.eval_shape(lambda kind=kind, size=size: make_model(**{kind: size + 1}))
        for name, leaf in _named(nnx.state(grown, nnx.Param)).items():
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
            "some; train anew once, or take config.model.item_features=False"
        )
    return FeatureMatch.matched(old, dataset.features)


def _read_adam(theirs: Config, model: SequenceModel, run: Path) -> optax.ScaleByAdamState:
    """Adam's state in a checkpoint of a run, with the best weights if it is still there.

    Raises:
      UserError: the run has no checkpoint, or another optimizer for the item table.
    """
    train = theirs.train
    if train.item_optimizer != "adam":
        raise UserError(
            f"--init-from {run} was trained with train.item_optimizer={train.item_optimizer}, "
            "whose state Adam cannot go on from; take config.train.init_optimizer=rewarm"
        )
    tx = make_optimizer(
        train.learning_rate,
        train.weight_decay,
        # Their values do not matter, only what is kept in the optimizer's state because of them.
        cosine_steps=1 if train.schedule == "cosine" else None,
        warmup_steps=1 if train.init_from and train.init_optimizer == "rewarm" else 0,
    )
    shapes = jax.eval_shape(lambda params: init_state(params, tx, 0), nnx.state(model))
    state = read_state(run, shapes, model.item_rows)
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


def _named(state: Any) -> dict[str, Any]:
    """The arrays of an `nnx.State` by their places in it."""
    return by_place(nnx.to_pure_dict(state))


def _arrays(state: Any) -> Arrays:
    return {name: np.asarray(leaf) for name, leaf in _named(state).items()}
