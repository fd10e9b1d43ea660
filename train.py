"""Trains a model: python train.py --config configs/quickstart.py --workdir runs/quickstart.

--config FILE.py[:VARIANT] names the settings and --config.KEY=VALUE changes one of them
(--config.train.epochs=10). The run directory keeps settings, log, TensorBoard events,
checkpoints and, at the end, metrics.json. The same command again goes on with a training
that was stopped.
"""

import sys
from pathlib import Path

from tim4rec_jax.errors import run_main


def main() -> None:
    """Runs the command line."""
    # Without JAX, which `--help` and a mistyped flag need not wait for.
    from tim4rec_jax.cli import parse

    config, workdir = parse(sys.argv, usage=__doc__ or "")
    from tim4rec_jax.training.train import train_and_report

    train_and_report(config, Path(workdir))


if __name__ == "__main__":
    sys.exit(run_main(main))
