"""The command line of `train.py`: a config file, changes to single settings, a run directory."""

import difflib
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Iterable
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from tim4rec_jax import config as config_lib
from tim4rec_jax.config import Config
from tim4rec_jax.errors import UsageError, UserError
from tim4rec_jax.presets import load_config


def main(argv: list[str], usage: str) -> None:
    """Runs `train.py`; the arguments are those of `parse`.

    Raises:
      UserError: what the user can correct.
    """
    config, workdir = parse(argv, usage)
    from tim4rec_jax.training.train import train_and_report

    if threading.current_thread() is threading.main_thread():
        # Before the first step, nothing else would remove what a run has begun to write.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        train_and_report(config, workdir, prepare_data)
    except KeyboardInterrupt as stop:
        begun = (workdir / "log.jsonl").exists()
        where = "the last checkpoint is kept" if begun else "no step has been trained yet"
        print(str(stop) or f"stopped; {where}; run the same command to go on", flush=True)
        print("error: interrupted", file=sys.stderr, flush=True)
        # Nothing can stop a thread that compiles, and Python would wait for it.
        os._exit(130)


def parse(argv: list[str], usage: str) -> tuple[Config, Path]:
    """Reads `--config FILE[:VARIANT] [--config.KEY=VALUE ...] [--workdir DIR] [--print]`.

    Without `--config`, the settings are those of the run in `--workdir`. `--init-from RUN` is short
    for `--config.train.init_from=RUN`.

    `--help` and `--print` print what they are asked for and end the program. Nothing is written.

    Args:
      argv: the command line (`sys.argv`); the program comes first.
      usage: the text that `--help` begins with.

    Returns:
      The settings, resolved and locked, and the run directory.

    Raises:
      UserError: a flag, a setting, a value or the config file is wrong.
    """
    if {"-h", "--help", "-help"} & set(argv):
        _print_help(usage)
        raise SystemExit
    argv = _with_new_names(_with_init_from(argv))
    files, settings = flags.FlagValues(), flags.FlagValues()
    files.set_gnu_getopt(True)
    file = flags.DEFINE_string("config", None, "settings", flag_values=files)
    workdir = flags.DEFINE_string("workdir", None, "run directory", flag_values=files)
    only_print = flags.DEFINE_bool("print", False, "print the settings", flag_values=files)
    try:
        argv = files(argv, known_only=True)
        loaded = _load(file.value, workdir.value)
        changed = _changed_settings(argv, loaded)
        written = config_lib.flatten(loaded)
        config = config_flags.DEFINE_config_dict(
            "config", loaded, flag_values=settings, sys_argv=argv
        )
        rest = settings(argv)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        # ml_collections wraps some messages in a tuple.
        message = re.sub(r"\('(.*?)', '.*'\)$", r"\1", str(error).strip())
        raise UsageError(f"{message}; see train.py --help") from error
    if rest:
        raise UsageError(f"{rest[0]!r} is not a flag; see train.py --help")
    if workdir.value == "":
        raise UserError("--workdir is empty; name a folder, or leave it out for one in runs/")
    resolved = config_lib.resolve(config.value).lock()
    named: str = file.value or str(Path(workdir.value or "") / "config.json")
    directory = workdir.value or _default_workdir(named, written["seed"], resolved.seed)
    if only_print.value:
        _print_settings(resolved, written, changed, named, directory)
        raise SystemExit
    return resolved, Path(directory)


def _load(named: str | None, workdir: str | None) -> Config:
    """The settings of a config file, or those of the run that is there."""
    if named:
        return load_config(named)
    if not workdir or not (Path(workdir) / "config.json").exists():
        raise UsageError("--config FILE.py is missing; see train.py --help")
    from tim4rec_jax.run import read_settings

    return read_settings(Path(workdir) / "config.json")


def _with_init_from(argv: list[str]) -> list[str]:
    """Writes `--init-from RUN` and `--init-from=RUN` as the setting that they are."""
    words, setting = [], "--config.train.init_from"
    for word in argv:
        flag = re.match(r"--?init[-_]from(=|$)", word)
        words.append(f"{setting}{word[flag.end() - len(flag[1]) :]}" if flag else word)
    return words


def _with_new_names(argv: list[str]) -> list[str]:
    """Replaces older names of settings, and says so."""
    for old, new in config_lib.RENAMED.items():
        pattern = re.compile(rf"^(--?config\.){re.escape(old)}(?==|$)")
        if any(pattern.match(word) for word in argv):
            print(f"note: config.{old} is now called config.{new}", file=sys.stderr)
            argv = [pattern.sub(rf"\g<1>{new}", word) for word in argv]
    return argv


