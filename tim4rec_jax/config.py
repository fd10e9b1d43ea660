"""The settings of a run: what can be set, the defaults, and what must hold.

The settings of a model stand with the model, as the dataclass `Settings` of its class in
`tim4rec_jax.models`. All other settings are the rows of `SETTINGS`.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

from ml_collections import ConfigDict, config_dict

from tim4rec_jax.checks import NOT_NEGATIVE, POSITIVE, SHARE, Check, checked, one_of
from tim4rec_jax.errors import UserError

# The functions that need the models import them. So `train.py --help` can begin without JAX.

# A `ConfigDict`, whose attributes no type checker knows.
Config: TypeAlias = Any


def _is_time(text: str) -> bool:
    from tim4rec_jax.data.splits import parse_time  # late, because its package takes long to import

    try:
        return abs(parse_time(text)) < 2**62
    except ValueError:
        return False


TIME = Check(
    _is_time, "it must be an ISO date such as 2003-02-28, or a number of seconds since 1970"
)


LOGGERS = ("tensorboard", "mlflow")
SAMPLED_LOSSES = ("sampled_softmax", "gbce", "bpr")
LOSSES = ("cross_entropy", *SAMPLED_LOSSES)


class Setting(NamedTuple):
    """One setting.

    Attributes:
      default: its value unless a configuration sets it. A type stands for no value: the setting
        is None until someone sets it, and the code chooses.
      help: one line for `train.py --help`.
      check: what must hold of a value.
    """

    default: Any
    help: str
    check: Check | None = None

    @property
    def optional(self) -> bool:
        """Whether the setting can be None."""
        return isinstance(self.default, type)

    @property
    def kind(self) -> type:
        """The type of a value."""
        return self.default if self.optional else type(self.default)

    def checked(self, value: Any) -> Any:
        """The value as a `kind`, or None where the setting is optional.

        Raises:
          ValueError: the setting cannot have it; see `tim4rec_jax.checks.checked`.
        """
        return None if value is None and self.optional else checked(value, self.kind, self.check)


# The defaults are those of the released 64-d configurations.
SETTINGS: dict[str, Setting] = {
    "dataset": Setting("", "folder of the prepared dataset"),
    "prepare": Setting("", "command that prepares the dataset; runs if the folder is missing"),
    "preset": Setting(
        "", "the configuration that these settings began with, for reports; filled in by itself"
    ),
    "seed": Setting(2020, "seed of initial weights, shuffling and dropout", NOT_NEGATIVE),
    "data.max_length": Setting(50, "longest history that the model sees, in events", POSITIVE),
    "data.split": Setting(
        "leave_one_out",
        "leave_one_out: the last event of a user tests; global_time: what is after a date tests",
        one_of("leave_one_out", "global_time"),
    ),
    "data.valid_from": Setting(
        str,
        "ISO date where validation begins, with global_time; default: after 80 % of events",
        TIME,
    ),
    "data.test_from": Setting(
        str,
        "ISO date where the test begins, with global_time; default: after 90 % of events",
        TIME,
    ),
    "data.convention": Setting(
        str,
        "gaps between events: recbole (float32 times, a spike in the padding) or exact; "
        "default: as the model was published",
        one_of("recbole", "exact"),
    ),
    "data.buckets": Setting(
        tuple, "lengths that batches are padded to; default: chosen from the data"
    ),
    "data.windows_per_user": Setting(
        int,
        "most windows of max_length that an epoch takes from a history, with every_position; "
        "default: all",
        POSITIVE,
    ),
    "data.shuffle_ties": Setting(
        False,
        "give events of one user and one moment, whose order nobody knows, a new order in each "
        "epoch, with every_position",
    ),
    "data.placement": Setting(
        "auto",
        "where batches are gathered: host, device (which then holds all events), or auto: the "
        "device if it is a GPU or TPU with enough memory",
        one_of("auto", "device", "host"),
    ),
    "train.objective": Setting(
        "prefix",
        "prefix: predict the event after each prefix of a history; every_position: all events "
        "of packed histories at once (causal models); cloze: masked items (bert4rec)",
        one_of("prefix", "every_position", "cloze"),
    ),
    "train.loss": Setting(
        "cross_entropy",
        "cross_entropy over all items; sampled_softmax, gbce or bpr for large catalogues; or a "
        "function of your own as module:function",
        Check(
            lambda value: value in LOSSES or ":" in value,
            f"it must be one of {', '.join(LOSSES)}, or name a function of your own as "
            "'module:function'",
        ),
    ),
    "train.negatives": Setting(512, "items that a sampled loss draws for a batch", POSITIVE),
    "train.calibration": Setting(
        0.75,
        "t of gbce (arXiv 2308.07192): 0 is the plain binary cross-entropy; with 1 the scores are "
        "probabilities",
        SHARE,
    ),
    "train.batch_size": Setting(
        2048,
        "rows in a batch; a row is one history, or with every_position max_length positions that "
        "hold several histories",
        POSITIVE,
    ),
    "train.learning_rate": Setting(1e-3, "of Adam", POSITIVE),
    "train.item_optimizer": Setting(
        "adam",
        "of the item table: adam changes every row in every step; lazy_adam and adagrad (one "
        "number for each row) only the rows of the batch, which needs a sampled loss",
        one_of("adam", "lazy_adam", "adagrad"),
    ),
    "train.schedule": Setting(
        "constant",
        "of the learning rate: constant, or cosine, which falls to 0 over all epochs",
        one_of("constant", "cosine"),
    ),
    "train.weight_decay": Setting(
        0.0,
        "factor of the weights in what is added to their gradients before Adam, as "
        "torch.optim.Adam has it; AdamW is another",
        NOT_NEGATIVE,
    ),
    "train.epochs": Setting(300, "most passes over the training data", POSITIVE),
    "train.patience": Setting(
        20, "epochs in a row without a better NDCG@10 before training stops", NOT_NEGATIVE
    ),
    "train.init_from": Setting(
        str,
        "run whose best weights the training begins with; --init-from=RUN is short for it",
        Check(bool, "it must name a run directory"),
    ),
    "train.init_optimizer": Setting(
        "carry",
        "with init_from: carry, Adam's moments go on from that run; rewarm, they begin at zero and "
        "the learning rate rises from zero over the first tenth of an epoch",
        one_of("carry", "rewarm"),
    ),
    "train.checkpoint_minutes": Setting(
        5.0, "minutes between checkpoints within an epoch; each epoch ends with one", NOT_NEGATIVE
    ),
    "train.loggers": Setting(
        "tensorboard",
        "where figures go besides log.jsonl: tensorboard, mlflow, a class of your own as "
        "module:Class, several with commas, or ''",
        Check(
            lambda value: all(name in LOGGERS or ":" in name for name in value.split(",") if name),
            f"it must name {' or '.join(LOGGERS)} or a class of your own as 'module:Class', with "
            "commas between several",
        ),
    ),
    "mesh.data": Setting(
        int,
        "devices that share the rows of a batch, each with a part of the item table; default: all "
        "of this process, each with the whole table",
        POSITIVE,
    ),
    "mesh.catalogue": Setting(
        1,
        "devices that share the items of the same rows, for a cross_entropy over so many items "
        "that their scores and gradients do not fit one device",
        POSITIVE,
    ),
    "eval.batch_size": Setting(512, "users evaluated at once; changes the speed only", POSITIVE),
    "eval.valid_users": Setting(
        int, "users that validations rank, drawn once by the seed; default: all", POSITIVE
    ),
    "eval.valid_epochs": Setting(1, "epochs between validations", POSITIVE),
    "eval.valid_steps": Setting(
        int, "steps between validations instead; patience then counts validations", POSITIVE
    ),
    "eval.ks": Setting(
        (10, 20, 50),
        "the cut-offs k of the metrics; training chooses the best epoch by NDCG@10 in any case",
        Check(
            lambda ks: bool(ks) and min(ks) > 0,
            "it must be one or more positive numbers, for example (10, 50)",
        ),
    ),
    "eval.ties": Setting(
        "optimistic",
        "a target among items with its very score: optimistic takes the best of their places, "
        "expected the mean over all orders of them",
        one_of("optimistic", "expected"),
    ),
}

# Names that settings had in older runs, and the names they have now.
RENAMED = {
    "model.seen_offset": "model.repeat_bias",
    "model.drift_knots": "model.date_bias_knots",
}
# Where the settings of older runs hold what `tim4rec_jax.run.read_date_range` returns today.
OLD_DATE_RANGES = ("model.drift_dates", "model.date_bias_dates", "data.date_range")


def default() -> Config:
    """Settings of a run of TiM4Rec, with the values of the released 64-d model."""
    from tim4rec_jax.models import DEFAULT_MODEL

    config = ConfigDict({"data": {}, "model": {}, "train": {}, "mesh": {}, "eval": {}})
    for name, setting in SETTINGS.items():
        group, key = _place(config, name)
        group[key] = config_dict.placeholder(setting.kind) if setting.optional else setting.default
    use_model(config, DEFAULT_MODEL)
    return config


def use_model(config: Config, name: str) -> None:
    """Switches to another model, with the default settings of its class.

    Its objective, its patience and, where it has one, its loss become those of the model, too.

    Args:
      config: changed in place.
      name: a model's name or "module:Class", see `tim4rec_jax.models.find_model`.

    Raises:
      ValueError: there is no such model.
    """
    from tim4rec_jax.models import find_model

    model = find_model(name)
    with config.unlocked():
        config.model = ConfigDict({"name": name, **dataclasses.asdict(model.Settings())})
    config.train.objective = model.default_objective
    config.train.patience = model.default_patience
    for setting in ("epochs", "loss", "negatives"):
        if (value := getattr(model, f"default_{setting}")) is not None:
            config.train[setting] = value


def rename_settings(config: Config) -> list[str]:
    """Moves the values of settings with an older name to the name of today.

    Args:
      config: changed in place.

    Returns:
      A sentence for each setting that was moved.
    """
    notes = []
    with config.unlocked(), config.ignore_type():
        for section in {"data", "model"} - set(config):  # a file of settings may lack them
            config[section] = ConfigDict()
        for old, new in RENAMED.items():
            group, key = _place(config, old)
            if key in group:
                target, name = _place(config, new)
                target[name] = group[key]
                del group[key]
                notes.append(f"config.{old} is now called config.{new}")
        for old in OLD_DATE_RANGES:
            group, key = _place(config, old)
            if key in group:
                del group[key]
    return notes


def old_date_range(values: dict[str, Any]) -> tuple[int, int] | None:
    """The dates of a date bias in the settings of an older run, None if there are none."""
    flat = flatten(values)
    for name in OLD_DATE_RANGES:
        if flat.get(name):
            first, last = flat[name]
            return first, last
    return None


def check_complete(config: Config) -> None:
    """Makes sure that no setting is missing, apart from those of the model, which have defaults.

    Raises:
      UserError: a setting is missing; the message names it.
    """
    there = flatten(config)
    if missing := [name for name in (*SETTINGS, "model.name") if name not in there]:
        raise UserError(
            f"config.{missing[0]} is missing; begin with tim4rec_jax.config.default(), which has "
            "every setting, and change what differs"
        )
    if not isinstance(there["model.name"], str):
        raise UserError(f"config.model.name is {there['model.name']!r}; it must be a text")


def check_values(config: Config) -> None:
    """Checks each setting by itself: its kind, its size, its words.

    Args:
      config: changed in place: `data.convention` and settings of the model that were left out are
        filled in, and a whole number where a number is asked for becomes a float.

    Raises:
      UserError: a setting is missing, not known or not possible; the message names it.
    """
    from tim4rec_jax.models import configure

    check_complete(config)
    for name, value in flatten(config).items():
        if name.startswith("model."):
            continue
        if name not in SETTINGS:
            raise UserError(f"config.{name} is not a setting")
        setting, (group, key) = SETTINGS[name], _place(config, name)
        try:
            value = setting.checked(value)
        except ValueError as error:
            raise UserError(f"config.{name} {error}") from None
        with group.ignore_type():
            group[key] = value  # a whole number has become a float
    try:
        _, settings = configure(config.model)
    except ValueError as error:
        raise UserError(f"config.model.{error}") from error
    with config.model.unlocked(), config.model.ignore_type():
        config.model.update(dataclasses.asdict(settings))
    if config.data.convention is None:
        packed = config.train.objective == "every_position"
        config.data.convention = "exact" if packed else settings.convention


def resolve(config: Config) -> Config:
    """Fills in what follows from other settings, and checks all of them.

    Args:
      config: not changed.

    Returns:
      A copy with everything filled in, such as `data.convention` and the settings of the
      model that were left out.

    Raises:
      UserError: a setting is not known or not possible; the message names it.
    """
    from tim4rec_jax.models import imported, model_class

    config = config.copy_and_resolve_references()
    check_values(config)
    if ":" in config.train.loss:
        try:
            imported(config.train.loss)
        except ValueError as error:
            raise UserError(f"config.train.loss {error}") from error
    for problem in _conflicts(config, model_class(config.model)):
        raise UserError(problem)
    return config


def _conflicts(config: Config, model: Any) -> Iterator[str]:
    """Yields a sentence for each pair of settings that cannot go together."""
    data, train = config.data, config.train
    for key in ("valid_from", "test_from"):
        if data[key] is not None and data.split != "global_time":
            yield (
                f"config.data.{key} is {data[key]!r}, which the split {data.split} does not use; "
                f"take config.data.split=global_time, or leave {key} out"
            )
    if data.windows_per_user is not None and train.objective != "every_position":
        yield (
            f"config.data.windows_per_user is {data.windows_per_user}, which the objective "
            f"{train.objective} does not use; take config.train.objective=every_position, or "
            "leave windows_per_user out"
        )
    if data.shuffle_ties and train.objective != "every_position":
        yield (
            "config.data.shuffle_ties is True, which the objective "
            f"{train.objective} does not use; take config.train.objective=every_position, or "
            "leave shuffle_ties out"
        )
    if data.shuffle_ties and data.placement == "device":
        yield (
            "config.data.shuffle_ties is True, and config.data.placement is 'device', where the "
            "events have the order of the dataset; take config.data.placement=host"
        )
    if train.init_optimizer != "carry" and train.init_from is None:
        yield (
            f"config.train.init_optimizer is {train.init_optimizer!r}, which a training from "
            "random weights does not use; name a run with --init-from, or leave it out"
        )
    if train.objective == "every_position" and not model.causal:
        encoding = config.model.get("time_encoding")
        name, remedy = model.__name__, "take another model or objective"
        if encoding:
            name = f"{config.model.name} with time encoding {encoding}"
            remedy = "take config.model.time_encoding=causal, or another model or objective"
        yield (
            f"config.train.objective is 'every_position', which needs a causal model, but {name} "
            f"looks ahead; {remedy}"
        )
    if train.objective == "every_position" and data.convention != "exact":
        yield (
            "config.data.convention is 'recbole', but packed rows have exact gaps; leave it out, "
            "or take config.train.objective=prefix"
        )
    if (train.objective == "cloze") != (model.default_objective == "cloze"):
        yield (
            f"config.train.objective is {train.objective!r}, and the model {config.model.name} is "
            f"trained with {model.default_objective}; cloze is for models that fill masks only"
        )
    if config.model.date_bias_knots and train.objective == "cloze":
        yield (
            f"config.model.date_bias_knots is {config.model.date_bias_knots}, and the objective is "
            "cloze, which predicts items of any date; take config.model.date_bias_knots=0"
        )
    if config.model.repeat_bias and (train.loss not in LOSSES or train.objective == "cloze"):
        yield (
            "config.model.repeat_bias is True, which needs a loss of this package and another "
            f"objective than cloze, and they are {train.loss} and {train.objective}; change them, "
            "or take config.model.repeat_bias=False"
        )
    if train.item_optimizer != "adam" and train.loss not in SAMPLED_LOSSES:
        yield (
            f"config.train.item_optimizer is {train.item_optimizer!r}, which changes the rows of a "
            f"batch only, and config.train.loss is {train.loss!r}, which has a gradient for every "
            f"row; take one of {', '.join(SAMPLED_LOSSES)}, or item_optimizer=adam"
        )
    if config.eval.valid_steps is not None and config.eval.valid_epochs != 1:
        yield (
            f"config.eval.valid_steps is {config.eval.valid_steps} and config.eval.valid_epochs "
            f"{config.eval.valid_epochs}; set one of them"
        )
    if train.item_optimizer != "adam" and train.init_from is not None:
        yield (
            f"config.train.item_optimizer is {train.item_optimizer!r}, which cannot begin with "
            "another run (--init-from) yet; take item_optimizer=adam"
        )
    if spreads_tables(config) or train.item_optimizer != "adam":
        yield from needs_of_whole_tables(config, model)
    buckets, longest = data.buckets, data.max_length
    if buckets is not None and (min(buckets, default=0) < 1 or max(buckets) != longest):
        yield (
            f"config.data.buckets {buckets} must be positive and the longest {longest}, which is "
            "config.data.max_length"
        )


def needs_of_whole_tables(config: Config, model: Any) -> Iterator[str]:
    """Yields a sentence for each setting that cannot go together with parts of the item table.

    Args:
      config: the settings.
      model: the model, or its class.
    """
    if config.train.loss not in LOSSES:
        yield (
            f"config.train.loss is {config.train.loss!r}, which needs the whole item table, and "
            "config.mesh or several processes spread it over devices; take a loss of this "
            "package, or train in one process without config.mesh"
        )
    if not model.item_rows:
        yield (
            f"config.model.name is {config.model.name!r}, which computes with the whole item "
            "table; take another model, or train in one process without config.mesh and "
            "config.train.item_optimizer"
        )


def spreads_tables(config: Config) -> bool:
    """Whether the devices of a run have parts of the item table, instead of all of it."""
    return (config.mesh.data or 1) * config.mesh.catalogue > 1


def setting_help(config: Config) -> dict[str, str]:
    """One line about each setting, by its full name; those of the model are its docstring's."""
    from tim4rec_jax.models import find_model

    lines = {name: setting.help for name, setting in SETTINGS.items()}
    lines["model.name"] = "which model; `configs/FILE.py:NAME` chooses it with its settings"
    for parent in reversed(find_model(config.model.name).Settings.__mro__):
        # Python 3.13 removes the indentation itself.
        described = inspect.cleandoc(parent.__doc__ or "")
        for section in re.split(r"\n(?:Attributes|Raises):\n", described)[1:2]:
            for name, text in re.findall(r"^ {2}(\w+): ((?:.|\n {4})*)", section, re.MULTILINE):
                lines[f"model.{name}"] = " ".join(text.split())
    return lines


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """The settings by their full names: `{"model.hidden_size": 64, ...}`."""
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict | dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _place(config: Config, name: str) -> tuple[Any, str]:
    """The section that holds a setting, and the setting's key there."""
    group, _, key = name.rpartition(".")
    return (config[group] if group else config), key
