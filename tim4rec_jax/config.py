"""The settings of a run: defaults, what follows from them, and what must hold."""

import dataclasses
from typing import Any, TypeAlias

from ml_collections import ConfigDict, config_dict

from tim4rec_jax.errors import UserError
from tim4rec_jax.models import DEFAULT_MODEL, MODELS, find_model, model_class, model_settings

# A ConfigDict: which attributes it has, no type checker can know.
Config: TypeAlias = Any


BASELINES = tuple(name for name in MODELS if name != DEFAULT_MODEL)


def default() -> Config:
    """Settings of a run, with the values of the released 64-d model."""
    return ConfigDict(
        {
            "dataset": "",  # a directory that data_prep wrote,
            "prepare": "",  # and the command that makes it
            "seed": 2020,  # of initial weights, shuffling and dropout
            "data": {
                # Where batches are gathered: on the "host", on the "device" (the event log lies
                # there), or "auto": on a GPU or TPU that has the memory.
                "placement": "auto",
                # Or "global_time": training ends at a date. See tim4rec_jax/data/splits.py.
                "split": "leave_one_out",
                # ISO dates, of "global_time" only; by default 80 and 90 % of events are before.
                "valid_from": config_dict.placeholder(str),
                "test_from": config_dict.placeholder(str),
                "max_length": 50,  # longest history the model sees
                # "recbole" rounds times to float32 and leaves the padding spike in, "exact" does
                # neither; by default what the time encoding calls for.
                "convention": config_dict.placeholder(str),
                # Lengths to pad batches to; by default chosen from the data.
                "buckets": config_dict.placeholder(tuple),
                # Windows of max_length an epoch takes from one history, at most; by default
                # all. Only with train.objective "every_position".
                "windows_per_user": config_dict.placeholder(int),
            },
            "model": _model_section(DEFAULT_MODEL),
            "train": {
                "objective": "prefix",
                "loss": "cross_entropy",  # or sampled_softmax, gbce, bpr: for large catalogues
                "negatives": 512,  # items that a sampled loss draws for a batch
                "calibration": 0.75,  # t of gbce
                "batch_size": 2048,
                "learning_rate": 1e-3,
                "schedule": "constant",  # or "cosine": down to 0 at the end of all epochs
                "weight_decay": 0.0,
                "epochs": 300,
                "patience": 20,  # epochs without a better NDCG@10 before training stops
                "checkpoint_minutes": 5.0,  # besides the checkpoint after every epoch
            },
            "eval": {"batch_size": 512},  # changes the speed only
        }
    )


def _model_section(name: str) -> dict[str, Any]:
    return {"name": name, **dataclasses.asdict(find_model(name).Settings())}


def use_model(config: Config, name: str) -> None:
    """Switches to another model, with its default settings.

    Args:
      config: changed in place.
      name: see `tim4rec_jax.models.find_model`.

    Raises:
      ValueError: there is no such model.
    """
    model = find_model(name)
    with config.unlocked():
        config.model = ConfigDict(_model_section(name))
    config.train.objective = model.default_objective
    config.train.patience = model.default_patience
    if model.default_epochs is not None:
        config.train.epochs = model.default_epochs


def use_causal_time(config: Config, *, rows: int, epochs: int) -> None:
    """Switches to causal time, trained at every position of packed rows.

    Args:
      config: changed in place.
      rows: of `data.max_length` positions, a batch.
      epochs: the learning rate falls to 0 in so many; nothing stops training before, because the
        last ones are the best.
    """
    config.model.update(time_encoding="causal", repeat_bias=True)
    config.train.update(
        objective="every_position",
        batch_size=rows,
        epochs=epochs,
        patience=epochs,
        schedule="cosine",
    )


_POSITIVE = (
    "data.max_length",
    "train.batch_size",
    "train.negatives",
    "train.learning_rate",
    "train.epochs",
    "eval.batch_size",
)
_NOT_NEGATIVE = (
    "seed",
    "train.weight_decay",
    "train.patience",
    "train.checkpoint_minutes",
)
_SHARES = ("train.calibration",)


