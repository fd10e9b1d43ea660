"""What a search of settings may try: ranges as a user writes them, and a default for each model."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from tim4rec_jax import checks
from tim4rec_jax.cli import unknown_setting
from tim4rec_jax.config import SETTINGS, Config, Setting, flatten
from tim4rec_jax.errors import UserError, first_line
from tim4rec_jax.files import read_regular
from tim4rec_jax.models import find_model

Space = dict[str, BaseDistribution]

# The same knobs for every model, whatever its publication calls them. A model is searched over
# those of these settings that it has.
DEFAULT = {
    "train.learning_rate": "log:3e-4:1e-2",
    "train.weight_decay": "0,1e-6,1e-5,1e-4",
    "model.hidden_size": "32,64,128",
    "model.num_layers": "1,2,3",
    "model.n_layers": "1,2,3",
    "model.dropout_prob": "0.1:0.6",
    "model.hidden_dropout_prob": "0.1:0.6",
    "model.attn_dropout_prob": "0.0:0.5",
    "model.embedding_size": "32,64,128",
}
# Settings that decide what is validated: figures of trials could not be compared.
_FIXED = ("dataset", "prepare", "preset", "seed", "model.name", "train.loggers")
_LARGEST_FILE = 1 << 20  # bytes


def default_space(config: Config, words: Sequence[str] = ()) -> dict[str, str]:
    """The ranges that suit the model of a configuration, as a user would write them.

    Args:
      config: the settings that the search begins with.
      words: a command line; what it gives as `--config.NAME=VALUE` is left alone.

    Returns:
      Ranges by full names of settings. It is empty for a model that learns nothing.
    """
    if find_model(config.model.name).needs_item_counts:
        return {}
    given = {word.partition("=")[0] for word in words}
    known = [name for name in flatten(config) if f"--config.{name}" not in given]
    return {name: DEFAULT[name] for name in DEFAULT if name in known}


def read_space(path: Path) -> dict[str, str]:
    """The ranges in a YAML file: `train.learning_rate: log:1e-4:1e-2`, `model.n_layers: [1, 2]`.

    Raises:
      UserError: the file is missing, no YAML, or holds something else.
    """
    try:
        values = yaml.safe_load(read_regular(path, _LARGEST_FILE))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no YAML file ({first_line(error)})") from error
    if not isinstance(values, Mapping) or not values:
        raise UserError(f"{path} must hold lines such as `train.learning_rate: log:1e-4:1e-2`")
    return {
        str(name): ",".join(map(str, words)) if isinstance(words, list) else str(words)
        for name, words in values.items()
    }


def make_space(ranges: Mapping[str, str], config: Config) -> Space:
    """What each setting may be in a trial.

    Args:
      ranges: by full names of settings: `LOW:HIGH`, `log:LOW:HIGH` or `VALUE,VALUE,...`.
      config: the settings that the search begins with, resolved.

    Raises:
      UserError: a setting is not known or cannot be searched, or its range is wrong.
    """
    known, space = flatten(config), {}
    for name, words in ranges.items():
        if name not in known:
            raise unknown_setting(name, known)
        if name in _FIXED or name.startswith("eval.") or name in ("data.split", "data.buckets"):
            raise UserError(f"{name} cannot be searched: it does not belong to the model")
        if name in ("data.valid_from", "data.test_from"):
            raise UserError(f"{name} cannot be searched: it says what is validated")
        try:
            space[name] = _distribution(words, _setting(name, config))
        except ValueError as error:
            raise UserError(f"{name} {error}") from None
    return space


def _setting(name: str, config: Config) -> Setting:
    """The definition of a setting: its type, and what its values must be."""
    if name in SETTINGS:
        return SETTINGS[name]
    fields = dataclasses.fields(find_model(config.model.name).Settings)
    field = next(field for field in fields if f"model.{field.name}" == name)
    numbers = checks.POSITIVE if type(field.default) in (int, float) else None
    return Setting(field.default, "", field.metadata.get("check", numbers))


def _distribution(words: str, setting: Setting) -> BaseDistribution:
    """The range of a setting.

    Raises:
      ValueError: the range is wrong; the message follows the name of the setting.
    """
    log = words.startswith("log:")
    ends = words.removeprefix("log:").split(":")
    if setting.kind in (int, float) and "," not in words and len(ends) == 2:
        low, high = (_value(end, setting, words) for end in ends)
        if not low < high:
            raise ValueError(f"has the range {words!r}; the lower end must come first")
        if log and low <= 0:
            raise ValueError(f"has the range {words!r}; one with log: must begin above 0")
        kind = IntDistribution if setting.kind is int else FloatDistribution
        return kind(low, high, log=log)
    words_of_values = words.split(",")
    values = []
    if not log and len(words_of_values) > 1:
        values = [_value(word, setting, words) for word in words_of_values]
    if not values or len(set(values)) < len(values):
        raise ValueError(f"has the range {words!r}; write LOW:HIGH, log:LOW:HIGH or A,B,C")
    return CategoricalDistribution(values)


def _value(word: str, setting: Setting, words: str) -> Any:
    """A value as the setting's type, which the setting can have."""
    word = word.strip()
    value: Any = word
    try:
        if setting.kind is bool:
            value = {"true": True, "false": False}.get(word.lower(), word)
        elif setting.kind in (int, float):
            value = setting.kind(word)
    except ValueError:
        kind = "whole number" if setting.kind is int else "number"
        raise ValueError(f"has the range {words!r}, and {word!r} is no {kind}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"has the range {words!r}; its numbers must be finite")
    return setting.checked(value)
