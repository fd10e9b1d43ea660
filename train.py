"""Trains a model: `python train.py --config configs/quickstart.py --workdir runs/quickstart`.

Run the same command again to go on with a training that was stopped.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from tim4rec_jax.errors import UserError, run_main

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "settings: FILE.py or FILE.py:VARIANT; --config.KEY=VALUE changes one"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "run directory, made or gone on with")


def main() -> None:
    """Runs the command line."""
    try:
        flags.FLAGS(sys.argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(str(error).strip()) from error
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise UserError("--config FILE.py and --workdir DIR are needed; see train.py --help")
    # Imports JAX, which `--help` and a mistyped flag need not wait for.
    from tim4rec_jax.training.loop import train

    train(_CONFIG.value, Path(_WORKDIR.value))


if __name__ == "__main__":
    sys.exit(run_main(main))
