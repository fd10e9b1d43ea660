"""Compares models in a clone of the repository; the code is in `tim4rec_jax.commands.compare`."""

import sys

from tim4rec_jax.commands.compare import main
from tim4rec_jax.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