def check_variant(variant: str, known: tuple[str, ...]) -> None:
    """Raises a ValueError that lists the variants if `variant` is none of them.

    Besides those `known`, a config has one for every comparison model.
    """
    if variant not in ("", *known, *BASELINES):
        listed = ", ".join((*known, *BASELINES))
        raise ValueError(f"{variant!r} is not a variant; there are: {listed}")


def resolve(config: Config) -> Config:
    """Fills in what follows from other settings and checks the rest.

    Raises:
      UserError: a setting cannot be, with its name.
    """
    config = config.copy_and_resolve_references()
    model, train = config.model, config.train
    try:
        settings, kind = model_settings(model), model_class(model)
    except ValueError as error:
        raise UserError(f"config.model.{error}") from error
    _one_of("data.placement", config.data.placement, ("auto", "device", "host"))
    _one_of("data.split", config.data.split, ("leave_one_out", "global_time"))
    _one_of("train.objective", train.objective, ("prefix", "every_position", "cloze"))
    losses = ("cross_entropy", "sampled_softmax", "gbce", "bpr")
    _one_of("train.loss", train.loss, losses)
    _one_of("train.schedule", train.schedule, ("constant", "cosine"))
    encoding = model.get("time_encoding")
    if train.objective == "every_position" and not kind.causal:
        name = f"{model.name} with time encoding {encoding}" if encoding else model.name
        raise UserError(
            f"config.train.objective is 'every_position', which needs a causal model, but {name} "
            "looks ahead; take config.model.time_encoding=causal, or another model or objective"
        )
    if (train.objective == "cloze") != (kind.default_objective == "cloze"):
        raise UserError(
            f"config.train.objective is {train.objective!r}, and the model {model.name} is trained "
            f"with {kind.default_objective}; cloze is for models that fill masks, and for no others"
        )
    if model.date_bias_knots and train.objective == "cloze":
        raise UserError(
            f"config.model.date_bias_knots is {model.date_bias_knots}, and the objective is cloze, which "
            "predicts items of any date; take config.model.date_bias_knots=0"
        )
    if model.repeat_bias and (train.loss != "cross_entropy" or train.objective == "cloze"):
        raise UserError(
            "config.model.repeat_bias is True, which needs config.train.loss=cross_entropy and "
            f"another objective than cloze, and they are {train.loss} and {train.objective}; "
            "change them, or take config.model.repeat_bias=False"
        )
    if config.data.convention is None:
        packed = train.objective == "every_position"
        config.data.convention = "exact" if packed else settings.convention
    _one_of("data.convention", config.data.convention, ("recbole", "exact"))
    if train.objective == "every_position" and config.data.convention != "exact":
        raise UserError(
            "config.data.convention is 'recbole', but packed rows have exact gaps; leave it out, "
            "or take config.train.objective=prefix"
        )
    buckets = config.data.buckets
    if buckets is not None and not all(isinstance(width, int) for width in buckets):
        raise UserError(f"config.data.buckets is {buckets!r}; it must be whole numbers")
    _check_numbers(flatten(config))
    windows = config.data.windows_per_user
    if windows is not None and windows < 1:
        raise UserError(f"config.data.windows_per_user is {windows}; it must be positive")
    return config


def _check_numbers(flat: dict) -> None:
    numbers = {name: value for name, value in flat.items() if isinstance(value, int | float)}
    for name, value in numbers.items():
        # Negated, so that a NaN does not pass.
        if name in _SHARES:
            if not 0 <= value < 1:
                raise UserError(f"config.{name} is {value}; it must lie in [0, 1)")
        elif name in _NOT_NEGATIVE:
            if not value >= 0:
                raise UserError(f"config.{name} is {value}; it must not be negative")
        elif name in _POSITIVE and not value > 0:
            raise UserError(f"config.{name} is {value}; it must be positive")


def _one_of(name: str, value, values: tuple) -> None:
    if value not in values:
        raise UserError(f"config.{name} is {value!r}; it must be one of {', '.join(values)}")


def flatten(config: Config, prefix: str = "") -> dict:
    """{"model.hidden_size": 64, ...}."""
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict | dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
