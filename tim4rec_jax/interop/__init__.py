"""Models trained with the published PyTorch code, and back.

`from_torch` and `to_torch` convert weights; `python -m tim4rec_jax.interop CHECKPOINT.pth
--workdir DIR` turns a file RecBole's trainer wrote into a run that `eval.py` evaluates.
"""

from tim4rec_jax.interop.torch_file import read_checkpoint
from tim4rec_jax.interop.weights import from_torch, to_torch

__all__ = ["from_torch", "read_checkpoint", "to_torch"]
