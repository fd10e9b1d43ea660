"""The command line of `train.py`: absl flags over an ml_collections config file."""

import difflib
import re

from absl import flags
from ml_collections import ConfigDict, config_flags

from tim4rec_jax.config import flatten
from tim4rec_jax.errors import UserError


def parse(argv: list[str], usage: str) -> tuple[ConfigDict, str]:
    """Reads `--config FILE[:VARIANT] [--config.KEY=VALUE ...] --workdir DIR`.

    Args:
      argv: the command line, the program first.
      usage: printed for `--help`, which ends the program.

    Returns:
      The settings, locked, and the run directory.

    Raises:
      UserError: a flag, a key, a value or the file is wrong.
    """
    if {"-h", "--help", "-help"} & set(argv):
        print(usage.strip())
        raise SystemExit
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    workdir = flags.DEFINE_string("workdir", None, "run directory", flag_values=values)
    try:
        rest = values(argv)[1:]
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_key(argv)) from error
    except FileNotFoundError as error:
        raise UserError(f"--config: there is no file {_config_file(argv)}") from error
    except flags.Error as error:
        message = re.sub(r"\('(.*?)', '.*'\)$", r"\1", str(error))
        raise UserError(f"{message}; see train.py --help") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"--config: {error}") from error
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; see train.py --help")
    if config.value is None or workdir.value is None:
        missing = "--config FILE.py" if config.value is None else "--workdir DIR"
        raise UserError(f"{missing} is missing; see train.py --help")
    return config.value, workdir.value


def _config_file(argv: list[str]) -> str:
    """The value of --config, without its variant."""
    text = " ".join(argv)
    found = re.search(r"--?config[= ](\S+?)(:\S*)?(\s|$)", text)
    return found.group(1) if found else "(none named)"


def _unknown_key(argv: list[str]) -> str:
    """Names the first --config.KEY that is not a setting, and those most like it."""
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    keys = re.findall(r"--?config\.([\w.]+)", " ".join(argv))
    values([arg for arg in argv if not re.match(r"--?config\.", arg)], known_only=True)
    known = flatten(config.value)
    unknown = next((key for key in keys if key not in known), "")
    near = difflib.get_close_matches(unknown, known, n=3, cutoff=0.4)
    # A key whose last word is right is more likely meant than one that merely looks alike.
    last = unknown.rpartition(".")[2]
    near = [key for key in known if key.rpartition(".")[2] == last] + near
    return f"config.{unknown} is not a setting; nearest: {', '.join(dict.fromkeys(near))}"
