"""Training of a model: objective, step, loop, checkpoints, log."""
