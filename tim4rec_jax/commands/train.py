"""Trains a model: python train.py --config configs/quickstart.py --workdir runs/quickstart.

--config FILE.py[:VARIANT]   the settings; the file is Python, and it is executed. A name is a file
                             of configs/ (beauty:causal), or a variant for your own log (causal)
--config.KEY=VALUE           changes one setting, for example --config.train.epochs=10
--workdir DIR                the run directory; default: runs/FILE[-VARIANT][-seedN]
--init-from RUN              begins with what another run has learnt; items are matched by their ids
--print                      prints the settings and where each comes from, and ends

Data that is not there is prepared first. The run directory keeps settings, log, TensorBoard
events, checkpoints and, at the end, metrics.json. The same command again goes on with a training
that was stopped, and so does --workdir alone. With more --config.train.epochs, a finished training
goes on too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command line, or the given words."""
    # Without JAX, so that `--help` begins at once.
    from tim4rec_jax import cli

    words = sys.argv[1:] if words is None else words
    cli.main(["train.py", *words], usage=__doc__ or "")
