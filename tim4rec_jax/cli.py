"""The command line of `train.py`: absl flags over an ml_collections config file."""

import difflib
import re
import runpy
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from tim4rec_jax.config import Config, flatten
from tim4rec_jax.errors import UserError


def parse(argv: list[str], usage: str) -> tuple[Config, str]:
    """Reads `--config FILE[:VARIANT] [--config.KEY=VALUE ...] --workdir DIR`.

    Args:
      argv: the command line (`sys.argv`), the program first.
      usage: printed for `--help`, which ends the program.

    Returns:
      The settings, locked, and the run directory.

    Raises:
      UserError: a flag, a key, a value or the file is wrong.
    """
    if {"-h", "--help", "-help"} & set(argv):
        print(usage.strip())
        raise SystemExit
    files, settings = flags.FlagValues(), flags.FlagValues()
    files.set_gnu_getopt(True)
    file = flags.DEFINE_string("config", None, "settings", flag_values=files)
    workdir = flags.DEFINE_string("workdir", None, "run directory", flag_values=files)
    try:
        argv = files(argv, known_only=True)
        loaded = _load(file.value)
        _check_keys(argv, loaded)
        config = config_flags.DEFINE_config_dict(
            "config", loaded, lock_config=True, flag_values=settings, sys_argv=argv
        )
        rest = settings(argv)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        # ml_collections wraps some messages in a tuple.
        message = re.sub(r"\('(.*?)', '.*'\)$", r"\1", str(error).strip())
        raise UserError(f"{message}; see train.py --help") from error
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; see train.py --help")
    if workdir.value is None:
        raise UserError("--workdir DIR is missing; see train.py --help")
    return config.value, workdir.value


def _load(named: str | None) -> Config:
    """The settings of FILE[:VARIANT] as they stand in the file."""
    if not named:
        raise UserError("--config FILE.py is missing; see train.py --help")
    path, _, variant = named.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config: there is no file {path}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = get_config(variant) if get_config else None
    # The file is the user's: whatever it raises is for the user to put right.
    except Exception as error:
        kind = "" if isinstance(error, ValueError | SyntaxError) else f"{type(error).__name__}: "
        raise UserError(f"--config {named}: {kind}{error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: {path} has no function get_config that returns a ConfigDict")
    return config


def _check_keys(argv: list[str], config: Config) -> None:
    """Refuses a `--config.KEY` that is not a setting, naming those most like it."""
    known = flatten(config)
    for key in re.findall(r"(?:^|\n)--?config\.([\w.]+)", "\n".join(argv)):
        if key in known:
            continue
        # A key whose last word is right is more likely meant than one that merely looks alike.
        last = key.rpartition(".")[2]
        by_last = {name.rpartition(".")[2]: name for name in known}
        near = [by_last[word] for word in difflib.get_close_matches(last, by_last, n=1)]
        near += difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(dict.fromkeys(near))}" if near else ""
        raise UserError(f"config.{key} is not a setting{hint}")
