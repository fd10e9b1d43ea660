"""Configurations by name, and what their variants share.

The files lie in `configs/` of the repository, and an installed package holds them as
`tim4rec_jax/configs/`. `beauty:causal` is the variant `causal` of `beauty.py` there.
"""

import runpy
import sys
from pathlib import Path

from ml_collections import ConfigDict

from tim4rec_jax import config as config_lib
from tim4rec_jax.config import Config
from tim4rec_jax.errors import UserError

FOLDER = Path(__file__).with_name("configs")
# The configuration for data of one's own: its variants need no other name.
OWN = "own"


def load_config(named: str) -> Config:
    """The settings that a configuration gives.

    Args:
      named: FILE.py[:VARIANT], NAME[:VARIANT] for a file of `configs/`, or VARIANT for one of
        `configs/own.py`. The file is executed, and its `get_config(VARIANT)` is called.

    Raises:
      UserError: there is no such file, it is no config file, or it does not know the variant.
    """
    path, variant = find(named)
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config(variant) if get_config else None
    # The file belongs to the user, who can correct whatever it raises.
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, ValueError | SyntaxError) else f"{type(error).__name__}: "
        raise UserError(f"--config {named}: {kind}{' '.join(str(error).split())}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: {path} has no function get_config that returns a ConfigDict")
    values: Config = config
    config = ConfigDict(values)  # one of its own, which is not frozen
    for note in config_lib.rename_settings(config):
        print(f"note: {path}: {note}", file=sys.stderr)
    try:
        config_lib.check_complete(config)
    except UserError as error:
        raise UserError(f"--config {named}: {error}") from None
    config.preset = f"{path.stem}:{variant}".removesuffix(":")
    return config


def find(named: str) -> tuple[Path, str]:
    """The file and the variant that the name of a configuration means; see `load_config`.

    Raises:
      UserError: there is no such file.
    """
    path, _, variant = named.partition(":")
    if Path(path).is_file():
        return Path(path), variant
    if path in names():
        return FOLDER / f"{path}.py", variant
    from tim4rec_jax.models import DEFAULT_MODEL

    own = ("causal", "official", DEFAULT_MODEL, *baselines())
    if path in own and not variant:
        return FOLDER / f"{OWN}.py", "" if path == DEFAULT_MODEL else path
    raise UserError(
        f"--config: there is no file {path}; by name there are {', '.join(names())}, with variants "
        f"such as beauty:causal, and for your own log {', '.join(own)}"
    )


def names() -> list[str]:
    """The configurations that have a name."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def baselines() -> list[str]:
    """The comparison models. Each is a variant of every configuration: `beauty:sasrec`."""
    from tim4rec_jax.models import DEFAULT_MODEL, MODELS

    return [name for name in MODELS if name != DEFAULT_MODEL]


def check_variant(variant: str, *own: str) -> None:
    """Checks the name of a variant.

    Args:
      variant: the name; "" is the experiment itself.
      own: the variants of the experiment besides the comparison models.

    Raises:
      ValueError: there is no such variant; the message lists those there are.
    """
    known = (*own, *baselines())
    if variant not in ("", *known):
        raise ValueError(f"{variant!r} is not a variant; there are: {', '.join(known)}")


def use_baseline(config: Config, variant: str) -> None:
    """Replaces the model by the comparison model of that name, if it is one.

    The model's settings, its objective and its patience (10 epochs; 20 for Mamba4Rec) become those
    of TiM4Rec's comparison, which stand with the model in `tim4rec_jax/models/`. Data, optimiser
    and batches stay those of the experiment.

    Args:
      config: changed in place.
      variant: the name of a comparison model; another variant changes nothing.
    """
    if variant in baselines():
        config_lib.use_model(config, variant)