def _changed_settings(argv: list[str], config: Config) -> set[str]:
    """Full names of the settings that the command line changes.

    `--config.model.name` puts the settings of the other model into `config`.

    Raises:
      UserError: a name is not a setting; the message names those most like it.
    """
    changed = dict(re.findall(r"(?:^|\n)--?config\.([\w.]+)(?:[=\n](.*))?", "\n".join(argv)))
    if changed.get("model.name", config.model.name) != config.model.name:
        try:
            config_lib.use_model(config, changed["model.name"])
        except ValueError as error:
            raise UserError(f"config.model.{error}") from error
    known = config_lib.flatten(config)
    for key in changed:
        if key not in known:
            raise unknown_setting(f"config.{key}", known)
    return set(changed)


def unknown_setting(name: str, known: Iterable[str]) -> UserError:
    """The error that a setting is not known, with those most like it.

    Args:
      name: as the user wrote it, with or without "config." before it.
      known: full names of the settings there are.
    """
    key, known = name.removeprefix("config."), tuple(known)
    # A name whose last word is right is more likely meant than one that looks alike.
    last = key.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in known}
    near = [by_last[word] for word in difflib.get_close_matches(last, by_last, n=1)]
    near += difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(dict.fromkeys(near))}" if near else ""
    return UserError(f"{name} is not a setting{hint}")


def _default_workdir(named: str, seed_of_file: int, seed: int) -> str:
    """`runs/CONFIG[-VARIANT][-seedN]`."""
    path, _, variant = named.partition(":")
    name = Path(path).stem + (f"-{variant}" if variant else "")
    return f"runs/{name}" + (f"-seed{seed}" if seed != seed_of_file else "")


def prepare_data(config: Config) -> None:
    """Prepares the dataset of a run if it is not there, with the command `config.prepare`.

    Args:
      config: the settings.

    Raises:
      UserError: the dataset cannot be prepared, or `config.prepare` makes another one.
    """
    if (Path(config.dataset) / "dataset.json").exists():
        return
    command = shlex.split(config.prepare)
    if command[:3] != ["python", "-m", "data_prep"] or command[-2:] != ["--out", config.dataset]:
        remedy = config.prepare or f"python -m data_prep NAME --out {config.dataset}"
        if command[-2:-1] == ["--out"]:  # of which another folder would not help
            remedy = shlex.join([*command[:-1], config.dataset])
        raise UserError(
            f"{config.dataset} is not a prepared dataset; correct --config.dataset, or prepare it "
            f"with `{remedy}`"
        )
    from tim4rec_jax.data_prep.__main__ import main as prepare

    print(f"{config.dataset} is not there yet; preparing it with `{config.prepare}`", flush=True)
    prepare(command[3:])


def _print_help(usage: str) -> None:
    """Prints each setting with its default. The model's need JAX, so they come last."""
    print(usage.strip())
    print("\nsettings of a run, with their defaults, which a config file changes:")
    for name, setting in config_lib.SETTINGS.items():
        _print_setting(name, None if setting.optional else setting.default, setting.help)
    sys.stdout.flush()
    config = config_lib.default()
    print(f"\nsettings of the model {config.model.name}; others: --config FILE.py:NAME --print")
    lines = config_lib.setting_help(config)
    for key, value in config.model.items():
        _print_setting(f"model.{key}", value, lines[f"model.{key}"])


def _print_setting(name: str, value: object, line: str) -> None:
    indent, width = " " * 40, max(80, shutil.get_terminal_size().columns)
    left = f"  {name} = {value!r}"
    gap = "\n" + indent if len(left) >= len(indent) else " " * (len(indent) - len(left))
    text = textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent)
    print(left + gap + text[len(indent) :])


def _print_settings(
    config: Config, written: dict, changed: set[str], named: str, workdir: str
) -> None:
    """Prints each setting with its value and the place that the value comes from."""
    default = config_lib.default()
    config_lib.use_model(default, config.model.name)
    in_code = config_lib.flatten(default)
    section = ""
    for name, value in _in_order(config).items():
        if name in changed:
            source = "command line"
        elif value != written[name]:
            source = "follows from other settings"
        else:
            source = "default" if value == in_code[name] else named.partition(":")[0]
        group, _, key = name.rpartition(".")
        if group != section:
            section = group
            print(f"\n{section}")
        print(f"{'  ' if group else ''}{key:<22}{value!s:<30} {source}".rstrip())
    print(f"\nthe data is prepared with: {config.prepare}")
    print(f"the run directory is:      {workdir}")


def _in_order(config: Config) -> dict:
    """All settings: those of the run as in the table of settings, then those of the model."""
    flat = config_lib.flatten(config)
    names = [*config_lib.SETTINGS, *(name for name in flat if name not in config_lib.SETTINGS)]
    return {name: flat[name] for name in names}
