"""What `train.py`, `eval.py` and the command `tim4rec` run."""
