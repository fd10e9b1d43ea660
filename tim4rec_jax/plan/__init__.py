"""What a training costs before it is started: `python -m tim4rec_jax.plan --help`.

`formulas` has the formulas, which docs/plan.md explains. `program` counts what a traced training
step computes and holds. `devices` has the figures of the vendors.
"""
