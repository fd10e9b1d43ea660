"""Trains a model: python train.py --config configs/quickstart.py --workdir runs/quickstart.

--config FILE.py[:VARIANT]   the settings; the file is Python, and it is executed
--config.KEY=VALUE           changes one setting, for example --config.train.epochs=10
--workdir DIR                the run directory; default: runs/FILE[-VARIANT][-seedN]
--print                      prints the settings and where each comes from, and ends

Data that is not there is prepared first. The run directory keeps settings, log, TensorBoard
events, checkpoints and, at the end, metrics.json. The same command again goes on with a training
that was stopped.
"""

import sys

from tim4rec_jax.errors import run_main


def main() -> None:
    """Runs the command line."""
    # Without JAX, so that `--help` begins at once.
    from tim4rec_jax import cli

    cli.main(sys.argv, usage=__doc__ or "")


if __name__ == "__main__":
    sys.exit(run_main(main))
