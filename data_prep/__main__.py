"""`python -m data_prep`: the command line of `tim4rec_jax.data_prep`."""

import sys

from tim4rec_jax.data_prep.__main__ import main
from tim4rec_jax.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
